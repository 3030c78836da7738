"""What the objectives of RL have in common: sums over responses, and what they report whatever they minimize."""

import jax
import jax.numpy as jnp

from kimi_jax.arrays import RLBatch


def in_loss(logprobs: jax.Array, batch: RLBatch) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(log π_θ,t, log π_i,t, log μ_t), float [R, T], 0 where the mask is off, whatever stands there."""
    mask = batch.rows.loss_mask
    logp, logp_i, logp_mu = (
        jnp.where(mask, x, 0.0) for x in (logprobs, batch.reference_logprobs, batch.behavior_logprobs)
    )
    return logp, logp_i, logp_mu


def per_response(x: jax.Array, batch: RLBatch) -> jax.Array:
    """Sums of [R, T] over the tokens of each response, [N]. x is 0 where the mask is off."""
    return jax.ops.segment_sum(x.ravel(), batch.response.ravel(), num_segments=batch.weights.shape[0])


def comparison(d: jax.Array, delta: jax.Array, gap: jax.Array, batch: RLBatch) -> dict[str, jax.Array]:
    """How far the policy is from π_i, and π_i from the sampler μ: parts that every objective has.

    Args:
        d: [R, T], log π_θ,t − log π_i,t; 0 where the mask is off, as is `gap`.
        delta: [N], Δ_j, its sums over responses.
        gap: [R, T], |log π_i,t − log μ_t|.

    Returns:
        Parts that add up over micro-batches:

        responses            number of responses with a token in the loss
        tokens               number of tokens in the loss
        squared_log_ratio    Σ_j Δ_j²; over `responses` a mean
        log_ratio            Σ_t d_t over all tokens; over `tokens` a mean, as are the next two
        kl                   Σ_t e^d − 1 − d: for tokens sampled from π_i an unbiased, never negative estimate of
                             KL(π_i ‖ π_θ), the direction that needs no ratio weights
        logprob_gap          Σ_t |log π_i,t − log μ_t|: numerics alone where π_i sampled the token, with policy lag
                             where an earlier iteration did

        and those that combine by the maximum: `max_log_ratio`, max_j |Δ_j|, and `max_logprob_gap`, over tokens.
    """
    mask = batch.rows.loss_mask
    return {
        "responses": jnp.sum(per_response(mask.astype(d.dtype), batch) > 0, dtype=d.dtype),
        "tokens": jnp.sum(mask, dtype=d.dtype),
        "squared_log_ratio": jnp.sum(delta**2),
        "log_ratio": jnp.sum(d),
        "kl": jnp.sum(jnp.expm1(d) - d),
        "logprob_gap": jnp.sum(gap),
        "max_log_ratio": jnp.max(jnp.abs(delta)),
        "max_logprob_gap": jnp.max(gap),
    }
