"""Accuracy against tokens: which checkpoints no other one beats in both, and where long2short RL starts (k1.5 §2.4).

The report starts it from the model with the best balance of the two and does not say how that is weighed. Here: among
the checkpoints whose accuracy is within a tolerance of the best, the one with the fewest tokens.
"""

import dataclasses
import itertools
import math
import os
import pathlib
from collections.abc import Sequence

import matplotlib.figure
import matplotlib.ticker


@dataclasses.dataclass(frozen=True)
class Point:
    """How a model did on held-out problems. checkpoint: "" if it is not there any more."""

    name: str
    accuracy: float  # pass@1, sampled
    tokens: float  # mean length of a response
    checkpoint: str


def frontier(points: Sequence[Point]) -> list[Point]:
    """Those that no other point beats: at most its tokens, at least its accuracy, one of them strictly. By tokens."""
    beats = lambda a, b: (  # noqa: E731
        a.tokens <= b.tokens and a.accuracy >= b.accuracy and (a.tokens < b.tokens or a.accuracy > b.accuracy)
    )
    best = [point for point in points if not any(beats(other, point) for other in points)]
    return sorted(best, key=lambda point: (point.tokens, point.accuracy))


def choose(points: Sequence[Point], *, tolerance: float) -> Point:
    """The point with the fewest tokens among those that have a checkpoint and an accuracy of at least that of the best
    of them less `tolerance`; of equal ones the most accurate. Raises ValueError if none has a checkpoint."""
    there = [point for point in points if point.checkpoint]
    if not there:
        raise ValueError(
            f"None of {len(points)} measurements belongs to a checkpoint that is still there. Keep more of them "
            "(config.rl.keep_last, keep_best), or measure one: scripts/long2short.py evaluate."
        )
    least = max(point.accuracy for point in there) - tolerance
    return min((p for p in there if p.accuracy >= least), key=lambda point: (point.tokens, -point.accuracy))


def draw(points: Sequence[Point], chosen: Point, path: str | os.PathLike) -> None:
    """A PNG: points with their names, hollow where the checkpoint is gone; the frontier; a ring around the chosen."""
    figure = matplotlib.figure.Figure(figsize=(7.2, 4.5), layout="constrained")
    axes = figure.add_subplot()
    best = frontier(points)
    axes.step([p.tokens for p in best], [p.accuracy for p in best], where="post", color="#9aa3ae", zorder=1)
    points = sorted(points, key=lambda point: point.tokens)
    gaps = [right.tokens - left.tokens for left, right in itertools.pairwise(points)]
    for point, before, after in zip(points, [0.0, *gaps], [*gaps, math.inf], strict=True):
        face, at = "#1f6feb" if point.checkpoint else "none", (point.tokens, point.accuracy)
        axes.scatter(*at, s=36, facecolors=face, edgecolors="#1f6feb", zorder=2)
        side, x = ("right", -5) if after < before else ("left", 5)  # the name where there is more room for it
        axes.annotate(point.name, at, (x, -10), textcoords="offset points", fontsize=7, ha=side)
    axes.scatter(chosen.tokens, chosen.accuracy, s=150, facecolors="none", edgecolors="#d9730d", linewidths=2, zorder=3)
    axes.set(xlabel="Mean tokens per response", ylabel="Held-out accuracy, pass@1")
    axes.yaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1.0))
    axes.margins(0.12)
    axes.spines[["top", "right"]].set_visible(False)
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png", dpi=150)
