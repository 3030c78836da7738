"""The policy objective: online mirror descent with a squared surrogate (k1.5 §2.3.2, equations 2 and 3).

The KL-regularized problem  max_θ E[r] − τ KL(π_θ ‖ π_i)  has an optimum that satisfies, for every response y_j,

    r_j − τ log Z = τ log( π*(y_j|x) / π_i(y_j|x) )

Asking π_θ to satisfy it on responses sampled from π_i gives the surrogate, with b for τ log Z,

    L(θ) = mean over problems of (1/k) Σ_j ( r_j − b − τ Δ_j )²

    ℓ_j = Σ_t log π_θ,t   over all response tokens in the loss, the end token included
    Δ_j = ℓ_j − ℓ_i,j     the log-ratio to π_i, the policy at the start of the iteration

We minimize L / (2τ), which up to terms free of θ is

    −(1/k) Σ_j [ (r_j − b) ℓ_j − (τ/2) Δ_j² ]

and has minus equation 3 as its gradient: neither learning rate nor clipping moves with τ. At the first update of an
iteration Δ ≡ 0, so τ acts only from the second one on.
"""

from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from kimi_jax.arrays import RLBatch
from kimi_jax.losses.responses import comparison, in_loss, per_response

Baseline = Literal["mean", "log_z"]
Form = Literal["sequence", "length_normalized", "token"]


def baseline(rewards: np.ndarray, *, kind: Baseline, tau: float) -> np.float64:
    """What the rewards of one problem are compared with: b in `r_j − b` (k1.5 §2.3.2).

        mean     r̄ = (1/k) Σ_j r_j                          the choice of the report
        log_z    τ log Z ≈ τ log( (1/k) Σ_j exp(r_j / τ) )   tends to r̄ as τ → ∞ and to max_j r_j as τ → 0

    Args:
        rewards: [k], the shaped rewards of the gradable responses.
        kind: which of the two.
        tau: τ > 0; `mean` ignores it.

    Raises:
        ValueError: for an unknown kind, a τ that is not positive, or rewards that are not a finite, non-empty vector.
    """
    r = np.asarray(rewards, np.float64)
    if r.ndim != 1 or r.size == 0 or not np.isfinite(r).all():
        raise ValueError(
            f"baseline() needs the rewards of one problem's gradable responses, a non-empty vector of finite numbers; "
            f"got {r}. Leave ungradable responses (nan) out first, and drop groups with fewer than two gradable ones."
        )
    if kind == "mean":
        return r.mean()
    if kind == "log_z":
        if not tau > 0:
            raise ValueError(f"baseline kind 'log_z' is τ log mean exp(r/τ) and needs tau > 0; got tau={tau}.")
        # The max-shift keeps exp(1 / 0.01) from overflowing; expm1 and log1p keep the limit τ → ∞ exact.
        r_max = r.max()
        return r_max + tau * np.log1p(np.mean(np.expm1((r - r_max) / tau)))
    raise ValueError(f"Unknown baseline kind {kind!r}: use 'mean' (the group's mean reward) or 'log_z' (τ log Z).")


def surrogate_loss(
    logprobs: jax.Array, batch: RLBatch, *, tau: jax.Array | float, form: Form
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The surrogate L / (2τ) of one micro-batch, summed over its responses with w_j = 1 / (k · problems) (k1.5 §2.3.2).

        sequence             −Σ_j w_j [ (r_j − b) ℓ_j − (τ/2) Δ_j² ]                        equation 3, if b = r̄
        length_normalized    −Σ_j w_j [ (r_j − b) ℓ_j − (τ/2) Δ_j² ] / |y_j|                ours
        token                −Σ_j w_j Σ_t [ (r_j − b) log π_θ,t − (τ/2) (log π_θ,t − log π_i,t)² ]   ours

    Args:
        logprobs: float32 [R, T], log π_θ of the targets. Whatever stands where `batch.rows.loss_mask` is off, nan
            included, has no influence and gets gradient 0.
        batch: see `arrays.RLBatch`; all of it is constant to the gradient.
        tau: τ, a runtime value: changing it compiles nothing.
        form: which of the three; static.

    Returns:
        The loss, a scalar, and its parts, which add up over micro-batches:

        policy               −Σ_j w_j (r_j − b) ℓ_j, as the form scales it
        regularizer          the rest: loss = policy + regularizer

        and those of `responses.comparison`.

    Raises:
        ValueError: for an unknown form.
    """
    if form not in ("sequence", "length_normalized", "token"):
        raise ValueError(
            f"Unknown form {form!r} of the surrogate loss: use 'sequence' (equation 3), 'length_normalized' or 'token'."
        )
    logp, logp_i, logp_mu = in_loss(logprobs, batch)
    d = logp - logp_i
    ell = per_response(logp, batch)
    delta = per_response(d, batch)  # not a difference of sums: those are large and nearly equal
    square = per_response(d**2, batch) if form == "token" else delta**2
    w = batch.weights / batch.lengths if form == "length_normalized" else batch.weights

    policy = -jnp.sum(w * batch.advantages * ell)
    regularizer = tau / 2 * jnp.sum(w * square)
    loss = policy + regularizer
    parts = {"policy": policy, "regularizer": regularizer}
    parts |= comparison(d, delta, jnp.abs(logp_i - logp_mu), batch)
    return loss, jax.lax.stop_gradient(parts)
