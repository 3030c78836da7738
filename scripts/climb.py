"""The climb in one table: SFT -> RL -> back down to short answers, on Countdown and its image twin (k1.5 §2.4, §3.4).

    python scripts/climb.py --workdir=runs/climb
    python scripts/climb.py --workdir=runs/climb --minutes=9
    CUDA_VISIBLE_DEVICES=1 python scripts/climb.py --workdir=runs/climb --only=start-1,short_rl-1 --wait

The same command again goes on: steps that are done are skipped, one that was interrupted resumes. --minutes stops by
Ctrl-C before a limit; leave a minute for what a run is in the middle of. The steps, in this order:

    start-SEED       SFT and RL with --config (configs/climb.py)
    samples          8 answers of start-0 to each of 6,000 training problems; what follows from them:
    shortest         SFT of start-0 on the shortest right answers
    dpo              DPO of start-0: shortest right answers before longer wrong ones and much longer right ones
    merge            the average of start-0 and of a short model, for which shortest stands: two models can be averaged
                     if they are near each other, as one is that was trained on from the other
    merge_shortest   shortest rejection sampling once more, of the merged model
    short_rl-SEED    RL of start-SEED with the length reward and half the room, from the checkpoint that `select` names
    OBJECTIVE-RATE   mirror_descent, rest, grpo, rloo and reinforce from the SFT of start-0: as many samples each, and
                     the same --rates, as Adam's steps have a size that does not depend on how a loss is scaled
    half             start-0 with the second half of each chain of thought deleted: scripts/controls.py
    table            climb.json, climb.md, climb.png, of all that is there

start-0 is that of the first of --seeds. --only takes names of steps, or what stands before the hyphen (start, short_rl,
grpo), or objectives; with --wait, steps wait for what other processes have to make first. Let no two processes do one
step at the same time. Exit status: 0 done, or stopped and saved; 2 something that was given is wrong; else that of the
program that failed.
"""

import argparse
import contextlib
import dataclasses
import difflib
import functools
import json
import pathlib
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import _climb_table

SCRIPTS = pathlib.Path(__file__).parent
OBJECTIVES = ("mirror_descent", "rest", "grpo", "rloo", "reinforce")

# What steps change of --config. The rates of SFT and DPO are far below those of the start: they are to change how the
# model answers, not to teach it anew.
_NO_RL = {"rl.iterations": 0, "sft.eval_every": 400, "sft.optimizer.end": 1e-5, "sft.optimizer.weight_decay": 0.1}
SETTINGS = {
    "sampling": {"n": 8, "limit": 6_000, "max_tokens": 320, "rows": 2_048, "batch": 1_000},  # of scripts/long2short.py
    "shortest": _NO_RL
    | {"data.text_tasks": (), "data.image_tasks": (), "sft.examples_per_kind": 5_000}
    | {"sft.steps": 800, "sft.optimizer.peak": 2e-4},
    "dpo": _NO_RL | {"sft.steps": 400, "sft.optimizer.peak": 5e-5, "rows.tokens": 1_024},  # two sides share a row
    "short_rl": {"sft.steps": 0, "sampling.max_tokens": 160}
    | {"rewards.weights.length": 0.5, "rewards.length_warmup": 0},
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
            status, out = call([sys.executable, str(SCRIPTS / program), *arguments], self.deadline, capture=keep_stdout)
        if keep_stdout and status == 0:
            _write(product, out)
        if product.exists():
            return
        if status == 0 or pressed or self.late():
            raise Stopped
        raise Failed(status)

    def train(self, name: str, settings: dict[str, Any]) -> None:
        """A run in WORKDIR/name."""
        flags = [f"--config.{key}={value}" for key, value in settings.items()]
        where = self.workdir / name
        self.run("train.py", f"--config={self.config}", f"--workdir={where}", *flags, product=where / "summary.json")

    def sample(self, kind: str, checkpoint: pathlib.Path, product: pathlib.Path) -> None:
        """kind: shortest or dpo-pairs."""
        flags = [f"--{name}={value}" for name, value in SETTINGS["sampling"].items()]
        where = [f"--checkpoint={checkpoint}", f"--out={product.parent}"]
        self.run("long2short.py", kind, *where, *flags, product=product)

    def wait_for(self, product: pathlib.Path) -> None:
        """Until another process has made it. Raises Stopped."""
        print(f"waiting for {product}", flush=True)
        while not product.exists():
            if self.late():
                raise Stopped
            time.sleep(1)


def call(command: list[str], deadline: float | None, *, capture: bool) -> tuple[int, str]:
    """(exit status, stdout if it is captured) of a program, which gets SIGINT at the deadline."""
    with subprocess.Popen(command, stdout=subprocess.PIPE if capture else None, text=True) as process:
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
    """product: what it makes last; where that is, the step is done. needs: what has to be there before."""

    product: pathlib.Path
    needs: pathlib.Path | None
    run: Callable[[], None]


def steps(runner: Runner, seeds: Sequence[int], rates: Sequence[str]) -> dict[str, Step]:
    """All but the table, by name, each after what it needs."""
    run, train, root = runner.run, runner.train, runner.workdir
    summary = lambda name: root / name / "summary.json"  # noqa: E731
    long, samples = root / f"start-{seeds[0]}", root / "samples"
    done, pairs = summary(long.name), samples / "pairs.jsonl"

    def start(seed: int) -> None:
        train(f"start-{seed}", {"seed": seed})

    def sample() -> None:
        runner.sample("shortest", long, samples / "examples.jsonl")
        runner.sample("dpo-pairs", long, pairs)  # of the same answers

    def imitate(name: str, start: pathlib.Path, made: pathlib.Path) -> None:
        files = {"data.train_file": made / "examples.jsonl", "data.heldout_file": made / "heldout.jsonl"}
        train(name, SETTINGS["shortest"] | files | {"init": start, "seed": seeds[0]})

    def dpo() -> None:
        train("dpo", SETTINGS["dpo"] | {"dpo.pairs": pairs, "init": long, "seed": seeds[0]})

    def merge() -> None:
        merged = root / "merge"
        sources = [long / "checkpoints" / "rl", root / "shortest" / "checkpoints" / "sft"]
        run("long2short.py", "merge", f"--out={merged}", *sources, product=merged)
        run("long2short.py", "evaluate", merged, product=merged / "evaluations.jsonl")

    def merge_shortest() -> None:
        own = root / "merge_samples"
        runner.sample("shortest", root / "merge", own / "examples.jsonl")
        imitate("merge_shortest", root / "merge", own)

    def short_rl(seed: int) -> None:
        begun, selected = root / f"start-{seed}", root / f"start-{seed}" / "selected.json"
        frontier = f"--out={begun / 'frontier.png'}"
        run("long2short.py", "select", frontier, begun, product=selected, keep_stdout=True)
        init = json.loads(selected.read_text())["init"]
        train(f"short_rl-{seed}", SETTINGS["short_rl"] | {"init": init, "seed": seed})

    def objective(name: str, rate: str) -> None:
        own = {"rl.objective": name, "rl.optimizer.peak": rate, "init": long / "checkpoints" / "sft", "seed": seeds[0]}
        train(f"{name}-{rate}", SETTINGS["objectives"] | own)

    part = functools.partial
    found = {f"start-{seed}": Step(summary(f"start-{seed}"), None, part(start, seed)) for seed in seeds}
    found["samples"] = Step(pairs, done, sample)
    found["shortest"] = Step(summary("shortest"), pairs, part(imitate, "shortest", long, samples))
    found["dpo"] = Step(summary("dpo"), pairs, dpo)
    found["merge"] = Step(root / "merge" / "evaluations.jsonl", summary("shortest"), merge)
    found["merge_shortest"] = Step(summary("merge_shortest"), found["merge"].product, merge_shortest)
    for seed in seeds:
        found[f"short_rl-{seed}"] = Step(summary(f"short_rl-{seed}"), summary(f"start-{seed}"), part(short_rl, seed))
    for rate in rates:
        for name in OBJECTIVES:  # which begin when SFT has ended
            own = f"{name}-{rate}"
            found[own] = Step(summary(own), long / "eval_sft.json", part(objective, name, rate))
    half = part(run, "controls.py", f"--workdir={long}", "half", product=long / "half.json")
    found["half"] = Step(long / "half.json", done, half)
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


def climb(args: argparse.Namespace) -> None:
    """Raises ValueError, Stopped, Failed."""
    deadline = time.monotonic() + 60 * args.minutes if args.minutes else None
    runner = Runner(args.workdir, args.config, deadline)
    found = steps(runner, args.seeds, args.rates)
    names = chosen(args.only, [*found, "table"])
    args.workdir.mkdir(parents=True, exist_ok=True)
    for name in names:
        if name == "table":
            print(_climb_table.write(args.workdir, args.seeds, args.rates, OBJECTIVES))
            continue
        step = found[name]
        print(f"--- {name}{': done' if step.product.exists() else ''}", flush=True)
        if step.product.exists():
            continue
        if step.needs and not step.needs.exists():
            if not args.wait:
                raise ValueError(f"{name} needs {step.needs}: take the steps before it first, or give --wait.")
            runner.wait_for(step.needs)
        step.run()


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
        climb(args)
    except (Stopped, KeyboardInterrupt):
        print("Stopped. The same command goes on from here.")
    except Failed as failed:
        return failed.args[0]
    except (ValueError, OSError) as error:
        print(f"Error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
