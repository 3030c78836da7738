"""Updates: the same for any cut into micro-batches, exact where exactness is promised, and never poisoned."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kimi_jax.arrays import TrainState
from kimi_jax.models.policy import Policy
from kimi_jax.rl.batch import build_minibatches
from kimi_jax.training import optim
from kimi_jax.training.step import NonFiniteError, Stepper, check_finite
from tests.helpers import (
    CONFIG,
    PACKING,
    assert_trees_close,
    random_groups,
    random_params,
    random_rewards,
    rl_stepper,
    run_updates,
)

TEXT = dataclasses.replace(CONFIG, vision=None)  # test_sharding trains on images too
SHAPE = dict(row_tokens=48, row_patches=48, **PACKING)


def minibatch(rows, responses):
    """Eight rows of tokens, in micro-batches of `rows` rows."""
    groups = random_groups(0, (5, 4, 3, 5, 4, 3))
    batches = build_minibatches(
        groups, *random_rewards(1, groups), minibatches=1, rows=rows, responses=responses, oldest_version=0, **SHAPE
    )[0]
    assert len(batches) == 8 // rows
    return batches


@pytest.fixture(scope="module")
def params():
    return random_params(TEXT)


@pytest.fixture(scope="module")
def stepper():
    return rl_stepper(Policy(TEXT), optimizer=optim.sgd(), rate=1e-3)


@pytest.fixture(scope="module")
def eight_by_one(stepper, params):
    return run_updates(stepper, params, minibatch(1, 7), updates=3)


@pytest.mark.smoke
def test_one_micro_batch_of_eight_rows_equals_eight_of_one(stepper, params, eight_by_one):
    grads, state, metrics = run_updates(stepper, params, minibatch(8, 31), updates=3)
    other_grads, other_state, other_metrics = eight_by_one
    assert_trees_close(grads, other_grads, relative=1e-4)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), state.params, other_state.params)
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), state.params, params)
    assert min(jax.tree.leaves(moved)) > 1e-4 and max(jax.tree.leaves(moved)) > 3e-3
    assert int(state.step) == int(other_state.step) == 3
    for update, other in zip(metrics, other_metrics, strict=True):
        for name in update:
            np.testing.assert_allclose(update[name], other[name], rtol=1e-3, atol=1e-5, err_msg=name)
    assert metrics[0]["responses"] == 24 and metrics[0]["finite"] == 1


def test_the_log_ratio_of_the_first_update_is_exactly_zero_and_then_is_not(eight_by_one):
    _, _, (first, second, third) = eight_by_one
    assert first["max_log_ratio"] == first["squared_log_ratio"] == first["log_ratio"] == first["kl"] == 0.0
    assert first["regularizer"] == 0.0
    assert all(update["max_log_ratio"] > 0.1 and update["regularizer"] > 0 for update in (second, third))


def test_gradients_are_those_of_the_loss(stepper, params, eight_by_one):
    """A central difference of the loss of the whole mini-batch along the gradient."""
    grads, _, metrics = eight_by_one
    batches = minibatch(1, 7)
    temperature = np.float32(0.7)

    def policy_term(step):
        moved = jax.tree.map(lambda p, g: p + np.float32(step) * g, params, grads)
        total = 0.0
        for batch in batches:
            logprobs = np.float64(stepper.score(moved, batch.rows, temperature))
            w = (batch.weights * batch.advantages)[batch.response]
            total -= np.sum(np.where(batch.rows.loss_mask, w * logprobs, 0.0))
        return total

    norm = np.sqrt(sum(np.sum(np.float64(g) ** 2) for g in jax.tree.leaves(grads)))
    assert metrics[0]["grad_norm"] == pytest.approx(norm, rel=1e-5)
    assert metrics[0]["loss"] == pytest.approx(policy_term(0.0), rel=1e-4)
    h = 1e-3 / norm
    assert (policy_term(h) - policy_term(-h)) / (2 * h) == pytest.approx(norm**2, rel=2e-3)
    assert metrics[0]["update_norm"] == pytest.approx(1e-3 * norm, rel=1e-5)


@pytest.mark.parametrize("field", ["advantages", "behavior_logprobs"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_changes_nothing_and_says_so(stepper, params, field, bad):
    batches = minibatch(1, 7)
    values = getattr(batches[5], field).copy()
    place = (0,) if field == "advantages" else tuple(np.argwhere(batches[5].rows.loss_mask)[3])
    values[place] = bad
    batches[5] = dataclasses.replace(batches[5], **{field: values})
    _, state, (metrics,) = run_updates(stepper, params, batches, updates=1)
    jax.tree.map(np.testing.assert_array_equal, state.params, params)
    assert int(state.step) == 0 and metrics["finite"] == 0
    culprit = "loss=" if field == "advantages" else "logprob_gap="
    with pytest.raises(NonFiniteError, match=f"(?s)iteration 7: not finite: .*{culprit}.* was not applied"):
        check_finite(metrics, "iteration 7")


def test_a_finite_update_raises_nothing(eight_by_one):
    check_finite(eight_by_one[2][0], "iteration 7")


# --- `apply` alone, on parameters that need no model


def toy_stepper(optimizer, *, clip_norm=1e6, schedule=lambda step: jnp.float32(0.1)):
    policy, loss_fn = Policy(TEXT), lambda logprobs, batch, hyper: (0.0, {})
    return Stepper(
        policy=policy, loss_fn=loss_fn, optimizer=optimizer, schedule=schedule, clip_norm=clip_norm, logits_chunk=1
    )


def toy(seed=0):
    rng = np.random.default_rng(seed)
    return {
        "a": {"kernel": rng.normal(size=(5, 3)).astype(np.float32)},
        "b": {"scale": rng.normal(size=7).astype(np.float32)},
    }


def fresh(optimizer, params):
    params = jax.tree.map(jnp.array, params)
    return TrainState(params, optimizer.init(params), jnp.int32(0))


def accumulated(grads, loss=0.0):
    return {"grads": jax.tree.map(jnp.array, grads), "parts": {"loss": jnp.float32(loss)}}


def test_the_gradient_is_clipped_to_a_global_norm():
    grads, params = toy(1), toy(2)
    norm = np.sqrt(sum(np.sum(np.float64(g) ** 2) for g in jax.tree.leaves(grads)))
    for clip_norm in (0.5 * norm, 2 * norm):
        stepper = toy_stepper(optim.sgd(), clip_norm=float(clip_norm))
        state, metrics = stepper.apply(fresh(stepper.optimizer, params), accumulated(grads))
        expected = jax.tree.map(lambda p, g: p - 0.1 * min(1, clip_norm / norm) * g, params, grads)  # noqa: B023
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), state.params, expected)
        assert metrics["grad_norm"] == pytest.approx(norm, rel=1e-6)  # before clipping
        assert metrics["update_norm"] == pytest.approx(0.1 * min(norm, clip_norm), rel=1e-5)


@pytest.mark.parametrize("bad", ["gradient", "loss"])
def test_the_guard_keeps_parameters_moments_and_step_bit_for_bit(bad):
    stepper = toy_stepper(optim.adam(b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.1))
    state, _ = stepper.apply(fresh(stepper.optimizer, toy()), accumulated(toy(1)))
    before = jax.device_get(state)
    before = jax.tree.map(np.copy, before)
    grads = toy(2)
    if bad == "gradient":
        grads["b"]["scale"][4] = np.inf
    state, metrics = stepper.apply(state, accumulated(grads, loss=np.nan if bad == "loss" else 0.0))
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(state), before)
    assert metrics["finite"] == 0 and int(state.step) == 1
    state, metrics = stepper.apply(state, accumulated(toy(3)))  # and goes on
    assert metrics["finite"] == 1 and int(state.step) == 2


def test_adam_is_reset_and_the_schedule_runs_on():
    rate = functools.partial(optim.learning_rate, kind="cosine", peak=0.1, end=0.01, warmup_steps=3, total_steps=11)
    stepper = toy_stepper(optim.adam(b1=0.8, b2=0.9, eps=1e-8, weight_decay=0.0), schedule=rate)
    state = fresh(stepper.optimizer, toy())
    for step in range(6):
        if step == 4:  # a new iteration: moments from zero
            state = dataclasses.replace(state, opt_state=stepper.optimizer.init(state.params))
        before = jax.tree.map(np.array, state.params)
        state, metrics = stepper.apply(state, accumulated(toy(10 + step)))
        expected = float(rate(jnp.int32(step)))
        assert metrics["learning_rate"] == pytest.approx(expected, rel=1e-6) and int(state.step) == step + 1
        if step in (0, 4):  # the first step of a fresh Adam is ± the learning rate, whatever the gradient
            change = jax.tree.map(lambda new, old: new - old, state.params, before)
            signs = jax.tree.map(lambda g: -expected * np.sign(g), toy(10 + step))  # noqa: B023
            jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-3), change, signs)
