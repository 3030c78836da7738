"""What is trained moves as if nothing were frozen, and what is frozen is not touched, by whatever mesh."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from kimi_jax.arrays import TrainState
from kimi_jax.models import lora, paths
from kimi_jax.models.policy import Policy
from kimi_jax.rl.batch import build_minibatches
from kimi_jax.training import optim, sharding, trainable
from tests.helpers import (
    CONFIG,
    PACKING,
    assert_trees_close,
    random_adapters,
    random_groups,
    random_params,
    random_rewards,
    rl_stepper,
    run_updates,
)

TEXT = dataclasses.replace(CONFIG, vision=None, num_layers=2, width=26, num_heads=4, mlp_width=38, vocab_size=62)
ADAM = optim.adam(b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.0)
SOME = ("decoder/ends/.*", ".*/(q|up)_proj/kernel")


def minibatch():
    groups = random_groups(0, (5, 4))
    shape = dict(rows=4, row_tokens=48, row_patches=48, responses=19, oldest_version=0, **PACKING)
    return build_minibatches(groups, *random_rewards(1, groups), minibatches=1, **shape)[0]


def test_split_and_join():
    params = random_params(CONFIG)
    trained, frozen = trainable.split(params, SOME)
    flat = dict(paths.flatten(params))
    kernels = {path for path in flat if path.endswith(("/q_proj/kernel", "/up_proj/kernel"))}
    assert len(kernels) == 4  # two in each tower
    assert dict(paths.flatten(trained)).keys() == kernels | {p for p in flat if p.startswith("decoder/ends/")}
    joined = trainable.join(trained, frozen)
    assert jax.tree.structure(joined) == jax.tree.structure(params)
    assert all(a is b for a, b in zip(jax.tree.leaves(joined), jax.tree.leaves(params), strict=True))
    everything, nothing = trainable.split(params, (".*",))
    assert jax.tree.structure(everything) == jax.tree.structure(params) and nothing == {}


def test_only_the_frozen_are_cast():
    params = trainable.cast_frozen(random_params(CONFIG), SOME, "bfloat16")
    trained, frozen = trainable.split(params, SOME)
    assert {leaf.dtype for leaf in jax.tree.leaves(trained)} == {np.dtype(np.float32)}
    assert {leaf.dtype for leaf in jax.tree.leaves(frozen)} == {np.dtype(jnp.bfloat16)}


@pytest.mark.parametrize(
    "pattern, told",
    [
        ("vison/.*", "'vison/.*' of the parameters to train matches no path from end to end. Near it are 'vision/.*'"),
        ("decoder/run/.*", "Near it are 'decoder/runs/.*'"),
        ("decoder", "Near it are 'decoder/.*'"),
        ("decoder/(.*", "'decoder/(.*' of the parameters to train is no regular expression: missing )"),
    ],
)
def test_a_pattern_that_matches_nothing_is_refused(pattern, told):
    shapes = jax.eval_shape(Policy(CONFIG).init, jax.random.key(0))
    with pytest.raises(ValueError) as error:
        trainable.split(shapes, ("decoder/.*", pattern))
    assert told in str(error.value)


def test_what_is_trained_moves_as_if_nothing_were_frozen_and_the_frozen_stay_bit_for_bit():
    params = random_params(TEXT)
    grads, state, metrics = run_updates(
        rl_stepper(Policy(TEXT), optimizer=ADAM, rate=1e-3, trained=SOME), params, minibatch(), updates=1
    )
    whole_grads, whole, _ = run_updates(
        rl_stepper(Policy(TEXT), optimizer=ADAM, rate=1e-3), params, minibatch(), updates=1
    )
    trained, frozen = trainable.split(params, SOME)
    assert_trees_close(grads, trainable.split(whole_grads, SOME)[0], relative=1e-5)
    moved, kept = trainable.split(state.params, SOME)
    jax.tree.map(np.testing.assert_array_equal, kept, frozen)
    assert min(np.abs(a - b).max() for a, b in zip(*map(jax.tree.leaves, (moved, trained)), strict=True)) > 5e-4
    # The first step of Adam is ± the rate, so a gradient that is next to nothing may go either way.
    differ = jax.tree.map(lambda a, b: np.mean(np.abs(a - b) > 1e-6), moved, trainable.split(whole.params, SOME)[0])
    assert max(jax.tree.leaves(differ)) < 0.02
    # Moments, clipping and the guard know of no others.
    [moments] = [part for part in state.opt_state if hasattr(part, "mu")]
    assert jax.tree.structure(moments.mu) == jax.tree.structure(moments.nu) == jax.tree.structure(trained)
    norm = np.sqrt(sum(np.sum(np.float64(g) ** 2) for g in jax.tree.leaves(grads)))
    assert float(metrics[0]["grad_norm"]) == pytest.approx(norm, rel=1e-5)


def run_on(mesh, params, patterns, updates=2):
    rules = functools.partial(sharding.shardings, mesh, rules=sharding.TRAIN_RULES)
    stepper = rl_stepper(Policy(TEXT, mesh=mesh), optimizer=ADAM, rate=1e-3, moments_sharding=rules, trained=patterns)
    batches = [sharding.put_rows(mesh, batch) for batch in minibatch()]
    step = sharding.replicate(mesh, np.int32(0))
    out = run_updates(stepper, jax.device_put(params, rules(params)), batches, updates=updates, step=step)
    compiled = [getattr(stepper, name)._cache_size() for name in ("init_optimizer", "accumulate", "apply")]
    assert compiled == [1, 1, 1]
    return out


@pytest.mark.skipif(jax.device_count() < 8, reason="needs eight devices, virtual ones will do")
def test_adapters_on_eight_devices_are_trained_as_on_one():
    base = jax.tree.map(lambda x: np.asarray(x, jnp.bfloat16), random_params(TEXT))
    params = base | {"lora": random_adapters(base, rank=3)}
    patterns = ("lora/.*/[ab]",)
    one = sharding.make_mesh(data=1, fsdp=1, tensor=1, devices=jax.devices()[:1])
    eight = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    grads, state, _ = run_on(one, params, patterns)
    grads_8, state_8, metrics_8 = run_on(eight, params, patterns)
    assert_trees_close(grads_8, grads, relative=1e-4)
    jax.tree.map(np.testing.assert_array_equal, {k: state_8.params[k] for k in base}, base)
    merged = jax.jit(lora.merge)
    assert_trees_close(merged(state_8.params), merged(state.params), relative=2e-2)
    assert jax.tree.map(lambda x: x.sharding, state_8.params) == sharding.shardings(
        eight, state_8.params, sharding.TRAIN_RULES
    )
    specs = {path: leaf.sharding.spec for path, leaf in paths.flatten(state_8.params["lora"]["decoder"]["runs"]["0"])}
    assert specs["attn/q_proj/a"] == P(None, "fsdp") and specs["attn/q_proj/b"] == P(None, None, "tensor")
    assert specs["mlp/down_proj/a"] == P(None, "tensor") and specs["mlp/down_proj/b"] == P(None, None, "fsdp")
    assert metrics_8[0]["max_log_ratio"] == 0.0


def test_an_update_leaves_the_frozen_where_they_are_in_memory():
    params = jax.tree.map(jnp.array, random_params(TEXT))
    stepper = rl_stepper(Policy(TEXT), optimizer=ADAM, rate=1e-3, trained=SOME)
    trained, frozen = trainable.split(params, SOME)
    where = {path: leaf.unsafe_buffer_pointer() for path, leaf in paths.flatten(frozen)}
    state = TrainState(params, stepper.init_optimizer(params), jnp.int32(0))
    acc = {"grads": jax.tree.map(jnp.ones_like, trained), "parts": {"loss": jnp.float32(0)}}
    state, _ = stepper.apply(state, acc)
    assert {path: leaf.unsafe_buffer_pointer() for path, leaf in paths.flatten(state.params) if path in where} == where
