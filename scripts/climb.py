"""The climb in one table: SFT -> RL -> back down to short answers, on Countdown and its image twin (k1.5 §2.4, §3.4).

    python scripts/climb.py --workdir=runs/climb
    python scripts/climb.py --workdir=runs/climb --minutes=9
    CUDA_VISIBLE_DEVICES=1 python scripts/climb.py --workdir=runs/climb --only=start-1,short_rl-1 --wait

The same command again goes on: steps that are done are skipped, one that was interrupted resumes. --minutes stops by
Ctrl-C before a limit; leave a minute for what a run is in the middle of. The steps, in this order:

    start-SEED       SFT and RL with --config (configs/climb.py)
    samples-SEED     8 answers of start-SEED to each of 4,000 training problems
    brief-SEED       SFT of start-SEED on all of them that are right, abridged: the same searches in half the tokens
    short_rl-SEED    RL with the length reward and half the room, from the checkpoint of start-SEED or brief-SEED that
                     `select` names: the shortest within 15 points of the best
    shortest         SFT of start-0 on its shortest right answers
    dpo              DPO of start-0: shortest right answers before longer wrong ones and much longer right ones
    merge            the average of start-0 and of a short model, for which shortest stands: two models can be averaged
                     if they are near each other, as one is that was trained on from the other
    merge_shortest   shortest rejection sampling once more, of the merged model
    OBJECTIVE-RATE   mirror_descent, rest, grpo, rloo and reinforce from the SFT of start-0: as many samples each, and
                     the same --rates, as Adam's steps have a size that does not depend on how a loss is scaled
    half             start-0 with the second half of each chain of thought deleted: scripts/controls.py
    table            climb.json, climb.md, climb.png, of all that is there

start-0 is that of the first of --seeds. --only takes names of steps, or what stands before the hyphen (start, short_rl,
grpo), or objectives. Several processes may share a workdir: each step is done by one of them, and with --wait they wait
for what others have to make first. A step that fails is left out, with those that need it. Exit status: 0 done, or
stopped and saved; 2 something that was given is wrong; else that of the first program that failed.
"""

import argparse
import contextlib
import dataclasses
import difflib
import fcntl
import functools
import json
import os
import pathlib
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import _climb_table

SCRIPTS = pathlib.Path(__file__).parent
OBJECTIVES = ("mirror_descent", "rest", "grpo", "rloo", "reinforce")

# What steps change of --config. The rates of SFT and DPO, but for brief, are far below those of the start: they change
# how the model answers and do not teach it anew.
_NO_RL = {"rl.iterations": 0, "sft.eval_every": 400, "sft.optimizer.end": 1e-5, "sft.optimizer.weight_decay": 0.1}
SETTINGS = {
    "sampling": {"n": 8, "limit": 4_000, "max_tokens": 320, "rows": 2_048, "batch": 1_000},  # of scripts/long2short.py
    "shortest": _NO_RL
    | {"data.text_tasks": (), "data.image_tasks": (), "sft.examples_per_kind": 5_000}
    | {"sft.steps": 800, "sft.optimizer.peak": 2e-4},
    "brief": _NO_RL
    | {"data.text_tasks": (), "data.image_tasks": (), "sft.examples_per_kind": 20_000}
    # A new way of writing takes more than a new choice; a rate that ends high leaves something to the RL that follows.
    | {"sft.steps": 1_200, "sft.optimizer.peak": 1e-3, "sft.optimizer.end": 2e-4},
    # Two sides share a row. Without α all answers get unlikely, the sooner the smaller β is (docs/log.md).
    "dpo": _NO_RL
    | {"dpo.beta": 1.0, "dpo.alpha": 300.0, "rows.tokens": 1_024}
    | {"sft.steps": 200, "sft.optimizer.peak": 2e-5, "sft.optimizer.end": 1e-6},
    "short_rl": {"sft.steps": 0, "rl.iterations": 200, "sampling.max_tokens": 160}
    | {"rewards.weights.length": 0.2, "rewards.length_warmup": 0},
    "objectives": {"sft.steps": 0, "rl.iterations": 40, "rl.eval_every": 5},
}


class Stopped(Exception):
    """By Ctrl-C or --minutes."""


class Failed(Exception):
    """args: the exit status of a program, which has said why."""


@dataclasses.dataclass
class Runner:
    """Runs programs of this directory whose products are not there yet."""

    workdir: pathlib.Path
    config: str
    deadline: float | None  # of time.monotonic()
    claim: tuple[int, ...] = ()  # the open file that keeps other processes from the step

    def late(self) -> bool:
        return self.deadline is not None and time.monotonic() >= self.deadline

    def run(self, *command: Any, product: pathlib.Path, keep_stdout: bool = False) -> None:
        """keep_stdout: it is the product. Raises Stopped, Failed."""
        if product.exists():  # a step may be of several programs
            return
        if self.late():
            raise Stopped
        program, *arguments = map(str, command)
        print(f"$ python scripts/{shlex.join([program, *arguments])}", flush=True)
        with _ctrl_c() as pressed:
            command = [sys.executable, str(SCRIPTS / program), *arguments]
            compiled = str(self.workdir.absolute() / "compiled")  # by one program, for all that do the same
            environment = {"JAX_COMPILATION_CACHE_DIR": compiled} | os.environ
            status, out = call(
                command, self.deadline, capture=keep_stdout, keep_open=self.claim, environment=environment
            )
        if keep_stdout and status == 0:
            _write(product, out)
        if pressed:
            raise Stopped
        if product.exists():
            return
        if status == 0 or self.late():
            raise Stopped
        raise Failed(status)

    def train(self, name: str, settings: dict[str, Any]) -> None:
        """A run in WORKDIR/name."""
        flags = [f"--config.{key}={value}" for key, value in settings.items()]
        where = self.workdir / name
        self.run("train.py", f"--config={self.config}", f"--workdir={where}", *flags, product=where / "summary.json")

    def sample(self, kind: str, checkpoint: pathlib.Path, product: pathlib.Path) -> None:
        """kind: shortest, dpo-pairs or abridge."""
        flags = [f"--{name}={value}" for name, value in SETTINGS["sampling"].items()]
        where = [f"--checkpoint={checkpoint}", f"--out={product.parent}"]
        self.run("long2short.py", kind, *where, *flags, product=product)

    def take(self, name: str, step: "Step", failed: Mapping[str, int]) -> int | None:
        """Does a step unless it is done, and returns the exit status; None: it lacks something, or another process does
        it. failed: steps that are not to be waited for, with their exit statuses. Raises Stopped."""
        if step.product.exists():
            print(f"--- {name}: done", flush=True)
            return 0
        if lacks := step.lacks():
            if lacks[0] in failed:
                print(f"--- {name} is left out: {lacks[0]} failed, and there is no {lacks[1]}", flush=True)
            return failed.get(lacks[0])
        with open(self.workdir / f".{name}.lock", "w") as file:
            try:  # it lasts as long as this process and the programs that it runs, whatever ends them
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return None
            print(f"--- {name}", flush=True)
            self.claim = (file.fileno(),)
            try:
                step.run()
            except Failed as failure:
                print(f"--- {name} failed: exit status {failure.args[0]}; see above", file=sys.stderr, flush=True)
                return failure.args[0]
        return 0

    def pause(self) -> None:
        """Before another look at what other processes have made. Raises Stopped."""
        if self.late():
            raise Stopped
        time.sleep(1)


def call(
    command: Sequence[str],
    deadline: float | None,
    *,
    capture: bool,
    keep_open: Sequence[int],
    environment: Mapping[str, str],
) -> tuple[int, str]:
    """(exit status, stdout if it is captured) of a program, which gets SIGINT at the deadline."""
    stdout = subprocess.PIPE if capture else None
    with subprocess.Popen(command, stdout=stdout, text=True, pass_fds=keep_open, env=environment) as process:
        try:
            out, _ = process.communicate(timeout=deadline and max(deadline - time.monotonic(), 0))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)
            out, _ = process.communicate()
    return process.returncode, out or ""


@contextlib.contextmanager
def _ctrl_c() -> Iterator[list[bool]]:
    """Ctrl-C is for the program, which saves. What is yielded is not empty once it was pressed."""
    pressed: list[bool] = []
    previous = signal.signal(signal.SIGINT, lambda *_: pressed.append(True))
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, previous)


def _write(path: pathlib.Path, text: str) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    temporary.replace(path)


# --- steps ------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Step:
    """product: what it makes last; where that is, the step is done. needs: another step, and what of it has to be there
    before."""

    product: pathlib.Path
    needs: tuple[str, pathlib.Path] | None
    run: Callable[[], None]

    def lacks(self) -> tuple[str, pathlib.Path] | None:
        """What it needs, if that is not there yet."""
        return self.needs if self.needs and not self.needs[1].exists() else None


def steps(runner: Runner, seeds: Sequence[int], rates: Sequence[str]) -> dict[str, Step]:
    """All but the table, by name, each after what it needs."""
    run, train, root = runner.run, runner.train, runner.workdir
    summary = lambda name: root / name / "summary.json"  # noqa: E731
    long, samples = root / f"start-{seeds[0]}", root / f"samples-{seeds[0]}"
    abridged = lambda seed: root / f"samples-{seed}" / "abridged.jsonl"  # noqa: E731

    def start(seed: int) -> None:
        train(f"start-{seed}", {"seed": seed})

    def sample(seed: int) -> None:
        runner.sample("abridge", root / f"start-{seed}", abridged(seed))

    def imitate(name: str, start: pathlib.Path, made: pathlib.Path, seed: int, settings: dict[str, Any]) -> None:
        files = {"data.train_file": made, "data.heldout_file": made.with_name("heldout.jsonl")}
        train(name, settings | files | {"init": start, "seed": seed})

    def shortest(name: str, start: pathlib.Path, made: pathlib.Path) -> None:
        runner.sample("shortest", start, made / "examples.jsonl")
        imitate(name, start, made / "examples.jsonl", seeds[0], SETTINGS["shortest"])

    def dpo() -> None:
        pairs = samples / "pairs.jsonl"
        runner.sample("dpo-pairs", long, pairs)  # of the same answers
        train("dpo", SETTINGS["dpo"] | {"dpo.pairs": pairs, "init": long, "seed": seeds[0]})

    def merge() -> None:
        merged = root / "merge"
        sources = [long / "checkpoints" / "rl", root / "shortest" / "checkpoints" / "sft"]
        run("long2short.py", "merge", f"--out={merged}", *sources, product=merged)
        run("long2short.py", "evaluate", merged, product=merged / "evaluations.jsonl")

    def brief(seed: int) -> None:
        imitate(f"brief-{seed}", root / f"start-{seed}", abridged(seed), seed, SETTINGS["brief"])

    def short_rl(seed: int) -> None:
        models = root / f"start-{seed}", root / f"brief-{seed}"
        selected = models[1] / "selected.json"
        flags = [f"--out={models[1] / 'frontier.png'}", "--tolerance=0.15"]
        run("long2short.py", "select", *flags, *models, product=selected, keep_stdout=True)
        init = json.loads(selected.read_text())["init"]
        train(f"short_rl-{seed}", SETTINGS["short_rl"] | {"init": init, "seed": seed})

    def objective(name: str, rate: str) -> None:
        own = {"rl.objective": name, "rl.optimizer.peak": rate, "init": long / "checkpoints" / "sft", "seed": seeds[0]}
        begun = root / f"{name}-{rate}" / "eval_sft.json"  # would be measured again, to the same end
        begun.parent.mkdir(exist_ok=True)
        _write(begun, (long / begun.name).read_text())
        train(f"{name}-{rate}", SETTINGS["objectives"] | own)

    part, found = functools.partial, dict[str, Step]()

    def add(name: str, do: Callable[[], None], *, after: str = "", product: pathlib.Path | None = None) -> None:
        found[name] = Step(product or summary(name), (after, found[after].product) if after else None, do)

    for seed in seeds:
        add(f"start-{seed}", part(start, seed))
    for seed in seeds:
        add(f"samples-{seed}", part(sample, seed), after=f"start-{seed}", product=abridged(seed))
        add(f"brief-{seed}", part(brief, seed), after=f"samples-{seed}")
        add(f"short_rl-{seed}", part(short_rl, seed), after=f"brief-{seed}")
    add("shortest", part(shortest, "shortest", long, samples), after=samples.name)
    add("dpo", dpo, after=samples.name)
    add("merge", merge, after="shortest", product=root / "merge" / "evaluations.jsonl")
    add("merge_shortest", part(shortest, "merge_shortest", root / "merge", root / "merge_samples"), after="merge")
    for rate in rates:
        for name in OBJECTIVES:  # which begin when SFT has ended
            own = f"{name}-{rate}"
            found[own] = Step(summary(own), (long.name, long / "eval_sft.json"), part(objective, name, rate))
    half = part(run, "controls.py", f"--workdir={long}", "half", product=long / "half.json")
    add("half", half, after=long.name, product=long / "half.json")
    return found


def chosen(only: Sequence[str], names: Sequence[str]) -> list[str]:
    """The steps that --only names, in its order; all if it names none. Raises ValueError for other names."""
    found: dict[str, None] = {}
    for name in only:
        groups = OBJECTIVES if name == "objectives" else (name,)
        members = [step for step in names if any(step == g or step.startswith(f"{g}-") for g in groups)]
        if not members:
            near = difflib.get_close_matches(name, names, n=1, cutoff=0.0)[0]
            raise ValueError(f"--only={name} is no step. Did you mean {near}? There are: {', '.join(names)}.")
        found |= dict.fromkeys(members)
    return list(found if only else names)


def climb(args: argparse.Namespace) -> int:
    """Does the steps, always the first that can be done now. Returns the exit status. Raises ValueError."""
    deadline = time.monotonic() + 60 * args.minutes if args.minutes else None
    runner = Runner(args.workdir, args.config, deadline)
    found = steps(runner, args.seeds, args.rates)
    names = chosen(args.only, [*found, "table"])
    args.workdir.mkdir(parents=True, exist_ok=True)
    left, failed, told = [name for name in names if name != "table"], {}, ""
    try:
        while left:
            for name in left:
                status = runner.take(name, found[name], failed)
                if status is not None:
                    break
            else:
                lacks = {name: found[name].lacks() for name in left}
                why = ", ".join(f"{n} needs {x[1]}" if x else f"another process does {n}" for n, x in lacks.items())
                if not args.wait:
                    raise ValueError(f"{why}: take the steps before it first, or give --wait.")
                if why != told:
                    print(f"waiting: {why}", flush=True)
                told = why
                runner.pause()
                continue
            left.remove(name)
            failed |= {name: status} if status else {}
    except (Stopped, KeyboardInterrupt):
        print(f"Left are {', '.join(left)}.\nStopped. The same command goes on from here.")
    else:
        if "table" in names:
            missing = [name for name, step in found.items() if not step.product.exists()]
            print(_climb_table.write(args.workdir, args.seeds, args.rates, OBJECTIVES, missing))
    return next(iter(failed.values()), 0)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    listed = lambda text: text.split(",")  # noqa: E731
    parser.add_argument("--workdir", type=pathlib.Path, required=True, help="every run gets a directory in here")
    parser.add_argument("--config", default="configs/climb.py", help="of all runs (default: configs/climb.py)")
    parser.add_argument("--only", type=listed, default=[], metavar="STEP,...", help="default: all")
    parser.add_argument("--seeds", type=lambda text: [int(seed) for seed in text.split(",")], default=[0, 1, 2])
    parser.add_argument("--rates", type=listed, default=["1e-4", "2e-4", "4e-4"], help="of each objective, at its peak")
    parser.add_argument("--minutes", type=float, help="stop after so long")
    parser.add_argument("--wait", action="store_true", help="for what other processes have to make")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    try:
        return climb(args)
    except (ValueError, OSError) as error:
        print(f"Error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
