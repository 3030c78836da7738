"""REINFORCE, RLOO, GRPO, ReST against float64 NumPy: loops over problems, responses and tokens that know no packing."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kimi_jax.losses.policy_gradient import (
    best_only,
    clipped_loss,
    leave_one_out,
    policy_gradient_loss,
    rewards_themselves,
    standardized,
)
from tests.losses.cases import Case, cast, central_differences, make_case, rows_of, softmax_model

CLIP, BETA = 0.23, 0.37


def correct(rewards: np.ndarray) -> np.ndarray:
    return rewards > 0.5


def by_hand(method: str, rewards: list[float]) -> list[float]:
    """Advantages of one problem, spelled out."""
    k, right = len(rewards), [r for r in rewards if r > 0.5]
    if method == "reinforce":
        return rewards
    if method == "rloo":
        return [r - sum(rewards[:j] + rewards[j + 1 :]) / (k - 1) for j, r in enumerate(rewards)]
    if method == "rest":
        best = [r == max(right, default=math.inf) for r in rewards]
        return [k / sum(best) if b else 0.0 for b in best]
    mean = sum(rewards) / k
    return [(r - mean) / (math.sqrt(sum((s - mean) ** 2 for s in rewards) / k) + 1e-6) for r in rewards]


METHODS = {
    "reinforce": (rewards_themselves, policy_gradient_loss),
    "rloo": (leave_one_out, policy_gradient_loss),
    "rest": (best_only, policy_gradient_loss),
    "grpo": (standardized, functools.partial(clipped_loss, clip=CLIP, beta=BETA)),
}


def case_of(method: str) -> Case:
    """The sampler's log-probs near the policy's, so that ratios are within, below and above the bounds."""
    case = make_case(lambda rewards: METHODS[method][0](rewards, correct(rewards)))
    noise = 0.4 * np.random.default_rng(5).normal(size=case.logprobs.shape)
    return case._replace(batch=case.batch.__class__(**vars(case.batch) | {"behavior_logprobs": case.logprobs + noise}))


def objective(case: Case, method: str, logprobs: np.ndarray) -> float:
    """What is maximized, a mean over problems. Only log-probs of tokens in the loss are read."""
    total, lengths = 0.0, iter(case.batch.lengths)
    for rewards, responses in zip(case.rewards, case.responses, strict=True):
        for advantage, place in zip(by_hand(method, rewards.tolist()), responses, strict=True):
            length, value = next(lengths), 0.0
            sampler, reference = case.batch.behavior_logprobs, case.batch.reference_logprobs
            for p, mu, q in zip(logprobs[place], sampler[place], reference[place], strict=True):
                if method != "grpo":
                    value += advantage * p
                    continue
                ratio = math.exp(p) / math.exp(mu)
                bounded = min(max(ratio, 1 - CLIP), 1 + CLIP)
                kl = math.exp(q) / math.exp(p) - math.log(math.exp(q) / math.exp(p)) - 1
                value += (min(ratio * advantage, bounded * advantage) - BETA * kl) / length
            total += value / len(rewards) / len(case.rewards)
    return total


@pytest.mark.parametrize("dtype, rtol", [(np.float64, 1e-6), (np.float32, 1e-4)])
@pytest.mark.parametrize("method", METHODS)
def test_loss_and_gradient_match_numpy_and_finite_differences(method, dtype, rtol):
    case, loss_fn = case_of(method), METHODS[method][1]
    mask = case.batch.rows.loss_mask

    def loss_at(values):
        logprobs = np.full(mask.shape, np.nan)
        logprobs[mask] = values
        return -objective(case, method, logprobs)

    expected = central_differences(loss_at, case.logprobs[mask])
    with jax.enable_x64(True):
        batch, logprobs = cast((case.batch, case.logprobs), dtype)
        (loss, parts), grad = jax.device_get(jax.jit(jax.value_and_grad(loss_fn, has_aux=True))(logprobs, batch))
    assert loss.dtype == grad.dtype == dtype
    np.testing.assert_allclose(loss, loss_at(case.logprobs[mask]), rtol=rtol)
    np.testing.assert_allclose(grad[mask], expected, rtol=rtol, atol=rtol * np.abs(expected).max() / 100)
    assert np.all(grad[~mask] == 0.0)  # nan stood there
    np.testing.assert_allclose(parts["policy"] + parts["regularizer"], loss, rtol=rtol)
    assert (parts["regularizer"] > 0) == (method == "grpo")


@pytest.mark.parametrize("method", METHODS)
def test_gradient_with_respect_to_parameters(method):
    params, _, _, in_numpy, in_jax = softmax_model()
    case = case_of(method)
    near = in_numpy(params) + 0.3 * np.random.default_rng(6).normal(size=case.logprobs.shape)
    batch = case.batch.__class__(**vars(case.batch) | {"behavior_logprobs": near})
    case = case._replace(batch=batch, logprobs=in_numpy(params))
    expected = central_differences(lambda w: -objective(case, method, in_numpy(w)), params)
    with jax.enable_x64(True):
        grad = jax.jit(jax.grad(lambda w: METHODS[method][1](in_jax(w), batch)[0]))(params)
    np.testing.assert_allclose(grad, expected, rtol=1e-6, atol=1e-8)


def test_clipping_takes_gradients_away_and_counts_them():
    case = case_of("grpo")
    batch, mask = case.batch, case.batch.rows.loss_mask
    with jax.enable_x64(True):
        loss_fn = functools.partial(clipped_loss, clip=CLIP, beta=0.0)
        (_, parts), grad = jax.device_get(jax.jit(jax.value_and_grad(loss_fn, has_aux=True))(case.logprobs, batch))
    ratio = np.exp(case.logprobs - batch.behavior_logprobs)[mask]
    advantage = batch.advantages[batch.response][mask]
    clipped = (advantage > 0) & (ratio > 1 + CLIP) | (advantage < 0) & (ratio < 1 - CLIP)
    assert 3 < clipped.sum() < mask.sum() - 3
    np.testing.assert_array_equal(grad[mask] == 0, clipped)
    assert parts["clipped"] == clipped.sum() and parts["regularizer"] == 0


def test_at_the_sampler_grpo_is_a_policy_gradient_of_mean_log_probs():
    case = case_of("grpo")
    batch = case.batch.__class__(**vars(case.batch) | {"behavior_logprobs": case.logprobs})
    with jax.enable_x64(True):
        grad = jax.grad(lambda p: clipped_loss(p, batch, clip=CLIP, beta=0.0)[0])(jnp.asarray(case.logprobs))
    expected = -(batch.weights * batch.advantages / batch.lengths)[batch.response]
    np.testing.assert_allclose(grad, np.where(batch.rows.loss_mask, expected, 0.0), rtol=1e-9)


@pytest.mark.parametrize("method", METHODS)
def test_micro_batches_add_up(method):
    case, loss_fn = case_of(method), METHODS[method][1]
    with jax.enable_x64(True):
        value_and_grad = jax.value_and_grad(loss_fn, has_aux=True)
        (loss, parts), grad = jax.device_get(value_and_grad(jnp.asarray(case.logprobs), case.batch))
        rows = [np.array([4, 0, 2]), np.array([6, 1]), np.array([3, 5])]
        micro_batches = [rows_of(case, chosen) for chosen in rows]
        results = jax.device_get([value_and_grad(jnp.asarray(m.logprobs), m.batch) for m in micro_batches])
    np.testing.assert_allclose(sum(result[0][0] for result in results), loss, rtol=1e-9)
    for name, value in parts.items():
        combine = max if name.startswith("max_") else sum
        np.testing.assert_allclose(combine(result[0][1][name] for result in results), value, rtol=1e-9, err_msg=name)
    for chosen, (_, micro_grad) in zip(rows, results, strict=True):
        np.testing.assert_allclose(micro_grad, grad[chosen], rtol=1e-9)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("k", [2, 3, 7])
def test_advantages(method, k):
    rewards = np.random.default_rng(k).integers(0, 2, k) + 0.1 * np.random.default_rng(k + 1).normal(size=k)
    rewards[0], rewards[1] = 1.0, 0.125  # not all alike
    found = METHODS[method][0](rewards, correct(rewards))
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, by_hand(method, rewards.tolist()), rtol=1e-12, atol=1e-12)


def test_how_the_methods_differ():
    rewards = np.array([1.0, 0.0, 0.0, 1.0, 1.0])
    right = rewards == 1
    np.testing.assert_allclose(leave_one_out(rewards, right), 5 / 4 * (rewards - rewards.mean()), rtol=1e-12)
    np.testing.assert_allclose(np.mean(standardized(rewards, right) ** 2), 1, rtol=1e-5)
    np.testing.assert_allclose(best_only(rewards, right), [5 / 3, 0, 0, 5 / 3, 5 / 3])
    # With a length reward the best is one; a high reward of a wrong response does not count.
    np.testing.assert_array_equal(best_only(np.array([0.7, 1.4, 1.2, 9.0, 0.5]), np.arange(5) < 3), [0, 5, 0, 0, 0])


@pytest.mark.parametrize("method", METHODS)
def test_a_group_of_equal_responses_teaches_only_those_without_a_baseline(method):
    advantages = METHODS[method][0]
    third = np.array([0.1 + 0.2, 0.3, 0.3])  # equal but for rounding, which must not be magnified
    np.testing.assert_allclose(advantages(np.zeros(3), np.zeros(3, bool)), 0, atol=1e-8)
    kept = {"reinforce": 0.3, "rest": None, "rloo": 0.0, "grpo": 0.0}[method]
    if kept is not None:
        np.testing.assert_allclose(advantages(third, np.ones(3, bool)), kept, atol=1e-8)


def test_a_reward_alone_cannot_be_compared():
    with pytest.raises(ValueError, match="others of its problem; got 1"):
        leave_one_out(np.ones(1), np.ones(1, bool))
