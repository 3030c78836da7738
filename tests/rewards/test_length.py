import numpy as np
import pytest

from kimi_jax.rewards.length import length_reward, length_weight

# By hand from k1.5 §2.3.3: λ_i = 0.5 − (len_i − min_len) / (max_len − min_len)
TABLE = [
    # correct, lengths, rewards
    ([1, 1, 1, 1], [100, 150, 200, 300], [0.5, 0.25, 0.0, -0.5]),
    ([0, 0, 0, 0], [100, 150, 200, 300], [0.0, 0.0, 0.0, -0.5]),
    ([1, 0, 0, 1], [100, 120, 260, 300], [0.5, 0.0, -0.3, -0.5]),
    ([0, 1], [7, 11], [0.0, -0.5]),
    ([1, 0], [7, 11], [0.5, -0.5]),
    ([1, 0, 1], [13, 13, 13], [0.0, 0.0, 0.0]),
    ([1], [13], [0.0]),
    ([], [], []),
]


@pytest.mark.parametrize("correct, lengths, expected", TABLE)
def test_length_reward_by_hand(correct, lengths, expected):
    rewards = length_reward(np.array(correct, bool), np.array(lengths, int))
    assert rewards.dtype == np.float64
    np.testing.assert_allclose(rewards, expected, atol=1e-15)


def test_wrong_answers_are_never_rewarded_for_being_short():
    rng = np.random.default_rng(0)
    for _ in range(101):
        correct, lengths = rng.random(7) < 0.5, rng.integers(1, 1000, 7)
        rewards = length_reward(correct, lengths)
        assert np.all(rewards[~correct] <= 0)
        assert np.all(np.abs(rewards) <= 0.5)
        order = np.argsort(lengths)
        for kind in (correct, ~correct):  # longer is never better, for right and for wrong answers
            assert np.all(np.diff(rewards[order][kind[order]]) <= 0)


def test_length_weight_is_zero_first_then_constant():
    assert [length_weight(i, weight=0.3, warmup_iterations=2) for i in range(5)] == [0.0, 0.0, 0.3, 0.3, 0.3]
    assert length_weight(0, weight=0.3, warmup_iterations=0) == 0.3


def test_mismatched_arguments_are_refused():
    with pytest.raises(ValueError, match=r"\(2,\) and \(3,\)"):
        length_reward(np.array([True, False]), np.array([3, 5, 7]))
