import numpy as np
import pytest

from kimi_jax.rl.prompts import PromptSampler

DIFFICULTIES = np.array([1, 1, 2, 3, 3])
OPTIONS = {
    "seed": 17,
    "curriculum": "uniform",
    "curriculum_iterations": 3,
    "hard_difficulty": 3,
    "prior_success": 0.5,
    "prior_visits": 2.0,
    "floor": 0.05,
}


def make(difficulties=DIFFICULTIES, **options) -> PromptSampler:
    return PromptSampler(difficulties, **(OPTIONS | options))


def visited(**options) -> PromptSampler:
    sampler = make(**options)
    sampler.update(0, correct=7, gradable=8)
    sampler.update(2, correct=0, gradable=8)
    sampler.update(4, correct=1000, gradable=1000)
    return sampler


def test_success_rates_by_hand():
    np.testing.assert_allclose(make().success_rates, 0.5)
    sampler = visited()
    np.testing.assert_allclose(sampler.success_rates, [8 / 10, 0.5, 1 / 10, 0.5, 1001 / 1002])
    sampler.update(0, correct=0, gradable=2)
    assert sampler.success_rates[0] == pytest.approx(8 / 12)
    sampler.update(0, correct=0, gradable=0)  # a group without a gradable response teaches nothing
    assert sampler.success_rates[0] == pytest.approx(8 / 12)


def test_frequencies_follow_the_weights():
    """One draw follows w; of two without replacement, i is among them with p_i + Σ_{j≠i} p_j p_i / (1 − p_j)."""
    sampler, draws = visited(), 3001
    p = np.array([0.2, 0.5, 0.9, 0.5, 0.05])
    np.testing.assert_allclose(sampler.weights(0), p)
    p /= p.sum()
    among_two = [p[i] + sum(p[j] * p[i] / (1 - p[j]) for j in range(p.size) if j != i) for i in range(p.size)]
    for count, expected in ((1, p), (2, np.array(among_two))):
        drawn = np.concatenate([sampler.draw(iteration, count) for iteration in range(draws)])
        frequency = np.bincount(drawn, minlength=p.size) / draws
        sigma = np.sqrt(expected * (1 - expected) / draws)
        assert np.all(np.abs(frequency - expected) < 4 * sigma), (count, frequency, expected)


def test_draws_are_distinct_and_can_take_all():
    sampler = visited()
    for iteration in range(11):
        assert sorted(sampler.draw(iteration, 5)) == [0, 1, 2, 3, 4]


def test_draws_depend_on_seed_iteration_and_state_only():
    large = np.zeros(101, int)
    sampler = make(large)
    first = sampler.draw(3, 13)
    sampler.draw(4, 13)
    np.testing.assert_array_equal(sampler.draw(3, 13), first)
    assert not np.array_equal(sampler.draw(4, 13), first)
    assert not np.array_equal(make(large, seed=18).draw(3, 13), first)
    for index in first:
        sampler.update(index, correct=100, gradable=100)
    assert not np.array_equal(sampler.draw(3, 13), first)


def test_curriculum_switches_to_hard_problems():
    sampler = visited(curriculum="hard_after")
    for iteration in range(3):
        np.testing.assert_array_equal(sampler.weights(iteration), visited().weights(iteration))
    for iteration in (3, 4, 1000):
        np.testing.assert_allclose(sampler.weights(iteration), [0, 0, 0, 0.5, 0.05])
        assert set(sampler.draw(iteration, 2)) == {3, 4}
    assert set(np.concatenate([sampler.draw(iteration, 1) for iteration in range(1000, 1100)])) == {3, 4}


def test_no_weight_is_ever_zero():
    for prior in (0.0, 1.0):
        sampler = make(prior_success=prior)
        for index in range(5):
            assert sampler.weights(0).min() >= 0.05
            sampler.update(index, correct=10**9, gradable=10**9)
        np.testing.assert_allclose(sampler.weights(0), 0.05)


def test_restoring_at_any_step_gives_the_same_rest():
    def advance(sampler, iteration):
        drawn = sampler.draw(iteration, 3)
        for index in drawn:
            sampler.update(index, correct=(index + iteration) % 4, gradable=3 + iteration % 2)
        return drawn.tolist()

    steps = 13
    sampler, drawn, states = make(curriculum="hard_after", hard_difficulty=2), [], []
    for iteration in range(steps):
        states.append(sampler.state())
        drawn.append(advance(sampler, iteration))
    for start, state in enumerate(states):
        resumed = make(curriculum="hard_after", hard_difficulty=2)
        resumed.restore(state)
        assert [advance(resumed, iteration) for iteration in range(start, steps)] == drawn[start:]
        np.testing.assert_array_equal(resumed.success_rates, sampler.success_rates)


def test_state_is_a_copy_in_both_directions():
    sampler = make()
    state = sampler.state()
    sampler.update(1, correct=1, gradable=1)
    assert state["correct"].sum() == 0
    sampler.restore(state)
    sampler.update(1, correct=1, gradable=1)
    assert state["correct"].sum() == 0


def test_restore_says_what_does_not_fit():
    sampler = visited()
    before = sampler.state()
    with pytest.raises(ValueError, match=r"5 problems.*\(5,\).*\(7,\)"):
        sampler.restore(make(np.zeros(7)).state())
    with pytest.raises(ValueError, match="gradable"):
        sampler.restore({"correct": np.zeros(5)})
    for name, value in sampler.state().items():
        np.testing.assert_array_equal(value, before[name])


@pytest.mark.parametrize("iteration, count", [(0, 6), (0, 0), (3, 3)])
def test_too_many_or_too_few_problems_are_refused(iteration, count):
    with pytest.raises(ValueError, match=f"Cannot draw {count} distinct problems in iteration {iteration}"):
        make(curriculum="hard_after").draw(iteration, count)


@pytest.mark.parametrize(
    "options, match",
    [
        ({"curriculum": "easy_first"}, "'easy_first'.*'uniform'.*'hard_after'"),
        ({"curriculum": "hard_after", "hard_difficulty": 4}, "hard_difficulty=4.*difficulty 3"),
        ({"prior_success": 1.5}, "prior_success=1.5"),
        ({"prior_visits": 0}, "prior_visits=0"),
        ({"floor": 0.0}, "floor=0.0"),
        ({"difficulties": []}, "non-empty"),
    ],
)
def test_bad_options_are_refused(options, match):
    with pytest.raises(ValueError, match=match):
        make(**options)


def test_bad_updates_are_refused():
    sampler = make()
    for correct, gradable in ((3, 2), (-1, 2), (0.95, 2)):
        with pytest.raises(ValueError, match="correct <= gradable"):
            sampler.update(0, correct, gradable)
    for index in (-1, 5):
        with pytest.raises(IndexError, match="0 to 4"):
            sampler.update(index, 1, 2)
    assert not sampler.state()["gradable"].any()
