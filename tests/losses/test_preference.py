"""Losses of labels and preferences against float64 NumPy: values, gradients in closed form, what must not matter."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kimi_jax.losses.preference import binary_cross_entropy, bradley_terry, direct_preference
from tests.losses.cases import central_differences

ROWS, ROW_LENGTH, PAIRS = 5, 11, 7


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def labelled():
    rng = np.random.default_rng(0)
    mask = rng.random((ROWS, ROW_LENGTH)) < 0.4
    scalars = np.where(mask, 3 * rng.normal(size=mask.shape), np.nan).astype(np.float32)
    return scalars, np.where(mask, rng.integers(0, 2, mask.shape), 97), mask


def compared():
    """Three pairs, numbers 1, 4 and 5 of 7, and the places of their members: [(better), (worse)]."""
    rng = np.random.default_rng(1)
    places = {1: [(0, 3), (0, 8)], 4: [(2, 9), (2, 1)], 5: [(4, 0), (3, 10)]}
    scalars = np.full((ROWS, ROW_LENGTH), np.nan, np.float32)
    labels, pair = np.full(scalars.shape, 97), np.full(scalars.shape, 97)
    for number, members in places.items():
        for label, place in zip((1, 0), members, strict=True):
            scalars[place], labels[place], pair[place] = 2 * rng.normal(), label, number
    return scalars, labels, np.isfinite(scalars), pair, places


def test_labels():
    scalars, labels, mask = labelled()
    s, y = scalars[mask].astype(np.float64), labels[mask]
    total = -np.sum(y * np.log(sigmoid(s)) + (1 - y) * np.log(1 - sigmoid(s)))
    value = jax.value_and_grad(binary_cross_entropy, has_aux=True)
    (loss, parts), grad = value(jnp.asarray(scalars), labels, mask, weight=0.25)
    assert loss == pytest.approx(0.25 * total, rel=1e-6)
    right = np.sum((s > 0) == (y == 1))
    assert 0 < right < mask.sum()
    assert parts == {"nll": pytest.approx(total, rel=1e-6), "tokens": mask.sum(), "right": right}
    expected = np.zeros(mask.shape)
    expected[mask] = 0.25 * (sigmoid(s) - y)
    np.testing.assert_allclose(grad, expected, rtol=1e-5, atol=1e-7)


def test_comparisons():
    scalars, labels, mask, pair, places = compared()
    margins = {n: np.float64(scalars[better]) - np.float64(scalars[worse]) for n, (better, worse) in places.items()}
    total = -sum(np.log(sigmoid(m)) for m in margins.values())
    value = jax.value_and_grad(bradley_terry, has_aux=True)
    (loss, parts), grad = value(jnp.asarray(scalars), labels, mask, pair, pairs=PAIRS, weight=0.5)
    assert loss == pytest.approx(0.5 * total, rel=1e-6)
    right = sum(m > 0 for m in margins.values())
    assert 0 < right < 3
    assert parts == {"nll": pytest.approx(total, rel=1e-6), "tokens": 6, "pairs": 3, "right": right}
    expected = np.zeros(mask.shape)
    for number, (better, worse) in places.items():
        expected[better] = 0.5 * (sigmoid(margins[number]) - 1)
        expected[worse] = -expected[better]
    np.testing.assert_allclose(grad, expected, rtol=1e-5, atol=1e-7)


def test_only_differences_matter_to_comparisons():
    scalars, labels, mask, pair, _ = compared()
    loss = lambda s: float(bradley_terry(s, labels, mask, pair, pairs=PAIRS, weight=1.0)[0])  # noqa: E731
    assert loss(scalars + 5) == pytest.approx(loss(scalars), rel=1e-5)
    assert loss(-scalars) != pytest.approx(loss(scalars), rel=1e-2)


def test_micro_batches_add_up():
    scalars, labels, mask = labelled()
    whole = float(binary_cross_entropy(scalars, labels, mask, weight=0.1)[0])
    parts = [binary_cross_entropy(scalars[r], labels[r], mask[r], weight=0.1)[0] for r in ([3, 0], [1], [4, 2])]
    assert sum(parts) == pytest.approx(whole, rel=1e-6)


@pytest.mark.parametrize("score", [-1e4, 1e4])
def test_extreme_scores_stay_finite(score):
    scalars, labels = jnp.array([[score, -score]]), jnp.array([[1, 0]])
    mask = labels >= 0
    for value in (
        lambda s: binary_cross_entropy(s, labels, mask, weight=1.0)[0],
        lambda s: bradley_terry(s, labels, mask, jnp.zeros((1, 2), int), pairs=1, weight=1.0)[0],
    ):
        loss, grad = jax.value_and_grad(value)(scalars)
        assert loss == pytest.approx(0 if score > 0 else 2e4) and np.isfinite(grad).all()


def test_nothing_marked_is_zero():
    nothing, nan = jnp.zeros((3, 5), bool), jnp.full((3, 5), jnp.nan)
    for loss, parts in (
        binary_cross_entropy(nan, nothing, nothing, weight=1.0),
        bradley_terry(nan, nothing, nothing, jnp.zeros((3, 5), int), pairs=2, weight=1.0),
    ):
        assert loss == 0 and set(map(float, parts.values())) == {0.0}


# --- DPO --------------------------------------------------------------------------------------------------------------

BETA = 0.3


def preferred():
    """Three pairs of responses, numbers 0, 3 and 5 of 7, and {number: (places of chosen, of rejected)}."""
    rng = np.random.default_rng(2)
    places = {
        3: (((0, 0, 0), (1, 2, 5)), ((0, 0), (7, 8))),
        0: (((2,), (4,)), ((2, 2, 2, 2, 2), (6, 7, 8, 9, 10))),
        5: (((4, 4), (0, 1)), ((3, 3, 3), (3, 4, 9))),
    }
    shape = (ROWS, ROW_LENGTH)
    logprobs, reference = np.full(shape, np.nan), np.full(shape, np.inf)
    chosen, pair = rng.random(shape) < 0.5, np.full(shape, 97)
    for number, members in places.items():
        for side, place in zip((True, False), members, strict=True):
            for values in (logprobs, reference):
                values[place] = -rng.exponential(size=len(place[0]))
            chosen[place], pair[place] = side, number
    return logprobs, reference, np.isfinite(logprobs), chosen, pair, places


def dpo_by_hand(logprobs, reference, places, weight, alpha):
    """Loss, its gradient in closed form, and what else is reported."""
    loss, grad, rewards = 0.0, np.zeros(logprobs.shape), []
    for better, worse in places.values():
        reward = [BETA * sum(logprobs[place] - reference[place]) for place in (better, worse)]
        margin = reward[0] - reward[1]
        loss -= weight * np.log(sigmoid(margin))
        grad[better], grad[worse] = -weight * BETA * sigmoid(-margin), weight * BETA * sigmoid(-margin)
        loss -= weight * alpha * np.mean(logprobs[better])
        grad[better] -= weight * alpha / len(better[0])
        rewards.append(reward)
    return loss, grad, np.array(rewards)


@pytest.mark.parametrize("alpha", [0.0, 0.7])
@pytest.mark.parametrize("dtype, rtol", [(np.float64, 1e-6), (np.float32, 1e-4)])
def test_direct_preference(dtype, rtol, alpha):
    logprobs, reference, mask, chosen, pair, places = preferred()
    expected, expected_grad, rewards = dpo_by_hand(logprobs, reference, places, 1 / 3, alpha)
    with jax.enable_x64(True):
        value = jax.jit(jax.value_and_grad(direct_preference, has_aux=True), static_argnames="pairs")
        (loss, parts), grad = jax.device_get(
            value(
                *(jnp.asarray(x, dtype) for x in (logprobs, reference)),
                mask,
                chosen,
                pair,
                pairs=PAIRS,
                beta=BETA,
                alpha=alpha,
                weight=1 / 3,
            )
        )
    assert loss.dtype == grad.dtype == dtype
    np.testing.assert_allclose(loss, expected, rtol=rtol)
    np.testing.assert_allclose(grad, expected_grad, rtol=rtol)
    assert np.all(grad[~mask] == 0)
    right = np.sum(rewards[:, 0] > rewards[:, 1])
    assert 0 < right < 3
    sums = {"chosen_reward": rewards[:, 0].sum(), "rejected_reward": rewards[:, 1].sum(), "nll": 3 * expected}
    sums["chosen_nll"] = -sum(np.mean(logprobs[better]) for better, _ in places.values())
    counts = {"tokens": mask.sum(), "pairs": 3, "right": right}
    highest = {"max_log_ratio": np.abs(rewards[:, 0] - rewards[:, 1]).max() / BETA}
    assert parts == {name: pytest.approx(x, rel=rtol) for name, x in (sums | counts | highest).items()}


def test_the_gradient_of_direct_preference_by_finite_differences():
    logprobs, reference, mask, chosen, pair, places = preferred()

    def loss_at(values):
        moved = logprobs.copy()
        moved[mask] = values
        return dpo_by_hand(moved, reference, places, 0.5, 0.7)[0]

    with jax.enable_x64(True):
        loss = lambda p: direct_preference(  # noqa: E731
            p, reference, mask, chosen, pair, pairs=PAIRS, beta=BETA, alpha=0.7, weight=0.5
        )[0]
        grad = jax.grad(loss)(jnp.asarray(logprobs))
    np.testing.assert_allclose(grad[mask], central_differences(loss_at, logprobs[mask]), rtol=1e-6, atol=1e-9)


def test_at_the_reference_every_comparison_is_even():
    logprobs, _, mask, chosen, pair, _ = preferred()
    logprobs = jnp.asarray(logprobs, jnp.float32)
    loss, parts = direct_preference(
        logprobs, logprobs, mask, chosen, pair, pairs=PAIRS, beta=BETA, alpha=0.0, weight=1 / 3
    )
    assert loss == pytest.approx(np.log(2), rel=1e-6)
    assert parts["right"] == parts["max_log_ratio"] == parts["chosen_reward"] == 0
