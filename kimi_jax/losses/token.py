"""Cross-entropy on tokens: the loss of supervised training (k1.5 §2.2, §2.5)."""

import jax
import jax.numpy as jnp


def cross_entropy(
    logprobs: jax.Array, loss_mask: jax.Array, *, weight: jax.Array | float
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """−weight · Σ_t log p_t over the trained targets of one micro-batch.

    Args:
        logprobs: float32 [R, T], log-probability of each target. What stands where the mask is off, nan included, has
            no influence and gets gradient 0.
        loss_mask: bool [R, T], is that target trained?
        weight: 1 / (trained tokens of the whole batch), so that every token counts the same in any micro-batch.

    Returns:
        The loss, a scalar, and parts that add up over micro-batches: `nll`, the sum without the weight, and `tokens`.
    """
    nll = -jnp.sum(jnp.where(loss_mask, logprobs, 0.0))
    parts = {"nll": nll, "tokens": jnp.sum(loss_mask, dtype=nll.dtype)}
    return weight * nll, jax.lax.stop_gradient(parts)
