"""What a response earns, against sums done by hand."""

import numpy as np
import pytest

from kimi_jax.rewards.components import COMPONENTS, format, length, repetition, shaped_rewards
from kimi_jax.types import Outcome, Problem, Prompt, Rollout, RolloutGroup, StopReason, Verdict

RIGHT, WRONG, UNKNOWN = Outcome.CORRECT, Outcome.WRONG, Outcome.UNGRADABLE


def group(outcomes, lengths, stops=None, formed=None) -> RolloutGroup:
    zeros = lambda n, dtype: np.zeros(n, dtype)  # noqa: E731
    stops = stops or [StopReason.END] * len(lengths)
    formed = formed or [True] * len(lengths)
    rollouts = [
        Rollout(i, zeros(n, np.int32), zeros(n, np.float32), zeros(n, np.int32), stop)
        for i, (n, stop) in enumerate(zip(lengths, stops, strict=True))
    ]
    verdicts = [Verdict(o, well_formed=f) for o, f in zip(outcomes, formed, strict=True)]
    return RolloutGroup(
        Problem("id", "chain", "1+1=?", "2"), Prompt(zeros(3, np.int32)), tuple(rollouts), tuple(verdicts)
    )


def test_ungradable_responses_earn_nothing_and_are_compared_with_nothing():
    outcomes = [UNKNOWN, RIGHT, WRONG, RIGHT, UNKNOWN, WRONG]
    lengths = [2, 100, 260, 300, 5000, 120]  # the shortest and the longest are ungradable
    rewards, parts = shaped_rewards(group(outcomes, lengths), {"length": 0.1})
    np.testing.assert_allclose(rewards, [np.nan, 1.05, -0.03, 0.95, np.nan, 0.0], atol=1e-15)
    np.testing.assert_allclose(parts["length"], [np.nan, 0.5, -0.3, -0.5, np.nan, 0.0], atol=1e-15)
    assert rewards.dtype == np.float64


def test_without_weights_the_reward_is_correctness():
    rewards, parts = shaped_rewards(group([RIGHT, WRONG, UNKNOWN], [3, 5, 7]), {})
    np.testing.assert_array_equal(rewards, [1.0, 0.0, np.nan])
    assert parts.keys() == {"correct", *COMPONENTS}


def test_a_group_without_gradable_responses():
    rewards, _ = shaped_rewards(group([UNKNOWN] * 3, [3, 5, 7]), {"length": 0.5})
    assert np.isnan(rewards).all() and rewards.shape == (3,)


def test_every_component_and_their_sum():
    one = group(
        [RIGHT, WRONG, WRONG, RIGHT],
        [100, 120, 260, 300],
        stops=[StopReason.END, StopReason.REPETITION, StopReason.LENGTH, StopReason.END],
        formed=[True, False, True, True],
    )
    np.testing.assert_allclose(length(one), [0.5, 0.0, -0.3, -0.5], atol=1e-15)
    np.testing.assert_array_equal(repetition(one), [0, -1, 0, 0])
    np.testing.assert_array_equal(format(one), [0, -1, 0, 0])
    rewards, _ = shaped_rewards(one, {"length": 0.2, "repetition": 0.3, "format": 0.5})
    np.testing.assert_allclose(rewards, [1.1, -0.8, -0.06, 0.9], atol=1e-15)


def test_an_unknown_component_is_refused():
    with pytest.raises(KeyError, match="brevity"):
        shaped_rewards(group([RIGHT, WRONG], [3, 5]), {"brevity": 1.0})
