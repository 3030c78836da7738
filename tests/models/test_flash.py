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
from tests.helpers import lower_for_gpu


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


@pytest.mark.parametrize("keep, times", [((), 2), (("attention",), 1)])
def test_what_is_kept_is_not_computed_again(keep, times):
    """The forward kernel in the gradient of a recomputed layer: once, where its results are kept."""
    q, k, v, g = _inputs(MIXED[:2], 2, 1, 16)
    policy = jax.checkpoint_policies.save_only_these_names(*keep)
    attend = functools.partial(flash.attend_rows, segments=_whole_blocks(MIXED[:2]), causal=True, interpret=True)
    q, k, v, g = (_whole_blocks(x) for x in (q, k, v, g))
    layer = jax.checkpoint(lambda q: jnp.sin(attend(jnp.sin(q), k, v)), policy=policy)
    gradient = jax.make_jaxpr(jax.grad(lambda q: jnp.sum(layer(q) * g)))(q)
    assert str(gradient).count("name=flash_forward") == times


def _whole_blocks(x):
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % 128), *[(0, 0)] * (x.ndim - 2)))


@pytest.mark.parametrize("keep, times", [((), 2), (("attention",), 1)])
def test_rows_of_one_sequence_go_to_cudnn_and_back(monkeypatch, keep, times):
    """With a stand-in that leaves behind for its gradient what cuDNN does, and counts how often it runs."""
    runs = []

    @jax.custom_vjp
    def cudnn(q, k, v):
        return forward(q, k, v)[0]

    def forward(q, k, v):
        o, lse = jax.pure_callback(
            lambda *inputs: runs.append(1) or jax.tree.map(np.asarray, plain(*inputs)),
            (jax.ShapeDtypeStruct(q.shape, q.dtype), jax.ShapeDtypeStruct((q.shape[0], 2, q.shape[1]), q.dtype)),
            *(q, k, v),
        )
        return o, (q, k, v, jnp.zeros(0), lse, o)

    def backward(residuals, do):  # of o = p v, from lse and o alone
        q, k, v, _, lse, o = residuals
        logits = jnp.einsum("rthe,rske->rhts", q, k) * 16**-0.5
        p = jnp.where(jnp.tri(q.shape[1], dtype=bool)[None, None], jnp.exp(logits - lse[..., None]), 0)
        dp = jnp.einsum("rthe,rske->rhts", do, v)
        ds = p * (dp - jnp.einsum("rthe,rthe->rht", do, o)[..., None]) * 16**-0.5
        dq, dk = jnp.einsum("rhts,rske->rthe", ds, k), jnp.einsum("rhts,rthe->rse", ds, q)[:, :, None]
        return dq, dk, jnp.einsum("rhts,rthe->rse", p, do)[:, :, None]

    def plain(q, k, v):
        logits = jnp.einsum("rthe,rske->rhts", q, k) * 16**-0.5
        logits = jnp.where(jnp.tri(q.shape[1], dtype=bool)[None, None], logits, -jnp.inf)
        o = jnp.einsum("rhts,rske->rthe", jax.nn.softmax(logits), v)
        return o, jax.nn.logsumexp(logits, axis=-1)

    cudnn.defvjp(forward, backward)
    q, k, v, g = (_whole_blocks(x) for x in _inputs(ALONE[:2], 2, 1, 16))
    attend = functools.partial(flash.attend_rows, segments=_whole_blocks(ALONE[:2]), causal=True, interpret=True)
    policy = jax.checkpoint_policies.save_only_these_names(*keep)

    def gradients():
        layer = jax.checkpoint(lambda *x: jnp.sin(attend(*x)), policy=policy)
        return jax.jit(jax.value_and_grad(lambda *x: jnp.sum(layer(*x) * g), argnums=(0, 1, 2)))(q, k, v)

    expected = gradients()
    monkeypatch.setattr(flash, "_alone", lambda interpret: cudnn)
    for ours, theirs in zip(*map(jax.tree.leaves, (gradients(), expected)), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)
    assert len(runs) == times


def test_triton_takes_the_kernels():
    """Without a GPU their Triton code is made and looked through; what it computes is tested interpreted."""
    shape = lambda *s: jax.ShapeDtypeStruct(s, jnp.bfloat16)  # noqa: E731
    segments = jax.ShapeDtypeStruct((2, 256), jnp.int32)
    attend = functools.partial(flash.attend_rows, causal=False, interpret=False)  # causal would ask for cuDNN
    gradient = jax.grad(lambda q, k, v, s: jnp.sum(attend(q, k, v, s).astype(jnp.float32)), argnums=(0, 1, 2))
    text = lower_for_gpu(gradient, shape(2, 256, 6, 64), shape(2, 256, 2, 64), shape(2, 256, 2, 64), segments)
    assert all(name in text for name in ("flash_forward", "flash_queries", "flash_keys"))


def test_intervals():
    first, stop = flash._intervals(jnp.array([[1, 1, 2, 2, 2, 0, 0], [3, 3, 3, 3, 3, 3, 3]]))
    np.testing.assert_array_equal(first, [[0, 0, 2, 2, 2, 5, 6], [0] * 7])
    np.testing.assert_array_equal(stop, [[2, 2, 5, 5, 5, 6, 7], [7] * 7])


def test_nothing_grows_with_the_square_of_the_row():
    T = 16_384
    shape = lambda *s: jax.ShapeDtypeStruct(s, jnp.bfloat16)  # noqa: E731
    first = jax.ShapeDtypeStruct((1, T), jnp.int32)

    def run(*inputs):
        o, lse = flash._packed_forward(*inputs, causal=True, interpret=True)
        return flash._packed_backward(*inputs, o, lse, o, causal=True, interpret=True)

    jaxpr = jax.make_jaxpr(run)(shape(1, T, 2, 16), shape(1, T, 1, 16), shape(1, T, 1, 16), first, first)
    sizes = [var.aval.size for equation in jaxpr.eqns for var in equation.outvars]
    assert max(sizes) == T * 2 * 16


def test_choice_of_implementation():
    choose = attention.choose_implementation
    assert choose("gpu", "bfloat16", row_tokens=512) == "cudnn"
    assert choose("gpu", "bfloat16", row_tokens=513) == "flash"
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
