"""Solutions to learn from that a model wrote and a judge approved: the long-CoT warm-up set (k1.5 §2.2), and the
expansion of a seed set (§2.5.2).

Long chains of thought are asked for with templates, one for each way of thinking that the report names: planning,
evaluation, reflection, exploration. Wrong, cut and repeated answers are thrown away. Among what is left the choice is
by the ways of thinking that the words show, by length, or by the merit that a reward model sees. What is learnt is the
answer to the bare problem: the template was only a help.
"""

import dataclasses
import re
from collections.abc import Callable, Sequence
from typing import Any

from kimi_jax.curation.asking import Generate, Judge, Judged, Ledger, ask, question
from kimi_jax.tasks.base import ANSWER_MARKER
from kimi_jax.types import Outcome, Problem, StopReason

_WAYS = {
    "planning": "Before you compute anything, lay out a plan: what is asked, what is given, which steps lead from one "
    "to the other and in which order. Then carry it out, and change the plan where a step shows that it does not work.",
    "evaluation": "After each step stop and judge it: does it follow from the one before, are size, sign and units "
    "sensible, does it bring you closer? Check the result as well.",
    "reflection": "Look back at what you have written again and again, as someone who suspects a mistake in it. Where "
    "you find one, say so, go back to where it was made, and go on from there.",
    "exploration": "Name several ways that could lead to a solution, try the most promising one, and turn to another "
    "where it leads nowhere. Confirm what you find in a second, independent way.",
    "all": "Make a plan first. Judge every step when you have made it. Look back for mistakes, and go back when you "
    "find one. When a way leads nowhere, try another.",
}
TEMPLATES = {"plain": "{question}"} | {
    name: "{question}\n\nThink aloud, at length. "
    f'{way} End with the final answer on a line of its own, after "{ANSWER_MARKER}".'
    for name, way in _WAYS.items()
}

# Words that show a way of thinking, in English and Chinese. They are counted, nothing more: a transparent measure.
_MARKS = {
    "planning": r"\b(?:plan|first,? (?:i|we|let)|let me (?:start|begin)|step 1|the steps|my approach|strategy"
    r"|break (?:it|this|the problem) (?:down|into))\b|计划|首先|第一步|思路|分成",
    "evaluation": r"\b(?:check|verify|double-check|let me confirm|makes? sense|is (?:that|this) right|plausible)\b"
    r"|检查|验证|验算|合理|核对",
    "reflection": r"\b(?:wait|hmm|hold on|mistake|i was wrong|that(?:'s| is) (?:wrong|not right)|go back|back\."
    r"|actually|let me (?:redo|reconsider|rethink))|等等|不对|错了|重新|反思",
    "exploration": r"\b(?:alternatively|another (?:way|approach|method|idea)|what if|instead,? (?:try|let)|"
    r"try (?:an?|the|another|a different)|other (?:way|approach)|suppose)\b|另一种|换一种|或者|假设|试试|尝试",
}
_PATTERNS = {name: re.compile(pattern, re.IGNORECASE) for name, pattern in _MARKS.items()}
BEHAVIOURS = tuple(_MARKS)
_MERIT = re.compile(r"score (\S+)|(\d+) of (\d+) votes for correct")  # as rewards.judges say it

PREFERENCES = ("behaviours", "lengths", "shortest", "merit")


@dataclasses.dataclass(frozen=True)
class Candidate:
    """An answer, and how it was asked for."""

    template: str
    answer: Judged


def marks(text: str) -> dict[str, int]:
    """How often the words of each of the four ways of thinking occur."""
    return {name: len(pattern.findall(text)) for name, pattern in _PATTERNS.items()}


def merit(answer: Judged) -> float:
    """What a reward model thought of it: log-odds, or the share of votes. 0 where a verifier judged."""
    found = _MERIT.match(answer.detail)
    if not found:
        return 0.0
    score, yes, votes = found.groups()
    return float(score) if score else int(yes) / int(votes)


def acceptable(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Those that are correct and came to their end, each text once."""
    good = [c for c in candidates if c.answer.outcome == Outcome.CORRECT and c.answer.stop == StopReason.END]
    return list({c.answer.text: c for c in reversed(good)}.values())[::-1]


def choose(candidates: Sequence[Candidate], keep: int, prefer: str) -> list[Candidate]:
    """At most `keep` of the candidates.

    prefer: "behaviours", those that show the most of the four ways of thinking, of these the longest; "lengths", from
    the shortest to the longest at equal distances; "shortest"; "merit", the shortest among equals. Otherwise equal ones
    stay in order.
    """
    if prefer == "lengths":
        ordered = sorted(candidates, key=lambda c: c.answer.tokens)
        step = (len(ordered) - 1) / max(keep - 1, 1)
        return ordered if len(ordered) <= keep else [ordered[round(i * step)] for i in range(keep)]
    order: dict[str, Callable[[Candidate], Any]] = {
        "behaviours": lambda c: (-sum(n > 0 for n in marks(c.answer.text).values()), -c.answer.tokens),
        "shortest": lambda c: c.answer.tokens,
        "merit": lambda c: (-merit(c.answer), c.answer.tokens),
    }
    return sorted(candidates, key=order[prefer])[:keep]


def collect(
    problems: Sequence[Problem],
    *,
    templates: Sequence[str],
    samples: int,
    seed: int,
    generate: Generate,
    judge: Judge,
    ledger: Ledger,
    source: str,
    temperature: float,
    batch: int,
    progress: Callable[[int], Any] = lambda n: None,
) -> list[list[Candidate]]:
    """All judged answers to each problem: `samples` for each template. Raises ValueError as `asking.ask` does."""
    asked = [(problem, name) for problem in problems for name in templates]
    answers = ask(
        [
            question(problem, TEMPLATES[name].replace("{question}", problem.prompt), purpose=name, seed=seed, n=samples)
            for problem, name in asked
        ],
        generate=generate,
        judge=judge,
        ledger=ledger,
        source=source,
        temperature=temperature,
        batch=batch,
        keep_texts=True,
        progress=progress,
    )
    candidates = [[Candidate(name, answer) for answer in own] for (_, name), own in zip(asked, answers, strict=True)]
    n = len(templates)
    return [[c for own in candidates[i : i + n] for c in own] for i in range(0, len(candidates), n)]


def examples(
    problem: Problem, chosen: Sequence[Candidate], *, origin: dict[str, Any]
) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """(record, provenance) of each: what `tasks.base.problem_from_record` takes, less images, and where it comes from.

    Solutions of one problem have ids of their own, "ID#1", "ID#2", ...: a file has every id once. origin: of all of
    them, such as the model.
    """
    found = []
    for number, candidate in enumerate(chosen, start=1):
        answer, id_ = candidate.answer, f"{problem.id}#{number}"
        record = {
            "id": id_,
            "task": problem.task,
            "prompt": problem.prompt,
            "answer": problem.answer,
            "difficulty": problem.difficulty,
            "solution": answer.text,
        }
        provenance = {
            "id": id_,
            "problem": problem.id,
            **origin,
            "template": candidate.template,
            "serial": answer.serial,
            "verdict": answer.outcome,
            "detail": answer.detail,
            "merit": merit(answer),
            "tokens": answer.tokens,
            "marks": marks(answer.text),
        }
        found.append((record, provenance))
    return found
