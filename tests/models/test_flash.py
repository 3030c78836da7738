"""The GPU kernels for long packed rows against plain XLA attention, in interpret mode."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kimi_jax.models import attention, flash
from kimi_jax.models.attention import attend_packed
from kimi_jax.models.flash import attend_rows
from kimi_jax.training.sharding import make_mesh


def _segments(*rows, tokens):
    """Rows of sequences of these lengths, and padding."""
    out = np.zeros((len(rows), tokens), np.int32)
    for row, lengths in zip(out, rows, strict=True):
        row[: sum(lengths)] = np.repeat(np.arange(len(lengths)) + 1, lengths)
    return out


# With padding and without, a sequence of one token, edges at and beside those of blocks, a row of padding alone.
MIXED = _segments((59, 128, 1, 71), (32, 31, 97), (), (1, 1, 257), tokens=259)
ALONE = _segments((259,), (131,), (), (1,), tokens=259)


def _inputs(segments, H, K, E, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), 4)
    real = (segments > 0)[..., None, None]
    q, g = (jax.random.normal(key, (*segments.shape, H, E)) for key in keys[:2])
    k, v = (jax.random.normal(key, (*segments.shape, K, E)) for key in keys[2:])
    return *(x.astype(dtype) for x in (q, k, v)), g * real  # nothing is asked of padding


@functools.partial(jax.jit, static_argnames=("causal", "implementation", "mesh"))
def _value_and_grads(q, k, v, g, segments, **options):
    real = (segments > 0)[..., None, None]
    run = lambda q, k, v: jnp.where(real, attend_packed(q, k, v, segments, **options), 0).astype(jnp.float32)  # noqa: E731
    out, pull = jax.vjp(run, q, k, v)
    return out, *pull(g)


def _agree(segments, H, K, E, *, causal, mesh=None):
    inputs = *_inputs(segments, H, K, E), segments
    wanted = _value_and_grads(*inputs, causal=causal, implementation="xla")
    got = _value_and_grads(*inputs, causal=causal, implementation="flash_interpret", mesh=mesh)
    for ours, theirs in zip(got, wanted, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("segments", [MIXED, ALONE], ids=["mixed", "alone"])
def test_matches_xla_with_gradients(segments, causal):
    _agree(segments, 6, 2, 16, causal=causal)


@pytest.mark.parametrize("H, K", [(3, 3), (5, 1)])
def test_every_grouping_of_heads(H, K):
    _agree(MIXED[1:2], H, K, 32, causal=True)


def test_on_a_mesh():
    if len(jax.devices()) < 4:
        pytest.skip("needs 4 devices")
    mesh = make_mesh(data=2, fsdp=1, tensor=2, devices=jax.devices()[:4])
    segments = np.concatenate([ALONE[:2], MIXED[:2]])  # each half decides for itself what it is
    _agree(segments, 4, 2, 16, causal=True, mesh=mesh)


def test_16_bits_are_as_exact_as_those_of_xla():
    exact = _value_and_grads(*_inputs(MIXED, 4, 2, 16), MIXED, causal=True, implementation="xla")
    errors = {}
    for name in ("xla", "flash_interpret"):
        found = _value_and_grads(*_inputs(MIXED, 4, 2, 16, jnp.bfloat16), MIXED, causal=True, implementation=name)
        errors[name] = [float(jnp.sqrt(jnp.mean((x - y) ** 2))) for x, y in zip(found, exact, strict=True)]
    assert max(errors["xla"]) > 0
    for ours, theirs in zip(errors["flash_interpret"], errors["xla"], strict=True):
        assert ours < 1.5 * theirs


def test_gradients_of_layers_that_are_scanned_and_recomputed():
    q, k, v, g = _inputs(MIXED[:2], 2, 1, 16)
    scales = jnp.array([0.7, 1.3, -0.4])

    def loss(scales, implementation):
        attend = functools.partial(attend_packed, causal=True, implementation=implementation)
        layer = lambda x, s: (x + attend(s * x, k, v, MIXED[:2]), None)  # noqa: E731
        return jnp.sum(jax.lax.scan(jax.checkpoint(layer), q, scales)[0] * g)

    grad = jax.jit(jax.grad(loss), static_argnums=1)
    np.testing.assert_allclose(grad(scales, "flash_interpret"), grad(scales, "xla"), rtol=1e-4)


def test_intervals():
    first, stop = flash._intervals(jnp.array([[1, 1, 2, 2, 2, 0, 0], [3, 3, 3, 3, 3, 3, 3]]))
    np.testing.assert_array_equal(first, [[0, 0, 2, 2, 2, 5, 6], [0] * 7])
    np.testing.assert_array_equal(stop, [[2, 2, 5, 5, 5, 6, 7], [7] * 7])


def test_nothing_grows_with_the_square_of_the_row():
    T = 16_384
    shape = lambda *s: jax.ShapeDtypeStruct(s, jnp.bfloat16)  # noqa: E731
    first = jax.ShapeDtypeStruct((1, T), jnp.int32)
    run = lambda q, k, v, first, stop: jax.vjp(lambda *x: flash._attend(*x, first, stop, True, True), q, k, v)[1](q)  # noqa: E731
    jaxpr = jax.make_jaxpr(run)(shape(1, T, 2, 16), shape(1, T, 1, 16), shape(1, T, 1, 16), first, first)
    sizes = [var.aval.size for equation in jaxpr.eqns for var in equation.outvars]
    assert max(sizes) == T * 2 * 16


def test_choice_of_implementation():
    choose = attention.choose_implementation
    assert choose("gpu", "bfloat16", row_tokens=4_096) == "cudnn"
    assert choose("gpu", "bfloat16", row_tokens=4_097) == "flash"
    assert choose("gpu", "float32", row_tokens=131_072) == choose("cpu", "bfloat16", row_tokens=131_072) == "xla"
    assert choose("tpu", "bfloat16", row_tokens=131_072) == "splash"
    assert attention.paged_kernel("flash", 64) == "gpu"


@pytest.mark.parametrize("causal", [True, False])
def test_head_widths_between_powers_of_2(causal):
    _agree(MIXED[1:2], 2, 1, 20, causal=causal)


def test_rows_that_the_kernels_do_not_take():
    q, k, v, _ = _inputs(ALONE, 2, 1, 16)
    with pytest.raises(ValueError, match="a multiple of 128 tokens, not 259"):
        attend_rows(q, k, v, ALONE, causal=True, interpret=True)
