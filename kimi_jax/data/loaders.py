"""Random-access datasets (grain) whose whole state is one integer.

`dataset[step]` is the batch of that step, on any host and after any interruption, so a checkpoint stores the step and
nothing else, and a run may resume with another number of hosts.
"""

from collections.abc import Callable, Iterator, Sequence

import grain
import numpy as np

from kimi_jax.arrays import PackedRows
from kimi_jax.data.packing import pack_rows, plan_rows
from kimi_jax.types import Example, Problem, Prompt


def sft_batches(
    examples: Sequence[Example],
    *,
    seed: int,
    rows_per_batch: int,
    row_tokens: int,
    row_patches: int,
    patch_dim: int,
    merge: int,
    image_id: int,
    extras: Sequence[str] = (),
    together: int = 1,
) -> grain.MapDataset:
    """An endless dataset: element `step` is a PackedRows of `rows_per_batch` rows of NumPy arrays.

    The examples are shuffled and packed into rows once; the order of the rows is drawn anew for each epoch. All rows of
    an epoch come before any of the next. A batch may hold the end of one epoch and the beginning of another: nothing is
    left out, and every batch is full. together: so many examples in sequence (2: pairs) stay neighbours in one row; a
    remainder that is not so many is left out.
    Raises ValueError if there are no examples, or one does not fit in a row.
    """
    if len(examples) < together:
        raise ValueError("no examples to train on")
    order = np.random.default_rng(seed).permutation(len(examples) // together)
    shuffled = [examples[together * index + j] for index in order for j in range(together)]
    joined = [_joined(shuffled[i : i + together]) for i in range(0, len(shuffled), together)]
    plan = [
        [together * index + j for index in row for j in range(together)]
        for row in plan_rows(joined, row_tokens=row_tokens, row_patches=row_patches)
    ]

    def pack(rows: Sequence[list[int]]) -> PackedRows:
        packed, _ = pack_rows(
            shuffled,
            rows,
            num_rows=rows_per_batch,
            row_tokens=row_tokens,
            row_patches=row_patches,
            patch_dim=patch_dim,
            merge=merge,
            image_id=image_id,
            extras=extras,
        )
        return packed

    endless = grain.MapDataset.source(plan).seed(seed).shuffle().repeat(None)
    if rows_per_batch == 1:  # in batches of one, grain's length of an endless dataset overflows
        return endless.map(lambda row: pack([row]))
    return endless.batch(rows_per_batch, batch_fn=pack)


def _joined(examples: Sequence[Example]) -> Example:
    """One example as large as all of these."""
    return Example(
        tokens=np.concatenate([example.tokens for example in examples]),
        trained=np.concatenate([example.trained for example in examples]),
        images=tuple(image for example in examples for image in example.images),
    )


def encoded_problems(problems: Sequence[Problem], encode: Callable[[Problem], Prompt]) -> grain.MapDataset:
    """Element i is `encode(problems[i])`, made when asked for, so that the patches need not all lie in memory."""
    return grain.MapDataset.source(problems).map(encode)


def prefetched(dataset: grain.MapDataset, start_step: int, *, num_threads: int) -> Iterator:
    """Iterates from `dataset[start_step]` on, in order, made ahead by `num_threads` threads (0: when asked for)."""
    options = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=2 * num_threads)
    return iter(dataset[start_step:].to_iter_dataset(options))


def trained_tokens(rows: PackedRows) -> int:
    """The number of targets in the loss of a batch, by which its summed loss is divided."""
    return int(rows.loss_mask.sum())
