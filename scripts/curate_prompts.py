"""Chooses the problems that are worth learning from by RL, and says why each of the others was dropped (k1.5 §2.1).

    python scripts/curate_prompts.py --problems=raw.jsonl --evaluation=test.jsonl --out=curated --checkpoint=runs/sft
    python scripts/curate_prompts.py --problems=raw.jsonl --out=curated --model=Qwen2.5-1.5B-Instruct --count=5000

A line of a file is a problem as for config.data.train_file, which may also have "tags", a list whose first is its
domain. Dropped are multiple choice, true or false, and proofs; what asks the same as another problem or as one of an
evaluation set; what the model always solves (10 samples), and what it guesses without thinking (8 guesses).

Writes to OUT: curated.jsonl, whose `difficulty` is how many of ten samples are wrong; decisions.jsonl, one line on each
problem; report.json and report.md. Answers are kept in OUT/samples.jsonl and guesses.jsonl: the same command after an
interruption goes on from there, and after a change asks again what the change concerns. Needs datasketch.

Exit status: 0 done; 2 something in what was given is wrong or the judge fails, and stderr says what; 130 stopped by
Ctrl-C.
"""

import argparse
import dataclasses
import importlib.util
import json
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

import _curation

from kimi_jax.curation.prompts import Rules

_FINAL = ("curated.jsonl", "decisions.jsonl", "report.json", "report.md")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--problems", type=pathlib.Path, required=True, help="JSONL")
    parser.add_argument("--evaluation", type=pathlib.Path, action="append", default=[], help="JSONL; once per file")
    parser.add_argument("--out", type=pathlib.Path, required=True, help="a directory")
    for field in dataclasses.fields(Rules):
        kind = int if field.default is None else type(field.default)
        default = "none" if field.default is None else field.default
        help_ = f"{field.metadata['help']} (default: {default})"
        parser.add_argument(f"--{field.name}", type=kind, default=field.default, help=help_)
    _curation.add_flags(parser)
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Returns the report. Raises ValueError, FileNotFoundError."""
    from kimi_jax.curation import prompts, report
    from kimi_jax.curation.asking import Ledger
    from kimi_jax.training.metrics import progress

    _curation.check_flags(args)
    if importlib.util.find_spec("datasketch") is None:
        raise ValueError("Finding copies needs datasketch, which is not installed: pip install datasketch")
    rules = Rules(**{field.name: getattr(args, field.name) for field in dataclasses.fields(Rules)})
    problems, records = _curation.read(args.problems)
    evaluation = [problem for path in args.evaluation for problem in _curation.read(path)[0]]
    with _curation.judging(args, problems) as (judge, verify):
        answerer = _curation.load_answerer(args)
        samples, guesses = Ledger(args.out / "samples.jsonl"), Ledger(args.out / "guesses.jsonl")
        for name in _FINAL:  # of an earlier run, perhaps with other rules
            (args.out / name).unlink(missing_ok=True)
        decisions = prompts.curate(
            problems,
            evaluation,
            tags={record["id"]: record["tags"] for record in records},
            generate=answerer.generate,
            judge=judge,
            verify=verify,
            samples=samples,
            guesses=guesses,
            source=f"{answerer.identity} {sorted(args.verifier)}",
            instructed=answerer.instructed,
            rules=rules,
            batch=args.batch,
            progress=lambda stage, total: progress(desc=stage, total=total).update,
        )
    summary = report.summarize(problems, decisions, _curation.plain_flags(args))
    kept = [
        {name: value for name, value in record.items() if name != "tags"}
        | _curation.moved_images(record, args.problems.parent, args.out)
        | {"difficulty": decision.difficulty}
        for record, decision in zip(records, decisions, strict=True)
        if not decision.reason
    ]
    _curation.write(args.out / "report.json", json.dumps(summary, indent=2, ensure_ascii=False) + "\n")
    _curation.write(args.out / "report.md", report.markdown(summary))
    _curation.write(args.out / "decisions.jsonl", _curation.lines(map(dataclasses.asdict, decisions)))
    _curation.write(args.out / "curated.jsonl", _curation.lines(kept))  # last: where it is, all is
    dropped = ", ".join(f"{name} {n}" for name, n in summary["dropped"].items() if n)
    print(f"{summary['kept']} of {summary['problems']} problems kept: {args.out / 'curated.jsonl'}")
    print(f"Dropped: {dropped or 'none'}. The report: {args.out / 'report.md'}")
    return summary


def main(argv: Sequence[str] | None = None) -> int:
    return _curation.exit_status(parse(argv), run)


if __name__ == "__main__":
    sys.exit(main())
