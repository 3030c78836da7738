"""What a curation did, as a dict to be counted with and as a page to be read."""

import collections
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from kimi_jax.curation.prompts import LEVELS, REASONS, Decision
from kimi_jax.types import Problem

_EXAMPLES = 3  # of each reason
_BAR = 40  # characters of the longest


def summarize(problems: Sequence[Problem], decisions: Sequence[Decision], settings: Mapping[str, Any]) -> dict:
    """Histograms are {value: count}, pass rates in tenths. settings: what was asked for, to be found in the report."""
    prompts = {problem.id: problem.prompt for problem in problems}
    kept = [decision for decision in decisions if not decision.reason]
    reasons = collections.Counter(decision.reason for decision in decisions if decision.reason)
    examples = {
        reason: [
            {"id": d.id, "prompt": prompts[d.id][:300], "detail": d.detail} for d in decisions if d.reason == reason
        ][:_EXAMPLES]
        for reason in REASONS
        if reasons[reason]
    }
    return {
        "settings": dict(settings),
        "problems": len(decisions),
        "kept": len(kept),
        "dropped": {reason: reasons[reason] for reason in REASONS},
        "pass_rate": {"measured": _pass_rates(decisions), "kept": _pass_rates(kept)},
        "domains": {"given": _count(d.domain for d in decisions), "kept": _count(d.domain for d in kept)},
        "domain_by_difficulty": {
            name: _count(d.difficulty for d in kept if d.domain == name) for name in sorted({d.domain for d in kept})
        },
        "mean_tokens_of_kept": sum(d.tokens for d in kept) / len(kept) if kept else None,
        "examples": examples,
    }


def markdown(report: Mapping[str, Any]) -> str:
    """The page of `summarize`'s dict."""
    total = max(report["problems"], 1)
    lines = [f"# Curation: {report['kept']} of {report['problems']} problems kept", ""]
    lines += ["| reason | dropped | share |", "|---|---:|---:|"]
    lines += [f"| {name} | {n} | {n / total:.1%} |" for name, n in report["dropped"].items()]
    for part, title in (("measured", "all that were measured"), ("kept", "those that are kept")):
        lines += ["", f"## Share of correct answers: {title}", "", "```", *_bars(report["pass_rate"][part]), "```"]
    lines += [
        "",
        "## Domains",
        "",
        "| domain | given | kept | kept by difficulty, easy to hard |",
        "|---|---:|---:|---|",
    ]
    for name, given in report["domains"]["given"].items():
        levels = report["domain_by_difficulty"].get(name, {})
        spread = ", ".join(f"{level}: {n}" for level, n in levels.items())
        lines.append(f"| {_cell(name)} | {given} | {report['domains']['kept'].get(name, 0)} | {spread} |")
    lines += ["", "## Dropped, for example"]
    for reason, examples in report["examples"].items():
        lines += ["", f"### {reason}", ""]
        lines += [f"* `{_code(e['id'])}`: `{_code(e['prompt'])}` ({_cell(e['detail'])})" for e in examples]
    lines += [
        "",
        "## Settings",
        "",
        *(f"* {name}: `{_code(str(value))}`" for name, value in report["settings"].items()),
    ]
    return "\n".join(lines) + "\n"


def _pass_rates(decisions: Iterable[Decision]) -> dict[str, int]:
    counts = collections.Counter(LEVELS - d.difficulty for d in decisions if d.difficulty is not None)
    return {f"{tenths / LEVELS:.1f}": counts[tenths] for tenths in range(LEVELS + 1)}


def _count(values: Iterable) -> dict[str, int]:
    return {str(value): n for value, n in sorted(collections.Counter(values).items())}


def _bars(histogram: Mapping[str, int]) -> list[str]:
    most = max([*histogram.values(), 1])
    return [f"{name} {n:6} {'#' * round(_BAR * n / most)}".rstrip() for name, n in histogram.items()]


def _code(text: str) -> str:
    return " ".join(text.split()).replace("`", "'")


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
