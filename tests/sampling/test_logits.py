"""Choosing tokens, against distributions worked out in float64 NumPy, one token at a time."""

import jax
import numpy as np
import pytest

from kimi_jax.sampling.logits import MAX_END_IDS, SamplingSettings, _threshold, choose, rollout_keys

V, DRAWS = 13, 8_009
RUN_KEY = jax.random.key(17)
# Every token has a probability of a per cent or more, and there are ties at several places, first and last included.
LOGITS = np.array([1.1, -0.3, 0.4, 1.1, -0.7, 0.4, 0.9, -0.3, 0.0, 0.4, -0.7, 0.2, -0.1], np.float32)

draw = jax.jit(choose)
keys_of = jax.jit(rollout_keys)


def settings(**changes):
    return SamplingSettings.of(**{"temperature": 1.0, "end_ids": [0]} | changes)


def distribution(logits, *, temperature, top_k, top_p):
    """Probabilities [V]. Tokens as likely as the last one that is kept are kept."""
    logits = logits.astype(np.float64) / temperature
    order = np.argsort(-logits, kind="stable")
    in_k = list(order[: top_k or len(logits)])
    mass = np.exp(logits[in_k]) / np.exp(logits[in_k]).sum()
    kept, reached = [], 0.0
    for token, p in zip(in_k, mass, strict=True):
        if top_p < 1 and reached >= top_p:
            break
        kept.append(token)
        reached += p
    keep = logits >= logits[kept[-1]]
    p = np.where(keep, np.exp(logits), 0.0)
    return p / p.sum()


def sample(logits, s, first_serial=0):
    """DRAWS independent draws: token 0 of as many rollouts."""
    keys = keys_of(RUN_KEY, np.arange(first_serial, first_serial + DRAWS, dtype=np.uint32), np.zeros(DRAWS, np.int32))
    return jax.device_get(draw(np.tile(logits, (DRAWS, 1)), keys, s))


CASES = [
    dict(temperature=1.0, top_k=0, top_p=1.0),
    dict(temperature=0.6, top_k=0, top_p=1.0),
    dict(temperature=2.3, top_k=0, top_p=1.0),
    dict(temperature=1.0, top_k=1, top_p=1.0),  # a tie: two tokens stay
    dict(temperature=0.7, top_k=3, top_p=1.0),
    dict(temperature=1.0, top_k=5, top_p=1.0),  # cuts through a tie of three
    dict(temperature=1.0, top_k=97, top_p=1.0),  # more than there are
    dict(temperature=1.0, top_k=0, top_p=0.01),
    dict(temperature=1.0, top_k=0, top_p=0.55),
    dict(temperature=0.5, top_k=0, top_p=0.83),
    dict(temperature=1.3, top_k=7, top_p=0.71),  # top-p of what top-k left
]


# Tokens are drawn in two steps: 13 is prime, so that the second has no choice; 12 are three groups of four.
@pytest.mark.parametrize("size", [13, 12])
@pytest.mark.parametrize("case", CASES, ids=lambda c: "-".join(map(str, c.values())))
def test_draws_and_log_probs_follow_the_distribution(case, size):
    logits = LOGITS[:size]
    tokens, logprobs = sample(logits, settings(**case))
    p = distribution(logits, **case)
    counts = np.bincount(tokens, minlength=size)
    assert not counts[p == 0].any()
    live = p > 0
    assert counts[live].all()
    np.testing.assert_allclose(logprobs, np.log(p[tokens]), atol=1e-6)
    if live.sum() > 1:
        chi_square = np.sum((counts[live] - DRAWS * p[live]) ** 2 / (DRAWS * p[live]))
        degrees = live.sum() - 1
        assert chi_square < degrees + 4 * np.sqrt(2 * degrees)  # four standard deviations


def test_top_p_that_is_off_cuts_nothing_however_unlikely():
    logits = np.full((1, V), -30.0, np.float32)
    logits[0, [3, 5]] = 0.0  # the sum of their probabilities rounds to 1
    assert (_threshold(logits, 1.0, settings(top_k=7)) == -30.0).all()  # the seventh is tied with the rest


def test_the_threshold_of_top_k_is_the_kth_largest_float_whatever_its_sign_and_size():
    values = np.random.default_rng(0).normal(size=(3, V)) * 10.0 ** np.arange(-37, 38, 6)
    logits = np.concatenate([values, -np.abs(values), np.full((1, V), -np.inf)]).astype(np.float32)
    logits[:, 5] = 0.0
    for k in range(1, V + 1):
        wanted = np.sort(logits, axis=1)[:, V - k]
        np.testing.assert_array_equal(_threshold(logits, 1.0, settings(top_k=k))[:, 0], wanted)


@pytest.mark.parametrize("size", [13, 12])
@pytest.mark.parametrize("top_k, top_p", [(0, 1.0), (5, 0.9)])
def test_temperature_zero_takes_the_most_likely_token_with_the_log_prob_of_temperature_one(top_k, top_p, size):
    logits = np.random.default_rng(0).normal(size=(DRAWS, size)).astype(np.float32)
    keys = keys_of(RUN_KEY, np.arange(DRAWS, dtype=np.uint32), np.zeros(DRAWS, np.int32))
    tokens, logprobs = jax.device_get(draw(logits, keys, settings(temperature=0.0, top_k=top_k, top_p=top_p)))
    np.testing.assert_array_equal(tokens, logits.argmax(axis=1))
    for row in range(0, DRAWS, 997):
        p = distribution(logits[row], temperature=1.0, top_k=top_k, top_p=top_p)
        assert logprobs[row] == pytest.approx(np.log(p[tokens[row]]), abs=1e-6)


def test_randomness_belongs_to_the_rollout_and_the_place_in_it():
    serials, index = (a.ravel() for a in np.meshgrid(np.arange(31), np.arange(37)))
    serials, index = serials.astype(np.uint32) + np.uint32(2**32 - 17), index.astype(np.int32)  # wraps: also large ones
    data = np.asarray(jax.random.key_data(keys_of(RUN_KEY, serials, index)))
    assert len(np.unique(data, axis=0)) == len(data)
    order = np.random.default_rng(1).permutation(len(data))
    np.testing.assert_array_equal(jax.random.key_data(keys_of(RUN_KEY, serials[order], index[order])), data[order])
    for row in (0, 401, 1146):
        alone = jax.random.fold_in(jax.random.fold_in(RUN_KEY, serials[row]), index[row])
        np.testing.assert_array_equal(jax.random.key_data(alone), data[row])
    other_run = jax.random.key_data(keys_of(jax.random.key(18), serials, index))
    assert len(np.unique(np.concatenate([data, other_run]), axis=0)) == 2 * len(data)


def test_runs_and_rollouts_draw_differently():
    uniform = np.zeros(V, np.float32)
    tokens = sample(uniform, settings())[0]
    later = sample(uniform, settings(), first_serial=DRAWS)[0]
    assert np.mean(tokens == later) == pytest.approx(1 / V, abs=0.02)


def test_changing_a_setting_compiles_nothing():
    sample(LOGITS, settings())
    compiled = draw._cache_size()
    for case in CASES:
        sample(LOGITS, settings(**case, end_ids=range(3)))
    sample(LOGITS, settings(temperature=0))
    assert draw._cache_size() == compiled


def test_end_ids_are_filled_up_with_an_id_that_no_token_has():
    assert SamplingSettings.of(temperature=1, end_ids=[7, 3]).end_ids.tolist() == [7, 3] + [-1] * (MAX_END_IDS - 2)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"temperature": -0.1}, "temperature=-0.1 must be at least 0"),
        ({"top_p": 0.0}, r"top_p=0.0 must lie in \(0, 1\]"),
        ({"top_p": 1.01}, r"top_p=1.01 must lie in \(0, 1\]"),
        ({"top_k": -1}, "top_k=-1 must be at least 0"),
        ({"end_ids": []}, "0 end ids were given; allowed are 1 to 8"),
        ({"end_ids": range(9)}, "9 end ids were given; allowed are 1 to 8"),
    ],
)
def test_bad_settings_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        settings(**changes)
