import dataclasses
import math

import jax
import pytest

from kimi_jax.models.config import NAMED_SIZES, VisionConfig, named_size
from kimi_jax.models.policy import Policy
from tests.helpers import CONFIG, VISION

PUBLISHED = {
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen2.5-7b": 7_615_616_512,
    "qwen2.5-vl-3b": 3_754_622_976,
    "qwen2.5-vl-7b": 8_292_166_656,
    "qwen3-vl-2b": 2_127_532_032,
}


def num_parameters(config):
    shapes = jax.eval_shape(Policy(config).init, jax.random.key(0))
    return {name: sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(part)) for name, part in shapes.items()}


@pytest.mark.parametrize("name", PUBLISHED)
def test_named_sizes_have_as_many_parameters_as_the_published_models(name):
    assert sum(num_parameters(named_size(name)).values()) == PUBLISHED[name]


@pytest.mark.parametrize("scalar_head", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_parameters_counted_by_hand(tied, scalar_head):
    c = dataclasses.replace(CONFIG, tie_embeddings=tied, scalar_head=scalar_head)
    attention = c.width * (c.num_heads + 2 * c.num_kv_heads) * c.head_dim + c.num_heads * c.head_dim * c.width
    layer = attention + 2 * c.head_dim + 3 * c.width * c.mlp_width + 2 * c.width  # q/k norms; SwiGLU; two norms
    ends = c.vocab_size * c.width * (1 if tied else 2) + c.width + (c.width + 1) * scalar_head
    v = VISION
    tower_layer = 4 * v.width**2 + 3 * v.width + 3 * v.width * v.mlp_width + 2 * v.width
    merged = 4 * v.width
    tower_ends = (v.patch_size**2 * 3 + 1) * v.width + v.width + (merged + 1) * merged + (merged + 1) * c.width
    expected = {"decoder": c.num_layers * layer + ends, "vision": v.num_layers * tower_layer + tower_ends}
    assert num_parameters(c) == expected


@pytest.mark.parametrize("name", NAMED_SIZES)
def test_every_named_size_can_be_built(name):
    config = named_size(name, vocab_size=97)
    shapes = jax.eval_shape(Policy(config).init, jax.random.key(0))
    assert shapes["decoder"]["ends"]["embed"]["embedding"].shape == (97, config.width)
    assert ("vision" in shapes) == (config.vision is not None)


def test_an_unknown_size_lists_the_known_ones():
    with pytest.raises(ValueError, match="no model size 'tyni'.*tiny, small, qwen2.5-0.5b"):
        named_size("tyni")


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"num_heads": 5}, "num_heads=5 must be a multiple of num_kv_heads=2"),
        ({"head_dim": 11}, "head_dim=11 must be even"),
        ({"vision": dataclasses.replace(VISION, num_heads=5)}, "vision width=24 over 5 heads"),
        ({"vision": dataclasses.replace(VISION, num_heads=4)}, "vision width=24 over 4 heads"),
    ],
)
def test_shapes_that_cannot_work_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **changes)


def test_configs_are_hashable_and_equal_by_value():
    assert hash(Policy(CONFIG)) == hash(Policy(dataclasses.replace(CONFIG)))
    assert Policy(CONFIG) == Policy(dataclasses.replace(CONFIG, vision=VisionConfig(**dataclasses.asdict(VISION))))


def test_which_coordinate_turns_which_pair():
    shape = dataclasses.replace(CONFIG, head_dim=18, mrope_sections=(3, 2, 4))
    assert shape.mrope_axes == (0, 0, 0, 1, 1, 2, 2, 2, 2)
    shape = dataclasses.replace(CONFIG, head_dim=18, mrope_sections=(4, 3, 2), mrope_interleaved=True)
    assert shape.mrope_axes == (0, 1, 2, 0, 1, 2, 0, 1, 0)
    assert set(CONFIG.mrope_axes) == {0} and not CONFIG.extras
    with pytest.raises(ValueError, match="must add up to 9"):
        dataclasses.replace(CONFIG, head_dim=18, mrope_sections=(4, 3, 3))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"norm": "batch"}, "vision norm='batch' is not one of rms, layer"),
        ({"full_layers": (2,)}, r"full_layers=\(2,\) must be ascending layers of 0..1"),
        ({"deepstack_layers": (1, 0)}, r"deepstack_layers=\(1, 0\) must be ascending"),
    ],
)
def test_towers_that_cannot_be(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(VISION, **change)
