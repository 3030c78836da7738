"""Eight virtual devices against one: the same gradients, parameters and tokens, and arrays where the tables say."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from kimi_jax.models.policy import Policy
from kimi_jax.rl.batch import build_minibatches
from kimi_jax.sampling import decode
from kimi_jax.sampling.handover import make_handover, num_bytes
from kimi_jax.sampling.logits import SamplingSettings
from kimi_jax.sampling.repetition import RepetitionSettings
from kimi_jax.training import optim, sharding
from kimi_jax.types import Request, StopReason
from tests.helpers import (
    CONFIG,
    PACKING,
    VISION,
    assert_trees_close,
    make_engine,
    random_groups,
    random_params,
    random_prompt,
    random_prompts,
    random_rewards,
    rl_stepper,
    run_updates,
    sampling_params,
)

# Heads, widths and vocabulary split in two; the key/value heads, the vision heads (3) and one MLP (29) do not all do.
SPLIT = dataclasses.replace(
    CONFIG, num_layers=2, width=26, mlp_width=38, vocab_size=62, num_heads=4, tie_embeddings=False
)

needs_eight = pytest.mark.skipif(jax.device_count() < 8, reason="needs eight devices, virtual ones will do")


def make_mesh(**changes):
    return sharding.make_mesh(**dict(data=2, fsdp=2, tensor=2) | changes)


def specs(params):
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf.sharding.spec
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }


def minibatch():
    groups = random_groups(0, (5, 4, 3, 5, 4, 3))
    shape = dict(rows=4, row_tokens=48, row_patches=48, responses=19, oldest_version=0, **PACKING)
    batches = build_minibatches(groups, *random_rewards(1, groups), minibatches=1, **shape)[0]
    assert len(batches) == 2
    return batches


def run_on(mesh, optimizer, updates):
    rules = functools.partial(sharding.shardings, mesh, rules=sharding.TRAIN_RULES)
    stepper = rl_stepper(Policy(SPLIT, mesh=mesh), optimizer=optimizer, rate=1e-3, moments_sharding=rules)
    params = random_params(SPLIT)
    params = jax.device_put(params, rules(params))
    batches = [sharding.put_rows(mesh, batch) for batch in minibatch()]
    step = jax.device_put(np.int32(0), NamedSharding(mesh, P()))
    out = run_updates(stepper, params, batches, updates=updates, step=step)
    # What an update gives back lies as what it was given: nothing compiles a second time.
    compiled = {name: getattr(stepper, name)._cache_size() for name in ("score", "accumulate", "apply")}
    assert compiled == {"score": 1, "accumulate": 2, "apply": 1}  # of the first micro-batch, and of those after it
    return rules, *out


@needs_eight
def test_training_on_eight_devices_equals_training_on_one():
    _, grads, state, metrics = run_on(make_mesh(data=1, fsdp=1, tensor=1, devices=jax.devices()[:1]), optim.sgd(), 3)
    rules, grads_8, state_8, metrics_8 = run_on(make_mesh(), optim.sgd(), 3)
    assert_trees_close(grads_8, grads, relative=1e-4)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), state_8.params, state.params)
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), state.params, random_params(SPLIT))
    assert max(jax.tree.leaves(moved)) > 1e-3
    assert metrics_8[0]["max_log_ratio"] == 0.0
    for update, update_8 in zip(metrics, metrics_8, strict=True):
        for name in update:
            np.testing.assert_allclose(update_8[name], update[name], rtol=1e-3, atol=1e-5, err_msg=name)
    # An update leaves the parameters as the table lays them out.
    assert jax.tree.map(lambda x: x.sharding, state_8.params) == rules(state_8.params)


@needs_eight
def test_moments_and_gradients_lie_like_the_parameters():
    mesh = make_mesh()
    rules = functools.partial(sharding.shardings, mesh, rules=sharding.TRAIN_RULES)
    optimizer = optim.adam(b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.0)
    stepper = rl_stepper(Policy(SPLIT, mesh=mesh), optimizer=optimizer, rate=1e-3, moments_sharding=rules)
    params = random_params(SPLIT)
    params = jax.device_put(params, rules(params))
    hyper = {"temperature": np.float32(1), "tau": np.float32(1), "is_pi_i": True}
    grads = stepper.accumulate(None, params, sharding.put_rows(mesh, minibatch()[0]), hyper)["grads"]
    moments = stepper.init_optimizer(params)[0]
    assert specs(grads) == specs(moments.mu) == specs(moments.nu) == specs(params)
    assert moments.count.sharding.spec == P()
    per_device = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(grads))
    assert per_device < 0.35 * num_bytes(grads)  # a quarter, and the small ones that every device has


PROGRAMS = (decode.prefill, decode.fork, decode.decode)


def answers(engine, params, requests, **options):
    """Every request's segment."""
    settings = SamplingSettings.of(temperature=1.0, end_ids=[7, 41])
    flight = engine.start(params, requests, run_key=jax.random.key(3), settings=settings, **options)
    found = {}
    while not flight.done:
        found |= flight.advance()
    assert all(len(free) == engine.shard_pages - 1 for free in flight._free)
    return [found[i] for i in range(len(requests))], flight


@needs_eight
@pytest.mark.parametrize("data, fsdp, tensor", [(2, 2, 2), (1, 1, 8), (8, 1, 1)])
def test_sampling_on_eight_devices_gives_the_tokens_of_one(data, fsdp, tensor):
    """Ragged groups, some begun before, long prompts in pieces, images, more than there are slots and pages."""
    mesh = make_mesh(data=data, fsdp=fsdp, tensor=tensor)
    limits = dict(rows=8, prompt_tokens=37, max_tokens=11, prefill_tokens=16, repetition_window=5)
    rules = RepetitionSettings.of(min_tokens=3, repeats=2, span=3, share=1.0)
    one = make_engine(policy=Policy(SPLIT), repetition=rules, **limits)
    pages = data * fsdp * max(one.row_pages + 1, 30 // (data * fsdp))  # rows of one shard wait for each other's
    put_rows = functools.partial(sharding.put_rows, mesh)
    eight = dataclasses.replace(one, policy=Policy(SPLIT, mesh=mesh), put_rows=put_rows, pages=pages)
    rng = np.random.default_rng(7)
    prompts = [*random_prompts(), random_prompt(np.random.default_rng(3), 31, [(7, 13)])]
    requests = [
        Request(prompt, int(rng.integers(2**32)), 6, rng.integers(8, 40, 5 * (j % 2)).astype(np.int32))
        for prompt, k in zip(prompts, (3, 4, 2, 1, 5, 3, 2), strict=True)
        for j in range(k)
    ]
    requests = [requests[i] for i in rng.permutation(len(requests))]

    masters = random_params(SPLIT)
    expected, alone = answers(one, sampling_params(masters, SPLIT), requests)
    to_rollout = make_handover(eight.policy, mesh, dtype="float32")
    params = to_rollout(jax.device_put(masters, sharding.shardings(mesh, masters, sharding.TRAIN_RULES)), None)
    before = [program._cache_size() for program in PROGRAMS]
    found, flight = answers(eight, params, requests)
    # Chunk after chunk is one program: the cache that it gives back lies as the one that it was given.
    compiled = [program._cache_size() - count for program, count in zip(PROGRAMS, before, strict=True)]
    assert compiled == [4, 1, 1]  # pieces of one length, with and without images, at the beginning and further on
    assert eight.new_pages()[0][0].sharding == eight.page_shapes()[0][0].sharding
    if mesh.shape["tensor"] == 8:  # prompts are read once, as on one device; where pages are few some are read again
        assert flight.prefilled_tokens == alone.prefilled_tokens
    assert [s.stop for s in found] == [s.stop for s in expected]
    assert {s.stop for s in found} >= {StopReason.END, StopReason.LENGTH}
    for segment, segment_8 in zip(expected, found, strict=True):
        np.testing.assert_array_equal(segment_8.tokens, segment.tokens)
        np.testing.assert_allclose(segment_8.logprobs, segment.logprobs, atol=1e-5)


@needs_eight
def test_a_fork_copies_within_each_shard():
    mesh = make_mesh()
    rng = np.random.default_rng(0)
    pool = rng.normal(size=(2, 4 * 5, 3, 7)).astype(np.float32)  # 5 pages in each of 4 shards
    where = NamedSharding(mesh, P("tensor", ("data", "fsdp")))
    source, target = np.array([2, 2, 0, 0, 1, 3, 0, 4], np.int32), np.array([1, 4, 0, 0, 2, 4, 0, 1], np.int32)
    expected = pool.copy().reshape(2, 4, 5, 3, 7)
    for b in range(8):
        if target[b]:
            expected[:, b // 2, target[b]] = pool.reshape(2, 4, 5, 3, 7)[:, b // 2, source[b]]
    copied = decode.fork((jax.device_put(pool, where),), *sharding.put_rows(mesh, (source, target)), mesh=mesh)[0]
    np.testing.assert_array_equal(copied, expected.reshape(pool.shape))
    assert copied.sharding == where


@needs_eight
def test_the_hand_over_casts_and_gives_away_the_previous_copy_but_never_the_masters():
    mesh, policy = make_mesh(), Policy(SPLIT)
    params = random_params(SPLIT)
    masters = jax.device_put(params, sharding.shardings(mesh, params, sharding.TRAIN_RULES))
    to_rollout = make_handover(policy, mesh, dtype="bfloat16")
    expected = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), sampling_params(params, SPLIT))
    previous = None
    for _ in range(3):
        rollout = to_rollout(masters, previous)  # not looked at here: what the host has a view of is not given away
        assert previous is None or all(leaf.is_deleted() for leaf in jax.tree.leaves(previous))
        assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(masters))
        previous = rollout
    jax.tree.map(np.testing.assert_array_equal, rollout, expected)
    jax.tree.map(np.testing.assert_array_equal, masters, params)
    assert num_bytes(rollout) == 2 * sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))
    # Decode gathers nothing over data and fsdp: what is split at all is split over tensor.
    assert {axis for spec in specs(rollout).values() for axis in spec} == {None, "tensor"}
    assert specs(rollout)["decoder/layers/1/attn/qkv_proj/kernel"] == P(None, "tensor")


@needs_eight
def test_the_tables_split_what_divides_and_replicate_the_rest():
    config = dataclasses.replace(SPLIT, qkv_bias=True, scalar_head=True)
    params = jax.eval_shape(Policy(config).init, jax.random.key(0))
    laid_out = jax.tree_util.tree_leaves_with_path(sharding.shardings(make_mesh(), params, sharding.TRAIN_RULES))
    flat = {jax.tree_util.keystr(path, simple=True, separator="/"): s.spec for path, s in laid_out}
    block = "decoder/runs/0"
    assert flat["decoder/ends/embed/embedding"] == flat["decoder/ends/head/embedding"] == P("tensor", "fsdp")
    assert flat[f"{block}/attn/q_proj/kernel"] == P(None, "fsdp", "tensor")  # layers are stacked in front
    assert flat[f"{block}/attn/q_proj/bias"] == P(None, "tensor")
    assert flat[f"{block}/attn/o_proj/kernel"] == flat[f"{block}/mlp/down_proj/kernel"] == P(None, "tensor", "fsdp")
    assert flat[f"{block}/attn/q_norm/scale"] == flat["decoder/ends/norm/scale"] == P()
    assert flat["decoder/ends/scalar_head/kernel"] == P()
    assert VISION.mlp_width % 2 and flat["vision/runs/0/mlp/gate_proj/kernel"] == P(None, "fsdp")


def test_a_parameter_that_no_rule_matches_is_an_error():
    tree = {"decoder": {"gate": {"kernel": jnp.zeros((3, 5))}}}
    with pytest.raises(KeyError, match=r"'decoder/gate/kernel' of shape \(3, 5\).*TRAIN_RULES"):
        sharding.shardings(make_mesh(data=1, fsdp=1, tensor=1, devices=jax.devices()[:1]), tree, sharding.TRAIN_RULES)


@needs_eight
@pytest.mark.parametrize("data, fsdp, tensor", [(1, 1, 1), (8, 1, 1), (1, 8, 1), (4, 1, 2), (2, 2, 2)])
def test_what_a_program_gives_back_is_laid_out_by_the_same_names(data, fsdp, tensor):
    """XLA chooses the names of an output's layout. Other names than the input's would compile the next call again."""
    mesh = make_mesh(data=data, fsdp=fsdp, tensor=tensor, devices=jax.devices()[: data * fsdp * tensor])
    params = random_params(SPLIT)
    params = jax.device_put(params, sharding.shardings(mesh, params, sharding.TRAIN_RULES))
    rows = sharding.put_rows(mesh, np.ones((8, 3), np.float32))
    params_out, rows_out = jax.jit(lambda tree: jax.tree.map(lambda x: 2 * x, tree))((params, rows))
    assert specs(params_out) == specs(params) and rows_out.sharding == rows.sharding


@needs_eight
def test_rows_are_split_where_they_divide():
    mesh = make_mesh()
    placed = sharding.put_rows(mesh, {"eight": np.arange(24).reshape(8, 3), "seven": np.arange(7)})
    assert placed["eight"].sharding.spec == P(("data", "fsdp")) and placed["seven"].sharding.spec == P()
    assert {shard.data.shape for shard in placed["eight"].addressable_shards} == {(2, 3)}
    np.testing.assert_array_equal(placed["seven"], np.arange(7))


@needs_eight
def test_one_size_of_the_mesh_may_be_what_is_left():
    devices = jax.devices()[:8]
    assert dict(make_mesh(data=-1, devices=devices).shape) == {"data": 2, "fsdp": 2, "tensor": 2}
    assert dict(make_mesh(data=1, fsdp=-1, tensor=1, devices=devices).shape) == {"data": 1, "fsdp": 8, "tensor": 1}


@needs_eight
@pytest.mark.parametrize(
    "sizes",
    [(3, 1, 1), (2, 2, 1), (-1, 3, 1), (-1, 16, 1), (-1, -1, 2), (-1, 0, 1), (0, 1, 1), (-2, -2, 2), (-1, -2, 2)],
)
def test_a_mesh_that_does_not_cover_the_devices_is_refused(sizes):
    data, fsdp, tensor = sizes
    with pytest.raises(ValueError, match=f"mesh data={data}, fsdp={fsdp}, tensor={tensor} does not cover 8 devices"):
        sharding.make_mesh(data=data, fsdp=fsdp, tensor=tensor, devices=jax.devices()[:8])
