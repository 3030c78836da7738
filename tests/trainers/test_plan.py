"""The plan of a run: its arithmetic against numbers worked out by hand."""

import re

import jax
import pytest

from kimi_jax.trainers import plan
from kimi_jax.trainers.config import default_config
from tests.trainers.helpers import text_config


def _line(text, name):
    [line] = [line for line in text.splitlines() if line.strip().startswith(name)]
    return line


def test_parameters_are_those_of_the_published_model():
    config = text_config(**{"model.size": "qwen2.5-1.5b", "tokenizer.vocab_size": 151_936})
    # 1.54B in the technical report; counted by hand: embedding, 28 layers, final norm
    width, kv, mlp = 1_536, 256, 8_960
    layer = 2 * width * width + width + 2 * (width * kv + kv) + 3 * width * mlp + 2 * width
    count = 151_936 * width + 28 * layer + width
    assert f"decoder {count:,} + vision 0 = {count:,}" in plan.describe(config)


def test_batches_of_an_iteration():
    text = plan.describe(text_config())
    # 32 × 8 responses of at most 48 + 64 = 112 tokens: one to a row of 128; two to a row when half as long
    rollout = _line(text, "RL rollout")
    assert "32 problems × 8 = 256 responses, each of at most 64 more tokens, 256 at a time in chunks of 32" in rollout
    assert "prompts are read 1,024 tokens at a time" in rollout
    assert "4 mini-batches of 64 responses, in micro-batches of 16 rows = 2,048 tokens" in text
    assert "64 rows, 4 micro-batches" in _line(text, "if all have the most tokens")
    assert "32 rows, 2 micro-batches" in _line(text, "if all are half as long")


@pytest.mark.parametrize("reset", [True, False])
def test_memory_adds_up_and_moments_come_and_go(reset):
    text = plan.describe(text_config(**{"rl.reset_optimizer": reset}))
    rollout, update = text.split("rollout phase\n")[1].split("update phase\n")
    for phase in (rollout, update):
        *parts, total = [float(size) for size in re.findall(r"([\d.]+) GiB", phase)]
        assert total == pytest.approx(sum(parts), abs=5e-3)
    assert ("optimizer moments" in rollout) == (not reset)
    assert "optimizer moments" in update


@pytest.mark.parametrize("pages, count", [(None, 1 + 64 * (7 + 1)), (999, 1 + 999 // 4)])
def test_pages_of_the_cache(pages, count):
    """7 pages of 16 tokens for 48 + 64, and one for a copy; one to throw away. 4 layers, 1 of 2 heads of 32 float32."""
    text = plan.describe(text_config(**{"mesh.data": 2, "sampling.pages": pages}))
    line = _line(text, f"KV cache, {count} pages of 16 tokens")
    size = 4 * 2 * 1 * count * 16 * 32 * 4
    assert float(re.search(r"([\d.]+) GiB", line).group(1)) == pytest.approx(size / 2**30, abs=5e-4)


def test_segments_bound_what_an_iteration_writes():
    assert "each of at most 24 more tokens" in plan.describe(text_config(**{"rl.segment_tokens": 24}))


def test_rows_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="sampling.rows=255 must be a multiple of 4"):
        plan.describe(text_config(**{"mesh.data": 2, "sampling.rows": 255}))


def test_sharded_bytes():
    """4 of 8 devices share the masters: the embedding [384, 128] in both dimensions, a norm in none."""
    config = text_config(**{"mesh.data": 2})
    policy = plan.Policy(plan.setup.model_config(config, 384))
    weights = plan.Weights.of(config, policy, plan.mesh_of_sizes(config, 8))
    layer_matrices = 128 * 128 * 2 + 2 * 128 * 64 + 3 * 128 * 384
    layer_norms = 2 * 128 + 2 * 32
    vision = sum(leaf.size for leaf in jax.tree.leaves(weights.params["vision"]))
    whole = 384 * 128 + 4 * layer_matrices
    assert weights.count == whole + 4 * layer_norms + 128 + vision
    decoder = plan.bytes_per_device(weights.params["decoder"])
    assert decoder == 4 * (whole // 4 + 4 * layer_norms + 128)
    # Adam: two moments like the masters, and a counter
    assert weights.moments == 2 * weights.masters + 4


def test_a_mesh_that_is_not_here_is_planned_for():
    text = plan.describe(text_config(**{"mesh.fsdp": 16, "mesh.tensor": 3}))
    assert "The mesh needs 48 devices" in text


def test_text_model_refuses_image_tasks():
    config = default_config()
    config.model.size = "qwen2.5-0.5b"
    with pytest.raises(ValueError, match=r"image_tasks=\(\)"):
        plan.describe(config)
