"""Responses that repeat themselves, found on the device while they are written (k1.5 §2.6.2).

Two rules look at the newest token of each row, both with a memory of `window` tokens:

    loop    The text goes round in a circle of some period p <= window. runs[p] counts for how many tokens in a row
            token[t] == token[t - p]; the alarm is runs[p] >= max(min_tokens, (repeats - 1) * p).
    copies  The text is pieced together from what stands a little earlier, at changing distances. A token is covered
            when it lies in a span of at least `span` tokens that also stands p <= window tokens before; the alarm is
            that the share `share` of the last `window` tokens is covered.

    tokens             a b c a b c a b x          window >= 3, span 3
    runs[3]            0 0 0 1 2 3 4 5 0
    covered            . . . 1 1 1 1 1 .          known from the third token of the copy on

Only the response counts: quoting the prompt is no repetition. Counters stop at the highest value that a rule asks for,
so the state is a function of the newest `history(settings, window)` tokens, and a response that is continued from its
saved tokens is judged exactly as if it had never been interrupted.

With window = 0 the state is empty, no row is ever reported, and the detector costs nothing.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kimi_jax.arrays import pytree

NOTHING = -1  # stands for a token before the first one; equal to no token


@pytree
class RepetitionSettings:
    """When a row repeats itself. Arrays, not constants: other thresholds compile nothing."""

    min_tokens: Any  # int32 [], shortest loop that is reported, without its first round
    repeats: Any  # int32 [], how many rounds a loop of a longer period has, the first one included
    span: Any  # int32 [], shortest copy that covers its tokens
    share: Any  # float32 [], of the last `window` tokens

    @classmethod
    def of(cls, *, min_tokens: int, repeats: int, span: int, share: float) -> "RepetitionSettings":
        """Checks the values; docs/log.md measures some. Raises ValueError that names the bad one."""
        if min_tokens < 1:
            raise ValueError(f"repetition min_tokens={min_tokens} must be at least 1.")
        if not 2 <= repeats <= 1000:
            raise ValueError(f"repetition repeats={repeats} must lie in 2..1000; the first round counts as one.")
        if span < 1:
            raise ValueError(f"repetition span={span} must be at least 1.")
        if not 0 < share <= 1:
            raise ValueError(f"repetition share={share} must lie in (0, 1]; window=0 switches detection off.")
        return cls(np.int32(min_tokens), np.int32(repeats), np.int32(span), np.float32(share))


@pytree
class RepetitionState:
    """What the two rules remember of each row, W = window. Index 0 is the newest token, or period 1."""

    recent: Any  # int32 [B, W], the last tokens, NOTHING before the first
    runs: Any  # int32 [B, W], runs[:, p - 1] is that of period p, at most the highest value that a rule asks for
    covered: Any  # bool [B, W], which of the last tokens lie in a copied span


def start(rows: int, *, window: int) -> RepetitionState:
    """The state of `rows` responses before their first token."""
    shape = (rows, window)
    return RepetitionState(jnp.full(shape, NOTHING, jnp.int32), jnp.zeros(shape, jnp.int32), jnp.zeros(shape, bool))


def update(
    state: RepetitionState, token: jax.Array, grow: jax.Array, settings: RepetitionSettings
) -> tuple[RepetitionState, jax.Array]:
    """Takes in one more token of each row that grows. Returns the new state and bool [B]: does the row repeat itself?

    token int32 [B], grow bool [B]. Rows that do not grow stay as they are and are not reported.
    """
    W = state.recent.shape[1]
    if W == 0:
        return state, jnp.zeros_like(grow)
    limits = _limits(W, settings)
    match = state.recent == token[:, None]
    runs = jnp.where(match, jnp.minimum(state.runs + 1, jnp.maximum(limits, settings.span)), 0)
    copied = jnp.any(runs >= settings.span, axis=1, keepdims=True)
    covered = _push(state.covered, jnp.zeros_like(grow)) | (copied & (jnp.arange(W)[None] < settings.span))
    loop = jnp.any(runs >= limits, axis=1)
    copies = jnp.sum(covered, axis=1) >= settings.share * W
    new = RepetitionState(_push(state.recent, token), runs, covered)
    keep = lambda new, old: jnp.where(grow[:, None], new, old)  # noqa: E731
    return jax.tree.map(keep, new, state), grow & (loop | copies)


def history(settings: RepetitionSettings, window: int) -> int:
    """How many of the newest tokens decide the state: 1,536 with the settings of the config and a window of 512."""
    if window == 0:
        return 0
    loop = max(int(settings.min_tokens), (int(settings.repeats) - 1) * window)
    copies = window + int(settings.span) - 1  # the oldest token that is remembered may lie at the end of a span
    return window + max(loop, copies)


def tails(responses: Sequence[np.ndarray], settings: RepetitionSettings, *, window: int) -> np.ndarray:
    """int32 [R, history], what `refresh` needs of the tokens of R responses; empty ones are new. On the host."""
    H = history(settings, window)
    padded = np.full((len(responses), H), NOTHING, np.int32)
    for row, tokens in zip(padded, responses, strict=True):
        n = min(len(tokens), H)
        row[H - n :] = tokens[len(tokens) - n :]
    return padded


def refresh(state: RepetitionState, rows: jax.Array, tails: jax.Array, settings: RepetitionSettings) -> RepetitionState:
    """Gives rows to other responses: the state that `update` would have reached, token by token.

    rows int32 [R], distinct; one that is out of range is dropped. tails int32 [R, history], from `tails` with the same
    settings: another history, and only that, compiles this function again.
    """
    W = state.recent.shape[1]
    if W == 0:
        return state
    give = lambda state, rows, new: jax.tree.map(lambda old, new: old.at[rows].set(new, mode="drop"), state, new)  # noqa: E731
    state = give(state, rows, start(rows.shape[0], window=W))
    begun = jnp.any(tails != NOTHING, axis=1)
    order = jnp.argsort(~begun)
    # One after the other, as each takes W · history integers.
    of_one = lambda i, state: give(state, rows[order[i]], _after(tails[order[i]], W, settings))  # noqa: E731
    return jax.lax.fori_loop(0, jnp.sum(begun), of_one, state)


def _limits(W, settings):
    """[1, W], the run that makes a loop of period p = 1..W."""
    return jnp.maximum(settings.min_tokens, (settings.repeats - 1) * jnp.arange(1, W + 1)[None])


def _push(memory, newest):
    return jnp.concatenate([newest[:, None], memory[:, :-1]], axis=1)


def _after(tail, W, settings) -> RepetitionState:
    """The state of one row after its last tokens, [H], for all periods and positions at once."""
    H = tail.shape[0]
    t = jnp.arange(H)
    p = jnp.arange(1, W + 1)[:, None]
    earlier = jnp.pad(tail, (W, 0), constant_values=NOTHING)[t[None] + W - p]  # [W, H]
    match = (tail[None] == earlier) & (earlier != NOTHING)
    runs = t[None] - jax.lax.cummax(jnp.where(match, 0, t[None]), axis=1)  # since the last mismatch; token 0 is one
    copied = jnp.any(runs >= settings.span, axis=0)
    next_copied = jax.lax.cummin(jnp.where(copied, t, H + settings.span), reverse=True)
    newest_first = lambda x: x[::-1][:W]  # noqa: E731
    return RepetitionState(
        recent=newest_first(tail),
        runs=jnp.minimum(runs[:, -1], jnp.maximum(_limits(W, settings)[0], settings.span)),
        covered=newest_first(next_copied - t < settings.span),
    )
