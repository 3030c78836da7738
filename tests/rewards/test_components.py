"""What a response earns, against sums done by hand."""

import re

import numpy as np
import pytest

from kimi_jax.rewards.components import (
    COMPONENTS,
    Failure,
    Group,
    format,
    length,
    own_component,
    repetition,
    shaped_rewards,
)
from kimi_jax.rewards.pool import WorkerPool
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
    np.testing.assert_allclose(length(Group.of(one)), [0.5, 0.0, -0.3, -0.5], atol=1e-15)
    np.testing.assert_array_equal(repetition(Group.of(one)), [0, -1, 0, 0])
    np.testing.assert_array_equal(format(Group.of(one)), [0, -1, 0, 0])
    rewards, _ = shaped_rewards(one, {"length": 0.2, "repetition": 0.3, "format": 0.5})
    np.testing.assert_allclose(rewards, [1.1, -0.8, -0.06, 0.9], atol=1e-15)


def test_an_unknown_component_is_refused():
    with pytest.raises(KeyError, match="brevity"):
        shaped_rewards(group([RIGHT, WRONG], [3, 5]), {"brevity": 1.0})


# --- components of the user -------------------------------------------------------------------------------------------


def test_one_of_the_user_is_added_with_its_weight_and_masked_like_the_others():
    one = group([RIGHT, WRONG, UNKNOWN], [3, 5, 7])
    rewards, parts = shaped_rewards(one, {"brevity": -0.5}, {"brevity": np.array([0.2, 0.4, 0.6])})
    np.testing.assert_allclose(rewards, [0.9, -0.2, np.nan], atol=1e-15)
    np.testing.assert_array_equal(parts["brevity"], [0.2, 0.4, np.nan])


def test_one_that_failed_takes_the_reward_with_it_if_it_counts():
    one, nothing = group([RIGHT, WRONG], [3, 5]), {"brevity": np.full(2, np.nan)}
    assert np.isnan(shaped_rewards(one, {"brevity": 0.1}, nothing)[0]).all()
    np.testing.assert_array_equal(shaped_rewards(one, {"brevity": 0.0}, nothing)[0], [1.0, 0.0])


def test_what_one_of_the_user_sees():
    seen = Group.of(group([RIGHT, WRONG], [3, 5], [StopReason.END, StopReason.LENGTH], [True, False]))
    told = [(r.text, r.tokens, r.stop.value, r.verdict.outcome.value, r.verdict.well_formed) for r in seen.responses]
    assert told == [("", 3, "end", "correct", True), ("", 5, "length", "wrong", False)]
    assert (seen.problem.answer, seen.problem.images) == ("2", ())


OWN = "tests.rewards.own_components:"


@pytest.mark.parametrize(
    "function, reason",
    [
        ("fails", "ZeroDivisionError: division by zero"),
        ("one_for_all", r"returned the shape \(\) for 2 responses; return one number for each"),
        ("too_many", r"returned the shape \(3,\) for 2 responses"),
        ("not_finite", "returned inf; return finite numbers"),
        ("words", "could not convert string to float"),
        ("hangs", "deadline of 1 s"),
        ("crashes", "the judging process exited with status 7"),
        ("no_such", "there is no 'tests.rewards.own_components:no_such'"),
    ],
)
def test_one_that_fails_says_why_and_the_next_group_has_its_values(function, reason):
    one = Group.of(group([RIGHT, WRONG], [3, 5]))
    with WorkerPool(own_component, failed=Failure, workers=1, deadline_s=1.0) as pool:
        tickets = [pool.call(OWN + name, one) for name in ("share_of_tokens", function, "share_of_tokens")]
        before, failed, after = [ticket.result() for ticket in tickets]
    np.testing.assert_allclose([before, after], [[3 / 8, 5 / 8]] * 2)
    assert isinstance(failed, Failure) and re.search(reason, failed.reason)
