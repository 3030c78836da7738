"""Random-access datasets (grain) whose whole state is one integer.

`dataset[step]` is the batch of that step, on any host and after any interruption, so a checkpoint stores the step and
nothing else, and a run may resume with another number of hosts.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import grain
import numpy as np

from kimi_jax.arrays import PackedRows
from kimi_jax.data.packing import check_size, cut_to_fit, joined, pack_rows, plan_rows
from kimi_jax.types import Example, Problem, Prompt

_PLANNED_AT_ONCE = 16_384  # examples; the time that first fit takes grows with their square


def sft_batches(
    examples: Sequence[Example],
    *,
    seed: int,
    rows_per_batch: int,
    row_tokens: int,
    row_patches: int,
    together: int = 1,
    **layout: Any,
) -> grain.MapDataset:
    """An endless dataset: element `step` is a PackedRows of `rows_per_batch` rows of NumPy arrays.

    The examples are shuffled and packed into rows once; the order of the rows is drawn anew for each epoch. All rows of
    an epoch come before any of the next. A batch may hold the end of one epoch and the beginning of another: nothing is
    left out, and every batch is full. together: so many examples in sequence (2: pairs) stay neighbours in one row; a
    remainder that is not so many is left out. layout: see `in_batches`.
    Raises ValueError if there are no examples, or one does not fit in a row.
    """
    if len(examples) < together:
        raise ValueError("no examples to train on")
    order = np.random.default_rng(seed).permutation(len(examples) // together)
    shuffled = [examples[together * index + j] for index in order for j in range(together)]
    whole = [_side_by_side(shuffled[i : i + together]) for i in range(0, len(shuffled), together)]
    plan = [
        [together * index + j for index in row for j in range(together)]
        for row in plan_rows(whole, row_tokens=row_tokens, row_patches=row_patches)
    ]
    rows = endless(plan, seed).map(lambda row: [shuffled[index] for index in row])
    return in_batches(rows, rows_per_batch=rows_per_batch, row_tokens=row_tokens, row_patches=row_patches, **layout)


def document_rows(
    examples: Sequence[Example] | grain.MapDataset,
    *,
    seed: int,
    row_tokens: int,
    row_patches: int,
    image_id: int,
    whole: bool,
    attention: str,
) -> list[Callable[[], list[Example]]]:
    """The rows of an epoch of `examples`, each a function that makes it: what `pack_rows` puts into one row.

    The examples are made twice, now for their sizes and later for their contents, so that their images and tokens need
    not all lie in memory. whole: examples are not cut; one that no row can hold is an error. Otherwise those that are
    longer are cut. attention: "partial", each example sees itself alone, or "full", it sees all of the row before it.

    Raises ValueError if there are no examples, or one does not fit in a row.
    """
    if not len(examples):
        raise ValueError("no examples to train on")
    limits = {"row_tokens": row_tokens, "row_patches": row_patches}

    def pieces(example: Example) -> list[Example]:
        return [example] if whole else cut_to_fit(example, image_id=image_id, **limits)

    def make(members: Sequence[tuple[int, int]]) -> list[Example]:
        found = [pieces(examples[index])[number] for index, number in members]
        return [joined(found, image_id=image_id)] if attention == "full" else found

    order = np.random.default_rng(seed).permutation(len(examples)).tolist()
    rows: list[Callable[[], list[Example]]] = []
    for begin in range(0, len(order), _PLANNED_AT_ONCE):
        sizes, members = [], []
        for index in order[begin : begin + _PLANNED_AT_ONCE]:
            for number, piece in enumerate(pieces(examples[index])):
                patches = sum(len(image.patches) for image in piece.images)
                check_size(index, tokens=len(piece.tokens), patches=patches, **limits)
                sizes.append(_emptied(piece))
                members.append((index, number))
        rows += [functools.partial(make, [members[i] for i in row]) for row in plan_rows(sizes, **limits)]
    return rows


def endless(elements: Sequence, seed: int) -> grain.MapDataset:
    """Epoch after epoch of the elements, each in an order of its own."""
    return grain.MapDataset.source(elements).seed(seed).shuffle().repeat(None)


def in_batches(
    rows: grain.MapDataset,
    *,
    rows_per_batch: int,
    row_tokens: int,
    row_patches: int,
    patch_dim: int,
    merge: int,
    image_id: int,
    extras: Sequence[str] = (),
) -> grain.MapDataset:
    """From lists of examples, one for each row, to PackedRows of so many of them: see `data.packing.pack_rows`."""

    def pack(batch: Sequence[Sequence[Example]]) -> PackedRows:
        ends = np.cumsum([len(row) for row in batch]).tolist()
        packed, _ = pack_rows(
            [example for row in batch for example in row],
            [range(end - len(row), end) for end, row in zip(ends, batch, strict=True)],
            num_rows=rows_per_batch,
            row_tokens=row_tokens,
            row_patches=row_patches,
            patch_dim=patch_dim,
            merge=merge,
            image_id=image_id,
            extras=extras,
        )
        return packed

    if rows_per_batch == 1:  # in batches of one, grain's length of an endless dataset overflows
        return rows.map(lambda row: pack([row]))
    return rows.batch(rows_per_batch, batch_fn=pack)


def _emptied(example: Example) -> Example:
    """As large, in no memory."""
    nothing = lambda x: np.broadcast_to(np.zeros((), x.dtype), x.shape)  # noqa: E731
    images = [
        dataclasses.replace(image, patches=nothing(image.patches), positions=nothing(image.positions))
        for image in example.images
    ]
    return Example(nothing(example.tokens), nothing(example.trained), tuple(images))


def _side_by_side(examples: Sequence[Example]) -> Example:
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
