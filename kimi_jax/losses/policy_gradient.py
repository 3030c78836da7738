"""Other objectives on the same batches: REINFORCE, RLOO, GRPO, ReST. `mirror_descent` is the report's own.

A method is an advantage A_j for each response of a group and a loss that weighs log-probs with it. For a problem with
responses y_1..y_k, rewards r_j, ℓ_j = Σ_t log π_θ,t and w = 1 / (k · problems):

    reinforce    A_j = r_j                                       −Σ w A_j ℓ_j
    rloo         A_j = r_j − mean of the other k − 1 rewards     −Σ w A_j ℓ_j
    rest         A_j = k / |B| for j in B, else 0                −Σ w A_j ℓ_j      B: the best correct responses
    grpo         A_j = (r_j − r̄) / σ                             clipped ratios, per token: `clipped_loss`

REINFORCE has no baseline: with the group's mean it would be RLOO times (k − 1) / k, which is RLOO at another learning
rate, and it is also what mirror descent becomes as τ → 0. With rewards of 0 and 1 it makes the right responses likelier
in proportion to how many they are, and has no negative gradient; nor has ReST, which fits the best responses
(k1.5 §3.5) and counts every solved problem once.

The gradients of the first two are unbiased at the first update of an iteration, whose responses come from the policy
that is updated. At the later ones the policy has moved, and nothing corrects for that; `rl.updates=1` is free of it.
"""

import jax
import jax.numpy as jnp
import numpy as np

from kimi_jax.arrays import RLBatch
from kimi_jax.losses.responses import comparison, in_loss, per_response

_LEAST_STD = 1e-6  # equal rewards may differ by rounding

# --- advantages of the gradable responses of one problem: (r [k], correct [k]) -> A [k] -----------------------------


def rewards_themselves(rewards: np.ndarray, correct: np.ndarray) -> np.ndarray:
    """A_j = r_j (Williams, 1992)."""
    return np.asarray(rewards, np.float64)


def leave_one_out(rewards: np.ndarray, correct: np.ndarray) -> np.ndarray:
    """A_j = r_j − (1/(k−1)) Σ_{i≠j} r_i: the baseline does not depend on y_j (Kool et al., 2019).

    Raises:
        ValueError: for fewer than two rewards.
    """
    r = np.asarray(rewards, np.float64)
    if r.size < 2:
        raise ValueError(f"leave_one_out() compares a reward with the others of its problem; got {r.size} reward.")
    return r - (r.sum() - r) / (r.size - 1)


def standardized(rewards: np.ndarray, correct: np.ndarray) -> np.ndarray:
    """A_j = (r_j − r̄) / (σ + 10⁻⁶), σ² = (1/k) Σ_j (r_j − r̄)² (DeepSeekMath, §4.1.2); 0 if all rewards are equal."""
    r = np.asarray(rewards, np.float64)
    return (r - r.mean()) / (r.std() + _LEAST_STD)


def best_only(rewards: np.ndarray, correct: np.ndarray) -> np.ndarray:
    """A_j = k / |B| for j in B, the correct responses with the highest reward, else 0; zeros if none is correct.

    Then −(1/k) Σ_j A_j ℓ_j is the mean negative log-likelihood of B: supervised learning on the best responses.
    """
    r, correct = np.asarray(rewards, np.float64), np.asarray(correct, bool)
    best = correct & (r >= np.max(r, where=correct, initial=-np.inf))
    return best * (r.size / max(best.sum(), 1))


# --- losses -----------------------------------------------------------------------------------------------------------


def policy_gradient_loss(logprobs: jax.Array, batch: RLBatch) -> tuple[jax.Array, dict[str, jax.Array]]:
    """−Σ_j w_j A_j ℓ_j of one micro-batch.

    Args, parts: as of `mirror_descent.surrogate_loss`; `regularizer` is 0.
    """
    logp, logp_i, logp_mu = in_loss(logprobs, batch)
    d = logp - logp_i
    policy = -jnp.sum(batch.weights * batch.advantages * per_response(logp, batch))
    parts = {"policy": policy, "regularizer": jnp.zeros_like(policy)}
    parts |= comparison(d, per_response(d, batch), jnp.abs(logp_i - logp_mu), batch)
    return policy, jax.lax.stop_gradient(parts)


def clipped_loss(
    logprobs: jax.Array, batch: RLBatch, *, clip: jax.Array | float, beta: jax.Array | float
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Minus the objective of GRPO (DeepSeekMath, arXiv 2402.03300, equations 3 and 4), of one micro-batch:

        J = mean over problems of (1/k) Σ_j (1/|y_j|) Σ_t { min[ ρ_t A_j, clip(ρ_t, 1−ε, 1+ε) A_j ] − β K_t }

        ρ_t = π_θ,t / μ_t                             μ: the sampler, which drew the token
        K_t = π_i,t / π_θ,t − log π_i,t / π_θ,t − 1   never negative; estimates KL(π_θ ‖ π_i) if π_θ drew the token

    Departures: π_ref is π_i, the policy at the start of the iteration, where the paper renews it less often, so that no
    second model is kept; μ is what the sampler itself computed, of whatever iteration; |y_j| counts all tokens of a
    response, also those that are too old to be in the loss.

    Args:
        logprobs, batch: as of `mirror_descent.surrogate_loss`.
        clip: ε, a runtime value, as is
        beta: β; 0 leaves out the second term.

    Returns:
        The loss and parts, as `mirror_descent.surrogate_loss` (`regularizer` is the β term), and `clipped`, the number
        of tokens whose gradient the clipping takes away; over `tokens` a share.
    """
    logp, logp_i, logp_mu = in_loss(logprobs, batch)
    mask, d = batch.rows.loss_mask, logp - logp_i
    w = batch.weights / batch.lengths

    advantages = batch.advantages[batch.response]
    ratio = jnp.exp(logp - logp_mu)
    free, bounded = ratio * advantages, jnp.clip(ratio, 1 - clip, 1 + clip) * advantages
    policy = -jnp.sum(w * per_response(jnp.where(mask, jnp.minimum(free, bounded), 0.0), batch))
    regularizer = beta * jnp.sum(w * per_response(jnp.expm1(-d) + d, batch))
    parts = {"policy": policy, "regularizer": regularizer, "clipped": jnp.sum(mask & (bounded < free), dtype=d.dtype)}
    parts |= comparison(d, per_response(d, batch), jnp.abs(logp_i - logp_mu), batch)
    return policy + regularizer, jax.lax.stop_gradient(parts)
