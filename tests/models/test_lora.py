"""Adapters against the model that they are merged into: the same numbers, and gradients by the chain rule."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kimi_jax.models import lora, paths
from kimi_jax.models.policy import Policy
from tests.helpers import (
    CONFIG,
    OPTIMIZED,
    assert_trees_close,
    pack,
    random_adapters,
    random_params,
    random_prompts,
    with_response,
)

POLICY = Policy(CONFIG)
PROJECTION = r"decoder/runs/.*/(q|k|v|o|gate|up|down)_proj/kernel"
KERNELS = [f"attn/{name}_proj" for name in "qkvo"] + [f"mlp/{name}_proj" for name in ("gate", "up", "down")]


@pytest.fixture(scope="module")
def params():
    """Every kernel of both stacks of layers is adapted."""
    base = random_params(CONFIG)
    return base | {"lora": random_adapters(base)}


@pytest.fixture(scope="module")
def loss():
    """(value, gradient) of a random weighting of the log-probs of packed rows with images."""
    rng = np.random.default_rng(1)
    examples = [with_response(prompt, rng.integers(6, CONFIG.vocab_size, 5)) for prompt in random_prompts()]
    rows, _ = pack(examples, [[0, 1, 2], [3, 4], [5]], row_tokens=48, row_patches=48)
    weights = rng.normal(size=rows.tokens.shape).astype(np.float32) * rows.loss_mask

    def value(params):
        return jnp.sum(weights * POLICY.logprobs(params, rows, temperature=0.7, logits_chunk=48)[0])

    return jax.jit(jax.value_and_grad(value))


def exactly_merged(params):
    """In float64 NumPy, by the formula."""
    flat = {path: np.float64(leaf) for path, leaf in paths.flatten(params)}
    scale = flat.pop("lora/scale")
    modules = [path.removeprefix("lora/").removesuffix("/a") for path in flat if path.endswith("/a")]
    for module in modules:
        a, b = (flat.pop(f"lora/{module}/{name}") for name in "ab")
        flat[f"{module}/kernel"] += scale * np.einsum("ldr,lrn->ldn", a, b)
    return paths.nest(flat.items())


def test_merging_is_the_formula_and_the_hand_over_gives_the_same(params):
    expected = exactly_merged(params)
    merged = lora.merge(params)
    assert_trees_close(merged, expected, relative=1e-6)
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max() > 0.1, merged, {k: params[k] for k in merged})
    assert all(
        bool(changed) == (path.endswith("/kernel") and "/runs/" in path) for path, changed in paths.flatten(moved)
    )
    handed_over = POLICY.to_sampling_layout(params, "float32")
    assert_trees_close(handed_over, POLICY.to_sampling_layout(merged, "float32"), relative=1e-6)
    assert "lora" not in handed_over and "lora" in params


def test_gradients_are_those_of_the_merged_matrices_by_the_chain_rule(params, loss):
    """W_eff = W + s A B: dA = s dW Bᵀ and dB = s Aᵀ dW, layer by layer, in float64."""
    value, grads = loss(params)
    merged_value, merged_grads = loss(lora.merge(params))
    assert float(value) == pytest.approx(float(merged_value), rel=1e-5)
    flat, whole = dict(paths.flatten(params)), dict(paths.flatten(merged_grads))
    expected = {"scale": np.zeros(())}  # a constant
    for path in flat:
        if path.startswith("lora/") and path.endswith("/a"):
            module = path.removeprefix("lora/").removesuffix("/a")
            a, b = (np.float64(flat[f"lora/{module}/{name}"]) for name in "ab")
            dW = np.float64(whole[f"{module}/kernel"])
            expected[f"{module}/a"] = 1.4 * np.einsum("ldn,lrn->ldr", dW, b)
            expected[f"{module}/b"] = 1.4 * np.einsum("ldr,ldn->lrn", a, dW)
    assert len(expected) == 1 + 2 * 2 * 7
    assert_trees_close(grads["lora"], paths.nest(expected.items()), relative=1e-4)
    assert_trees_close(grads["decoder"]["ends"], merged_grads["decoder"]["ends"], relative=1e-4)


def test_a_model_with_new_adapters_is_the_model_bit_for_bit(loss):
    loss = jax.jit(loss.__wrapped__, compiler_options=OPTIMIZED)  # else two programs may round in different places
    base = random_params(CONFIG)
    adapters = lora.init(base, jax.random.key(3), rank=5, alpha=32.0, targets=[PROJECTION])
    (value, grads), (before, before_grads) = loss(base | {"lora": adapters}), loss(base)
    assert value == before
    jax.tree.map(np.testing.assert_array_equal, {k: v for k, v in grads.items() if k != "lora"}, before_grads)
    sampling = POLICY.to_sampling_layout(base | {"lora": adapters}, "float32")
    jax.tree.map(np.testing.assert_array_equal, sampling, POLICY.to_sampling_layout(base, "float32"))


def test_new_adapters():
    shapes = jax.eval_shape(POLICY.init, jax.random.key(0))
    adapters = lora.init(shapes, jax.random.key(3), rank=5, alpha=7.0, targets=[PROJECTION])
    flat = dict(paths.flatten(adapters))
    assert flat.pop("scale") == np.float32(7 / 5)
    assert flat.keys() == {f"decoder/runs/0/{kernel}/{name}" for kernel in KERNELS for name in "ab"}
    drawn = set()
    for path, leaf in flat.items():
        L, D, N = dict(paths.flatten(shapes))[f"{path[:-2]}/kernel"].shape
        assert leaf.dtype == jnp.float32
        if path.endswith("/b"):
            assert leaf.shape == (L, 5, N) and not leaf.any()
        else:
            assert leaf.shape == (L, D, 5)
            np.testing.assert_allclose(np.std(leaf) * D**0.5, 1, atol=5 / leaf.size**0.5)
            assert abs(np.mean(leaf)) * D**0.5 < 5 / leaf.size**0.5
            drawn.add(float(leaf[0, 0, 0]))
    assert len(drawn) == 7  # none like another


def test_a_base_in_bfloat16_is_merged_in_float32(params):
    base = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), {k: v for k, v in params.items() if k != "lora"})
    small = jax.tree.map(lambda x: 1e-3 * x, params["lora"])
    merged = lora.merge(base | {"lora": small})
    assert_trees_close(merged, exactly_merged(base | {"lora": small}), relative=1e-6)
    assert merged["decoder"]["runs"]["0"]["mlp"]["up_proj"]["kernel"].dtype == jnp.float32
    assert merged["decoder"]["ends"]["embed"]["embedding"].dtype == jnp.bfloat16


def test_a_gradient_has_the_merged_kernels_of_few_layers_at_once():
    """In float32: XLA for CPUs slices no array of 16 bits, and converts the stacks instead."""
    config = dataclasses.replace(CONFIG, vision=None, num_layers=19, width=202, mlp_width=307)
    policy = Policy(config)
    base = jax.eval_shape(policy.init, jax.random.key(0))
    adapters = jax.eval_shape(lambda: lora.init(base, jax.random.key(0), rank=3, alpha=1.0, targets=[PROJECTION]))
    rows, _ = pack([with_response(random_prompts()[0], np.arange(7))], [[0]], row_tokens=16, row_patches=0)

    def loss(adapters, base):
        return jnp.sum(policy.logprobs(base | {"lora": adapters}, rows, temperature=1.0, logits_chunk=16)[0])

    compiled = jax.jit(jax.grad(loss)).lower(adapters, base).compile()
    kernels = sum(4 * leaf.size for path, leaf in paths.flatten(base) if path.endswith("_proj/kernel"))
    assert compiled.memory_analysis().temp_size_in_bytes < 0.4 * kernels


@pytest.mark.parametrize(
    "pattern, near",
    [
        ("decoder/runs/.*/qkv_proj/kernel", "decoder/runs/0/attn/q_proj/kernel"),
        ("decoder/ends/.*", "decoder/runs/.*"),  # no stacked kernel there
        ("decoder/runs/.*_proj", "decoder/runs/.*"),  # from end to end
    ],
)
def test_targets_that_match_no_kernel_are_refused(pattern, near):
    shapes = jax.eval_shape(POLICY.init, jax.random.key(0))
    with pytest.raises(ValueError) as error:
        lora.init(shapes, jax.random.key(0), rank=3, alpha=1.0, targets=[PROJECTION, pattern])
    assert f"The pattern {pattern!r} of the kernels to adapt matches no path" in str(error.value)
    assert near in str(error.value)
