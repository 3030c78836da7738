"""Repeat detection against its definition, spelled out in loops over whole sequences."""

import functools
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kimi_jax.sampling import repetition
from kimi_jax.sampling.repetition import RepetitionSettings, RepetitionState
from kimi_jax.trainers.config import default_config

W = 13
SETTINGS = RepetitionSettings.of(min_tokens=11, repeats=3, span=5, share=0.8)


@functools.partial(jax.jit, static_argnames="window")
def scan(tokens, grow, settings, *, window):
    """All of [B, T] through `update`. Returns the states after every token [T, B, ...] and the alarms [T, B]."""

    def step(state, x):
        state, repeated = repetition.update(state, *x, settings)
        return state, (state, repeated)

    return jax.lax.scan(step, repetition.start(tokens.shape[0], window=window), (tokens.T, grow.T))[1]


@functools.partial(jax.jit, static_argnames="window")
def alarms(tokens, settings, *, window):
    """bool [B, T]."""

    def step(state, token):
        return repetition.update(state, token, jnp.ones_like(token, bool), settings)

    return jax.lax.scan(step, repetition.start(tokens.shape[0], window=window), tokens.T)[1].T


refresh = jax.jit(repetition.refresh)


def brute_force(x, settings, window):
    """Alarms of one sequence, by definition."""
    x, alarms, covered = x.tolist(), [], np.zeros(len(x), bool)
    for t in range(len(x)):
        loop = False
        for p in range(1, window + 1):
            run = 0
            while t - run - p >= 0 and x[t - run] == x[t - run - p]:
                run += 1
            loop |= run >= max(settings.min_tokens, (settings.repeats - 1) * p)
            if run >= settings.span:
                covered[t - settings.span + 1 : t + 1] = True
        share = np.float32(covered[max(0, t + 1 - window) : t + 1].sum() / window)
        alarms.append(loop or share >= settings.share)
    return np.array(alarms)


def random_text(rng, length):
    """Noise of a few letters, loops and copies from earlier on, one after the other."""
    x = list(rng.integers(0, 3, 7))
    while len(x) < length:
        kind, n = rng.integers(0, 3), int(rng.integers(2, 19))
        if kind == 0:
            x += list(rng.integers(0, 5, n))
        elif kind == 1:
            x += x[-int(rng.integers(1, 7)) :] * int(rng.integers(1, 9))
        else:
            at = int(rng.integers(max(0, len(x) - 17), len(x)))
            x += x[at : at + n]
    return np.array(x[:length], np.int32)


def random_texts(seed, rows=23, length=211):
    rng = np.random.default_rng(seed)
    return np.stack([random_text(rng, length) for _ in range(rows)])


def assert_equal(a: RepetitionState, b: RepetitionState):
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize(
    "settings",
    [
        SETTINGS,
        RepetitionSettings.of(min_tokens=10_000, repeats=3, span=3, share=0.9),  # copies alone
        RepetitionSettings.of(min_tokens=5, repeats=5, span=10_000, share=1.0),  # loops alone
        RepetitionSettings.of(min_tokens=7, repeats=2, span=17, share=1.0),  # a span longer than the window
    ],
)
def test_against_brute_force(settings):
    x = random_texts(0)
    want = np.stack([brute_force(row, settings, W) for row in x])
    assert 0.02 < want.mean() < 0.9  # both verdicts occur
    np.testing.assert_array_equal(alarms(x, settings, window=W), want)


@pytest.mark.parametrize("p", [1, 2, 3, 5, 7, 11, 13])
def test_every_period_is_caught_at_the_promised_token(p):
    settings = RepetitionSettings.of(min_tokens=11, repeats=3, span=1000, share=1.0)
    rng = np.random.default_rng(p)
    before = 100 + np.arange(29)
    x = np.concatenate([before, np.tile(rng.permutation(p), 40)])[None].astype(np.int32)
    found = np.flatnonzero(np.asarray(alarms(x, settings, window=W))[0])
    assert found[0] + 1 == len(before) + p + max(11, 2 * p)


def test_longer_periods_than_the_window_are_not_seen():
    x = np.tile(np.arange(W + 1, dtype=np.int32), 9)[None]
    assert not np.any(alarms(x, SETTINGS, window=W))


def test_rows_that_do_not_grow_stay_and_rows_are_independent():
    rng = np.random.default_rng(1)
    x = random_texts(2)
    grow = rng.random(x.shape) < 0.7
    states, repeated = scan(x, grow, SETTINGS, window=W)
    states, repeated = jax.device_get((states, repeated))
    for b in range(x.shape[0]):  # one at a time, without the pauses; padded at the end to one length
        n = grow[b].sum()
        dense = np.pad(x[b, grow[b]], (0, x.shape[1] - n))[None]
        alone, alone_repeated = jax.device_get(scan(dense, np.ones_like(dense, bool), SETTINGS, window=W))
        assert_equal(jax.tree.map(lambda s, b=b: s[-1, b], states), jax.tree.map(lambda s, n=n: s[n - 1, 0], alone))
        np.testing.assert_array_equal(repeated[grow[b], b], alone_repeated[:n, 0])
    assert not np.any(repeated.T[~grow])


@pytest.mark.parametrize(
    "settings",
    [
        SETTINGS,  # loops need the longest history
        RepetitionSettings.of(min_tokens=31, repeats=2, span=3, share=0.8),  # min_tokens does
        RepetitionSettings.of(min_tokens=2, repeats=2, span=7, share=0.8),  # copies do
    ],
)
def test_refresh_gives_the_state_of_stepping(settings):
    x = random_texts(3)
    states = jax.device_get(scan(x, np.ones_like(x, bool), settings, window=W)[0])
    B, T = x.shape
    other = jax.tree.map(lambda s: s[100], states)  # what the slots held before
    for seed in range(3):
        rng = np.random.default_rng(seed)
        rows = rng.permutation(B)[:17].astype(np.int32)
        cuts = rng.integers(0, T + 1, 17)
        cuts[:3] = 0, 1, T
        tails = repetition.tails([x[-1 - i, :n] for i, n in enumerate(cuts)], settings, window=W)
        rows[5] = B  # padding: dropped
        got = refresh(other, rows, tails, settings)
        want = jax.tree.map(np.array, other)
        for i, (row, n) in enumerate(zip(rows, cuts, strict=True)):
            if row == B:
                continue
            for name in ("recent", "runs", "covered"):
                stepped = getattr(states, name)[n - 1, -1 - i] if n else getattr(repetition.start(1, window=W), name)[0]
                getattr(want, name)[row] = stepped
        assert_equal(got, want)


def test_history_is_what_it_takes():
    """On loops of the longest period, one token less would change the state."""
    x = np.tile(np.arange(W, dtype=np.int32), 9)
    stepped = jax.tree.map(lambda s: s[-1], scan(x[None], np.ones((1, len(x)), bool), SETTINGS, window=W)[0])
    empty = repetition.start(1, window=W)
    tails = repetition.tails([x], SETTINGS, window=W)
    assert tails.shape == (1, repetition.history(SETTINGS, W)) == (1, W + 2 * W)
    assert_equal(refresh(empty, np.array([0]), tails, SETTINGS), stepped)
    short = refresh(empty, np.array([0]), tails[:, 1:], SETTINGS)
    assert short.runs[0, -1] == stepped.runs[0, -1] - 1


def test_other_thresholds_compile_nothing():
    x = random_texts(4)
    alarms(x, SETTINGS, window=W)
    before = alarms._cache_size()
    strict = alarms(x, RepetitionSettings.of(min_tokens=3, repeats=2, span=2, share=0.5), window=W)
    assert alarms._cache_size() == before
    assert strict.sum() > alarms(x, SETTINGS, window=W).sum()


def test_window_zero_is_off():
    x = np.zeros((3, 47), np.int32)
    assert not np.any(alarms(x, SETTINGS, window=0))
    state = repetition.start(3, window=0)
    tails = repetition.tails([x[0]], SETTINGS, window=0)
    assert refresh(state, np.array([1]), tails, SETTINGS).recent.shape == (3, 0)


DEFAULTS = dict(default_config().sampling.repetition)
WINDOW_OF_THE_LOG = DEFAULTS.pop("window") or 512


@pytest.mark.parametrize("bad", [{"min_tokens": 0}, {"repeats": 1}, {"span": 0}, {"share": 0.0}, {"share": 1.5}])
def test_bad_settings_are_named(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        RepetitionSettings.of(**DEFAULTS | bad)


def test_defaults_on_ordinary_and_on_looping_text():
    """As bytes. The figures of docs/log.md, by scripts/false_alarms.py, are the same on more text."""
    source = open(textwrap.__file__).read()
    check = "Wait, let me check the sum again: it is 42. "
    ordinary = [
        source,
        ", ".join(map(str, range(1, 2001))),
        "".join(f"{a} x {b} = {a * b}\n" for a in range(1, 31) for b in range(1, 21)),
        "| n | square |\n|---|---|\n" + "".join(f"| {n} | {n * n} |\n" for n in range(300)),
        ("-" * 79 + "\n").join(source.splitlines(keepends=True)),
    ]
    looping = [  # and after how many tokens of the loop it is found
        ("!", 1 + 256),
        (check, len(check) + 256),
        (source[1000:1300], 300 + 502),  # the share of copies is there before the third round
    ]
    texts = [*(text[:2500] for text in ordinary), *(source[:1000] + loop * (1500 // len(loop)) for loop, _ in looping)]
    tokens = np.zeros((len(texts), 2500), np.int32)
    for row, text in zip(tokens, texts, strict=True):
        row[: len(text)] = list(text.encode("latin1"))
    found = np.asarray(alarms(tokens, RepetitionSettings.of(**DEFAULTS), window=WINDOW_OF_THE_LOG))
    lengths = [len(text) for text in texts]
    first = [next(iter(np.flatnonzero(row[:n])), None) for row, n in zip(found, lengths, strict=True)]
    assert first[:5] == [None] * 5
    assert [at + 1 - 1000 for at in first[5:]] == [tokens for _, tokens in looping]
