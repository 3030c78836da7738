"""The plan of a run: its arithmetic against numbers worked out by hand, and real compilations for TPU slices."""

import importlib.util
import re

import jax
import pytest

from kimi_jax.trainers import plan
from kimi_jax.trainers.config import check_config, default_config

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="needs the TPU compiler: pip install -e '.[tpu]'"
)


def _text_config(**changes):
    """A tiny model on text alone, which compiles fast."""
    config = default_config()
    with config.unlocked():
        config.data.image_tasks = ()
        config.rows.patches = config.sampling.prompt_patches = 0
        config.mesh.fsdp = config.mesh.tensor = 2
        config.update_from_flattened_dict(changes)
    check_config(config)
    return config


def _line(text, name):
    [line] = [line for line in text.splitlines() if line.strip().startswith(name)]
    return line


def test_parameters_are_those_of_the_published_model():
    config = _text_config(**{"model.size": "qwen2.5-1.5b", "tokenizer.vocab_size": 151_936})
    # 1.54B in the technical report; counted by hand: embedding, 28 layers, final norm
    width, kv, mlp = 1_536, 256, 8_960
    layer = 2 * width * width + width + 2 * (width * kv + kv) + 3 * width * mlp + 2 * width
    count = 151_936 * width + 28 * layer + width
    assert f"decoder {count:,} + vision 0 = {count:,}" in plan.describe(config)


def test_batches_of_an_iteration():
    text = plan.describe(_text_config())
    # 32 × 8 responses of at most 48 + 64 = 112 tokens: one to a row of 128; two to a row when half as long
    assert "32 problems × 8 = 256 responses, 256 at a time: 1 × (1 prefill + at most 2 chunks of 32 tokens)" in text
    assert "4 mini-batches of 64 responses, in micro-batches of 16 rows = 2,048 tokens" in text
    assert "64 rows, 4 micro-batches" in _line(text, "if all have the most tokens")
    assert "32 rows, 2 micro-batches" in _line(text, "if all are half as long")


@pytest.mark.parametrize("reset", [True, False])
def test_memory_adds_up_and_moments_come_and_go(reset):
    text = plan.describe(_text_config(**{"rl.reset_optimizer": reset}))
    rollout, update = text.split("rollout phase\n")[1].split("update phase\n")
    for phase in (rollout, update):
        *parts, total = [float(size) for size in re.findall(r"([\d.]+) GiB", phase)]
        assert total == pytest.approx(sum(parts), abs=5e-3)
    assert ("optimizer moments" in rollout) == (not reset)
    assert "optimizer moments" in update


def test_sharded_bytes():
    """4 of 8 devices share the masters: the embedding [384, 128] in both dimensions, a norm in none."""
    config = _text_config(**{"mesh.data": 2})
    policy = plan.Policy(plan.setup.model_config(config, 384))
    weights = plan._Weights.of(config, policy, plan._mesh_of_sizes(config, 8))
    layer_matrices = 128 * 128 * 2 + 2 * 128 * 64 + 3 * 128 * 384
    layer_norms = 2 * 128 + 2 * 32
    vision = sum(leaf.size for leaf in jax.tree.leaves(weights.params["vision"]))
    whole = 384 * 128 + 4 * layer_matrices
    assert weights.count == whole + 4 * layer_norms + 128 + vision
    decoder = plan._bytes_per_device(weights.params["decoder"])
    assert decoder == 4 * (whole // 4 + 4 * layer_norms + 128)
    # Adam: two moments like the masters, and a counter
    assert weights.moments == 2 * weights.masters + 4


def test_a_mesh_that_is_not_here_is_planned_for():
    text = plan.describe(_text_config(**{"mesh.fsdp": 16, "mesh.tensor": 3}))
    assert "The mesh needs 48 devices" in text


def test_text_model_refuses_image_tasks():
    config = default_config()
    config.model.size = "qwen2.5-0.5b"
    with pytest.raises(ValueError, match=r"image_tasks=\(\)"):
        plan.describe(config)


@needs_libtpu
@pytest.mark.parametrize("name", ["v5e:3x5", "v99:2x4", "a slice"])
def test_unknown_topology_teaches(name):
    with pytest.raises(ValueError, match=f"{name}.*such as v5e:2x4"):
        plan.topology_devices(name)


def test_without_compiler_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"\.\[tpu\]"):
        plan.topology_devices("v5e:2x4")


@needs_libtpu
@pytest.mark.slow
def test_compiles_for_a_slice_and_fits():
    config = _text_config(**{"mesh.data": 2})
    report = plan.compile_for_topology(config, "v5e:2x4")
    programs = {program.name: program for program in report.programs}
    assert not [program.error for program in report.programs if program.error]
    assert "attention splash" in report.heading
    assert report.fits and "It fits" in str(report)

    policy = plan.Policy(plan.setup.model_config(config, 384))
    weights = plan._Weights.of(config, policy, plan._mesh_of_sizes(config, 8))
    gradient, chunk, optimizer = programs["gradient"], programs["decode chunk"], programs["optimizer"]
    # Parameters and the sum of their gradients come in, and the sum goes out in the memory that it came in.
    assert gradient.arguments >= 2 * weights.masters
    assert gradient.outputs >= weights.masters and gradient.aliased == gradient.outputs
    assert optimizer.arguments >= 4 * weights.masters
    # The cache of 64 rows per chip, 112 slots, one of two key/value heads each, 4 layers, is updated in place.
    cache = 2 * 4 * 64 * 112 * 32 * 4
    assert chunk.arguments >= cache + weights.rollout and chunk.aliased >= cache
    assert gradient.collectives["all-gather"] and gradient.collectives["all-reduce"]
    assert chunk.collectives["all-reduce"]  # of the two tensor halves of each layer
    assert gradient.flops > 0 and gradient.temporaries > 0


@needs_libtpu
@pytest.mark.slow
def test_what_does_not_fit_says_by_how_much():
    config = _text_config(**{"mesh.data": 2, "sampling.max_tokens": 80, "sampling.rows": 2**20, "rl.responses": 2**10})
    devices = plan.topology_devices("v5e:2x4")
    mesh = plan.sharding.make_mesh(**config.mesh, devices=devices)
    policy = plan.setup.make_policy(config, mesh, plan.setup.model_config(config, 384))
    programs = tuple(plan._rollout_programs(config, policy, mesh, plan._Weights.of(config, policy, mesh)))
    report = plan.Report("", plan.HBM[devices[0].device_kind], programs)
    assert not report.fits
    prefill = programs[-1]
    assert prefill.name == "prefill"  # nothing that reads its result was tried
    assert re.search(r"needs [\d.,]+ GiB per chip, [\d.,]+ more than the 15.75", prefill.error)
    assert "does NOT fit" in str(report) and "sampling.rows" in str(report)
