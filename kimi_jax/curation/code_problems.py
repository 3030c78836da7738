"""Code problems before they have tests: a statement and submissions, from a file with one JSON record per line."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kimi_jax.rewards.sandbox.api import JudgeRequest, Test, check
from kimi_jax.rewards.sandbox.languages import LANGUAGES


@dataclasses.dataclass(frozen=True)
class Submission:
    language: str
    code: str


@dataclasses.dataclass(frozen=True)
class Control:
    """A submission of which one knows whether it is right. It has no vote; it shows how good the tests are."""

    submission: Submission
    right: bool
    note: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class CodeProblem:
    """A problem without tests: programs read the input from stdin and write the output to stdout."""

    id: str
    statement: str
    submissions: tuple[Submission, ...]  # most of them right
    generator: str = ""  # source (`generators`)
    special_judge: bool = False  # several outputs are right, so that votes mean nothing
    language: str = ""  # in which it must be solved; "": the default of `rewards.code`
    time_limit_s: float
    memory_limit_mb: int
    tolerance: float = 0.0  # of numbers in the output, absolute or relative
    controls: tuple[Control, ...] = ()


_KINDS: dict[str, tuple[type, ...]] = {
    "id": (str,),
    "statement": (str,),
    "submissions": (list,),
    "generator": (str,),
    "special_judge": (bool,),
    "language": (str,),
    "time_limit_s": (float, int),
    "memory_limit_mb": (int,),
    "tolerance": (float, int),
    "controls": (list,),
}
_REQUIRED = ("id", "statement", "submissions")


def from_record(record: Any, *, time_limit_s: float, memory_limit_mb: int) -> CodeProblem:
    """A problem from its JSON record, whose fields are those of `CodeProblem`, with submissions
    `{"language", "code"}` and controls `{"language", "code", "right", "note"}`.

    Args:
        time_limit_s, memory_limit_mb: where the record has none.

    Raises:
        ValueError: names the record, the field and the remedy.
    """
    if not isinstance(record, Mapping):
        raise ValueError(f"a record must be an object with {', '.join(_KINDS)}, got {type(record).__name__}")
    name = f"record {record.get('id', '(without id)')!r:.60}"
    _check_fields(record, _KINDS, _REQUIRED, name)
    if record.get("language") and record["language"] not in LANGUAGES:
        raise ValueError(f"{name}: language is {record['language']!r:.60}; known are {', '.join(LANGUAGES)}")
    problem = CodeProblem(
        **{
            "time_limit_s": time_limit_s,
            "memory_limit_mb": memory_limit_mb,
            **record,
            "submissions": tuple(
                _submission(item, f"{name}: submissions[{i}]") for i, item in enumerate(record["submissions"])
            ),
            "controls": tuple(
                _control(item, f"{name}: controls[{i}]") for i, item in enumerate(record.get("controls", ()))
            ),
        }
    )
    request = JudgeRequest(
        language="python",
        code="",
        tests=[Test(expected="")],
        time_limit_s=problem.time_limit_s,
        memory_limit_mb=problem.memory_limit_mb,
        tolerance=problem.tolerance,
    )
    try:
        check(request)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    return problem


def read(path: str | Path, *, time_limit_s: float, memory_limit_mb: int) -> list[CodeProblem]:
    """All problems of a file, with the limits for those that have none.

    Raises:
        ValueError: with file and line number, for a malformed record, an id that an earlier line has, or an empty file.
    """
    path = Path(path)
    problems: dict[str, CodeProblem] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1):
        if not line.strip():
            continue
        try:
            problem = from_record(json.loads(line), time_limit_s=time_limit_s, memory_limit_mb=memory_limit_mb)
            if problem.id in problems:
                raise ValueError(f"record {problem.id!r}: an earlier line has this id; remove one of the two")
        except ValueError as error:  # json.JSONDecodeError is one
            raise ValueError(f"{path}, line {number}: {error}") from error
        problems[problem.id] = problem
    if not problems:
        raise ValueError(f"{path} has no records; give one JSON object with {', '.join(_REQUIRED)} per line")
    return list(problems.values())


def _submission(item: Any, name: str) -> Submission:
    _check_fields(item, {"language": (str,), "code": (str,)}, ("language", "code"), name)
    if item["language"] not in LANGUAGES:
        raise ValueError(f"{name}: language is {item['language']!r:.60}; known are {', '.join(LANGUAGES)}")
    return Submission(**item)


def _control(item: Any, name: str) -> Control:
    kinds = {"language": (str,), "code": (str,), "right": (bool,), "note": (str,)}
    _check_fields(item, kinds, ("language", "code", "right"), name)
    submission = _submission({"language": item["language"], "code": item["code"]}, name)
    return Control(submission, item["right"], item.get("note", ""))


def _check_fields(item: Any, kinds: Mapping[str, tuple[type, ...]], required: tuple[str, ...], name: str) -> None:
    if not isinstance(item, Mapping):
        raise ValueError(f"{name} must be an object with {', '.join(kinds)}, got {item!r:.60}")
    if unknown := [field for field in item if field not in kinds]:
        raise ValueError(f"{name}: unknown field {unknown[0]!r}; known are {', '.join(kinds)}: rename or remove it")
    if missing := [field for field in required if field not in item]:
        raise ValueError(f"{name}: field {missing[0]!r} is missing; {', '.join(required)} are needed")
    for field, value in item.items():
        kind = kinds[field]
        if not isinstance(value, kind) or (isinstance(value, bool) and bool not in kind):
            raise ValueError(f"{name}: field {field!r} must be of type {kind[0].__name__}, got {value!r:.60}")
        if field in required and isinstance(value, str) and not value.strip():
            raise ValueError(f"{name}: field {field!r} is empty; give it a value or drop the record")
