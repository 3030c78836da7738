"""What to learn from several answers to one problem, so that answers get shorter and stay right (k1.5 §2.4).

    shortest rejection sampling    the shortest correct answer, to imitate
    abridging                      every correct answer, to imitate as its task writes it in fewer tokens; ours, not the
                                   report's: a style is learned, where the luck of a short search is not (docs/log.md)
    preferences                    chosen: the shortest correct answer
                                   rejected: longer wrong answers, and correct ones longer than 1.5 times the chosen

Lengths are in tokens. A correct answer counts only if it came to its end; what ended otherwise has not been taught to
stop. A cut answer may be rejected: then its lack of an end is kept, and no end is taught.
"""

import dataclasses
import json
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from kimi_jax.curation.asking import Judged
from kimi_jax.tasks.base import problem_from_record
from kimi_jax.types import Outcome, Problem, StopReason

MUCH_LONGER = 1.5  # times the chosen answer
_SIDES = ("chosen", "rejected")


def shortest(answers: Sequence[Judged]) -> Judged | None:
    """The shortest correct answer, the first of several; None if there is none."""
    return min(filter(_imitable, answers), key=lambda answer: answer.tokens, default=None)


def _imitable(answer: Judged) -> bool:
    return answer.outcome == Outcome.CORRECT and answer.stop == StopReason.END


def rejected(answers: Sequence[Judged], chosen: Judged) -> list[tuple[str, Judged]]:
    """What `chosen` is preferred to, each text once, with the reason: "wrong" or "long"."""
    found: dict[str, tuple[str, Judged]] = {}
    for answer in answers:
        if answer.outcome == Outcome.WRONG and answer.tokens > chosen.tokens:
            found.setdefault(answer.text, ("wrong", answer))
        elif answer.outcome == Outcome.CORRECT and answer.tokens > MUCH_LONGER * chosen.tokens:
            found.setdefault(answer.text, ("long", answer))
    found.pop(chosen.text, None)
    return list(found.values())


def examples(problem: Problem, answers: Sequence[Judged], *, origin: Mapping[str, Any]) -> list[tuple[dict, dict]]:
    """[(record, provenance)] of the shortest correct answer, [] if there is none.

    The record is one of `tasks.base.problem_from_record`, less images, with the answer as `solution`. origin: of all of
    them, such as the model.
    """
    chosen = shortest(answers)
    return (
        [(_record(problem) | {"solution": chosen.text}, _provenance(problem, answers, chosen, origin))]
        if chosen
        else []
    )


def abridged(
    problem: Problem,
    answers: Sequence[Judged],
    *,
    origin: Mapping[str, Any],
    abridge: Callable[[str], str | None],
) -> list[tuple[dict, dict]]:
    """[(record, provenance)] of every correct answer as `abridge` writes it, each text once.

    Left out is what `abridge` cannot read, for which it gives None. The records are as those of `examples`, with ids
    that count them.
    """
    found: dict[str, Judged] = {}
    for answer in answers:
        if _imitable(answer) and (text := abridge(answer.text)) is not None:
            found.setdefault(text, answer)
    ids = [{"id": f"{problem.id}#{number}"} for number in range(len(found))]
    return [
        (
            _record(problem) | own | {"solution": text},
            _provenance(problem, answers, answer, origin) | own | {"text": answer.text},
        )
        for own, (text, answer) in zip(ids, found.items(), strict=True)
    ]


def pairs(problem: Problem, answers: Sequence[Judged], *, origin: Mapping[str, Any]) -> list[tuple[dict, dict]]:
    """[(record, provenance)] of all preferences among the answers; the record is one that `read_pairs` takes."""
    chosen = shortest(answers)
    found = []
    for reason, answer in rejected(answers, chosen) if chosen else ():
        sides = {"chosen": chosen.text, "rejected": answer.text, "rejected_ends": answer.stop == StopReason.END}
        facts = {"because": reason, "rejected_serial": answer.serial, "rejected_tokens": answer.tokens}
        found.append((_record(problem) | sides, _provenance(problem, answers, chosen, origin) | facts))
    return found


def _record(problem: Problem) -> dict[str, Any]:
    return {name: getattr(problem, name) for name in ("id", "task", "prompt", "answer", "difficulty")}


def _provenance(
    problem: Problem, answers: Sequence[Judged], chosen: Judged, origin: Mapping[str, Any]
) -> dict[str, Any]:
    return {
        "id": problem.id,
        **origin,
        "n": len(answers),
        "serial": chosen.serial,
        "tokens": chosen.tokens,
        "verdict": chosen.outcome,
        "lengths": [answer.tokens for answer in answers],
        "verdicts": [answer.outcome for answer in answers],
    }


# --- pairs from a file ------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False)
class Pair:
    problem: Problem
    chosen: str
    rejected: str
    rejected_ends: bool  # false: it was cut, so its last token is not an end


def read_pairs(path: str | pathlib.Path) -> list[Pair]:
    """Pairs from a file, one JSON record per line: a problem as `tasks.base.problem_from_record` reads it, `chosen`,
    `rejected`, and perhaps `rejected_ends`. Image paths are relative to the file's folder.

    Raises FileNotFoundError, and ValueError with file and line number: malformed records, sides that are equal.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no file of pairs {path}. scripts/long2short.py dpo-pairs writes one.")
    found = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1):
        if line.strip():
            try:
                found.append(_pair(json.loads(line), path.parent))
            except ValueError as error:  # json.JSONDecodeError is one
                raise ValueError(f"{path}, line {number}: {error}") from error
    if not found:
        raise ValueError(f"{path} has no pairs: give one JSON record per line.")
    return found


def _pair(record: Any, folder: pathlib.Path) -> Pair:
    if not isinstance(record, dict):
        raise ValueError(f"a pair is an object with a problem, 'chosen' and 'rejected', not {record!r:.60}")
    chosen, rejected = sides = [record.pop(side, None) for side in _SIDES]
    ends = record.pop("rejected_ends", True)
    name = f"pair {record.get('id', '(without id)')!r}"
    for side, text in zip(_SIDES, sides, strict=True):
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"{name}: {side!r} must be a text that is not empty, got {text!r:.60}")
    if not isinstance(ends, bool):
        raise ValueError(f"{name}: 'rejected_ends' must be true or false, got {ends!r:.60}")
    if chosen == rejected:
        raise ValueError(f"{name}: 'chosen' and 'rejected' are the same text, so nothing is preferred; drop the pair")
    return Pair(problem_from_record(record, folder=folder), chosen, rejected, ends)
