"""From logits to one token per row, with randomness that belongs to the rollout and not to the batch."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kimi_jax.arrays import pytree

MAX_END_IDS = 8
_GROUP = 64  # tokens of the vocabulary that are drawn together


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
    B, V = logits.shape
    greedy = settings.temperature == 0
    temperature = jnp.where(greedy, 1.0, settings.temperature)
    truncate = (settings.top_k > 0) | (settings.top_p < 1)
    everything = lambda *_: jnp.full((B, 1), -jnp.inf)  # noqa: E731
    # Only the threshold leaves the branches: logits would be copied.
    threshold = jax.lax.cond(truncate, _threshold, everything, logits, temperature, settings)
    logits = jnp.where(logits < threshold, -jnp.inf, logits / temperature)

    # Noise for every token would cost more than all else here, so first a group of n tokens is drawn, by its mass, then
    # one of its members. Member i of group j is token i · V/n + j.
    n = math.gcd(V, _GROUP)
    groups = logits.reshape(B, n, V // n)
    mass = jax.nn.logsumexp(groups, axis=1)
    group = _draw(jnp.where(greedy, jnp.max(groups, axis=1), mass), keys, greedy)
    members = jnp.take_along_axis(groups, group[:, None, None], axis=2)[..., 0]
    fresh = jax.vmap(lambda key: jax.random.fold_in(key, V))(keys)  # V: more than there are groups
    member = _draw(members, fresh, greedy)
    chosen = jnp.take_along_axis(members, member[:, None], axis=1)[:, 0]
    return member * (V // n) + group, chosen - jax.nn.logsumexp(mass, axis=-1)


def rollout_keys(run_key: jax.Array, serials: jax.Array, index: jax.Array) -> jax.Array:
    """Key of token `index[b]` of rollout `serials[b]`: the same in any slot, order, batch or continuation."""
    return jax.vmap(lambda u, t: jax.random.fold_in(jax.random.fold_in(run_key, u), t))(serials, index)


def _draw(logits, keys, greedy):
    """Gumbel-max: argmax(logits + Gumbel noise) is a draw from softmax(logits). logits [B, n] -> int32 [B]."""
    noise = jax.vmap(lambda key: jax.random.gumbel(key, logits.shape[1:]))(keys)
    return jnp.argmax(logits + jnp.where(greedy, 0.0, noise), axis=-1).astype(jnp.int32)


def _threshold(logits, temperature, settings):
    """[B, 1], the least of the top k logits, or of the fewest of them whose probability reaches top_p, if that is more.

    Found by bisection: XLA takes no sort into a CUDA graph, so that the host would have to intervene in every step.
    """
    V = logits.shape[-1]
    bits = jax.lax.bitcast_convert_type(logits, jnp.uint32)
    sign = jnp.uint32(1 << 31)
    order = jnp.where(bits >= sign, ~bits, bits | sign)  # integers in the order of the floats

    def reach(weights, least):
        """The largest integer such that the weights from it upwards sum to at least `least`, [B, 1]."""

        def bit(i, found):
            higher = found | (sign >> i)
            enough = jnp.sum(jnp.where(order >= higher, weights, 0.0), axis=-1, keepdims=True) >= least
            return jnp.where(enough, higher, found)

        return jax.lax.fori_loop(0, 32, bit, jnp.zeros((logits.shape[0], 1), jnp.uint32))

    top = reach(jnp.ones_like(logits), jnp.where(settings.top_k > 0, jnp.minimum(settings.top_k, V), V))
    highest = jnp.max(logits, axis=-1, keepdims=True)
    weights = jnp.where(order >= top, jnp.exp((logits - highest) / temperature), 0.0)
    nucleus = reach(weights, settings.top_p * jnp.sum(weights, axis=-1, keepdims=True))
    # A sum may round to 1 too early: top_p=1 is no bisection.
    found = jnp.where(settings.top_p < 1, jnp.maximum(top, nucleus), top)
    return jax.lax.bitcast_convert_type(jnp.where(found >= sign, found ^ sign, ~found), jnp.float32)
