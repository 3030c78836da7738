"""The image processor of transformers is the oracle, in the form that needs no torchvision."""

import json

import numpy as np
import pytest
from PIL import Image

transformers = pytest.importorskip("transformers")
torch = pytest.importorskip("torch")
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil  # noqa: E402
from transformers.vision_utils import get_vision_window_index  # noqa: E402

from kimi_jax.data.hf_images import ImageProcessor, window_order  # noqa: E402
from kimi_jax.data.images import decode_image  # noqa: E402

QWEN2_5 = {"min_pixels": 28 * 28 * 3, "max_pixels": 28 * 28 * 37, "image_processor_type": "Qwen2VLImageProcessor"}
QWEN3 = {
    "size": {"shortest_edge": 32 * 32 * 5, "longest_edge": 32 * 32 * 41},
    "patch_size": 16,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "image_processor_type": "Qwen2VLImageProcessorFast",
}
SIZES = [
    (28, 28),
    (60, 84),
    (83, 61),
    (1, 1),
    (1, 199),
    (200, 1),
    (13, 331),
    (509, 7),
    (311, 487),
    (97, 1021),
    (14, 42),
]


def noise(height, width, channels=3):
    return np.random.default_rng(1000 * height + width).integers(0, 256, (height, width, channels), np.uint8)


def processors(options):
    return ImageProcessor.from_config(options, {}), Qwen2VLImageProcessorPil(**options)


def assert_same(ours, oracle, image):
    expected = oracle(Image.fromarray(image) if isinstance(image, np.ndarray) else image)  # it guesses about arrays
    found = ours(image)
    np.testing.assert_allclose(found.patches, expected["pixel_values"], atol=1e-5, rtol=0)
    assert found.patches.dtype == np.float32 and found.positions.dtype == np.int32
    _, rows, columns = expected["image_grid_thw"][0]
    assert found.grid == (rows, columns) and found.num_tokens == rows * columns // ours.merge**2
    assert found.windows is None and found.order is None


@pytest.mark.parametrize("options", [QWEN2_5, QWEN3, {}], ids=["qwen2.5", "qwen3", "defaults"])
@pytest.mark.parametrize("size", SIZES)
def test_sizes(options, size):
    assert_same(*processors(options), noise(*size))


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "1", "CMYK", "YCbCr", "HSV"])
def test_modes(mode, tmp_path):
    picture = Image.fromarray(noise(61, 47, 4), "RGBA").convert(mode)
    ours, oracle = processors(QWEN3)
    assert_same(ours, oracle, picture)
    if mode in ("RGB", "RGBA", "L", "LA", "P", "1"):  # what PNG can hold, as the rest of the program reads it
        picture.save(tmp_path / "p.png", **({"transparency": 7} if mode == "P" else {}))
        read = ours(decode_image((tmp_path / "p.png").read_bytes(), name="p"))
        with Image.open(tmp_path / "p.png") as stored:
            assert_same(ours, oracle, stored.copy())
            np.testing.assert_allclose(read.patches, oracle(stored)["pixel_values"], atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "options",
    [
        {"do_normalize": False},
        {"do_rescale": False, "do_normalize": False},
        {"do_normalize": None},  # null is no
        {"resample": 2, "rescale_factor": 1 / 127},
        {"image_mean": 0.3, "image_std": [0.2, 0.3, 0.4], "merge_size": 3, "temporal_patch_size": 3},
    ],
)
def test_options(options):
    assert_same(*processors(QWEN2_5 | options), noise(89, 131))
    assert_same(*processors(QWEN2_5 | {"do_resize": False}), noise(56, 84))


def test_null_leaves_a_setting_out():
    names = ("image_mean", "image_std", "rescale_factor", "resample", "patch_size", "size", "min_pixels")
    assert ImageProcessor.from_config(dict.fromkeys(names), {}) == ImageProcessor.from_config({}, {})


def test_positions_and_merge_blocks():
    """Each patch holds the pixels at its position, and merge blocks are whole and in reading order."""
    ours = ImageProcessor.from_config({"do_resize": False, "do_normalize": False, "do_rescale": False}, {})
    found = ours(np.repeat(np.arange(56 * 84).reshape(56, 84, 1) // 28, 3, axis=2).astype(np.uint8))
    for patch, (row, column) in zip(found.patches, found.positions, strict=True):
        assert patch[0] == (row * 14 * 84 + column * 14) // 28 % 256
    blocks = found.positions.reshape(-1, 4, 2) // 2
    assert (blocks == blocks[:, :1]).all()
    assert [tuple(block[0]) for block in blocks] == [(row, column) for row in range(2) for column in range(3)]


@pytest.mark.parametrize("grid", [(1, 1), (4, 4), (3, 11), (8, 4), (9, 13), (5, 2)])
def test_windows(grid):
    stored, windows = window_order(*grid, window=4)
    expected, bounds = get_vision_window_index(torch.tensor([[1, 2 * grid[0], 2 * grid[1]]]), 2, 112, 14)
    np.testing.assert_array_equal(stored, expected)
    np.testing.assert_array_equal(np.flatnonzero(np.diff(windows)) + 1, bounds[1:-1] // 4)


def test_an_image_with_windows_is_the_same_in_another_order():
    model = {"model_type": "qwen2_5_vl", "vision_config": {"patch_size": 14, "spatial_merge_size": 2}}
    image = noise(150, 290)
    plain = ImageProcessor.from_config(QWEN2_5, {})(image)
    found = ImageProcessor.from_config(QWEN2_5, model)(image)
    assert plain.num_tokens == found.num_tokens > 16
    for name in ("patches", "positions"):
        blocks, expected = (getattr(x, name).reshape(plain.num_tokens, 4, -1) for x in (found, plain))
        np.testing.assert_array_equal(blocks[found.order], expected)
    places = found.positions // 8  # 112 pixels are 8 patches
    for window in range(found.windows.max() + 1):
        own = np.flatnonzero(found.windows == window)
        np.testing.assert_array_equal(own, np.arange(own[0], own[-1] + 1))
        assert (places[own] == places[own[0]]).all()
    assert found.windows.dtype == found.order.dtype == np.int32 and len(found.windows) == len(found.patches)


def test_directories(tmp_path):
    def write(name, content):
        (tmp_path / name).write_text(json.dumps(content))

    with pytest.raises(FileNotFoundError, match="no image processor in"):
        ImageProcessor.load(tmp_path)
    write("preprocessor_config.json", QWEN2_5)
    assert ImageProcessor.load(tmp_path).patch_dim == 1176 and ImageProcessor.load(tmp_path).window is None
    write("config.json", {"model_type": "qwen2_5_vl", "vision_config": {"window_size": 84}})
    assert ImageProcessor.load(tmp_path).window == 3
    write("config.json", {"model_type": "qwen3_vl", "vision_config": {"patch_size": 16}})
    with pytest.raises(ValueError, match="patch_size=14, but the vision tower of config.json has 16"):
        ImageProcessor.load(tmp_path)
    write("processor_config.json", {"image_processor": QWEN3})  # the newer place
    assert ImageProcessor.load(tmp_path) == ImageProcessor.from_config(QWEN3, {})
    assert ImageProcessor.load(tmp_path).patch_dim == 1536
    write("processor_config.json", {"image_processor": {"image_processor_type": "CLIPImageProcessor"}})
    with pytest.raises(ValueError, match="'CLIPImageProcessor' of .* is none of Qwen2VL"):
        ImageProcessor.load(tmp_path)


def test_both_spellings_of_the_bounds():
    new = {"size": {"shortest_edge": 4097, "longest_edge": 9973}}
    assert ImageProcessor.from_config(new, {}) == ImageProcessor.from_config(
        {"size": {"min_pixels": 4097, "max_pixels": 9973}}, {}
    )
    old = {"min_pixels": 4097, "max_pixels": 9973}
    assert ImageProcessor.from_config(new, {}) == ImageProcessor.from_config(old | {"size": None}, {})
    for size in ({"shortest_edge": 7}, {"shortest_edge": 11, "longest_edge": 7}, {"height": 7, "width": 7}):
        with pytest.raises(ValueError, match="does not bound the pixels"):
            ImageProcessor.from_config({"size": size}, {})
    with pytest.raises(ValueError, match="need 3 numbers"):
        ImageProcessor.from_config({"image_mean": [0.1, 0.2]}, {})


@pytest.mark.parametrize("size", [(1, 201), (2011, 10)])
def test_narrow_images_are_refused_by_both(size):
    ours, oracle = processors(QWEN2_5)
    with pytest.raises(ValueError, match="aspect ratio"):
        oracle(Image.fromarray(noise(*size)))
    with pytest.raises(ValueError, match=f"{size[0]} x {size[1]} pixels is too narrow"):
        ours(noise(*size))


def test_other_bad_images():
    ours = ImageProcessor.from_config(QWEN2_5, {})
    for image in (np.zeros((0, 7, 3), np.uint8), np.zeros((7, 7), np.uint8), np.zeros((7, 7, 3), np.float32)):
        with pytest.raises(ValueError, match="non-empty uint8 array"):
            ours(image)
    for picture in (Image.new("I;16", (7, 7)), Image.new("F", (7, 7)), Image.new("RGB", (0, 7))):
        with pytest.raises(ValueError, match="8 bits per channel"):
            ours(picture)
    with pytest.raises(ValueError, match="30 x 28 pixels does not fill blocks of 28 x 28"):
        ImageProcessor.from_config(QWEN2_5 | {"do_resize": False}, {})(noise(30, 28))
