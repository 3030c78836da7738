"""Images as the Qwen-VL families read them, equal to their Hugging Face processors (Qwen2-VL, arXiv 2409.12191 §2.1).

An image is resized so that it fills whole merge blocks and stays between two numbers of pixels, normalized, and cut
into patches. A patch is repeated in time, as the towers read videos too. Towers with windows (Qwen2.5-VL) get the
patches window by window.
"""

import dataclasses
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from kimi_jax.data.hf_tokenizer import read_json
from kimi_jax.types import ImagePatches

_KNOWN = ("Qwen2VLImageProcessor", "Qwen2_5_VLImageProcessor", "Qwen3VLImageProcessor")
_STEEPEST = 200  # the longer side may be this many times the shorter
_CHANNELS = 3


@dataclasses.dataclass(frozen=True)
class ImageProcessor:
    """Call it with an image."""

    patch_size: int  # pixels
    temporal_patch_size: int
    merge: int  # merge² neighbouring patches become one token
    min_pixels: int
    max_pixels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    scale: float | None  # what pixels are multiplied by; None: they are not
    normalize: bool
    resample: int | None  # a PIL.Image.Resampling; None: images are not resized
    window: int | None  # side of a window in merge blocks; None: the tower has no windows

    @property
    def patch_dim(self) -> int:
        return _CHANNELS * self.temporal_patch_size * self.patch_size**2

    def __call__(self, image: np.ndarray | Image.Image) -> ImagePatches:
        """Cuts a uint8 [height, width, 3] array, or a PIL image of any 8-bit mode, into patches.

        Values of a patch are in (channel, time, row, column) order. Raises ValueError for another dtype or shape, for
        an image without pixels, and for one whose sides differ too much.
        """
        pixels = self._resized(_rgb(image))
        if self.scale is not None:
            pixels = (pixels.astype(np.float64) * self.scale).astype(np.float32)
        pixels = pixels.astype(np.float32)
        if self.normalize:
            pixels = (pixels - np.array(self.mean, np.float32)) / np.array(self.std, np.float32)

        size, merge = self.patch_size, self.merge
        rows, columns = (side // (size * merge) for side in pixels.shape[:2])  # of merge blocks
        blocks = pixels.reshape(rows, merge, size, columns, merge, size, _CHANNELS).transpose(0, 3, 1, 4, 6, 2, 5)
        blocks = np.repeat(blocks[:, :, :, :, :, None], self.temporal_patch_size, axis=5)
        patches = blocks.reshape(rows * columns, merge**2, self.patch_dim)
        grid = np.indices((rows * merge, columns * merge), dtype=np.int32)
        positions = grid.reshape(2, rows, merge, columns, merge).transpose(1, 3, 2, 4, 0).reshape(-1, merge**2, 2)
        windows = order = None
        if self.window:
            stored, windows = window_order(rows, columns, window=self.window)
            patches, positions, order = patches[stored], positions[stored], np.argsort(stored).astype(np.int32)
            windows = np.repeat(windows, merge**2)
        return ImagePatches(
            patches=np.ascontiguousarray(patches.reshape(-1, self.patch_dim)),
            positions=np.ascontiguousarray(positions.reshape(-1, 2)),
            num_tokens=rows * columns,
            grid=(rows * merge, columns * merge),
            windows=windows,
            order=order,
        )

    def _resized(self, pixels: np.ndarray) -> np.ndarray:
        height, width = pixels.shape[:2]
        block = self.patch_size * self.merge
        if self.resample is None:
            if height % block or width % block:
                raise ValueError(
                    f"an image of {height} x {width} pixels does not fill blocks of {block} x {block}, and the "
                    "processor's config says do_resize=false; resize it, or set do_resize=true"
                )
            return pixels
        target = smart_resize(height, width, factor=block, min_pixels=self.min_pixels, max_pixels=self.max_pixels)
        return np.asarray(Image.fromarray(pixels).resize(target[::-1], resample=self.resample))

    @classmethod
    def load(cls, directory: str | os.PathLike) -> "ImageProcessor":
        """Reads processor_config.json or preprocessor_config.json, and the windows from config.json.

        Raises FileNotFoundError if there is neither, ValueError for a processor of another family or for settings
        that are missing or do not fit the model.
        """
        directory = Path(directory)
        nested = read_json(directory / "processor_config.json").get("image_processor")
        options = nested or read_json(directory / "preprocessor_config.json")
        if not options:
            raise FileNotFoundError(
                f"no image processor in {str(directory)!r}: it needs a preprocessor_config.json, or a "
                "processor_config.json with an 'image_processor'"
            )
        kind = options.get("image_processor_type", _KNOWN[0])
        if kind.removesuffix("Fast").removesuffix("Pil") not in _KNOWN:
            raise ValueError(f"image processor {kind!r} of {str(directory)!r} is none of {', '.join(_KNOWN)}")
        try:
            return cls.from_config(options, read_json(directory / "config.json"))
        except ValueError as error:
            raise ValueError(f"image processor of {str(directory)!r}: {error}") from error

    @classmethod
    def from_config(cls, options: Mapping[str, Any], model: Mapping[str, Any]) -> "ImageProcessor":
        """options: of the processor, those left out as in Qwen2-VL. model: config.json; {}: no windows, no checks."""
        # null is no for a switch, and leaves out anything else
        options = {name: value for name, value in options.items() if value is not None or name.startswith("do_")}
        size = options.get("size") or {}
        pixels = {}
        for name, edge, default in (
            ("min_pixels", "shortest_edge", 56**2),
            ("max_pixels", "longest_edge", 28**2 * 1280),
        ):
            given = (options.get(name), size.get(edge), size.get(name), default if not size else None)
            pixels[name] = next((value for value in given if value is not None), None)
        if None in pixels.values() or not 0 < pixels["min_pixels"] <= pixels["max_pixels"]:
            raise ValueError(
                f"size={size} with min_pixels={options.get('min_pixels')}, max_pixels={options.get('max_pixels')} does "
                "not bound the pixels of an image; give shortest_edge <= longest_edge (both in pixels)"
            )
        sizes = {"patch_size": 14, "temporal_patch_size": 2, "merge_size": 2}
        sizes = {name: int(options.get(name, default)) for name, default in sizes.items()}
        vision = model.get("vision_config", {})
        for name, other in zip(sizes, ("patch_size", "temporal_patch_size", "spatial_merge_size"), strict=True):
            if vision.get(other, sizes[name]) != sizes[name]:
                raise ValueError(f"{name}={sizes[name]}, but the vision tower of config.json has {vision[other]}")
        window = vision.get("window_size", 112 if model.get("model_type") == "qwen2_5_vl" else None)
        return cls(
            patch_size=sizes["patch_size"],
            temporal_patch_size=sizes["temporal_patch_size"],
            merge=sizes["merge_size"],
            **pixels,
            mean=_per_channel(options.get("image_mean", (0.48145466, 0.4578275, 0.40821073))),  # as CLIP has it
            std=_per_channel(options.get("image_std", (0.26862954, 0.26130258, 0.27577711))),
            scale=options.get("rescale_factor", 1 / 255) if options.get("do_rescale", True) else None,
            normalize=options.get("do_normalize", True),
            resample=options.get("resample", int(Image.Resampling.BICUBIC)) if options.get("do_resize", True) else None,
            window=window // sizes["merge_size"] // sizes["patch_size"] if window else None,
        )


def smart_resize(height: int, width: int, *, factor: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """The (height, width) to resize to: multiples of `factor`, between the bounds, of nearly the same proportions.

    Very small blocks can make it miss a bound, as in the original. Raises ValueError for an image that is too narrow.
    """
    if max(height, width) > _STEEPEST * min(height, width):
        raise ValueError(
            f"an image of {height} x {width} pixels is too narrow: its longer side may be {_STEEPEST} times the other"
        )
    sides = [round(side / factor) * factor for side in (height, width)]
    if math.prod(sides) > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        sides = [max(factor, math.floor(side / shrink / factor) * factor) for side in (height, width)]
    elif math.prod(sides) < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        sides = [math.ceil(side * grow / factor) * factor for side in (height, width)]
    return sides[0], sides[1]


def window_order(rows: int, columns: int, *, window: int) -> tuple[np.ndarray, np.ndarray]:
    """The merge blocks of an image, window by window, and the window of each in that order: two int32 [rows * columns].

    Windows are `window` x `window` blocks, counted in reading order; the last of a line or a column may be smaller.
    `types.ImagePatches` has a picture.
    """
    row, column = np.divmod(np.arange(rows * columns, dtype=np.int32), np.int32(columns))
    across = -(-columns // window)
    owner = (row // window) * across + column // window
    stored = np.argsort(owner, kind="stable").astype(np.int32)
    return stored, owner[stored].astype(np.int32)


def _rgb(image: np.ndarray | Image.Image) -> np.ndarray:
    """uint8 [height, width, 3], transparent parts on white."""
    if isinstance(image, Image.Image):
        if image.mode.startswith(("I", "F")) or not all(image.size):
            raise ValueError(f"an image must have pixels of 8 bits per channel, got mode {image.mode}, {image.size}")
        if "A" in image.getbands() or image.info.get("transparency") is not None:
            opaque = Image.new("RGBA", image.size, (255, 255, 255, 255))
            image = Image.alpha_composite(opaque, image.convert("RGBA"))
        image = np.array(image.convert("RGB"))
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != _CHANNELS or image.size == 0:
        raise ValueError(
            f"an image must be a non-empty uint8 array [height, width, 3], got {image.dtype} {list(image.shape)}; "
            "data.images.load_image returns one"
        )
    return image


def _per_channel(value: float | tuple[float, ...]) -> tuple[float, ...]:
    values = tuple(value) if isinstance(value, list | tuple) else (value,) * _CHANNELS
    if len(values) != _CHANNELS:
        raise ValueError(f"image_mean and image_std need {_CHANNELS} numbers, got {values}")
    return values
