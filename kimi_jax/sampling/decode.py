"""Jitted sampling: `start` reads prompts and draws the first tokens, `decode_chunk` draws the next ones.

Slots of the KV cache are filled without gaps, prompt then response, so the first `next_slot` slots are live and
whatever padding left behind them is overwritten before it is seen:

    prompt "abc" in a bucket of 5, S = 8       slot   0 1 2 3 4 5 6 7
    after start (first token x drawn)                 a b c . . . . .    last_token x, next_slot 3
    after one decode step (y drawn)                   a b c x . . . .    last_token y, next_slot 4
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from kimi_jax.arrays import PackedRows, SamplingState
from kimi_jax.models.policy import Policy
from kimi_jax.sampling.logits import SamplingSettings, choose, rollout_keys


@functools.partial(jax.jit, static_argnames=("policy", "slots", "max_tokens"))
def start(
    params: dict,
    prompts: PackedRows,
    prompt_lengths: jax.Array,
    prompt_of_row: jax.Array,
    serials: jax.Array,
    budgets: jax.Array,
    run_key: jax.Array,
    settings: SamplingSettings,
    *,
    policy: Policy,
    slots: int,
    max_tokens: int,
) -> SamplingState:
    """Prefills every prompt once, hands its cache to all rows that answer it, and draws their first tokens.

    params: sampling layout. prompts: one prompt per row, padded on the right. prompt_lengths int32 [rows of prompts].
    prompt_of_row, serials, budgets: int [B]; a row with budget 0 is unused and done from the start.
    """
    logits, caches = policy.prefill(params, prompts, prompt_lengths - 1)

    def spread(kv):  # [prompts, T, K, E] -> [B, S, K, E]
        return jnp.pad(kv, ((0, 0), (0, slots - kv.shape[1]), (0, 0), (0, 0)))[prompt_of_row]

    n = prompt_lengths[prompt_of_row]
    B = serials.shape[0]
    state = SamplingState(
        cache=jax.tree.map(spread, caches),
        last_token=jnp.zeros(B, jnp.int32),
        next_position=n - 1,
        next_slot=n - 1,
        serials=serials,
        budgets=budgets,
        lengths=jnp.zeros(B, jnp.int32),
        done=budgets == 0,
        ended=jnp.zeros(B, bool),
        tokens=jnp.zeros((B, max_tokens), jnp.int32),
        logprobs=jnp.zeros((B, max_tokens), jnp.float32),
    )
    return _append(state, logits[prompt_of_row], state.cache, run_key, settings)


@functools.partial(jax.jit, static_argnames=("policy", "steps"), donate_argnames=("state",))
def decode_chunk(
    params: dict, state: SamplingState, run_key: jax.Array, settings: SamplingSettings, *, policy: Policy, steps: int
) -> SamplingState:
    """Up to `steps` more tokens for every row that is not done; stops early when all are."""

    def step(carry):
        i, state = carry
        logits, cache = policy.decode(params, state.cache, state.last_token, state.next_position, state.next_slot)
        return i + 1, _append(state, logits, cache, run_key, settings)

    live = lambda carry: (carry[0] < steps) & ~jnp.all(carry[1].done)  # noqa: E731
    return jax.lax.while_loop(live, step, (0, state))[1]


def _append(state: SamplingState, logits, cache, run_key, settings) -> SamplingState:
    """Draws the next token of every row that is not done."""
    token, logprob = choose(logits, rollout_keys(run_key, state.serials, state.lengths), settings)
    grow = ~state.done
    rows = jnp.arange(token.shape[0])
    at = jnp.where(grow, state.lengths, state.tokens.shape[1])  # out of bounds: dropped
    lengths = state.lengths + grow
    ended = grow & jnp.any(token[:, None] == settings.end_ids[None], axis=-1)
    return dataclasses.replace(
        state,
        cache=cache,
        last_token=jnp.where(grow, token, state.last_token),
        next_position=state.next_position + grow,
        next_slot=state.next_slot + grow,
        lengths=lengths,
        done=state.done | ended | (lengths >= state.budgets),
        ended=state.ended | ended,
        tokens=state.tokens.at[rows, at].set(token, mode="drop"),
        logprobs=state.logprobs.at[rows, at].set(logprob, mode="drop"),
    )
