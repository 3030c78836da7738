"""The frontier against brute force, and which checkpoint is chosen."""

import numpy as np
import pytest
from PIL import Image

from kimi_jax.long2short.frontier import Point, choose, draw, frontier

POINTS = [
    Point("long", 0.92, 310.0, "a/rl/9"),
    Point("longer", 0.92, 340.0, "a/rl/10"),
    Point("gone", 0.95, 300.0, ""),
    Point("balanced", 0.905, 170.0, "b/rl/3"),
    Point("as short", 0.90, 170.0, "c/rl/3"),
    Point("short", 0.70, 60.0, "b/sft/1"),
    Point("bad", 0.60, 200.0, "d/sft/1"),
]


def test_the_frontier_by_hand():
    assert [point.name for point in frontier(POINTS)] == ["short", "balanced", "gone"]


@pytest.mark.parametrize("seed", range(5))
def test_the_frontier_by_brute_force(seed):
    rng = np.random.default_rng(seed)
    points = [Point(str(i), rng.integers(7) / 7, float(rng.integers(11)), "x") for i in range(31)]
    found = frontier(points)
    for point in points:
        better = [p for p in points if p.tokens <= point.tokens and p.accuracy >= point.accuracy]
        beaten = any(p.tokens != point.tokens or p.accuracy != point.accuracy for p in better)
        assert (point in found) == (not beaten)
    assert [p.tokens for p in found] == sorted(p.tokens for p in found)


@pytest.mark.parametrize("tolerance, name", [(0.0, "long"), (0.02, "balanced"), (0.018, "balanced"), (0.3, "short")])
def test_the_fewest_tokens_within_the_tolerance(tolerance, name):
    assert choose(POINTS, tolerance=tolerance).name == name
    assert choose(POINTS[::-1], tolerance=tolerance).name == name


def test_without_a_checkpoint_there_is_nothing_to_start_from():
    with pytest.raises(ValueError, match="None of 1 measurements .*keep_last"):
        choose([POINTS[2]], tolerance=0.1)


def test_the_picture(tmp_path):
    draw(POINTS, POINTS[3], tmp_path / "new" / "frontier.png")
    with Image.open(tmp_path / "new" / "frontier.png") as picture:
        pixels = np.asarray(picture.convert("RGB")).reshape(-1, 3)
    for color in ((0x1F, 0x6F, 0xEB), (0xD9, 0x73, 0x0D)):
        assert (pixels == color).all(axis=1).sum() > 20
