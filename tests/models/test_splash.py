"""The TPU kernel against plain XLA attention, in interpret mode, on one device and on a mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kimi_jax.models.attention import attend_packed
from kimi_jax.training.sharding import make_mesh

# Where the sequences of a row end, as fractions of its length. The second row ends in padding.
_ENDS = ((0.3, 0.7, 1.0), (0.1, 0.5, 0.9))


def _inputs(R, T, H, K, E, seed=0):
    keys = jax.random.split(jax.random.key(seed), 4)
    q, g = (jax.random.normal(key, (R, T, H, E)) for key in keys[:2])
    k, v = (jax.random.normal(key, (R, T, K, E)) for key in keys[2:])
    segments = np.zeros((R, T), np.int32)
    for row in range(R):
        start = 0
        for number, end in enumerate(_ENDS[row % 2], start=1):
            stop = int(end * T)
            segments[row, start:stop] = number
            start = stop
    return q, k, v, segments, g


def _value_and_grads(q, k, v, segments, g, **options):
    @jax.jit
    def run(q, k, v):
        out, pull = jax.vjp(lambda q, k, v: attend_packed(q, k, v, segments, **options), q, k, v)
        return out, pull(g)

    return run(q, k, v)


def _agree(inputs, *, causal, mesh):
    wanted = _value_and_grads(*inputs, causal=causal, implementation="xla")
    got = _value_and_grads(*inputs, causal=causal, implementation="splash_interpret", mesh=mesh)
    for ours, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


@pytest.mark.parametrize("causal", [True, False])
def test_matches_xla_with_gradients(causal):
    _agree(_inputs(2, 257, 6, 2, 11), causal=causal, mesh=None)  # three blocks of 128


@pytest.mark.parametrize(
    "sizes, R, H, K",
    [
        ((2, 1, 2), 2, 6, 2),  # rows and both kinds of heads split
        ((1, 2, 4), 2, 4, 2),  # more tensor shards than key/value heads, which are repeated
        ((2, 2, 2), 3, 3, 1),  # nothing divides, so every device does all
    ],
)
def test_matches_xla_on_a_mesh(sizes, R, H, K):
    data, fsdp, tensor = sizes
    devices = jax.devices()[: data * fsdp * tensor]
    if len(devices) < data * fsdp * tensor:
        pytest.skip(f"needs {data * fsdp * tensor} devices")
    mesh = make_mesh(data=data, fsdp=fsdp, tensor=tensor, devices=devices)
    _agree(_inputs(R, 131, H, K, 8), causal=True, mesh=mesh)


def test_segments_do_not_see_each_other():
    q, k, v, segments, _ = _inputs(2, 131, 2, 1, 8)
    options = dict(causal=False, implementation="splash_interpret")
    first = np.arange(131) < int(0.3 * 131)
    before = attend_packed(q, k, v, segments, **options)
    outside = jnp.asarray(~first)[None, :, None, None]
    after = attend_packed(q, k, jnp.where(outside, v + 1e3, v), segments, **options)
    np.testing.assert_array_equal(before[0, first], after[0, first])
    assert not np.allclose(before[0, ~first], after[0, ~first])
