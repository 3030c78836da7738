"""What a reward model learns from labels and from comparisons (k1.5 §2.3.5), and a policy from comparisons (§2.4).

    labels         −w Σ_n [ y_n log σ(s_n) + (1 − y_n) log σ(−s_n) ]     s_n: the score, y_n: 1 if correct, else 0
    comparisons    −w Σ_p log σ(s_p⁺ − s_p⁻)                             Bradley-Terry: P(⁺ beats ⁻) = σ(s⁺ − s⁻)
    DPO            −w Σ_p log σ(β Δ_p⁺ − β Δ_p⁻)                         Δ = log π_θ(y|x) − log π_ref(y|x)
                   −w α Σ_p log π_θ(y_p⁺|x) / |y_p⁺|                     0 in the report: α = 0

The first gives log-odds of being correct, so its zero means "as likely as not". The second fixes differences alone: it
ranks, and its zero means nothing. The third is the second with the score β Δ, which is what a policy π_θ scores that is
optimal for a reward under a KL penalty β from π_ref (Rafailov et al., 2023). It too fixes differences alone, and may
push both sides out of what was ever learnt; α keeps the chosen one likely (Pang et al., 2024).
"""

import jax
import jax.numpy as jnp


def binary_cross_entropy(
    scalars: jax.Array, labels: jax.Array, mask: jax.Array, *, weight: jax.Array | float
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Cross-entropy of labels at marked positions of one micro-batch.

    Args:
        scalars: float32 [R, T]. What stands where the mask is off, nan included, has no influence and gets gradient 0.
        labels: [R, T], 0 or 1 at the marked positions, anything elsewhere.
        mask: bool [R, T], the positions with a label.
        weight: w, 1 / (marked positions of the whole batch).

    Returns:
        The loss, a scalar, and parts that add up over micro-batches: `nll`, the sum without the weight; `tokens`, the
        marked positions; `right`, those whose score is on the side of its label.
    """
    s = jnp.where(mask, scalars, 0.0)
    y = mask & (labels == 1)
    nll = -jnp.sum(jnp.where(mask, jax.nn.log_sigmoid(jnp.where(y, s, -s)), 0.0))
    right = jnp.sum(mask & ((s > 0) == y), dtype=nll.dtype)
    parts = {"nll": nll, "tokens": jnp.sum(mask, dtype=nll.dtype), "right": right}
    return weight * nll, jax.lax.stop_gradient(parts)


def bradley_terry(
    scalars: jax.Array, labels: jax.Array, mask: jax.Array, pair: jax.Array, *, pairs: int, weight: jax.Array | float
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Negative log-likelihood of comparisons; both members of a pair are in the micro-batch.

    Args:
        scalars: float32 [R, T]. What stands where the mask is off, nan included, has no influence and gets gradient 0.
        labels: [R, T], at the marked positions 1 for the better of a pair and 0 for the worse.
        mask: bool [R, T], two positions of each pair: where its members have their scores.
        pair: int32 [R, T], at the marked positions which pair, in 0..pairs-1.
        pairs: how many there may be; static. A number that no position has is no pair.
        weight: w, 1 / (pairs of the whole batch).

    Returns:
        The loss, a scalar, and parts that add up over micro-batches: `nll`, the sum without the weight; `tokens`, the
        marked positions; `pairs`; `right`, those whose better member has the higher score.
    """
    s = jnp.where(mask, scalars, 0.0)
    better = mask & (labels == 1)
    index = jnp.where(mask, pair, 0).ravel()
    total = lambda x: jax.ops.segment_sum(x.ravel(), index, num_segments=pairs)  # noqa: E731
    margin = total(jnp.where(better, s, -s))  # -0.0 where the mask is off
    exists = total(better.astype(s.dtype)) > 0
    nll = -jnp.sum(jnp.where(exists, jax.nn.log_sigmoid(margin), 0.0))
    parts = {
        "nll": nll,
        "tokens": jnp.sum(mask, dtype=nll.dtype),
        "pairs": jnp.sum(exists, dtype=nll.dtype),
        "right": jnp.sum(exists & (margin > 0), dtype=nll.dtype),
    }
    return weight * nll, jax.lax.stop_gradient(parts)


def direct_preference(
    logprobs: jax.Array,
    reference_logprobs: jax.Array,
    mask: jax.Array,
    chosen: jax.Array,
    pair: jax.Array,
    *,
    pairs: int,
    beta: jax.Array | float,
    alpha: jax.Array | float,
    weight: jax.Array | float,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """DPO: the negative log-likelihood of comparisons of responses; both members of a pair are in the micro-batch.

    Args:
        logprobs: float32 [R, T], log π_θ of the targets. What stands where the mask is off, nan included, has no
            influence and gets gradient 0.
        reference_logprobs: float32 [R, T], log π_ref of the same; constant.
        mask: bool [R, T], the tokens of responses.
        chosen: bool [R, T], is that token of the response that is preferred?
        pair: int32 [R, T], at the tokens of responses which pair, in 0..pairs-1.
        pairs: how many there may be; static. A number that no token has is no pair.
        beta: β > 0: how far π_θ may go from π_ref, less the greater it is.
        alpha: α >= 0: how much it counts that the chosen responses are likely, per token.
        weight: w, 1 / (pairs of the whole batch).

    Returns:
        The loss, a scalar, and parts that add up over micro-batches: `nll`, the sum without the weight; `chosen_nll`,
        what α multiplies in it; `tokens`; `pairs`; `right`, those whose chosen response has the higher β Δ;
        `chosen_reward` and `rejected_reward`, the sums of β Δ⁺ and of β Δ⁻; and `max_log_ratio`, the largest
        |Δ⁺ − Δ⁻|, which combines by the maximum.
    """
    d = jnp.where(mask, logprobs - jax.lax.stop_gradient(reference_logprobs), 0.0)
    index = jnp.where(mask, pair, 0).ravel()
    total = lambda x: jax.ops.segment_sum(x.ravel(), index, num_segments=pairs)  # noqa: E731
    better, worse = total(jnp.where(chosen, d, 0.0)), total(jnp.where(chosen, 0.0, d))
    exists = total(mask.astype(d.dtype)) > 0
    margin = better - worse
    likely = total(jnp.where(mask & chosen, logprobs, 0.0)) / jnp.maximum(total((mask & chosen).astype(d.dtype)), 1)
    chosen_nll = -jnp.sum(likely)
    nll = alpha * chosen_nll - jnp.sum(jnp.where(exists, jax.nn.log_sigmoid(beta * margin), 0.0))
    parts = {
        "nll": nll,
        "chosen_nll": chosen_nll,
        "tokens": jnp.sum(mask, dtype=d.dtype),
        "pairs": jnp.sum(exists, dtype=d.dtype),
        "right": jnp.sum(exists & (margin > 0), dtype=d.dtype),
        "chosen_reward": beta * jnp.sum(better),
        "rejected_reward": beta * jnp.sum(worse),
        "max_log_ratio": jnp.max(jnp.abs(margin)),
    }
    return weight * nll, jax.lax.stop_gradient(parts)
