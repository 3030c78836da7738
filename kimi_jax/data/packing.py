"""Packing: token sequences of any length side by side in rows of one length, none of them cut or dropped (k1.5 §2.5.2).

`plan_rows` decides who shares a row, from sizes alone; `pack_rows` copies the data. Between the two, a plan is a list
of rows, and a row is a list of indices of examples: whoever needs another order or a subset permutes or slices lists.
"""

from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence

import numpy as np

from kimi_jax.arrays import PackedRows
from kimi_jax.types import Example, ImagePatches


def plan_rows(examples: Sequence[Example], *, row_tokens: int, row_patches: int) -> list[list[int]]:
    """First fit: each example, in the given order, goes to the first row with room for its tokens and its patches.

    An image that several members of a row share (the same object, as in k responses to one prompt) takes room once.
    Raises ValueError for an example that is empty, or that no row can hold.
    """
    free_tokens = np.full(len(examples), row_tokens)
    free_patches = np.full(len(examples), row_patches)
    rows: list[list[int]] = []
    rows_with: dict[int, list[int]] = defaultdict(list)  # id of an image -> the rows that hold it
    for index, example in enumerate(examples):
        images = _distinct([example])
        tokens, patches = len(example.tokens), sum(len(image.patches) for image in images)
        check_size(index, tokens=tokens, patches=patches, row_tokens=row_tokens, row_patches=row_patches)
        candidates = len(rows) + 1  # the last one is empty, so one always fits
        cost = np.full(candidates, patches)
        for image in images:
            cost[rows_with[id(image)]] -= len(image.patches)
        row = int(np.argmax((free_tokens[:candidates] >= tokens) & (free_patches[:candidates] >= cost)))
        if row == len(rows):
            rows.append([])
        rows[row].append(index)
        free_tokens[row] -= tokens
        free_patches[row] -= cost[row]
        for image in images:
            if row not in rows_with[id(image)]:
                rows_with[id(image)].append(row)
    return rows


def pack_rows(
    examples: Sequence[Example],
    plan: Sequence[Sequence[int]],
    *,
    num_rows: int,
    row_tokens: int,
    row_patches: int,
    patch_dim: int,
    merge: int,
    image_id: int,
    extras: Collection[str] = (),
) -> tuple[PackedRows, dict[int, tuple[int, int]]]:
    """Lays out the examples of `plan` in `num_rows` rows of NumPy arrays; rows left over are padding.

    `PackedRows` defines the arrays. Also returns where each example went, {index: (row, start)}, in the order of the
    plan: its token t stands at [row, start + t], and as a target at [row, start + t - 1]. The j-th image token of an
    example stands for the j-th merged patch of its images (in reading order, if they have windows). extras: which of
    the optional arrays of `PackedRows` the model reads. Raises ValueError if the plan does not fit, if image tokens and
    images do not agree, or if the first token of an example is trained, which nothing could predict.
    """
    if len(plan) > num_rows:
        raise ValueError(f"the plan has {len(plan)} rows, but num_rows={num_rows}; raise num_rows or split the plan")
    if row_patches % merge**2:
        raise ValueError(f"row_patches={row_patches} must be a multiple of merge²={merge**2}, the patches of a token")
    shape = (num_rows, row_tokens)
    rows = PackedRows(
        tokens=np.zeros(shape, np.int32),
        targets=np.zeros(shape, np.int32),
        loss_mask=np.zeros(shape, bool),
        positions=np.zeros(shape, np.int32),
        segments=np.zeros(shape, np.int32),
        image_index=np.full(shape, -1, np.int32),
        patches=np.zeros((num_rows, row_patches, patch_dim), np.float32),
        patch_positions=np.zeros((num_rows, row_patches, 2), np.int32),
        patch_segments=np.zeros((num_rows, row_patches), np.int32),
        **empty_extras(shape, row_patches, extras),
    )
    placements: dict[int, tuple[int, int]] = {}
    for row, members in enumerate(plan):
        images = _distinct(examples[index] for index in members)
        patches = sum(len(image.patches) for image in images)
        tokens = sum(len(examples[index].tokens) for index in members)
        if tokens > row_tokens or patches > row_patches:
            raise ValueError(
                f"row {row} of the plan needs {tokens} tokens and {patches} patches, but row_tokens={row_tokens} and "
                f"row_patches={row_patches}; use a plan of plan_rows with the same limits"
            )
        merged_patches = _place_images(rows, row, images, patch_dim=patch_dim, merge=merge)
        start = 0
        for segment, index in enumerate(members, start=1):
            example = examples[index]
            stop = start + len(example.tokens)
            here = (row, slice(start, stop))
            rows.tokens[here] = example.tokens
            rows.positions[here] = np.arange(stop - start)
            rows.segments[here] = segment
            rows.image_index[here] = _image_index(index, example, merged_patches, image_id=image_id)
            if rows.rope_positions is not None:
                rows.rope_positions[here] = rope_positions(rows.image_index[here] >= 0, example.images, merge=merge)
            if example.trained[0]:
                raise ValueError(
                    f"token 0 of example {index} is marked as trained, but no token stands before it; "
                    "begin the sequence with an untrained token"
                )
            rows.targets[row, start : stop - 1] = example.tokens[1:]
            rows.loss_mask[row, start : stop - 1] = example.trained[1:]
            placements[index] = (row, start)
            start = stop
    return rows, placements


def cut_to_fit(example: Example, *, row_tokens: int, row_patches: int, image_id: int) -> list[Example]:
    """A document in pieces that fit in rows, each as long as possible; no image is cut.

    The first token of a piece is not trained, as nothing before it is left. Raises ValueError for an image that no row
    can hold.
    """
    is_image = (np.asarray(example.tokens) == image_id) & ~example.trained
    places = np.flatnonzero(is_image)
    ends = np.cumsum([image.num_tokens for image in example.images], dtype=np.int64)  # in `places`
    spans = [
        (places[end - image.num_tokens], places[end - 1] + 1) for end, image in zip(ends, example.images, strict=True)
    ]
    pieces, start, left = [], 0, list(zip(spans, example.images, strict=True))
    while start < len(example.tokens):
        stop, patches, own = min(start + row_tokens, len(example.tokens)), 0, []
        for (first, last), image in left:
            if first >= stop:
                break
            patches += len(image.patches)
            if last > stop or patches > row_patches:
                stop = first
                break
            own.append(image)
        if stop == start:
            raise ValueError(
                f"an image of {left[0][1].num_tokens} tokens and {len(left[0][1].patches)} patches does not fit in a "
                f"row of row_tokens={row_tokens} and row_patches={row_patches}"
            )
        trained = example.trained[start:stop].copy()
        trained[0] = False
        pieces.append(Example(example.tokens[start:stop], trained, tuple(own)))
        start, left = stop, left[len(own) :]
    return pieces


def joined(examples: Sequence[Example], *, image_id: int) -> Example:
    """Documents as one, in which each sees those before it, so that the first token of each is trained as well."""
    trained = [example.trained.copy() for example in examples]
    for own, example in zip(trained[1:], examples[1:], strict=True):
        own[0] = example.tokens[0] != image_id
    return Example(
        tokens=np.concatenate([example.tokens for example in examples]),
        trained=np.concatenate(trained),
        images=tuple(image for example in examples for image in example.images),
    )


def empty_extras(shape: tuple[int, int], row_patches: int, extras: Collection[str]) -> dict[str, np.ndarray]:
    """The optional arrays of `PackedRows` that `extras` names, empty. shape: rows, tokens of a row."""
    shapes = {
        "rope_positions": (*shape, 3),
        "patch_windows": (shape[0], row_patches),
        "patch_grids": (shape[0], row_patches, 2),
    }
    return {name: np.zeros(shapes[name], np.int32) for name in extras}


def rope_positions(is_image: np.ndarray, images: Sequence[ImagePatches], *, merge: int) -> np.ndarray:
    """Where M-RoPE (Qwen2-VL, arXiv 2409.12191 §2.1) puts each token of a sequence: int32 [n, 3], (time, row, column).

    is_image: bool [n], the tokens that stand for merged patches of `images`. Text has three times the same number. An
    image that begins at p has time p, and its rows and columns count from p; it is followed by p plus its longer side:

        a b [2 x 3 image] c        time    0 1 2 2 2 2 2 2 5
                                   row     0 1 2 2 2 3 3 3 5
                                   column  0 1 2 3 4 2 3 4 5
    """
    step = np.ones(len(is_image), np.int64)  # from a token to the next; the tokens of an image share their step
    within = np.zeros((len(is_image), 3), np.int64)
    places = np.flatnonzero(is_image)
    for image in images:
        own, places = places[: image.num_tokens], places[image.num_tokens :]
        rows, columns = (side // merge for side in image.grid)
        step[own] = 0
        step[own[-1]] = max(rows, columns)
        within[own, 1:] = np.indices((rows, columns)).reshape(2, -1).T
    start = np.cumsum(step) - step
    return (start[:, None] + within).astype(np.int32)


def rope_offset(images: Sequence[ImagePatches], *, merge: int) -> int:
    """What to add to the place of a text token in its sequence, behind the images, to get its rope position."""
    return sum(max(image.grid) // merge - image.num_tokens for image in images)


def _place_images(
    rows: PackedRows, row: int, images: list[ImagePatches], *, patch_dim: int, merge: int
) -> dict[int, np.ndarray]:
    """Copies the patches of `images` into a row. Returns {id of an image: indices of its merged patches}."""
    merged_patches = {}
    start = windows = 0
    for segment, image in enumerate(images, start=1):
        if image.patches.shape != (image.num_tokens * merge**2, patch_dim):
            raise ValueError(
                f"an image of {image.num_tokens} tokens has patches {list(image.patches.shape)}, expected "
                f"{[image.num_tokens * merge**2, patch_dim]}; was it cut with another patch_size or merge?"
            )
        stop = start + len(image.patches)
        rows.patches[row, start:stop] = image.patches
        rows.patch_positions[row, start:stop] = image.positions
        rows.patch_segments[row, start:stop] = segment
        if rows.patch_grids is not None:
            rows.patch_grids[row, start:stop] = image.grid
        if rows.patch_windows is not None:
            if image.windows is None:
                raise ValueError(
                    "the vision tower attends within windows, and an image has none; cut it with the image processor "
                    "of that model (data.hf_images)"
                )
            rows.patch_windows[row, start:stop] = image.windows + windows + 1
            windows += image.windows.max() + 1
        order = np.arange(image.num_tokens) if image.order is None else image.order
        merged_patches[id(image)] = start // merge**2 + order
        start = stop
    return merged_patches


def _image_index(index: int, example: Example, merged_patches: dict[int, np.ndarray], *, image_id: int) -> np.ndarray:
    """int32 [n]: the merged patch of the row at each token of one example, -1 at text."""
    # An image token that the model itself wrote (it is trained) is text: no picture belongs to it.
    is_image = (np.asarray(example.tokens) == image_id) & ~example.trained
    own = [merged_patches[id(image)] for image in example.images]
    expected = sum(len(part) for part in own)
    if is_image.sum() != expected:
        raise ValueError(
            f"example {index} has {is_image.sum()} image tokens (id {image_id}), but its {len(own)} images make "
            f"{expected}; data.chat.encode_prompt keeps the two equal"
        )
    image_index = np.full(len(example.tokens), -1, np.int32)
    image_index[is_image] = np.concatenate([np.empty(0, np.int32), *own])
    return image_index


def _distinct(examples: Iterable[Example]) -> list[ImagePatches]:
    """The images of the examples, each object once, in order of appearance."""
    return list({id(image): image for example in examples for image in example.images}.values())


def check_size(index: int, *, tokens: int, patches: int, row_tokens: int, row_patches: int) -> None:
    """Raises ValueError for an example that is empty, or that no row can hold. index: how it is named."""
    if tokens == 0:
        raise ValueError(f"example {index} has no tokens; leave it out")
    for unit, size, limit in [("tokens", tokens, row_tokens), ("patches", patches, row_patches)]:
        if size > limit:
            raise ValueError(
                f"example {index} has {size} {unit}, but a row holds row_{unit}={limit}; raise row_{unit} or leave the "
                "example out (examples are never cut)"
            )
