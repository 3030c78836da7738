import grain
import numpy as np
import pytest

from kimi_jax.data.mixture import choose, mixed, shares

RISING = {"text": ((0, 0.8),), "images": ((0, 0.0), (700, 0.0), (1_400, 0.3)), "rest": ((0, 0.2), (1_400, 0.1))}


@pytest.mark.parametrize("seed", [0, 7])
def test_shares_over_100k_draws_keep_to_the_schedule(seed):
    """Over all of them, and in every window of 1,000: far within half a point."""
    steps, rows = 3_126, 32
    sources, _ = choose(RISING, steps=steps, rows_per_step=rows, seed=seed)
    assert len(sources) == steps * rows > 100_000
    for index, (name, schedule) in enumerate(RISING.items()):
        weights = {n: np.interp(np.arange(steps), *zip(*s, strict=True)) for n, s in RISING.items()}
        expected = np.repeat(weights[name] / sum(weights.values()), rows)
        drawn = sources == index
        assert abs(drawn.mean() - expected.mean()) < 1e-4
        behind = np.abs(np.cumsum(drawn) - np.cumsum(expected))
        assert behind.max() < 20, schedule
        for start in range(0, len(drawn) - 1_000, 997):
            window = slice(start, start + 1_000)
            assert abs(drawn[window].mean() - expected[window].mean()) < 5e-3


def test_a_source_of_no_weight_is_never_drawn():
    for names in (("a", "b"), ("b", "a")):
        weights = {name: ((0, 0.0 if name == "a" else 0.3),) for name in names}
        sources, _ = choose(weights, steps=997, rows_per_step=101, seed=3)
        assert set(sources.tolist()) == {names.index("b")}


def test_neighbours_are_not_alike():
    """Shares alone could be had by taking turns in blocks."""
    sources, _ = choose({"a": ((0, 1.0),), "b": ((0, 1.0),)}, steps=1_009, rows_per_step=1, seed=0)
    runs = np.diff(np.flatnonzero(np.diff(sources)))
    assert runs.max() <= 2


def test_the_seed_decides_and_the_length_of_the_run_does_not():
    short, places = choose(RISING, steps=29, rows_per_step=7, seed=5)
    long, more = choose(RISING, steps=2_003, rows_per_step=7, seed=5)
    np.testing.assert_array_equal(short, long[: len(short)])
    np.testing.assert_array_equal(places, more[: len(short)])
    other, _ = choose(RISING, steps=2_003, rows_per_step=7, seed=6)
    assert (other != long).any()


def endless(name, count, seed):
    return grain.MapDataset.source([f"{name}{i}" for i in range(count)]).seed(seed).shuffle().repeat(None)


def test_each_source_is_read_epoch_by_epoch_with_nothing_twice_and_nothing_skipped_across_a_resume():
    weights = {"a": ((0, 1.0), (90, 3.0)), "b": ((0, 2.0),)}
    make = lambda: mixed(  # noqa: E731
        {"b": endless("b", 13, 1), "a": endless("a", 31, 2)}, weights, steps=97, rows_per_step=5, seed=11
    )
    steps = make().batch(5, batch_fn=list)
    assert len(steps) == 97
    resumed = [*list(iter(steps))[:41], *list(iter(make().batch(5, batch_fn=list)[41:]))]
    stream = [row for step in resumed for row in step]
    assert stream == list(make())
    for name, count in (("a", 31), ("b", 13)):
        own = [row for row in stream if row[0] == name]
        epochs = [own[start : start + count] for start in range(0, len(own), count)]
        assert len(epochs) > 5
        for epoch in epochs[:-1]:
            assert sorted(epoch) == sorted(f"{name}{i}" for i in range(count))
        assert len(set(epochs[-1])) == len(epochs[-1])
        assert epochs[0] != epochs[1]


@pytest.mark.parametrize(
    "weights, told",
    [
        ({"a": ((0, 1.0),), "c": ((0, 1.0),)}, "the mixture names a, c, but there are the sources a, b"),
        ({"a": ((0, 1.0),)}, "names a, but there are the sources a, b"),
        ({"a": ((0, 1.0),), "b": ((0, -0.1),)}, "weight of 'b' is -0.1"),
        ({"a": ((0, 1.0),), "b": ((0, float("nan")),)}, "weight of 'b' is nan"),
        ({"a": ((0, 1.0), (4, 0.0)), "b": ((0, 0.0),)}, "weights of a, b sum to zero at step 4"),
        ({"a": ((0, 1.0),), "b": ((4, 1.0), (4, 2.0))}, r"'b' changes at the steps \[4, 4\]"),
        ({"a": (), "b": ((0, 1.0),)}, r"'a' changes at the steps \[\]"),
    ],
)
def test_what_is_no_mixture(weights, told):
    sources = {"a": endless("a", 3, 0), "b": endless("b", 3, 0)}
    with pytest.raises(ValueError, match=told):
        mixed(sources, weights, steps=7, rows_per_step=2, seed=0)
    with pytest.raises(ValueError, match="at least one source"):
        shares({}, 3)
