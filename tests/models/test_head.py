"""The head's log-probs, entropies and hand-written gradients against float64 NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kimi_jax.models.head import target_logprobs

R, T, D, V = 3, 14, 11, 37
TEMPERATURE = 0.7


def draw(dtype):
    rng = np.random.default_rng(0)
    x, table = rng.normal(size=(R, T, D)), 2.0 * rng.normal(size=(V, D))
    cast = lambda a: jnp.asarray(a, dtype)  # noqa: E731
    return cast(x), cast(table).astype(jnp.float32), rng.integers(V, size=(R, T)), rng.normal(size=(R, T))


def oracle(x, table, targets, g):
    """(log-probs, entropies, dx, dtable) in float64, the gradients those of Σ g · log-probs."""
    x, table = np.float64(x), np.float64(table)
    logits = x @ table.T / TEMPERATURE
    log_p = logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)
    p, chosen = np.exp(log_p), np.eye(V)[targets]
    dl = (chosen - p) * g[..., None] / TEMPERATURE
    return (log_p * chosen).sum(-1), -(p * log_p).sum(-1), dl @ table, np.einsum("rtv,rtd->vd", dl, x)


def gradients(x, table, targets, g, *, chunk):
    def loss(x, table, temperature):
        logprobs, entropy = target_logprobs(x, table, targets, temperature=temperature, chunk=chunk)
        return jnp.sum(g * logprobs) + 5.0 * jnp.sum(entropy), (logprobs, entropy)

    grads, outputs = jax.grad(loss, argnums=(0, 1, 2), has_aux=True)(x, table, jnp.float32(TEMPERATURE))
    return *outputs, *grads


@pytest.mark.smoke
@pytest.mark.parametrize("chunk", [1, 7, 14])
def test_float32_equals_numpy_in_any_chunks(chunk):
    arguments = draw(jnp.float32)
    *outputs, dtemperature = jax.jit(functools.partial(gradients, chunk=chunk))(*arguments)
    for output, expected in zip(outputs, oracle(*arguments), strict=True):
        np.testing.assert_allclose(output, expected, rtol=1e-5, atol=1e-5)
    assert dtemperature == 0  # and the entropy, whose weight in the loss is 5, moved nothing


def test_bfloat16_is_as_near_as_its_digits():
    arguments = draw(jnp.bfloat16)
    logprobs, entropy, dx, dtable, _ = jax.jit(functools.partial(gradients, chunk=7))(*arguments)
    expected = oracle(*arguments)
    np.testing.assert_allclose(logprobs, expected[0], atol=0.05)
    np.testing.assert_allclose(entropy, expected[1], atol=0.05)
    assert dx.dtype == jnp.bfloat16 and dtable.dtype == jnp.float32
    for grad, exact in ((dx, expected[2]), (dtable, expected[3])):
        assert np.linalg.norm(np.float64(grad) - exact) < 0.01 * np.linalg.norm(exact)


def test_large_logits_stay_finite():
    x, table, targets, g = draw(jnp.float32)
    *outputs, _ = gradients(30 * x, table, targets, g, chunk=7)
    for output, expected in zip(outputs, oracle(30 * x, table, targets, g), strict=True):
        np.testing.assert_allclose(output, expected, rtol=1e-3, atol=1e-3)


def test_products_are_in_the_compute_dtype():
    """In float32, which is what JAX derives, they take at least twice as long on GPUs and TPUs."""
    arguments = draw(jnp.bfloat16)
    jaxpr = jax.make_jaxpr(functools.partial(gradients, chunk=7))(*arguments)
    products = [equation for equation, _ in equations(jaxpr.jaxpr) if equation.primitive.name == "dot_general"]
    assert [x.aval.dtype for product in products for x in product.invars] == [jnp.bfloat16] * 8  # logits twice, dx, dt


def test_what_is_as_large_as_the_logits_of_a_chunk_stays_within_it_and_the_table_is_cast_outside():
    """What leaves a loop lies in memory, and each chunk reads it; what stays, the compiler fuses with the logits."""
    arguments = draw(jnp.bfloat16)
    jaxpr = jax.make_jaxpr(functools.partial(gradients, chunk=7))(*arguments)
    made = [(x.aval, looped) for equation, looped in equations(jaxpr.jaxpr) for x in equation.outvars]
    assert {looped for aval, looped in made if aval.size >= R * 7 * V} == {True}
    casts = [looped for aval, looped in made if (aval.shape, aval.dtype) == ((V, D), jnp.bfloat16)]
    assert casts == [False, False]  # forward and backward


def equations(jaxpr, looped=False):
    """(equation, whether in a loop) of all that compute, from outside to inside."""
    for equation in jaxpr.eqns:
        within = looped or equation.primitive.name in ("scan", "while")
        inner = jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "jaxpr"))
        inner = [x.jaxpr for x in inner if hasattr(x, "jaxpr")]
        if not inner:
            yield equation, looped
        for each in inner:
            yield from equations(each, within)


def test_a_chunk_must_divide_the_row():
    x, table, targets, _ = draw(jnp.float32)
    with pytest.raises(ValueError, match="logits_chunk=4 must divide the row length 14"):
        target_logprobs(x, table, targets, temperature=1.0, chunk=4)
