"""Images at their native resolution: reading them, and cutting them into patches for the vision tower (k1.5 App. B.3).

No image is resized. The patches that the tower merges into one token lie next to each other, so the merge is a reshape.
"""

import io
import os
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from kimi_jax.types import ImagePatches

_WHITE = 255


def patchify(image: np.ndarray, *, patch_size: int, merge: int) -> ImagePatches:
    """Cuts a uint8 [height, width, 3] image into patches, in blocks of `merge`² patches that become one token each.

    White is added on the right and at the bottom until both sides are multiples of `patch_size * merge`. Blocks are in
    reading order, and so are the patches within a block. With merge = 2, 4 x 4 patches come in the order

         0  1 |  4  5
         2  3 |  6  7
        ------+------
         8  9 | 12 13
        10 11 | 14 15

    Values of a patch are x / 127.5 - 1 in (row, column, channel) order: C = patch_size² * 3. Raises ValueError for
    another dtype or shape, and for an image without pixels.
    """
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or image.size == 0:
        raise ValueError(
            f"an image must be a non-empty uint8 array [height, width, 3], got {image.dtype} {list(image.shape)}; "
            "data.images.load_image returns one"
        )
    block = patch_size * merge
    height, width = (-(-side // block) * block for side in image.shape[:2])
    padding = ((0, height - image.shape[0]), (0, width - image.shape[1]), (0, 0))
    pixels = np.pad(image, padding, constant_values=_WHITE).astype(np.float32) / 127.5 - 1

    rows, columns = height // block, width // block  # of blocks
    patches = pixels.reshape(rows, merge, patch_size, columns, merge, patch_size, 3).transpose(0, 3, 1, 4, 2, 5, 6)
    grid = np.moveaxis(np.indices((rows * merge, columns * merge), dtype=np.int32), 0, -1)
    positions = grid.reshape(rows, merge, columns, merge, 2).transpose(0, 2, 1, 3, 4)
    return ImagePatches(
        patches=patches.reshape(-1, patch_size**2 * 3),
        positions=positions.reshape(-1, 2),
        num_tokens=rows * columns,
        grid=(rows * merge, columns * merge),
    )


def load_image(path: str | os.PathLike) -> np.ndarray:
    """Reads an image file as uint8 [height, width, 3]. Raises FileNotFoundError, or what `decode_image` raises."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"no image file at {str(path)!r}; relative paths start from {os.getcwd()!r}")
    return decode_image(Path(path).read_bytes(), name=repr(str(path)))


def decode_image(data: bytes, *, name: str) -> np.ndarray:
    """Decodes PNG, JPEG, ... to uint8 [height, width, 3], upright, transparent parts on white. Errors use `name`.

    Raises ValueError if `data` is damaged, not an image, or has more than 8 bits per channel.
    """
    try:
        with Image.open(io.BytesIO(data)) as image:
            image.load()
            upright = ImageOps.exif_transpose(image)
    except Exception as error:  # decoders of damaged files raise whatever they stumble over
        why = "it is in no known format" if isinstance(error, UnidentifiedImageError) else error
        raise ValueError(
            f"image {name} ({len(data)} bytes) cannot be decoded: {why}; save it again as PNG or JPEG"
        ) from error
    if upright.mode.startswith(("I", "F")):
        raise ValueError(f"image {name} has pixels of mode {upright.mode!r}; save it with 8 bits per channel")
    with_alpha = upright.convert("RGBA")
    canvas = Image.new("RGBA", with_alpha.size, (_WHITE, _WHITE, _WHITE, 255))
    return np.array(Image.alpha_composite(canvas, with_alpha).convert("RGB"))
