"""The device nouns of the project: pytrees of arrays. Their axis letters are in `types`, with the host nouns.

They are apart from those because the workers that judge responses must not import JAX.
"""

import dataclasses
import typing
from typing import Any

import jax


@typing.dataclass_transform(eq_default=False, frozen_default=True)
def pytree(cls):
    """A frozen dataclass whose fields are arrays, as a JAX pytree."""
    cls = dataclasses.dataclass(frozen=True, eq=False)(cls)
    return jax.tree_util.register_dataclass(cls, [f.name for f in dataclasses.fields(cls)], [])


@pytree
class PackedRows:
    """Several token sequences side by side in rows of one length; none attends to another.

    Two sequences "ab" and "cde" (b, d, e trained) in one row of 7:

        tokens      a b c d e . .
        targets     b . d e . . .      the token that follows within the sequence
        loss_mask   1 0 1 1 0 0 0      is that target trained?
        positions   0 1 0 1 2 0 0
        segments    1 1 2 2 2 0 0      0 is padding

    Every row brings the patches of its own images, so rows are independent: they shard and split into micro-batches at
    will.
    """

    tokens: Any  # int32 [R, T]
    targets: Any  # int32 [R, T]
    loss_mask: Any  # bool [R, T]
    positions: Any  # int32 [R, T]
    segments: Any  # int32 [R, T]
    image_index: Any  # int32 [R, T], which merged patch of the row stands here; -1 at text tokens
    patches: Any  # float32 [R, P, C]
    patch_positions: Any  # int32 [R, P, 2]
    patch_segments: Any  # int32 [R, P], 1, 2, ... per image; 0 is padding
    # What only some models read; None for the others (`ModelConfig.extras`).
    rope_positions: Any = None  # int32 [R, T, 3], (time, row, column): see `data.packing.rope_positions`
    patch_windows: Any = None  # int32 [R, P], 1, 2, ... per window of an image; 0 is padding
    patch_grids: Any = None  # int32 [R, P, 2], rows and columns of the image that a patch is of; 0 in padding


@pytree
class RLBatch:
    """A micro-batch of packed prompt + response sequences, each in one row, with what a loss may look at."""

    rows: PackedRows
    response: Any  # int32 [R, T], index of the response that a target belongs to, in 0..N-1; 0 where loss_mask is off
    behavior_logprobs: Any  # float32 [R, T], of the targets, from the sampler
    versions: Any  # int32 [R, T], of the targets: the iteration whose weights sampled each
    reference_logprobs: Any  # float32 [R, T], of the targets, under π_i in training numerics
    rewards: Any  # float32 [N], shaped reward r_j
    advantages: Any  # float32 [N], r_j - b
    weights: Any  # float32 [N], 1 / (k · problems of the mini-batch); 0 for padding, so that micro-batch losses add up
    lengths: Any  # float32 [N], |y_j| in tokens, at least 1
    group: Any  # int32 [N], which problem of the mini-batch


@pytree
class TrainState:
    """What an update changes. `step` counts updates and drives the schedule; it outlives resets of the optimizer."""

    params: Any  # float32 masters in the training layout
    opt_state: Any  # None between the iterations of RL, when the moments do not exist
    step: Any  # int32 []


@pytree
class Slots:
    """The rows of a decode step, one open response in each. The host owns them and sends them with every chunk.

    `last_token` is the newest token of a row: drawn, or the last of the prompt, and not yet read. The next step reads
    it at `positions` and puts its keys and values into the page that `table` names for that position. Row b of 2 with
    pages of 4, prompt "abcde" and response "xy" so far:

        table[b]  7 3 9 .      page 7: a b c d      page 3: e x . .      last_token y, position 6, length 2
    """

    table: Any  # int32 [B, M], the pages of a row in order; 0 (the trash page) where it has none
    last_token: Any  # int32 [B]
    positions: Any  # int32 [B], of last_token
    serials: Any  # uint32 [B], fold into the run key: the rollout's own randomness
    lengths: Any  # int32 [B], tokens of the response so far
    budgets: Any  # int32 [B], length at which the response is cut
    live: Any  # bool [B]; the others are empty and draw nothing
    rope_offsets: Any = None  # int32 [B], what M-RoPE adds to the positions of text; None for models without it


@pytree
class Drawn:
    """What one chunk of decode steps added to each row: the first counts[b] columns of row b."""

    tokens: Any  # int32 [B, steps]
    logprobs: Any  # float32 [B, steps], of the distribution sampled from
    counts: Any  # int32 [B]
    ended: Any  # bool [B], the last of them is an end token
    repeats: Any  # bool [B], stopped because it repeats itself
