"""Problems that ask the same as another one, or as one of an evaluation set.

The same problem comes in other words, and another problem in the same words: "compute 3+4" and "compute 3+5", or one
question about two pictures. So what must agree exactly goes first, the numbers and operators in the text and the
pictures; then the remaining words must be alike, and the answers equal.

    same id                                                             a copy: the id is the canonical content
    same pictures, numbers and operators:
        same words, in the same order                                   a copy
        similar words (Jaccard, rare ones count more), same answer      a copy

Among many problems with the same numbers, MinHash finds the pairs that are worth comparing, and every one is compared.
"""

import collections
import dataclasses
import hashlib
import math
import re
import unicodedata
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from PIL import Image

from kimi_jax.tasks.base import ANSWER_MARKER, normalize_answer
from kimi_jax.types import IMAGE_MARKER, Outcome, Problem, Verdict

_FEW = 48  # problems that are compared each with each; more go through MinHash
_BANDS, _ROWS = 42, 3  # a pair with Jaccard similarity s is looked at with probability 1 - (1 - s³)⁴²: 0.94 for 0.4
_THUMBNAIL = 16  # pixels a side
_MEAN, _MOST = 4, 40  # levels of 0..255 by which thumbnails of the same picture differ, on average and at most


@dataclasses.dataclass(frozen=True)
class Copy:
    """Of which problem something is a copy. `origin`: "duplicate", or "contaminated" if that one is for evaluation."""

    origin: str
    of: str  # its id
    similarity: float  # 1 for the same id or words


def find_copies(
    problems: Sequence[Problem],
    evaluation: Sequence[Problem],
    *,
    similarity: float,
    verify: Callable[[Problem, str], Verdict],
) -> dict[int, Copy]:
    """{index among `problems`: what it is a copy of}. Of several copies the first is not one.

    similarity: Jaccard, from which on words count as alike. verify: says whether an answer in another form is equal.
    """
    everything = [*evaluation, *problems]
    readings = [read(problem.prompt) for problem in everything]
    document_frequency = collections.Counter(shingle for reading in readings for shingle in reading.shingles)
    weights = {shingle: math.log1p(len(everything) / n) for shingle, n in document_frequency.items()}

    found: dict[int, Copy] = {}  # by index in `everything`
    first: dict[str, int] = {}
    for i, problem in enumerate(everything):
        if i >= len(evaluation) and problem.id in first:
            found[i] = _copy(everything, first[problem.id], 1.0, len(evaluation))
        first.setdefault(problem.id, i)

    for members in _comparable(everything, readings):
        index = _Index(members, readings)
        for i in members:
            if i in found:
                continue
            if i >= len(evaluation):
                best, score = None, 0.0
                for j in index.near(i):
                    if readings[i].words == readings[j].words and _same_pixels(everything[i], everything[j]):
                        best, score = j, 1.0
                        break
                    s = _jaccard(readings[i].shingles, readings[j].shingles, weights)
                    if s >= similarity and s > score and same_answer(everything[i], everything[j], verify):
                        best, score = j, s
                if best is not None:
                    found[i] = _copy(everything, best, score, len(evaluation))
                    continue
            index.insert(i)
    return {i - len(evaluation): copy for i, copy in found.items()}


def _copy(everything: Sequence[Problem], of: int, similarity: float, evaluation: int) -> Copy:
    return Copy("contaminated" if of < evaluation else "duplicate", everything[of].id, similarity)


def same_answer(a: Problem, b: Problem, verify: Callable[[Problem, str], Verdict]) -> bool:
    if normalize_answer(a.answer) == normalize_answer(b.answer):
        return True
    return verify(a, f"{ANSWER_MARKER} {b.answer}").outcome == Outcome.CORRECT


# --- words ------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Reading:
    words: tuple[str, ...]  # everything but punctuation, in order
    numbers: tuple[str, ...]  # the numbers and operators among them, sorted
    shingles: frozenset[str]  # one or two words in sequence, without those that only ask


_SYNONYMS = (
    (r"\\[dt]?frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}", r" \1/\2 "),
    (r"\\(?:times|cdot|ast)\b|[×·∙⋅]|\bmultiplied by\b|\btimes\b", "*"),
    (r"\\div\b|[÷⁄∕]|\bdivided by\b", "/"),
    (r"[−–—]|\bminus\b", "-"),
    (r"\bplus\b", "+"),
    (r"\*\*", "^"),
    (r"\\leq?\b|≤", "<="),
    (r"\\geq?\b|≥", ">="),
    (r"√", " sqrt "),
    (r"\\(?:left|right|text|mathrm|mathbf|displaystyle|quad|qquad)\b|\\[,!;: ]", " "),
    (r"(?<=\d),(?=\d{3}(?!\d))", ""),  # 1,000
    (r"(\.\d*?)0+(?!\d)", r"\1"),  # 2.50
    # The number of the question and its points are no part of it.
    (r"^\s*(?:(?:problem|question|exercise|example|q|no\.?|例|问题|题目?)\s*)?\d+\s*[.):、]\s*(?!\d)", ""),
    (r"\(\s*(?:本[小大]?题)?(?:满分)?\s*\d+\s*(?:points?|pts?|marks?|分)\s*\)", ""),
    (r"(?<=[^\W\d_]{2})[-/]|[-/](?=[^\W\d_]{2})", " "),  # two-digit, km/h: nothing to be computed
    (r"=\s*(?=[?？\s_]*$)", ""),
)
_COUNTS = "two three four five six seven eight nine ten eleven twelve".split()
_NUMBERS = {word: str(n) for n, word in enumerate(_COUNTS, start=2)}
_TOKEN = re.compile(r"\d+(?:\.\d+)?|[\u3400-\u9fff]|[^\W\d_]+|<=|>=|[-+*/^=<>!%()]")
_OPERATORS = frozenset("+-*/^")
# What asks, and says nothing about what for.
_ASKING = re.compile(
    r"请问?|计算|求出?|的值|结果|是多少|等于|多少|什么|下列|以下|如图所示|所示|解答|直接|写出|给出|答案|吗|呢"
    r"|\b(?:please|compute|calculate|evaluate|find|determine|solve|simplify|what|which|is|are|was|were|be|the|a|an|of|to"
    r"|value|result|answer|give|tell|me|us|following|expression|work|out|equal|equals|do|does|did|you|can|could|your|my"
    r"|how|many|much|there|here|in|on|at|for|that|this|it|its|will|would|by|with|from|and|get|write|down|final)\b"
)


def read(text: str) -> Reading:
    """A text as far as copies are concerned: case, punctuation, spelling of numbers and LaTeX make no difference."""
    text = unicodedata.normalize("NFKC", text.replace(IMAGE_MARKER, " ")).casefold()
    for pattern, replacement in _SYNONYMS:
        text = re.sub(pattern, replacement, text)
    words = _tokens(text)
    content = _tokens(_ASKING.sub(" ", text)) or words
    pairs = [f"{a} {b}" for a, b in zip(content[:-1], content[1:], strict=True)]
    numbers = sorted(word for word in words if word in _OPERATORS or word[0].isdigit())
    return Reading(tuple(words), tuple(numbers), frozenset([*content, *pairs]))


def _tokens(text: str) -> list[str]:
    return [_NUMBERS.get(token, token) for token in _TOKEN.findall(text)]


def _jaccard(a: frozenset[str], b: frozenset[str], weights: dict[str, float]) -> float:
    total = lambda shingles: sum(weights[shingle] for shingle in shingles)  # noqa: E731
    return total(a & b) / total(a | b) if a or b else 1.0


class _Index:
    """Of some readings those seen so far, to be asked for similar ones."""

    def __init__(self, members: Sequence[int], readings: Sequence[Reading]):
        self._seen: list[int] = []
        self._sketches: dict[int, Any] = {}
        if len(members) > _FEW:
            from datasketch import MinHash, MinHashLSH

            self._lsh = MinHashLSH(num_perm=_BANDS * _ROWS, params=(_BANDS, _ROWS))
            texts = [[shingle.encode() for shingle in readings[i].shingles] for i in members]
            self._sketches = dict(zip(members, MinHash.bulk(texts, num_perm=_BANDS * _ROWS, seed=1), strict=True))

    def near(self, i: int) -> list[int]:
        return sorted(self._lsh.query(self._sketches[i])) if self._sketches else self._seen

    def insert(self, i: int) -> None:
        if self._sketches:
            self._lsh.insert(i, self._sketches[i])
        else:
            self._seen.append(i)


# --- pictures ---------------------------------------------------------------------------------------------------------


def _comparable(problems: Sequence[Problem], readings: Sequence[Reading]) -> list[list[int]]:
    """Indices of problems with the same numbers and pictures, in groups of two and more."""
    blocks = collections.defaultdict(list)
    for i, (problem, reading) in enumerate(zip(problems, readings, strict=True)):
        blocks[reading.numbers, len(problem.images)].append(i)
    groups: list[list[int]] = []
    for (_, images), members in blocks.items():
        if images and len(members) > 1:
            shown = collections.defaultdict(list)
            for i, picture in zip(members, group_pictures([problems[i].images for i in members]), strict=True):
                shown[picture].append(i)
            groups += shown.values()
        else:
            groups.append(members)
    return [members for members in groups if len(members) > 1]


def group_pictures(shown: Sequence[Sequence[np.ndarray]]) -> list[int]:
    """For each list of pictures (all of them equally long) the number of one that shows the same.

    The same are those that were only scaled or compressed, as far as thumbnails tell.
    """
    thumbnails = np.stack([np.concatenate([_thumbnail(image) for image in images]) for images in shown])
    means = thumbnails.mean(axis=1)
    order = np.argsort(means, kind="stable")
    leaders = list(range(len(shown)))
    for position, i in enumerate(order):
        # The means of two differ by no more than their pixels do on average: only neighbours in this order are alike.
        begin = np.searchsorted(means[order[:position]], means[i] - _MEAN)
        others = order[begin:position]
        differences = np.abs(thumbnails[others] - thumbnails[i])
        alike = others[
            (differences.max(axis=1, initial=0) <= _MOST) & (differences.sum(axis=1) <= _MEAN * thumbnails.shape[1])
        ]
        if len(alike):
            leaders[i] = leaders[alike[0]]
    return leaders


def _thumbnail(image: np.ndarray) -> np.ndarray:
    small = Image.fromarray(image).resize((_THUMBNAIL, _THUMBNAIL), Image.Resampling.BOX)
    return np.asarray(small, np.int16).ravel()


def picture_digest(problem: Problem) -> str:
    """Of the exact pixels of all its images; "" without any."""
    digest = hashlib.blake2b(digest_size=12)
    for image in problem.images:
        digest.update(repr(image.shape).encode() + np.ascontiguousarray(image).tobytes())
    return digest.hexdigest() if problem.images else ""


def _same_pixels(a: Problem, b: Problem) -> bool:
    return picture_digest(a) == picture_digest(b)
