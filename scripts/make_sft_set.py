"""Solutions to learn from that a model writes and a judge approves (k1.5 §2.2, §2.5.2).

    python scripts/make_sft_set.py warmup --problems=curated/curated.jsonl --out=warmup --model=Qwen2.5-1.5B-Instruct
    python scripts/make_sft_set.py expand --problems=seeds.jsonl --out=expanded --checkpoint=runs/sft [--judge=runs/rm]

warmup: long chains of thought. The model is asked with --templates, which want planning, evaluation, reflection,
exploration, or all of them; what is learnt is its answer to the problem alone. expand: several plain answers to the
problems of a seed set, of which the best are kept. Only correct answers that came to their end are kept, --keep of each
problem by --prefer: behaviours, lengths, shortest, or the merit that the reward model --judge sees in them, which then
judges instead of the verifiers.

Writes to OUT: examples.jsonl, problem records with `solution` for config.data.train_file; provenance.jsonl, a line on
each of them in the same order (model, template, seed, serial, verdict, tokens, marks); report.json. All answers are
kept in OUT/samples.jsonl: the same command after an interruption goes on from there.

Exit status: 0 done; 2 something in what was given is wrong or the judge fails, and stderr says what; 130 stopped by
Ctrl-C.
"""

import argparse
import collections
import contextlib
import json
import pathlib
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import _curation

from kimi_jax.curation import warmup

_MODES = {  # templates, preference, how many are kept
    "warmup": ("planning,evaluation,reflection,exploration,all", "behaviours", 2),
    "expand": ("plain", "shortest", 1),
}


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("mode", choices=_MODES)
    parser.add_argument("--problems", type=pathlib.Path, required=True, help="JSONL")
    parser.add_argument("--out", type=pathlib.Path, required=True, help="a directory")
    parser.add_argument("--templates", help=f"of {', '.join(warmup.TEMPLATES)}; default: by mode")
    parser.add_argument("--samples", type=int, default=4, help="answers per problem and template (default: 4)")
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--keep", type=int, help="most answers to one problem (default: warmup 2, expand 1)")
    prefer = "default: warmup behaviours, expand shortest, with --judge merit"
    parser.add_argument("--prefer", choices=warmup.PREFERENCES, help=prefer)
    parser.add_argument("--judge", type=pathlib.Path, help="workdir of a reward model; default: the verifiers")
    parser.add_argument("--votes", type=int, default=4, help="of a reward model that reasons (default: 4)")
    parser.add_argument("--seed", type=int, default=0)
    _curation.add_flags(parser)
    return parser.parse_args(argv)


def resolve(args: argparse.Namespace) -> None:
    """Fills in what depends on the mode. Raises ValueError."""
    templates, prefer, keep = _MODES[args.mode]
    args.templates = (args.templates or templates).split(",")
    args.prefer = args.prefer or ("merit" if args.judge else prefer)
    args.keep = keep if args.keep is None else args.keep
    if unknown := [name for name in args.templates if name not in warmup.TEMPLATES]:
        raise ValueError(f"--templates has {unknown[0]!r}; there are {', '.join(warmup.TEMPLATES)}.")
    if args.prefer == "merit" and not args.judge:
        raise ValueError("--prefer=merit needs a reward model, --judge=WORKDIR: verifiers know right and wrong alone.")
    if args.judge and args.verifier:
        raise ValueError(f"--judge={args.judge} judges instead of --verifier={args.verifier[0]}. Drop one of the two.")
    for name in ("samples", "keep", "votes"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name}={getattr(args, name)} must be at least 1.")
    if args.temperature <= 0 and args.samples > 1:
        raise ValueError(f"--temperature={args.temperature} gives {args.samples} equal answers. Raise it.")
    _curation.check_flags(args)


@contextlib.contextmanager
def choose_judge(args: argparse.Namespace, problems) -> Iterator:
    """The verifiers, or else the reward model of --judge."""
    if not args.judge:
        with _curation.judging(args, problems) as (judge, _):
            yield judge
        return
    from kimi_jax.curation.asking import check_judge
    from kimi_jax.trainers.reward_models import load_judge
    from kimi_jax.training.sharding import make_mesh

    mesh = make_mesh(data=-1, fsdp=1, tensor=args.tensor)
    judge = load_judge(args.judge, mesh, votes=args.votes, option="--judge")
    check_judge(problems, judge)
    yield judge


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Returns the report. Raises ValueError, FileNotFoundError."""
    from kimi_jax.curation.asking import Ledger
    from kimi_jax.training.metrics import progress

    resolve(args)
    problems, records = _curation.read(args.problems)
    with choose_judge(args, problems) as judge:
        answerer = _curation.load_answerer(args)
        if not answerer.instructed and args.templates != ["plain"]:
            raise ValueError(f"{args.checkpoint} knows no instructions, so templates mean nothing: --templates=plain.")
        ledger = Ledger(args.out / "samples.jsonl")
        final = [args.out / name for name in ("report.json", "provenance.jsonl", "examples.jsonl")]
        for path in final:
            path.unlink(missing_ok=True)
        judged_by = f"{args.judge.resolve()} {args.votes} votes" if args.judge else f"verifiers {sorted(args.verifier)}"
        collected = warmup.collect(
            problems,
            templates=args.templates,
            samples=args.samples,
            seed=args.seed,
            generate=answerer.generate,
            judge=judge,
            ledger=ledger,
            source=f"{answerer.identity} {judged_by}",
            temperature=args.temperature,
            batch=args.batch,
            progress=progress(desc=args.mode, total=len(problems) * len(args.templates)).update,
        )
    origin = {"model": answerer.identity, "judge": judged_by, "seed": args.seed, "temperature": args.temperature}
    examples, provenance = [], []
    for problem, record, candidates in zip(problems, records, collected, strict=True):
        chosen = warmup.choose(warmup.acceptable(candidates), args.keep, args.prefer)
        images = _curation.moved_images(record, args.problems.parent, args.out)
        for example, source in warmup.examples(problem, chosen, origin=origin):
            examples.append(example | images)
            provenance.append(source)
    if not examples:
        raise ValueError(
            f"No answer to {len(problems)} problems is correct and complete, so there is nothing to learn from. Raise "
            "--samples or --max_tokens, or ask a better model."
        )
    report = summarize(collected, provenance, _curation.plain_flags(args))
    texts = (json.dumps(report, indent=2) + "\n", _curation.lines(provenance), _curation.lines(examples))
    for path, text in zip(final, texts, strict=True):  # the examples last: where they are, all is
        _curation.write(path, text)
    print(f"{len(examples)} examples of {report['problems_with_examples']} of {len(problems)} problems: {final[-1]}")
    return report


def summarize(collected, kept: Sequence[dict], settings: dict) -> dict[str, Any]:
    """Per template how much is correct, and of what is kept lengths and ways of thinking."""
    asked: dict[str, collections.Counter] = collections.defaultdict(collections.Counter)
    for candidates in collected:
        for candidate in candidates:
            asked[candidate.template][candidate.answer.outcome] += 1
    tokens = sorted(p["tokens"] for p in kept)
    return {
        "settings": settings,
        "answers": {name: dict(counts) for name, counts in asked.items()},
        "problems": len(collected),
        "problems_with_examples": len({p["problem"] for p in kept}),
        "examples": len(kept),
        "templates_of_examples": dict(collections.Counter(p["template"] for p in kept)),
        "share_that_shows": {name: sum(p["marks"][name] > 0 for p in kept) / len(kept) for name in warmup.BEHAVIOURS},
        "tokens": {"least": tokens[0], "median": tokens[len(tokens) // 2], "most": tokens[-1]},
    }


def main(argv: Sequence[str] | None = None) -> int:
    return _curation.exit_status(parse(argv), run)


if __name__ == "__main__":
    sys.exit(main())
