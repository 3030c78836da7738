"""The vocabulary head under a loss: log-probs of given tokens, without the logits of all tokens at once.

At 152,000 tokens the head is a sixth of a small model's arithmetic, and most of the memory traffic outside its layers.
So its gradient is written out: products in the compute dtype (what JAX derives multiplies by logit gradients in
float32, at half the speed or less), logits that are recomputed rather than kept, one pass over them where possible.
"""

import jax
import jax.numpy as jnp


def target_logprobs(x, table, targets, *, temperature, chunk: int) -> tuple[jax.Array, jax.Array]:
    """Log-probs of `targets` and the entropy at each position, both float32 [R, T].

    x [R, T, D] in the compute dtype, table [V, D], targets int32 [R, T]. The distribution p is softmax(l) with
    l = x tableᵀ / temperature. Logits exist for `chunk` tokens of each row at a time, forward and backward. Neither the
    entropy nor the temperature has a gradient. Raises ValueError when chunk does not divide T.
    """
    R, T, _ = x.shape
    if T % chunk:
        raise ValueError(f"logits_chunk={chunk} must divide the row length {T}.")
    split = lambda a: jnp.moveaxis(a.reshape(R, T // chunk, chunk, *a.shape[2:]), 1, 0)  # noqa: E731
    outputs = _chunks(split(x), table, split(targets), temperature)
    return jax.tree.map(lambda a: jnp.moveaxis(a, 0, 1).reshape(R, T), outputs)


@jax.custom_vjp  # of all chunks: in a loop that JAX differentiates, it would lay the mask of targets out in memory
def _chunks(x, table, targets, temperature):
    return _forward(x, table, targets, temperature)[0]


def _forward(x, table, targets, temperature):
    """log p_y = l_y - log Σ_v exp l_v and H = -Σ_v p_v log p_v, with all l less the highest of them."""
    lowered = table.astype(x.dtype)

    def chunk(xs):
        x, targets = xs
        products = _products(x, lowered)
        highest = jnp.max(products, axis=-1)
        logits = (products - highest[..., None]) / temperature
        weights = jnp.exp(logits)
        z = jnp.sum(weights, axis=-1)
        entropy = jnp.log(z) - jnp.sum(weights * logits, axis=-1) / z
        logprobs = jnp.sum(jnp.where(_is_target(logits, targets), logits, 0.0), axis=-1) - jnp.log(z)
        return (logprobs, entropy), (highest, z)

    outputs, sums = jax.lax.map(chunk, (x, targets))
    return outputs, (x, table, targets, temperature, sums)


def _backward(residuals, cotangents):
    """dl_v = (1[v = y] - p_v) g / temperature for the cotangent g of log p_y; dx = dl table, dtable = dlᵀ x."""
    x, table, targets, temperature, sums = residuals
    lowered = table.astype(x.dtype)

    def chunk(dtable, xs):
        x, targets, (highest, z), g = xs
        p = jnp.exp((_products(x, lowered) - highest[..., None]) / temperature) / z[..., None]
        dl = ((_is_target(p, targets) - p) * g[..., None]).astype(x.dtype)
        dx = jnp.einsum("rtv,vd->rtd", dl, lowered, preferred_element_type=jnp.float32)
        dtable += jnp.einsum("rtv,rtd->vd", dl, x, preferred_element_type=jnp.float32)
        return dtable, dx.astype(x.dtype)

    zeros = jnp.zeros(table.shape, jnp.float32)
    dtable, dx = jax.lax.scan(chunk, zeros, (x, targets, sums, cotangents[0] / temperature))
    return dx, dtable.astype(table.dtype), None, None


_chunks.defvjp(_forward, _backward)


def _products(x, table):
    return jnp.einsum("rtd,vd->rtv", x, table, preferred_element_type=jnp.float32)


def _is_target(logits, targets):
    return jax.lax.broadcasted_iota(targets.dtype, logits.shape, 2) == targets[..., None]
