"""The fused layer of a decode step on GPUs, interpreted, against `layers.Block.decode` on every other device."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from kimi_jax.models import decode_gpu, layers
from kimi_jax.training.sharding import make_mesh
from tests.helpers import lower_for_gpu

B, D, F, PAGE, PAGES = 5, 192, 7 * 64, 4, 3  # products of 2 and 4 parts


def make(rngs, **changes):
    shape = dict(num_heads=6, num_kv_heads=2, head_dim=32, qkv_bias=True, qk_norm=False, norm="rms", mlp="swiglu")
    return layers.Block(
        D, F, mlp_bias=False, eps=1e-6, dtype=jnp.float32, rngs=rngs, out_scale=1.0, fused=True, **shape | changes
    )


def random_block(**changes):
    graphdef, state = nnx.split(make(nnx.Rngs(0), **changes))
    draw = lambda i, leaf: leaf + 0.3 * jax.random.normal(jax.random.key(i), leaf.shape) * (leaf.ndim == 1)  # noqa: E731
    leaves, tree = jax.tree.flatten(state)
    return nnx.merge(graphdef, jax.tree.unflatten(tree, [draw(i, leaf) for i, leaf in enumerate(leaves)]))


def arguments(E=32, K=2, parts=3):
    normal = lambda i, *shape: jax.random.normal(jax.random.key(100 + i), shape)  # noqa: E731
    positions = jnp.array([0, 3, -1, 11, 4])  # a first token, the last slot of a page, an empty row, the last of all
    table = jnp.arange(1, B * PAGES + 1).reshape(B, PAGES)
    pages = tuple(normal(i, K, B * PAGES + 1, PAGE, E) for i in (0, 1))
    return normal(2, B, D), normal(3, parts, B, D), normal(4, B, E // 2), pages, table, positions


@pytest.mark.parametrize("changes", [{}, {"qk_norm": True, "qkv_bias": False}, {"num_kv_heads": 1}])
@pytest.mark.parametrize("first", [True, False])
def test_a_layer(changes, first):
    block = random_block(**changes)
    assert decode_gpu.takes(block, None)
    x, added, angles, pages, table, positions = arguments(K=changes.get("num_kv_heads", 2))
    added = None if first else added
    wanted = block.decode(x, added, angles, pages, table, positions, implementation="xla", mesh=None)
    found = decode_gpu.decode(block, x, added, angles, pages, table, positions, interpret=True)
    live = positions >= 0
    for y, z in zip(*((x[live], jnp.sum(added, axis=0)[live]) for x, added, _ in (wanted, found)), strict=True):
        np.testing.assert_allclose(z, y, atol=2e-5)
    for y, z in zip(wanted[2], found[2], strict=True):
        np.testing.assert_allclose(z, y, atol=1e-5)


def test_a_product_is_split_until_the_gpu_is_full():
    x, w = (jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate([(5, 8960), (8960, 1536)]))
    parts = decode_gpu.product(x, w)
    assert parts.shape == (8, 5, 1536)  # 12 columns of programs
    np.testing.assert_allclose(jnp.sum(parts, axis=0), np.asarray(x, np.float64) @ np.asarray(w, np.float64), atol=2e-3)

    def shape(*sizes):
        B, D, N = sizes
        x, w = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((B, D), (D, N)))
        return jax.eval_shape(decode_gpu.product, x, w).shape

    assert shape(256, 8960, 1536)[0] == 4  # 24 of them
    assert shape(64, 1536, 2048)[0] == 4  # shorter sums: half the GPU
    assert shape(2048, 384, 384)[0] == 1
    assert shape(64, 1536, 151_936)[0] == 1
    assert shape(5, 42, 7)[0] == 1  # nothing to split


@pytest.mark.parametrize("changes", [{"o_bias": True}, {"norm": "layer"}, {"mlp": "gelu_tanh"}])
def test_what_it_does_not_take(changes):
    assert not decode_gpu.takes(make(nnx.Rngs(0), **changes), None)


def test_several_devices_take_the_other_route():
    assert not decode_gpu.takes(make(nnx.Rngs(0)), make_mesh(data=2, fsdp=2, tensor=2))


def test_the_kernels_compile_for_a_gpu():
    block = random_block()
    half = lambda tree: jax.tree.map(  # noqa: E731
        lambda x: x.astype(jnp.bfloat16) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree
    )
    graphdef, state = nnx.split(block)

    def step(state, *args):
        return decode_gpu.decode(nnx.merge(graphdef, state), *args, interpret=False)

    x, added, angles, pages, table, positions = arguments()
    code = lower_for_gpu(step, half(state), x, added, angles, half(pages), table, positions)
    assert code.count("add_norm") >= 2 and "paged_split" in code
