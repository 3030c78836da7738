"""From logits to one token per row, with randomness that belongs to the rollout and not to the batch."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kimi_jax.arrays import pytree

MAX_END_IDS = 8


@pytree
class SamplingSettings:
    """How to choose tokens. Arrays, not constants: another temperature or end token compiles nothing."""

    temperature: Any  # float32 []; 0 takes the most likely token
    top_k: Any  # int32 []; 0 is off
    top_p: Any  # float32 []; 1 is off
    end_ids: Any  # int32 [MAX_END_IDS], filled up with -1

    @classmethod
    def of(cls, *, temperature: float, end_ids, top_k: int = 0, top_p: float = 1.0) -> "SamplingSettings":
        """Checks the values. Raises ValueError that names the bad one."""
        if temperature < 0:
            raise ValueError(f"temperature={temperature} must be at least 0 (0 takes the most likely token).")
        if not 0 < top_p <= 1:
            raise ValueError(f"top_p={top_p} must lie in (0, 1]; 1 switches it off.")
        if top_k < 0:
            raise ValueError(f"top_k={top_k} must be at least 0; 0 switches it off.")
        if not 1 <= len(end_ids) <= MAX_END_IDS:
            raise ValueError(f"{len(end_ids)} end ids were given; allowed are 1 to {MAX_END_IDS}.")
        padded = np.full(MAX_END_IDS, -1, np.int32)
        padded[: len(end_ids)] = end_ids
        return cls(np.float32(temperature), np.int32(top_k), np.float32(top_p), padded)


def choose(logits: jax.Array, keys: jax.Array, settings: SamplingSettings) -> tuple[jax.Array, jax.Array]:
    """One token per row and its log-prob. logits float32 [B, V], keys [B].

    The log-prob is of the distribution sampled from: logits divided by the temperature, truncated and renormalised when
    top-k or top-p is on. At temperature 0 it is that of temperature 1.
    """
    greedy = settings.temperature == 0
    logits = logits / jnp.where(greedy, 1.0, settings.temperature)
    truncate = (settings.top_k > 0) | (settings.top_p < 1)
    logits = jax.lax.cond(truncate, _truncated, lambda logits, _: logits, logits, settings)
    # Gumbel-max: argmax(logits + Gumbel noise) is a draw from softmax(logits).
    noise = jax.vmap(lambda key: jax.random.gumbel(key, logits.shape[1:]))(keys)
    tokens = jnp.argmax(logits + jnp.where(greedy, 0.0, noise), axis=-1)
    chosen = jnp.take_along_axis(logits, tokens[:, None], axis=-1)[:, 0]
    return tokens.astype(jnp.int32), chosen - jax.nn.logsumexp(logits, axis=-1)


def rollout_keys(run_key: jax.Array, serials: jax.Array, index: jax.Array) -> jax.Array:
    """Key of token `index[b]` of rollout `serials[b]`: the same in any slot, order, batch or continuation."""
    return jax.vmap(lambda u, t: jax.random.fold_in(jax.random.fold_in(run_key, u), t))(serials, index)


def _truncated(logits, settings):
    """-inf outside the top k and the smallest set whose probability reaches top_p. Ties at the edge stay in."""
    V = logits.shape[-1]
    descending = jnp.sort(logits, axis=-1, descending=True)
    k = jnp.where(settings.top_k > 0, jnp.minimum(settings.top_k, V), V)
    p = jax.nn.softmax(jnp.where(jnp.arange(V)[None] < k, descending, -jnp.inf), axis=-1)
    within = (jnp.cumsum(p, axis=-1) - p < settings.top_p) | (settings.top_p >= 1)  # a sum may round to 1 too early
    kept = jnp.sum(within, axis=-1)  # at least the first
    threshold = jnp.take_along_axis(descending, jnp.minimum(kept, k)[:, None] - 1, axis=-1)
    return jnp.where(logits >= threshold, logits, -jnp.inf)
