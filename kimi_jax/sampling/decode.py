"""The jitted programs of the sampler: `prefill` reads prompts into the cache, `fork` copies a page, `decode` draws.

Prefill reads all of a sequence but its last token and computes no logits; the first decode step reads that token. So a
new response, one of k that share a prompt, and one that is continued all start alike.
"""

import functools

import jax
import jax.numpy as jnp

from kimi_jax.arrays import Drawn, PackedRows, Slots
from kimi_jax.models.policy import Policy
from kimi_jax.sampling import repetition
from kimi_jax.sampling.logits import SamplingSettings, choose, rollout_keys
from kimi_jax.sampling.repetition import RepetitionSettings, RepetitionState
from kimi_jax.training.sharding import ROW_AXES

P = jax.P


@functools.partial(jax.jit, static_argnames=("policy", "fresh"), donate_argnames=("pages",))
def prefill(params: dict, pages, rows: PackedRows, table: jax.Array, *, policy: Policy, fresh: bool):
    """See `Policy.prefill`. params: sampling layout. The cache is updated in place."""
    return policy.prefill(params, pages, rows, table, fresh=fresh)


@functools.partial(jax.jit, static_argnames=("mesh",), donate_argnames=("pages",))
def fork(pages, source: jax.Array, target: jax.Array, *, mesh: jax.sharding.Mesh | None):
    """Copies page source[b] to page target[b], int32 [B] each, in all layers; 0 to 0 where there is nothing to do."""
    copy = lambda leaf, source, target: leaf.at[:, target].set(leaf[:, source])  # noqa: E731
    if mesh is not None and mesh.size > 1:  # pages are numbered within a shard of rows
        leaf = P(None, ROW_AXES)
        copy = jax.shard_map(
            copy, mesh=mesh, in_specs=(leaf, P(ROW_AXES), P(ROW_AXES)), out_specs=leaf, axis_names=set(ROW_AXES)
        )
    return jax.tree.map(lambda leaf: copy(leaf, source, target), pages)


@functools.partial(jax.jit, static_argnames=("policy", "steps"), donate_argnames=("pages", "repeated"))
def decode(
    params: dict,
    pages,
    repeated: RepetitionState,
    slots: Slots,
    run_key: jax.Array,
    settings: SamplingSettings,
    repetition_settings: RepetitionSettings,
    enough: jax.Array,
    *,
    policy: Policy,
    steps: int,
) -> tuple[tuple, RepetitionState, Drawn]:
    """Up to `steps` more tokens for every live row; left early once no more than `enough` rows live.

    Returns the cache and what is known of repetitions, updated in place, and what was drawn.
    """
    B = slots.serials.shape[0]

    def step(carry):
        i, pages, repeated, token, lengths, live, drawn = carry
        positions = jnp.where(live, slots.positions + i, -1)
        logits, pages = policy.decode(params, pages, slots.table, token, positions, slots.rope_offsets)
        token, logprob = choose(logits, rollout_keys(run_key, slots.serials, lengths), settings)
        repeated, repeats = repetition.update(repeated, token, live, repetition_settings)
        ended = live & jnp.any(token[:, None] == settings.end_ids[None], axis=-1)
        drawn = Drawn(
            tokens=drawn.tokens.at[:, i].set(jnp.where(live, token, 0)),
            logprobs=drawn.logprobs.at[:, i].set(jnp.where(live, logprob, 0.0)),
            counts=drawn.counts + live,
            ended=drawn.ended | ended,
            repeats=drawn.repeats | repeats,
        )
        lengths = lengths + live
        live = live & ~ended & ~repeats & (lengths < slots.budgets)
        return i + 1, pages, repeated, token, lengths, live, drawn

    nothing = Drawn(
        tokens=jnp.zeros((B, steps), jnp.int32),
        logprobs=jnp.zeros((B, steps), jnp.float32),
        counts=jnp.zeros(B, jnp.int32),
        ended=jnp.zeros(B, bool),
        repeats=jnp.zeros(B, bool),
    )
    start = (jnp.int32(0), pages, repeated, slots.last_token, slots.lengths, slots.live, nothing)
    go_on = lambda carry: (carry[0] < steps) & (jnp.sum(carry[5]) > enough)  # noqa: E731
    _, pages, repeated, _, _, _, drawn = jax.lax.while_loop(go_on, step, start)
    if policy.mesh is not None:  # every process looks at all rows
        drawn = jax.lax.with_sharding_constraint(drawn, jax.NamedSharding(policy.mesh, P()))
    return pages, repeated, drawn
