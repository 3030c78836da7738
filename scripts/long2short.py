"""From long answers to short ones (k1.5 §2.4).

    python scripts/long2short.py merge --out=DIR LONG SHORT [--weights=0.5,0.5]
    python scripts/long2short.py shortest --checkpoint=runs/long --out=DIR [--problems=FILE] [--n=8]
    python scripts/long2short.py dpo-pairs --checkpoint=runs/long --out=DIR [--problems=FILE] [--n=8]
    python scripts/long2short.py abridge --checkpoint=runs/long --out=DIR [--problems=FILE] [--n=8]
    python scripts/long2short.py evaluate RUN...
    python scripts/long2short.py select --out=frontier.png RUN... [--tolerance=0.02]

merge averages the weights of models in the Hugging Face layout (or imports of them) into such a model, tensor by
tensor; or those of runs, whose checkpoints are named as in config.init (WORKDIR, WORKDIR/checkpoints/STAGE[/STEP]),
into a run that config.init takes. Configuration and tokenizer are those of the first.

shortest samples n answers to each problem and keeps the shortest correct one: OUT/examples.jsonl, problems with
`solution` for config.data.train_file. dpo-pairs prefers it to longer wrong answers and to much longer correct ones:
OUT/pairs.jsonl, for config.dpo.pairs. abridge keeps every correct answer, with the same reasoning written in fewer
tokens, which a task must know how to do (Task.abridge): OUT/abridged.jsonl, for config.data.train_file. What stands
behind each line is in the same line of *_provenance.jsonl. Without --problems they are the training problems of the
run, and its held-out problems go to OUT/heldout.jsonl. Answers are kept in OUT/samples.jsonl: these commands share
them, and go on from there after an interruption.

evaluate measures runs, or checkpoints of them, on their held-out problems; those that merge made were never measured.
select draws accuracy against tokens of all that runs have measured, and names the checkpoint for config.init of
long2short RL (configs/long2short_rl.py): the one with the fewest tokens within --tolerance of the best accuracy.

A summary goes to stdout as JSON. Exit status: 0 done; 2 something in what was given is wrong, and stderr says what; 130
stopped by Ctrl-C.
"""

import argparse
import collections
import dataclasses
import json
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

import _curation

# Everything that imports JAX is imported after the flags are parsed, so that a typing error is reported at once.


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    commands = parser.add_subparsers(dest="command", required=True)

    merge = commands.add_parser("merge", help="average the weights of models", allow_abbrev=False)
    merge.add_argument("sources", type=pathlib.Path, nargs="+", metavar="DIR", help="two models, or two runs, or more")
    merge.add_argument("--out", type=pathlib.Path, required=True, help="a new directory")
    merge.add_argument("--weights", type=numbers, help="of each, in order; they sum to 1 (default: equal ones)")
    merge.add_argument("--shard_gb", type=float, default=5.0, help="most gigabytes of a file (default: 5)")
    merge.add_argument("--traceback", action="store_true", help="show where an error came from")

    evaluate = commands.add_parser("evaluate", help="measure runs on their held-out problems", allow_abbrev=False)
    select = commands.add_parser("select", help="name the start of long2short RL", allow_abbrev=False)
    for command in (evaluate, select):
        command.add_argument("runs", type=pathlib.Path, nargs="+", metavar="RUN", help="a workdir")
        command.add_argument("--traceback", action="store_true", help="show where an error came from")
    select.add_argument("--out", type=pathlib.Path, required=True, help="a PNG")
    select.add_argument("--tolerance", type=float, default=0.02, help="of accuracy (default: 0.02, two points)")

    for name, what in (
        ("shortest", "examples of short correct answers"),
        ("dpo-pairs", "pairs of answers"),
        ("abridge", "examples of correct answers, abridged"),
    ):
        sampling = commands.add_parser(name, help=f"make {what}", allow_abbrev=False)
        sampling.add_argument("--out", type=pathlib.Path, required=True, help="a directory")
        sampling.add_argument("--problems", type=pathlib.Path, help="JSONL; default: those of the run")
        sampling.add_argument("--limit", type=int, help="only so many problems, the first ones")
        sampling.add_argument("--n", type=int, default=8, help="answers to each problem (default: 8)")
        sampling.add_argument("--temperature", type=float, default=1.0, help="default: 1")
        sampling.add_argument("--seed", type=int, default=0)
        _curation.add_flags(sampling)
    return parser.parse_args(argv)


def numbers(text: str) -> list[float]:
    return [float(part) for part in text.split(",")]


# --- merge ------------------------------------------------------------------------------------------------------------


def merge(args: argparse.Namespace) -> dict[str, Any]:
    from kimi_jax.trainers import long2short

    weights = args.weights or [1 / len(args.sources)] * len(args.sources)
    done = long2short.merge(args.sources, args.out, weights=weights, shard_bytes=int(args.shard_gb * 1e9))
    return done | {"out": str(args.out)}


# --- shortest, dpo-pairs, abridge -------------------------------------------------------------------------------------


def shortest(args: argparse.Namespace) -> dict[str, Any]:
    from kimi_jax.long2short import choosing

    return _from_answers(args, choosing.examples, "examples", "has a correct answer that came to its end")


def dpo_pairs(args: argparse.Namespace) -> dict[str, Any]:
    from kimi_jax.long2short import choosing

    return _from_answers(args, choosing.pairs, "pairs", "has a correct answer and one that it is preferred to")


def abridge(args: argparse.Namespace) -> dict[str, Any]:
    from kimi_jax.long2short import choosing
    from kimi_jax.tasks import TASKS

    able = {name: task.abridge for name, task in TASKS.items() if task.abridge}

    def check(problems):
        if unable := sorted({problem.task for problem in problems} - set(able)):
            raise ValueError(
                f"Nobody knows how to abridge answers to problems of {', '.join(unable)}: of the tasks here, those of "
                f"{', '.join(able)} do (Task.abridge). Give --problems=FILE with problems of these alone."
            )

    def choose(problem, answers, **origin):
        return choosing.abridged(problem, answers, abridge=able[problem.task], **origin)

    return _from_answers(args, choose, "abridged", "has a correct answer that can be abridged", check)


def _from_answers(
    args: argparse.Namespace, choose, name: str, needed: str, check=lambda problems: None
) -> dict[str, Any]:
    """Samples, chooses, writes OUT/NAME.jsonl. check: of the problems, before. Raises ValueError, FileNotFoundError."""
    from kimi_jax.curation.asking import Ledger, ask, question
    from kimi_jax.training.metrics import progress

    _check(args)
    problems, records = _problems(args)
    check(problems)
    with _curation.judging(args, problems) as (judge, _):
        answerer = _curation.load_answerer(args)
        final = args.out / f"{name}.jsonl"
        final.unlink(missing_ok=True)  # of an earlier run, perhaps with other flags
        judged_by = f"verifiers {sorted(args.verifier)}"
        answers = ask(
            [question(p, p.prompt, purpose="long2short", seed=args.seed, n=args.n) for p in problems],
            generate=answerer.generate,
            judge=judge,
            ledger=Ledger(args.out / "samples.jsonl"),
            source=f"{answerer.identity} {judged_by}",
            temperature=args.temperature,
            batch=args.batch,
            keep_texts=True,
            progress=progress(desc="answers", total=len(problems)).update,
        )
    origin = {"model": answerer.identity, "judge": judged_by, "seed": args.seed, "temperature": args.temperature}
    found, used = [], 0
    for problem, record, own in zip(problems, records, answers, strict=True):
        images = {"images": record["images"]} if record.get("images") else {}
        chosen = choose(problem, own, origin=origin)
        found += [(made | images, provenance) for made, provenance in chosen]
        used += bool(chosen)
    if not found:
        raise ValueError(f"None of {len(problems)} problems {needed}. Raise --n or --max_tokens, or ask another model.")
    made, provenance = zip(*found, strict=True)
    _curation.write(args.out / f"{name}_provenance.jsonl", _curation.lines(provenance))
    _curation.write(final, _curation.lines(made))  # last: where it is, all is
    tokens = [answer.tokens for own in answers for answer in own]
    kept = [one["tokens"] for one in provenance]
    return {
        "problems": len(problems),
        "problems_used": used,
        "answers": dict(collections.Counter(answer.outcome for own in answers for answer in own)),
        "mean_tokens": sum(tokens) / len(tokens),
        name: len(made),
        "mean_tokens_chosen": sum(kept) / len(kept),
        **({"because": dict(collections.Counter(one["because"] for one in provenance))} if name == "pairs" else {}),
        "out": str(final),
    }


def _check(args: argparse.Namespace) -> None:
    _curation.check_flags(args)
    if args.n < 1 or args.limit is not None and args.limit < 1:
        raise ValueError(f"--n={args.n} and --limit={args.limit} must be at least 1.")
    if args.temperature <= 0 and args.n > 1:
        raise ValueError(f"--temperature={args.temperature} gives {args.n} equal answers. Raise it.")
    if args.model and not args.problems:
        raise ValueError("--problems=FILE is missing: a published model brings no problems, as a run does.")


def _problems(args: argparse.Namespace):
    """(problems, records of them for files in OUT)."""
    if args.problems:
        problems, records = _curation.read(args.problems)
        moved = [record | _curation.moved_images(record, args.problems.parent, args.out) for record in records]
        return problems[: args.limit], moved[: args.limit]
    from kimi_jax.trainers import long2short

    train, heldout = long2short.problems_of(args.checkpoint)
    args.out.mkdir(parents=True, exist_ok=True)
    _curation.write(args.out / "heldout.jsonl", _curation.lines(long2short.record(p, args.out) for p in heldout))
    return train[: args.limit], [long2short.record(problem, args.out) for problem in train[: args.limit]]


# --- evaluate, select -------------------------------------------------------------------------------------------------


def evaluate(args: argparse.Namespace) -> list[dict[str, Any]]:
    from kimi_jax.trainers import long2short

    return [long2short.evaluate(run) for run in args.runs]


def select(args: argparse.Namespace) -> dict[str, Any]:
    from kimi_jax.long2short import frontier
    from kimi_jax.trainers import long2short

    if not 0 <= args.tolerance < 1:
        raise ValueError(f"--tolerance={args.tolerance} is a share of accuracy: from 0 to 1, such as 0.02.")
    points = [point for run in args.runs for point in long2short.points(run)]
    chosen = frontier.choose(points, tolerance=args.tolerance)
    frontier.draw(points, chosen, args.out)
    return {
        "init": chosen.checkpoint,
        "chosen": dataclasses.asdict(chosen),
        "frontier": [dataclasses.asdict(point) for point in frontier.frontier(points)],
        "points": len(points),
        "out": str(args.out),
    }


COMMANDS = {
    "merge": merge,
    "shortest": shortest,
    "dpo-pairs": dpo_pairs,
    "abridge": abridge,
    "evaluate": evaluate,
    "select": select,
}


def main(argv: Sequence[str] | None = None) -> int:
    return _curation.exit_status(parse(argv), lambda args: print(json.dumps(COMMANDS[args.command](args))))


if __name__ == "__main__":
    sys.exit(main())
