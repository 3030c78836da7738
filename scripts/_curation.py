"""What the two scripts that ask a model about many problems share: flags, files, the judge, the model."""

import argparse
import contextlib
import json
import os
import pathlib
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

# Everything that imports JAX is imported when it is needed, so that a typing error is reported at once.
from kimi_jax.tasks.base import problem_from_record
from kimi_jax.types import Problem, Verdict


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Of what answers and what judges."""
    one = parser.add_mutually_exclusive_group(required=True)
    one.add_argument("--model", type=pathlib.Path, help="that answers: a published model, Hugging Face layout")
    one.add_argument("--checkpoint", type=pathlib.Path, help="instead: a run of scripts/train.py, or a step of it")
    parser.add_argument("--system", default="", help="with --model: the system message")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="default: that of the model")
    parser.add_argument("--max_tokens", type=int, default=4096, help="of an answer")
    parser.add_argument("--rows", type=int, default=64, help="answers that are written at the same time")
    parser.add_argument("--pages", type=int, help="of the cache; default: enough for all rows at full length")
    parser.add_argument("--tensor", type=int, default=1, help="devices that share an answer; the others share the rows")
    parser.add_argument("--batch", type=int, default=128, help="questions after which answers are saved")
    parser.add_argument("--verifier", action="append", default=[], help="your own: task=module:function; once for each")
    parser.add_argument("--sandbox", help="URL of the service that runs code; default: here")
    parser.add_argument("--workers", type=int, default=2, help="processes that judge")
    parser.add_argument("--deadline_s", type=float, default=10.0, help="for judging one answer")
    parser.add_argument("--traceback", action="store_true", help="show where an error came from")


def check_flags(args: argparse.Namespace) -> None:
    for name in ("max_tokens", "rows", "tensor", "batch"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name}={getattr(args, name)} must be at least 1.")
    if args.system and not args.model:
        raise ValueError("--system belongs to --model: a run has its system message in its config.")


# --- files ------------------------------------------------------------------------------------------------------------


def read(path: pathlib.Path) -> tuple[list[Problem], list[dict[str, Any]]]:
    """(problems, their records, which may have `tags` beside what `problem_from_record` takes).

    Raises ValueError with file and line number.
    """
    problems: dict[str, Problem] = {}
    records = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            tags = record.pop("tags", []) if isinstance(record, dict) else []
            problem = problem_from_record(record, folder=path.parent)
            if not isinstance(tags, list) or not all(isinstance(tag, str) for tag in tags):
                raise ValueError(f"problem record {problem.id!r}: 'tags' must be a list of texts, got {tags!r:.80}")
            if problem.id in problems:
                raise ValueError(f"problem record {problem.id!r}: an earlier line has this id; remove one of the two")
        except ValueError as error:  # json.JSONDecodeError is one
            raise ValueError(f"{path}, line {number}: {error}") from error
        problems[problem.id] = problem
        records.append(record | {"tags": tags})
    if not problems:
        raise ValueError(f"{path} has no problems: give one JSON record per line.")
    return list(problems.values()), records


def moved_images(record: Mapping[str, Any], source: pathlib.Path, target: pathlib.Path) -> dict[str, Any]:
    """The field `images` of a record for a file in another folder: names are relative to it."""
    images = [os.path.relpath(source / name, target) for name in record.get("images", ())]
    return {"images": images} if images else {}


def write(path: pathlib.Path, text: str) -> None:
    """Whole or not at all, also where other processes write the same."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def lines(records: Iterable[Mapping[str, Any]]) -> str:
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def plain_flags(args: argparse.Namespace) -> dict[str, Any]:
    """As JSON has it."""
    return json.loads(json.dumps(vars(args), default=str))


# --- who judges, who answers ------------------------------------------------------------------------------------------


@contextlib.contextmanager
def judging(args: argparse.Namespace, problems: Sequence[Problem]) -> Iterator[tuple[Callable, Callable]]:
    """(judge of many answers, verifier of one). Raises ValueError for problems that cannot be judged."""
    from kimi_jax.curation.asking import check_judge
    from kimi_jax.rewards.pool import VerifierPool
    from kimi_jax.trainers import rewards
    from kimi_jax.trainers.config import default_config

    sys.path.append(os.getcwd())  # where verifiers may lie
    options = default_config().rewards
    options.verifiers, options.sandbox = tuple(args.verifier), args.sandbox
    options.workers, options.deadline_s = args.workers, args.deadline_s
    rewards.check_problems(problems, options, from_files=True)
    verify = rewards.verifier(options)
    with VerifierPool(verify, workers=args.workers, deadline_s=args.deadline_s) as pool:

        def judge(answers: Sequence[tuple[Problem, str]]) -> list[Verdict]:
            return pool.verdicts([pool.submit(problem, text) for problem, text in answers])

        check_judge(problems, judge)
        yield judge, verify


def load_answerer(args: argparse.Namespace):
    from kimi_jax.trainers import answering

    return answering.load(
        model=args.model,
        checkpoint=args.checkpoint,
        system=args.system,
        dtype=args.dtype,
        rows=args.rows,
        max_tokens=args.max_tokens,
        pages=args.pages,
        tensor=args.tensor,
        seed=args.seed,
    )


def exit_status(args: argparse.Namespace, job: Callable[[argparse.Namespace], Any]) -> int:
    """Runs the job, and reports what is wrong with what was given in one line."""
    try:
        job(args)
    except (ValueError, OSError, MemoryError) as error:
        if args.traceback:
            raise
        print(f"Error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("Stopped. The same command goes on from here.", file=sys.stderr)
        return 130
    return 0
