import io

import numpy as np
import pytest
from PIL import Image

from kimi_jax.data.images import decode_image, load_image, patchify


def random_image(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def cut_by_hand(image, patch_size, merge):
    """The definition, one patch at a time; pixels outside the image are white."""
    side = patch_size * merge
    patches, positions = [], []
    for block_top in range(0, image.shape[0], side):
        for block_left in range(0, image.shape[1], side):
            for row in range(merge):
                for column in range(merge):
                    top, left = block_top + row * patch_size, block_left + column * patch_size
                    values = []
                    for y in range(top, top + patch_size):
                        for x in range(left, left + patch_size):
                            inside = y < image.shape[0] and x < image.shape[1]
                            values += list(image[y, x].astype(float)) if inside else [255.0] * 3
                    patches.append(np.array(values) / 127.5 - 1)
                    positions.append((top // patch_size, left // patch_size))
    return np.array(patches), np.array(positions)


@pytest.mark.parametrize("height, width", [(20, 30), (19, 23), (1, 31), (10, 10), (11, 1)])
@pytest.mark.parametrize("patch_size, merge", [(5, 2), (3, 1), (2, 3)])
def test_patches_and_positions_equal_the_definition(height, width, patch_size, merge):
    image = random_image(height, width)
    cut = patchify(image, patch_size=patch_size, merge=merge)
    patches, positions = cut_by_hand(image, patch_size, merge)
    assert (cut.patches.dtype, cut.positions.dtype) == (np.float32, np.int32)
    np.testing.assert_allclose(cut.patches, patches, atol=1e-6)
    np.testing.assert_array_equal(cut.positions, positions)
    assert cut.num_tokens * merge**2 == len(patches)


def test_the_order_in_the_docstring():
    drawing = patchify.__doc__.split("come in the order")[1].split("Values")[0]
    rows = [line.replace("|", " ").split() for line in drawing.splitlines() if line.strip() and "+" not in line]
    positions = patchify(random_image(8, 8), patch_size=2, merge=2).positions
    drawn = {(r, c): int(index) for r, row in enumerate(rows) for c, index in enumerate(row)}
    assert drawn == {(r, c): index for index, (r, c) in enumerate(positions.tolist())} and len(drawn) == 16


def test_positions_put_the_image_together_again():
    image = random_image(21, 14)
    cut = patchify(image, patch_size=7, merge=1)
    restored = np.zeros_like(image)
    for patch, (row, column) in zip(cut.patches, cut.positions, strict=True):
        pixels = np.round((patch.reshape(7, 7, 3) + 1) * 127.5).astype(np.uint8)
        restored[row * 7 : row * 7 + 7, column * 7 : column * 7 + 7] = pixels
    np.testing.assert_array_equal(restored, image)


@pytest.mark.parametrize(
    "image",
    [np.zeros((0, 5, 3), np.uint8), np.zeros((5, 0, 3), np.uint8), np.zeros((5, 7), np.uint8)]
    + [np.zeros((5, 7, 4), np.uint8), np.zeros((5, 7, 3), np.float32)],
)
def test_what_is_not_an_image_is_refused(image):
    with pytest.raises(ValueError, match=r"non-empty uint8 array \[height, width, 3\], got"):
        patchify(image, patch_size=5, merge=1)


def test_files_of_all_modes(tmp_path):
    image = random_image(5, 7)
    Image.fromarray(image).save(tmp_path / "rgb.png")
    np.testing.assert_array_equal(load_image(tmp_path / "rgb.png"), image)

    Image.fromarray(image[..., 0]).save(tmp_path / "gray.png")
    np.testing.assert_array_equal(load_image(str(tmp_path / "gray.png")), np.repeat(image[..., :1], 3, axis=-1))

    alpha = np.tile(np.array([0, 51, 255], np.uint8), (5, 3))[:, :7, None]
    Image.fromarray(np.concatenate([image, alpha], axis=-1)).save(tmp_path / "rgba.png")
    on_white = image * (alpha / 255) + 255 * (1 - alpha / 255)
    np.testing.assert_allclose(load_image(tmp_path / "rgba.png"), on_white, atol=1)

    Image.fromarray(image).quantize(11).save(tmp_path / "palette.png")
    assert load_image(tmp_path / "palette.png").shape == (5, 7, 3)


def test_a_photograph_stands_upright(tmp_path):
    image = np.zeros((8, 16, 3), np.uint8)
    image[:, :8] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held so that the picture must be turned clockwise
    Image.fromarray(image).save(tmp_path / "turned.png", exif=exif)
    np.testing.assert_array_equal(load_image(tmp_path / "turned.png"), np.rot90(image, -1))


def test_errors_name_the_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="no image file at .*nowhere.png"):
        load_image(tmp_path / "nowhere.png")
    (tmp_path / "text.png").write_text("not a picture")
    with pytest.raises(ValueError, match="text.png.*cannot be decoded: it is in no known format; save"):
        load_image(tmp_path / "text.png")
    buffer = io.BytesIO()
    Image.fromarray(random_image(31, 37)).save(buffer, "PNG")
    for size in (0, 41, 1009):
        with pytest.raises(ValueError, match=rf"image of record 7 \({size} bytes\) cannot be decoded"):
            decode_image(buffer.getvalue()[:size], name="of record 7")
    Image.fromarray(np.zeros((5, 7), np.uint16)).save(tmp_path / "deep.png")
    with pytest.raises(ValueError, match="deep.png.*8 bits per channel"):
        load_image(tmp_path / "deep.png")
