"""What a task is, how its problems are drawn and split, and the verdict rule that most tasks share.

A task draws problems with a known answer and a worked solution, and judges responses by an exact rule (k1.5 §2.1:
prompts whose answers can be verified). Training and held-out problems are separated by a hash of their content, so that
no seed, order or number of problems can move one across.
"""

import hashlib
import io
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from kimi_jax.types import IMAGE_MARKER, Outcome, Problem, Verdict

ANSWER_MARKER = "Answer:"
SPLITS = ("train", "heldout")
_HELDOUT_ONE_IN = 5
_MAX_FRUITLESS_DRAWS = 2000  # in a row; then a difficulty counts as used up
_INTEGER = re.compile(r"[+-]?[0-9]{1,30}")


@dataclass(frozen=True)
class Task:
    """A family of problems. `kind` is "text" or "image"; it groups tasks in the table of results."""

    name: str
    kind: str
    difficulties: tuple[int, ...]
    draw: Callable[[np.random.Generator, int], Problem]  # a random problem of one difficulty, with its worked solution
    verify: Callable[[Problem, str], Verdict]  # of a problem and the text of a response
    abridge: Callable[[str], str | None] | None = None  # a response with the same reasoning in fewer tokens, if it can


# --- problems -------------------------------------------------------------------------------------------------------


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def split_of(problem_id: str) -> str:
    """Which split an id belongs to: "heldout" for one in five, else "train". A function of the content alone."""
    return "heldout" if _hash(problem_id) % _HELDOUT_ONE_IN == 0 else "train"


def make_problems(
    task: Task, *, split: str, count: int, seed: int, difficulties: Sequence[int] | None = None
) -> list[Problem]:
    """Draws `count` problems with distinct ids, the difficulties taking turns; equal arguments give equal problems.

    Args:
        task: where to draw from; tasks (and splits) use independent random streams under one seed.
        split: "train" or "heldout".
        count: how many.
        seed: not negative.
        difficulties: a selection of `task.difficulties`; all by default. One whose problems run out leaves its turns to
            the others.

    Raises:
        ValueError: unknown split or difficulty, or fewer than `count` distinct problems exist.
    """
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}; it must be one of {', '.join(SPLITS)}")
    if count < 0 or seed < 0:
        raise ValueError(f"count and seed must not be negative, got count={count}, seed={seed}")
    wanted = list(task.difficulties if difficulties is None else difficulties)
    if not wanted or not set(wanted) <= set(task.difficulties):
        raise ValueError(f"task {task.name!r} has difficulties {task.difficulties}, not {wanted}; choose some of them")

    rng = np.random.default_rng([seed, _hash(task.name), SPLITS.index(split)])
    problems: dict[str, Problem] = {}
    while len(problems) < count:
        turn = wanted[len(problems) % len(wanted)]
        for _ in range(_MAX_FRUITLESS_DRAWS):
            problem = task.draw(rng, turn)
            if problem.id not in problems and split_of(problem.id) == split:
                problems[problem.id] = problem
                break
        else:
            wanted.remove(turn)
            if not wanted:
                raise ValueError(
                    f"task {task.name!r} has only {len(problems)} distinct {split} problems of the {count} asked for; "
                    f"ask for fewer, or allow more of its difficulties {task.difficulties}"
                )
    return list(problems.values())


# --- the shared verdict rule ----------------------------------------------------------------------------------------


def extract_answer(text: str) -> str | None:
    """What follows the last "Answer:" on its line, without a final period; None where nothing does."""
    _, marker, rest = text.rpartition(ANSWER_MARKER)
    answer = rest.partition("\n")[0].strip().removesuffix(".").rstrip()
    return answer if marker and answer else None


def final_answer(text: str) -> tuple[str | None, str]:
    """(answer, "") of a response that commits to one answer; (None, why) otherwise. Several "Answer:" are a hedge."""
    found = text.count(ANSWER_MARKER)
    if found > 1:
        return None, f"{found} times {ANSWER_MARKER!r}; one is allowed"
    answer = extract_answer(text)
    return answer, "" if answer else f"no text after {ANSWER_MARKER!r}"


def normalize_answer(answer: str) -> int | str:
    """An integer where the answer is one ("07" is 7), else the text with its white space made uniform."""
    answer = " ".join(answer.split())
    return int(answer) if _INTEGER.fullmatch(answer) else answer


def verify_exact(problem: Problem, text: str) -> Verdict:
    """Correct if and only if the response has exactly one "Answer:", followed by the reference answer."""
    answer, why = final_answer(text)
    if answer is None:
        return Verdict(Outcome.WRONG, why, well_formed=False)
    correct = normalize_answer(answer) == normalize_answer(problem.answer)
    return Verdict(Outcome.CORRECT if correct else Outcome.WRONG, answer)


# --- problems from records ------------------------------------------------------------------------------------------

_FIELDS = {"id": str, "task": str, "prompt": str, "answer": str, "difficulty": int, "solution": str, "images": Sequence}
_REQUIRED = ("id", "task", "prompt", "answer")


def problem_from_record(record: Mapping[str, Any], *, folder: str | Path = ".") -> Problem:
    """Builds a problem from a JSON-like record, or says what is wrong with it.

    Args:
        record: `id`, `task`, `prompt`, `answer` (text, not empty), and optionally `difficulty` (integer), `solution`
            (text), `images` (a list of file names or of encoded images, one per marker in the prompt).
        folder: what relative file names are relative to.

    Raises:
        ValueError: names the record, the field and the remedy.
    """
    if not isinstance(record, Mapping):
        raise ValueError(f"a problem record must be a dict of {', '.join(_FIELDS)}, got {type(record).__name__}")
    name = f"problem record {record.get('id', '(without id)')!r}"
    if unknown := [field for field in record if field not in _FIELDS]:
        raise ValueError(f"{name}: unknown field {unknown[0]!r}; allowed are {', '.join(_FIELDS)}: rename or remove it")
    if missing := [field for field in _REQUIRED if field not in record]:
        raise ValueError(f"{name}: field {missing[0]!r} is missing; every record needs {', '.join(_REQUIRED)}")
    for field, kind in _FIELDS.items():
        if field not in record:
            continue
        value: Any = record[field]
        impostors = (bool, str, bytes) if kind is Sequence else (bool,)  # they pass for a sequence, or an integer
        if not isinstance(value, kind) or isinstance(value, impostors):
            expected = {str: "text", int: "an integer", Sequence: "a list of file names or encoded images"}[kind]
            raise ValueError(f"{name}: field {field!r} must be {expected}, got {type(value).__name__} {value!r:.80}")
        if field in _REQUIRED and not str(value).strip():
            raise ValueError(f"{name}: field {field!r} is empty; give it a value or drop the record")
        if kind is str and not _is_unicode(str(value)):
            raise ValueError(f"{name}: field {field!r} has half of a surrogate pair, which is no character; remove it")
    images = record.get("images", ())
    if (markers := record["prompt"].count(IMAGE_MARKER)) != len(images):
        raise ValueError(
            f"{name}: field 'prompt' has {IMAGE_MARKER} {markers} times and 'images' has {len(images)} images; "
            f"write {IMAGE_MARKER} once per image"
        )
    pixels = tuple(_read_image(image, Path(folder), f"{name}: images[{i}]") for i, image in enumerate(images))
    return Problem(**{**record, "images": pixels})


def _is_unicode(text: str) -> bool:
    return not any("\ud800" <= character <= "\udfff" for character in text)


def _read_image(source: str | bytes, folder: Path, name: str) -> np.ndarray:
    if isinstance(source, str):
        path = folder / source
        name = f"{name} ({path})"
        if not path.is_file():
            raise ValueError(f"{name}: no such file; correct the path, which is relative to {folder.resolve()}")
        source = path.read_bytes()
    elif not isinstance(source, bytes):
        raise ValueError(f"{name}: must be a file name or the bytes of an encoded image, got {type(source).__name__}")
    try:
        with Image.open(io.BytesIO(source)) as image:
            return np.asarray(image.convert("RGB"))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{name}: not a readable image ({error}); write it again, as PNG for example") from error


def read_problems(path: str | Path) -> list[Problem]:
    """Reads problems from a file with one JSON record per line; image paths are relative to the file's folder.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: with file and line number, for a malformed record and for an id that a line before it has.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path} of problems, one JSON record per line")
    problems: dict[str, Problem] = {}
    for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            problem = problem_from_record(json.loads(line), folder=path.parent)
            if problem.id in problems:
                raise ValueError(f"problem record {problem.id!r}: an earlier line has this id; remove one of the two")
        except (ValueError, RecursionError) as error:  # of bytes that are not UTF-8, and of JSON, too
            raise ValueError(f"{path}, line {number}: {error}") from error
        problems[problem.id] = problem
    return list(problems.values())
