import numpy as np
import pytest

from kimi_jax.arrays import PackedRows
from kimi_jax.data.packing import cut_to_fit, joined, pack_rows, plan_rows, rope_offset, rope_positions
from kimi_jax.types import Example, ImagePatches

IMAGE_ID, PATCH_DIM = 5, 7


def random_image(rng, num_tokens, merge):
    shape = (num_tokens * merge**2,)
    patches = rng.normal(size=shape + (PATCH_DIM,)).astype(np.float32)
    return ImagePatches(
        patches, rng.integers(0, 97, shape + (2,), dtype=np.int32), num_tokens, (merge, num_tokens * merge)
    )


def random_example(rng, length, images=()):
    """Images at random places in the text, and a `trained` full of holes. A trained image token stands for no image."""
    num_image_tokens = sum(image.num_tokens for image in images)
    tokens = rng.integers(IMAGE_ID + 1, 101, length + num_image_tokens, dtype=np.int32)
    tokens[rng.permutation(len(tokens))[:num_image_tokens]] = IMAGE_ID
    trained = (rng.random(len(tokens)) < 0.5) & (tokens != IMAGE_ID)
    trained[0] = False
    written = np.flatnonzero(trained)[:1]
    tokens[written[rng.random(len(written)) < 0.3]] = IMAGE_ID
    return Example(tokens, trained, tuple(images))


def random_examples(seed, count, merge):
    rng = np.random.default_rng(seed)
    shared = [random_image(rng, num_tokens, merge) for num_tokens in (1, 2, 3)]
    examples = []
    for _ in range(count):
        fresh = [random_image(rng, 2, merge)] if rng.random() < 0.2 else []
        images = [shared[index] for index in rng.integers(0, 3, rng.integers(0, 3))] + fresh
        examples.append(random_example(rng, int(rng.integers(1, 13)), images))
    return examples


def first_fit_by_hand(examples, row_tokens, row_patches):
    rows = []
    for index, example in enumerate(examples):
        for row in rows:
            members = [examples[i] for i in row] + [example]
            images = {id(image): len(image.patches) for member in members for image in member.images}
            if sum(len(m.tokens) for m in members) <= row_tokens and sum(images.values()) <= row_patches:
                row.append(index)
                break
        else:
            rows.append([index])
    return rows


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("merge", [1, 2])
def test_plan_equals_first_fit_by_hand(seed, merge):
    examples = random_examples(seed, 97, merge)
    plan = plan_rows(examples, row_tokens=37, row_patches=8 * merge**2)
    assert plan == first_fit_by_hand(examples, 37, 8 * merge**2)
    assert sorted(index for row in plan for index in row) == list(range(97))


def test_a_shared_image_takes_room_once():
    rng = np.random.default_rng(0)
    image = random_image(rng, 3, 1)
    twin = ImagePatches(image.patches, image.positions, image.num_tokens, image.grid)  # equal, but another object
    same = [random_example(rng, 2, [image]), random_example(rng, 2, [image]), random_example(rng, 2, [image, image])]
    assert plan_rows(same, row_tokens=101, row_patches=3) == [[0, 1, 2]]
    assert plan_rows([same[0], random_example(rng, 2, [twin])], row_tokens=101, row_patches=3) == [[0], [1]]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("merge", [1, 2])
def test_every_example_is_found_whole_where_its_placement_says(seed, merge):
    examples = random_examples(seed, 31, merge)
    limits = dict(row_tokens=37, row_patches=8 * merge**2)
    plan = plan_rows(examples, **limits)
    rows, placements = pack_rows(
        examples, plan, num_rows=len(plan) + 2, patch_dim=PATCH_DIM, merge=merge, image_id=IMAGE_ID, **limits
    )
    assert any((example.tokens[example.trained] == IMAGE_ID).any() for example in examples)
    assert list(placements) == [index for row in plan for index in row]

    used = np.zeros_like(rows.tokens, bool)
    for index, (row, start) in placements.items():
        example, n = examples[index], len(examples[index].tokens)
        here = (row, slice(start, start + n))
        assert not used[here].any()
        used[here] = True
        np.testing.assert_array_equal(rows.tokens[here], example.tokens)
        np.testing.assert_array_equal(rows.positions[here], np.arange(n))
        assert set(rows.segments[here]) == {1 + plan[row].index(index)}
        for t in range(n):  # the target of slot t is token t + 1; the last slot has none
            target = (example.tokens[t + 1], example.trained[t + 1]) if t + 1 < n else (0, False)
            assert (rows.targets[row, start + t], rows.loss_mask[row, start + t]) == target
        merged = rows.image_index[here]
        np.testing.assert_array_equal(merged >= 0, (example.tokens == IMAGE_ID) & ~example.trained)
        own = merged[merged >= 0]
        for values, name in [(rows.patches, "patches"), (rows.patch_positions, "positions")]:
            found = values[row].reshape(-1, merge**2, values.shape[-1])[own]
            wanted = [getattr(image, name) for image in example.images]
            np.testing.assert_array_equal(
                found.reshape(-1, values.shape[-1]), np.concatenate([np.empty((0, values.shape[-1])), *wanted])
            )
        offset = 0
        for image in example.images:  # the tokens of one image lie in one segment of exactly its size
            members = own[offset : offset + image.num_tokens]
            (segment,) = set(rows.patch_segments[row].reshape(-1, merge**2)[members].ravel())
            assert (rows.patch_segments[row] == segment).sum() == len(image.patches)
            offset += image.num_tokens

    assert rows.loss_mask.sum() == sum(example.trained.sum() for example in examples)
    for padding in (rows.tokens, rows.targets, rows.loss_mask, rows.positions, rows.segments, rows.image_index + 1):
        assert not padding[~used].any()
    for row in range(len(plan) + 2):
        members = plan[row] if row < len(plan) else []
        images = {id(image): image for index in members for image in examples[index].images}.values()
        sizes = [len(image.patches) for image in images]
        expected = np.repeat([*range(1, len(sizes) + 1), 0], [*sizes, 8 * merge**2 - sum(sizes)])
        np.testing.assert_array_equal(rows.patch_segments[row], expected)
        assert not rows.patches[row, sum(sizes) :].any() and not rows.patch_positions[row, sum(sizes) :].any()


def test_the_row_in_the_docstring():
    letters = {".": 0, **{letter: ord(letter) for letter in "abcde"}}
    drawn = {}
    for line in PackedRows.__doc__.splitlines():
        name, *values = line.split() or [""]
        if name in ("tokens", "targets", "loss_mask", "positions", "segments"):
            drawn[name] = [letters[v] if v in letters else int(v) for v in values[:7]]
    examples = [
        Example(np.array([ord(letter) for letter in "ab"]), np.array([False, True])),
        Example(np.array([ord(letter) for letter in "cde"]), np.array([False, True, True])),
    ]
    rows, _ = pack_rows(
        examples, [[0, 1]], num_rows=1, row_tokens=7, row_patches=0, patch_dim=PATCH_DIM, merge=1, image_id=IMAGE_ID
    )
    assert len(drawn) == 5
    for name, values in drawn.items():
        np.testing.assert_array_equal(getattr(rows, name)[0], values, err_msg=name)


def test_shapes_and_types():
    rows, placements = pack_rows(
        [], [], num_rows=2, row_tokens=11, row_patches=12, patch_dim=PATCH_DIM, merge=2, image_id=IMAGE_ID
    )
    assert placements == {}
    grid = {name: (2, 11) for name in ("tokens", "targets", "loss_mask", "positions", "segments", "image_index")}
    shapes = grid | {"patches": (2, 12, PATCH_DIM), "patch_positions": (2, 12, 2), "patch_segments": (2, 12)}
    types = dict.fromkeys(shapes, np.int32) | {"loss_mask": np.bool_, "patches": np.float32}
    for name, shape in shapes.items():
        assert (getattr(rows, name).shape, getattr(rows, name).dtype) == (shape, types[name]), name


def test_examples_that_fit_nowhere_are_named():
    rng = np.random.default_rng(0)
    small, image = random_example(rng, 3), random_image(rng, 5, 1)
    with pytest.raises(ValueError, match="example 1 has 13 tokens, but a row holds row_tokens=11; raise row_tokens"):
        plan_rows([small, random_example(rng, 13)], row_tokens=11, row_patches=0)
    with pytest.raises(ValueError, match="example 0 has 5 patches, but a row holds row_patches=3; raise row_patches"):
        plan_rows([random_example(rng, 2, [image])], row_tokens=11, row_patches=3)
    with pytest.raises(ValueError, match="example 0 has no tokens"):
        plan_rows([Example(np.zeros(0, np.int32), np.zeros(0, bool))], row_tokens=11, row_patches=0)


def test_rows_that_cannot_be_packed_are_refused():
    rng = np.random.default_rng(0)
    image = random_image(rng, 3, 1)
    example = random_example(rng, 3, [image])
    lost = Example(example.tokens, example.trained)
    first_trained = Example(np.array([11, 13]), np.array([True, True]))
    limits = dict(num_rows=1, row_tokens=7, row_patches=4, patch_dim=PATCH_DIM, merge=1, image_id=IMAGE_ID)
    with pytest.raises(ValueError, match="the plan has 2 rows, but num_rows=1"):
        pack_rows([example, example], [[0], [1]], **limits)
    with pytest.raises(ValueError, match="needs 12 tokens and 3 patches"):
        pack_rows([example, example], [[0, 1]], **limits)
    with pytest.raises(ValueError, match=r"example 0 has 3 image tokens \(id 5\), but its 0 images make 0"):
        pack_rows([lost], [[0]], **limits)
    with pytest.raises(ValueError, match=r"has patches \[3, 7\], expected \[3, 11\]"):
        pack_rows([example], [[0]], **limits | {"patch_dim": 11})
    with pytest.raises(ValueError, match="row_patches=6 must be a multiple of merge²=4"):
        pack_rows([example], [[0]], **limits | {"row_patches": 6, "merge": 2})
    with pytest.raises(ValueError, match="token 0 of example 0 is marked as trained"):
        pack_rows([first_trained], [[0]], **limits)


def cut(rows, columns, merge, *, windows=None, order=None):
    """An image of rows x columns tokens; its patches know their places."""
    grid = (rows * merge, columns * merge)
    patches = np.zeros((np.prod(grid), PATCH_DIM), np.float32)
    positions = np.indices(grid, dtype=np.int32).reshape(2, -1).T
    return ImagePatches(patches, positions, rows * columns, grid, windows, order)


def test_rope_positions_step_by_step():
    images = [cut(2, 3, 2), cut(5, 1, 2), cut(1, 7, 2)]
    layout = [(None, 3), (0, 6), (None, 2), (1, 5), (2, 7), (None, 11)]  # (image, tokens): two of them touch
    is_image, expected, at = [], [], 0
    for image, count in layout:
        is_image += [image is not None] * count
        if image is None:
            expected += [[at + i] * 3 for i in range(count)]
            at += count
        else:
            rows, columns = (side // 2 for side in images[image].grid)
            expected += [[at, at + row, at + column] for row in range(rows) for column in range(columns)]
            at += max(rows, columns)
    np.testing.assert_array_equal(rope_positions(np.array(is_image), images, merge=2), expected)
    assert len(is_image) - 1 + rope_offset(images, merge=2) == expected[-1][0]
    np.testing.assert_array_equal(rope_positions(np.zeros(5, bool), [], merge=2), np.arange(5)[:, None].repeat(3, 1))


def test_arrays_that_only_some_models_read():
    window = np.repeat([0, 0, 1, 1, 2, 3], 4).astype(np.int32)  # 2 x 3 tokens, in an order of their own
    windowed = cut(2, 3, 2, windows=window, order=np.array([0, 2, 4, 1, 3, 5]))
    other = cut(1, 2, 2, windows=np.zeros(8, np.int32), order=np.arange(2))
    examples = []
    for images in ([windowed], [other, windowed]):
        tokens = np.concatenate([[7], *[np.full(image.num_tokens, IMAGE_ID) for image in images], [8, 9]])
        examples.append(Example(tokens.astype(np.int32), tokens == 9, tuple(images)))
    limits = dict(num_rows=2, row_tokens=23, row_patches=40, patch_dim=PATCH_DIM, merge=2, image_id=IMAGE_ID)
    rows, _ = pack_rows(examples, [[0, 1]], **limits, extras=("rope_positions", "patch_windows", "patch_grids"))
    np.testing.assert_array_equal(rows.patch_windows[0], [*window + 1, *[5] * 8, *[0] * 8])
    np.testing.assert_array_equal(rows.patch_grids[0], [[4, 6]] * 24 + [[2, 4]] * 8 + [[0, 0]] * 8)
    own = [0, 2, 4, 1, 3, 5]
    expected = [-1, *own, -1, -1, -1, 6, 7, *own, -1, -1]
    np.testing.assert_array_equal(rows.image_index[0], expected + [-1] * (23 - len(expected)))
    for start, example in ((0, examples[0]), (9, examples[1])):  # each sequence begins anew
        here = slice(start, start + len(example.tokens))
        wanted = rope_positions(example.tokens == IMAGE_ID, example.images, merge=2)
        np.testing.assert_array_equal(rows.rope_positions[0, here], wanted)
    assert not rows.rope_positions[1].any() and not rows.patch_windows[1].any()
    plain, _ = pack_rows(examples, [[0, 1]], **limits)
    assert plain.rope_positions is plain.patch_windows is plain.patch_grids is None
    whole = Example(examples[0].tokens, examples[0].trained, (cut(2, 3, 2),))
    with pytest.raises(ValueError, match="attends within windows, and an image has none"):
        pack_rows([whole], [[0]], **limits, extras=("patch_windows",))


# --- documents that are cut and joined ------------------------------------------------------------------------------


def random_document(rng, length, images=()):
    """Images in one piece each, at random places; all that is text is trained, but for the first token."""
    texts = [rng.integers(IMAGE_ID + 1, 101, 1) for _ in range(length)]
    places = np.sort(rng.integers(0, length + 1, len(images)))
    pieces = [piece for text in np.split(np.arange(length), places) for piece in (*(texts[i] for i in text), None)][:-1]
    shown = iter(images)
    tokens = np.concatenate([np.full(next(shown).num_tokens, IMAGE_ID) if p is None else p for p in pieces])
    tokens = tokens.astype(np.int32)
    trained = tokens != IMAGE_ID
    trained[0] = False
    return Example(tokens, trained, tuple(images))


@pytest.mark.parametrize("seed", range(7))
def test_pieces_are_the_document_and_as_long_as_they_can_be(seed):
    rng = np.random.default_rng(seed)
    limits = dict(row_tokens=11, row_patches=20, image_id=IMAGE_ID)
    for _ in range(13):
        images = [random_image(rng, int(n), 2) for n in rng.integers(1, 6, rng.integers(0, 7))]
        document = random_document(rng, int(rng.integers(1, 60)), images)
        pieces = cut_to_fit(document, **limits)
        np.testing.assert_array_equal(np.concatenate([piece.tokens for piece in pieces]), document.tokens)
        assert [id(image) for piece in pieces for image in piece.images] == [id(image) for image in document.images]
        for piece, following in zip(pieces, [*pieces[1:], None], strict=True):
            patches = sum(len(image.patches) for image in piece.images)
            assert len(piece.tokens) <= 11 and patches <= 20
            assert (piece.tokens == IMAGE_ID).sum() == sum(image.num_tokens for image in piece.images)
            np.testing.assert_array_equal(piece.trained[1:], piece.tokens[1:] != IMAGE_ID)
            assert not piece.trained[0]
            if following is not None:  # its first token, or image, found no room
                image = following.images[0] if following.tokens[0] == IMAGE_ID else None
                more = image.num_tokens if image else 1
                assert len(piece.tokens) + more > 11 or patches + (len(image.patches) if image else 0) > 20


def test_an_image_that_no_row_can_hold():
    rng = np.random.default_rng(0)
    document = random_document(rng, 3, [random_image(rng, 6, 2)])
    with pytest.raises(ValueError, match="an image of 6 tokens and 24 patches does not fit in a row of row_tokens=5"):
        cut_to_fit(document, row_tokens=5, row_patches=40, image_id=IMAGE_ID)
    with pytest.raises(ValueError, match="row_patches=20"):
        cut_to_fit(document, row_tokens=50, row_patches=20, image_id=IMAGE_ID)


def test_joined_documents_are_one_and_each_but_the_first_begins_with_a_target():
    rng = np.random.default_rng(0)
    images = [random_image(rng, 2, 1)]
    pictured = Example(np.array([IMAGE_ID, IMAGE_ID, 9], np.int32), np.array([False, False, True]), tuple(images))
    whole = joined([random_document(rng, 3), random_document(rng, 2), pictured], image_id=IMAGE_ID)
    assert whole.trained.tolist() == [False, True, True] + [True, True] + [False, False, True]
    assert len(whole.tokens) == 8 and whole.images == tuple(images)
