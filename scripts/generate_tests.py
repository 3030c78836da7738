"""Turns code problems without tests into RL problems with tests, and says why each of the others was dropped.

    python scripts/generate_tests.py --problems=raw.jsonl --out=admitted.jsonl --report=report.json
    python scripts/generate_tests.py ... --sandbox=http://sandbox:8123 --jobs=64
    python scripts/generate_tests.py ... --model=Qwen2.5-Coder-7B-Instruct

A line of raw.jsonl is {"id", "statement", "submissions": [{"language", "code"}, ...]} and optionally {"generator",
"special_judge", "language", "time_limit_s", "memory_limit_mb", "tolerance", "controls"}. A generator defines
`generate(io, index)` (kimi_jax/curation/generators.py); a problem without one needs --model, which writes it, or is
dropped. Controls, {"language", "code", "right", "note"}, have no vote: the report says how many of the wrong ones the
tests catch. Needs CYaRon (pip install -e '.[curation]').

What is finished is kept in OUT.progress: the same command after an interruption goes on from there, and after a change
does again what the change concerns. OUT and the report are written at the end, whole.

Exit status: 0 done; 1 done, but the sandbox failed on some problems, which the same command tries again; 2 something in
what was given is wrong, and stderr says what; 130 stopped by Ctrl-C.
"""

import argparse
import collections
import concurrent.futures
import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from kimi_jax.curation import code_problems, test_cases
from kimi_jax.curation.code_problems import CodeProblem
from kimi_jax.curation.generators import SandboxFailed, extract_code, generator_prompt, library
from kimi_jax.curation.test_cases import Rules
from kimi_jax.rewards.sandbox.api import Sandbox
from kimi_jax.rewards.sandbox.client import SandboxClient, SandboxUnreachable
from kimi_jax.rewards.sandbox.isolation import NoIsolation
from kimi_jax.rewards.sandbox.pool import LocalSandbox


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--problems", type=pathlib.Path, required=True, help="JSONL, as above")
    parser.add_argument("--out", type=pathlib.Path, required=True, help="admitted problems, JSONL of the task code")
    parser.add_argument("--report", type=pathlib.Path, required=True, help="JSON: a summary and every decision")
    parser.add_argument("--sandbox", default="local", help="local (default) or the URL of a service")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="problems at the same time")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of submissions, and of --model")
    for field in dataclasses.fields(Rules):
        parser.add_argument(f"--{field.name}", type=type(field.default), default=field.default)
    parser.add_argument("--time_limit_s", type=float, default=2.0, help="of problems that have none")
    parser.add_argument("--memory_limit_mb", type=int, default=256, help="of problems that have none")
    parser.add_argument("--model", type=pathlib.Path, help="Hugging Face layout; writes the missing generators")
    parser.add_argument("--temperature", type=float, default=0.6, help="of --model")
    parser.add_argument("--max_tokens", type=int, default=4096, help="of --model, per generator")
    parser.add_argument("--rows", type=int, default=16, help="generators that --model writes at the same time")
    args = parser.parse_args(argv)
    if args.jobs < 1:
        parser.error(f"--jobs={args.jobs} must be at least 1")
    return args


# --- what is finished -------------------------------------------------------------------------------------------------


class Progress:
    """Finished parts of the work by a key that names all that they depend on; a file that only grows."""

    def __init__(self, path: pathlib.Path):
        self._path, self._lock = path, threading.Lock()
        self._done: dict[str, Any] = {}
        lines = path.read_text(encoding="utf-8").split("\n") if path.exists() else []
        for line in lines:
            with contextlib.suppress(ValueError):  # the last one, if it was being written
                self._done.update(json.loads(line))
        self._torn = bool(lines and lines[-1])

    def get(self, key: str) -> Any | None:
        return self._done.get(key)

    def put(self, key: str, value: Any) -> None:
        with self._lock, self._path.open("a", encoding="utf-8") as file:
            file.write("\n" * self._torn + json.dumps({key: value}) + "\n")
            self._torn = False
            self._done[key] = value


def key_of(*parts: Any) -> str:
    return hashlib.blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=16).hexdigest()


def write_whole(path: pathlib.Path, text: str) -> None:
    """The file is the old one or the new one, never a part."""
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)


# --- generators -------------------------------------------------------------------------------------------------------


def model_writer(args: argparse.Namespace) -> Callable[[list[str]], list[str]]:
    """A function from prompts to the responses of --model."""
    import jax
    import sample

    from kimi_jax.sampling.handover import make_handover
    from kimi_jax.sampling.logits import SamplingSettings
    from kimi_jax.trainers import setup
    from kimi_jax.training.sharding import make_mesh

    config = sample.model_settings(args.model, system="")
    chat, shape = sample.load_chat(argparse.Namespace(model=args.model, raw=False), config)
    mesh = make_mesh(data=1, fsdp=1, tensor=-1)
    policy = setup.make_policy(config, mesh, shape)
    dtype = config.model.sampling_dtype or shape.dtype
    _, masters = sample.load_params(args, None, setup.params_like(config, policy, mesh), dtype)
    params = make_handover(policy, mesh, dtype=dtype)(masters, None)
    engine = None

    def write(texts: list[str]) -> list[str]:
        nonlocal engine
        prompts = [chat.encode_prompt(text, []) for text in texts]
        longest = max(len(prompt.tokens) for prompt in prompts)
        if engine is None or engine.prompt_tokens < longest:  # each one is compiled anew
            changes = {"rows": args.rows, "pages": None, "prompt_tokens": longest, "max_tokens": args.max_tokens}
            engine = setup.make_engine(config, mesh, policy, chat, **changes)
        rollouts = engine.generate(
            params,
            prompts,
            k=1,
            first_serial=0,
            run_key=jax.random.key(args.seed),
            settings=SamplingSettings.of(temperature=args.temperature, end_ids=chat.end_ids),
            policy_version=0,
        )
        return [rollout.text for (rollout,) in rollouts]

    return write


def with_generators(
    problems: list[CodeProblem],
    make_writer: Callable[[], Callable[[list[str]], list[str]]],
    *,
    batch: int,
    rules: Rules,
    progress: Progress,
    settings: list,
) -> list[CodeProblem]:
    """The problems, with a generator where one was missing and the writer gave one."""
    prompts = {
        problem.id: generator_prompt(problem.statement, cases=rules.cases, max_bytes=rules.max_input_bytes)
        for problem in problems
        if not problem.generator and not problem.special_judge
    }
    keys = {name: key_of("generator", prompt, settings) for name, prompt in prompts.items()}
    todo = [name for name in prompts if progress.get(keys[name]) is None]
    write = make_writer() if todo else None
    for start in range(0, len(todo), batch):
        part = todo[start : start + batch]
        for name, text in zip(part, write([prompts[name] for name in part]), strict=True):
            progress.put(keys[name], extract_code(text))
        print(f"{start + len(part)} of {len(todo)} generators written", file=sys.stderr)
    return [
        dataclasses.replace(problem, generator=progress.get(keys[problem.id])) if problem.id in keys else problem
        for problem in problems
    ]


# --- tests ------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def open_sandbox(where: str, jobs: int) -> Iterator[Sandbox]:
    if where == "local":
        with LocalSandbox(workers=jobs) as sandbox:
            yield sandbox
    else:
        with SandboxClient(where) as sandbox:
            yield sandbox


def decide(problem: CodeProblem, sandbox: Sandbox, languages: Sequence[str], rules: Rules, seed: int) -> dict[str, Any]:
    """The decision as JSON, with what the tests of an admitted problem say of its controls."""
    decision = test_cases.make_tests(problem, sandbox=sandbox, languages=languages, rules=rules, seed=seed)
    controls = [c for c in problem.controls if c.submission.language in languages] if decision.record else []
    passes = test_cases.check_controls(problem, controls, decision.record, sandbox=sandbox) if controls else []
    shown = [{"right": c.right, "note": c.note, "passes": p} for c, p in zip(controls, passes, strict=True)]
    return {**dataclasses.asdict(decision), "controls": shown}


def decide_all(
    problems: Sequence[CodeProblem], *, sandbox: Sandbox, jobs: int, rules: Rules, seed: int, progress: Progress
) -> tuple[list[dict], dict[str, str]]:
    """The decisions in the order of the problems, and by id why there is none."""
    languages = sorted(sandbox.health()["profiles"]["default"]["languages"])
    settings = [dataclasses.asdict(rules), seed, languages]
    keys = {problem.id: key_of("decision", dataclasses.asdict(problem), settings) for problem in problems}
    todo = [problem for problem in problems if progress.get(keys[problem.id]) is None]
    if len(todo) < len(problems):
        print(f"{len(problems) - len(todo)} of {len(problems)} problems were finished before", file=sys.stderr)
    failed = {}
    pool = concurrent.futures.ThreadPoolExecutor(jobs)
    try:
        futures = {pool.submit(decide, p, sandbox, languages, rules, seed): p.id for p in todo}
        for number, future in enumerate(concurrent.futures.as_completed(futures), start=1):
            name = futures[future]
            try:
                decision = future.result()
                progress.put(keys[name], decision)
                outcome = decision["reason"] or "admitted"
            except (SandboxFailed, ValueError) as error:  # the second if a service refuses requests of this size
                failed[name] = outcome = str(error)
            print(f"{number} of {len(todo)}: {name}: {outcome}", file=sys.stderr)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
    return [progress.get(keys[problem.id]) for problem in problems if problem.id not in failed], failed


def summary(decisions: Sequence[dict], failed: dict[str, str]) -> dict[str, Any]:
    """How many problems are left after each rule, and what the tests of the admitted ones say of the controls."""
    reasons = collections.Counter(decision["reason"] for decision in decisions)
    controls = [control for decision in decisions for control in decision["controls"]]
    right, wrong = ([c["passes"] for c in controls if c["right"] is side] for side in (True, False))
    return {
        "problems": len(decisions) + len(failed),
        "sandbox_failed": len(failed),
        "dropped": {reason: reasons[reason] for reason in test_cases.REASONS},
        "admitted": reasons[""],
        "right_controls": {"all": len(right), "passed": sum(right)},
        "wrong_controls": {"all": len(wrong), "caught": len(wrong) - sum(wrong)},
    }


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    try:
        return run(args)
    except (ValueError, OSError, NoIsolation, SandboxUnreachable) as error:
        print(f"Error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("Stopped; the same command goes on from here.", file=sys.stderr)
        return 130


def run(args: argparse.Namespace) -> int:
    # --- whatever can be wrong with what was given, before any work
    rules = Rules(**{field.name: getattr(args, field.name) for field in dataclasses.fields(Rules)})
    problems = code_problems.read(args.problems, time_limit_s=args.time_limit_s, memory_limit_mb=args.memory_limit_mb)
    library()
    if len({path.resolve() for path in (args.problems, args.out, args.report)}) < 3:
        raise ValueError("--problems, --out and --report must be three files")
    for path in (args.out, args.report):
        path.parent.mkdir(parents=True, exist_ok=True)
    progress = Progress(args.out.with_name(args.out.name + ".progress"))

    with open_sandbox(args.sandbox, args.jobs) as sandbox:
        if args.model:
            settings = [str(args.model), args.temperature, args.max_tokens, args.seed]
            problems = with_generators(
                problems,
                lambda: model_writer(args),
                batch=4 * args.rows,
                rules=rules,
                progress=progress,
                settings=settings,
            )
        decisions, failed = decide_all(
            problems, sandbox=sandbox, jobs=args.jobs, rules=rules, seed=args.seed, progress=progress
        )

    records = [decision["record"] for decision in decisions if decision["record"]]
    write_whole(args.out, "".join(json.dumps(record) + "\n" for record in records))
    report = {
        "summary": summary(decisions, failed),
        "rules": dataclasses.asdict(rules),
        "decisions": [{name: value for name, value in d.items() if name != "record"} for d in decisions],
        "failed": failed,
    }
    write_whole(args.report, json.dumps(report, indent=1) + "\n")
    print(json.dumps(report["summary"]))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
