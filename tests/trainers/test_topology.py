"""Real compilations for TPU slices, by the compiler of TPUs and without a TPU."""

import importlib.util
import re

import jax
import pytest

from kimi_jax.models import config as models
from kimi_jax.models import paged
from kimi_jax.trainers import plan, topology
from tests.trainers.helpers import text_config

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="needs the TPU compiler: pip install -e '.[tpu]'"
)


@needs_libtpu
@pytest.mark.parametrize("name", ["v5e:3x5", "v99:2x4", "a slice"])
def test_unknown_topology_teaches(name):
    with pytest.raises(ValueError, match=f"{name}.*such as v5e:2x4"):
        topology.topology_devices(name)


def test_without_compiler_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"\.\[tpu\]"):
        topology.topology_devices("v5e:2x4")


@needs_libtpu
@pytest.mark.slow
def test_compiles_for_a_slice_and_fits():
    config = text_config(**{"mesh.data": 2})
    report = topology.compile_for_topology(config, "v5e:2x4")
    programs = {program.name: program for program in report.programs}
    assert not [program.error for program in report.programs if program.error]
    assert "attention splash" in report.heading
    assert report.fits and "It fits" in str(report)

    policy = plan.Policy(plan.setup.model_config(config, 384))
    weights = plan.Weights.of(config, policy, plan.mesh_of_sizes(config, 8))
    gradient, chunk, optimizer = programs["gradient"], programs["decode chunk"], programs["optimizer"]
    # Parameters and the sum of their gradients come in, and the sum goes out in the memory that it came in.
    assert gradient.arguments >= 2 * weights.masters
    assert gradient.aliased >= weights.masters
    assert optimizer.arguments >= 4 * weights.masters
    # The cache of 64 rows per chip, 8 pages of 16 tokens, one of two key/value heads, 4 layers, is updated in place.
    cache = 2 * 4 * 64 * 8 * 16 * 32 * 4
    for name in ("prefill", "prefill on", "decode chunk"):
        assert programs[name].arguments >= cache + weights.rollout and programs[name].aliased >= cache, name
    assert programs["fork"].aliased >= cache and not programs["fork"].collectives
    assert programs["fork"].resident == weights.masters + weights.rollout
    # SFT: no copy of the weights beside its update; its moments beside the programs that write, while it is evaluated.
    assert programs["SFT gradient"].arguments >= 2 * weights.masters
    assert programs["SFT gradient"].resident == weights.moments("sft") and not programs["SFT optimizer"].resident
    largest = max((programs[name] for name in ("prefill", "prefill on", "decode chunk")), key=lambda p: p.total)
    assert programs["SFT evaluation"].peak == largest.peak + weights.moments("sft")
    assert gradient.collectives["all-gather"] and gradient.collectives["all-reduce"]
    assert chunk.collectives["all-reduce"]  # of the two tensor halves of each layer
    assert gradient.flops > 0 and gradient.temporaries > 0


WRITING = ["hand-over", "prefill", "prefill on", "fork", "decode chunk"]
UPDATE = ["SFT gradient", "SFT optimizer"]


@pytest.mark.parametrize(
    "changes, names",
    [
        ({"sft.steps": 0}, [*WRITING, "score", "gradient", "optimizer"]),
        ({"rl.iterations": 0}, [*UPDATE, *WRITING]),
        ({"rl.iterations": 0, "data.heldout_per_kind": 0}, UPDATE),
        ({"reward_model.kind": "chain_of_thought"}, [*UPDATE, *WRITING]),
        ({"reward_model.kind": "classic", "model.scalar_head": True}, UPDATE),
        ({"reward_model.kind": "classic", "reward_model.objective": "pairs", "model.scalar_head": True}, UPDATE),
        ({"rl.iterations": 0, "init": "run", "dpo.pairs": "file", "data.heldout_per_kind": 0}, UPDATE),
    ],
)
def test_what_is_compiled_is_what_the_config_runs(changes, names, monkeypatch):
    """On devices that are here, which take it for a topology; and no further than what is lowered."""
    config = text_config(**{"mesh.data": 2} | changes)
    monkeypatch.setattr(topology, "topology_devices", lambda name: jax.devices())
    monkeypatch.setitem(topology.HBM, jax.devices()[0].device_kind, 1.0)
    lowered = []

    def lower(name, function, *args, resident, **statics):
        lowered.append(function.lower(*args, **statics))
        return topology.Program(name, 0.0, resident=resident)

    monkeypatch.setattr(topology, "_compile", lower)
    report = topology.compile_for_topology(config, "these")
    assert [program.name for program in report.programs] == names and len(lowered) == len(names)


@pytest.mark.parametrize("micro_rows, alone", [(4, True), (2, False)])
def test_a_single_micro_batch_is_added_to_nothing(micro_rows, alone, monkeypatch):
    changes = {"mesh.data": 2, "rl.iterations": 0, "data.heldout_per_kind": 0, "sft.rows": 4}
    config = text_config(**changes | {"sft.micro_rows": micro_rows})
    monkeypatch.setattr(topology, "topology_devices", lambda name: jax.devices())
    monkeypatch.setitem(topology.HBM, jax.devices()[0].device_kind, 1.0)
    before = {}

    def compiled(name, function, *args, resident):
        before[name] = args[0]
        return topology.Program(name, 0.0, resident=resident)

    monkeypatch.setattr(topology, "_compile", compiled)
    topology.compile_for_topology(config, "these")
    assert (before["SFT gradient"] is None) == alone


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize("num_kv_heads", [1, 4])
def test_heads_of_128_are_decoded_by_the_kernel_for_tpus(monkeypatch, num_kv_heads):
    """Key/value heads split over tensor, or whole on each chip because they do not divide."""
    wide = models.ModelConfig(
        vocab_size=1,
        width=256,
        num_layers=2,
        num_heads=4,
        num_kv_heads=num_kv_heads,
        head_dim=128,
        mlp_width=512,
        rope_base=1e6,
        tie_embeddings=True,
        dtype="bfloat16",
    )
    monkeypatch.setitem(models.NAMED_SIZES, "wide", wide)
    calls = []
    kernel = paged._decode_tpu
    monkeypatch.setattr(
        paged, "_decode_tpu", lambda *args, **options: calls.append(options) or kernel(*args, **options)
    )
    config = text_config(**{"mesh.data": 2, "model.size": "wide", "sampling.repetition.window": 8})
    mesh = plan.sharding.make_mesh(**config.mesh, devices=topology.topology_devices("v5e:2x4"))
    policy = plan.setup.make_policy(config, mesh, plan.setup.model_config(config, 384))
    *_, chunk = topology._rollout_programs(config, policy, mesh, plan.Weights.of(config, policy, mesh), moments=0)
    assert chunk.name == "decode chunk" and not chunk.error
    assert calls == [{"interpret": False}] * 2
    cache = 2 * 2 * 64 * 8 * 16 * max(num_kv_heads // 2, 1) * 128 * 2
    assert chunk.aliased >= cache and chunk.temporaries < cache


@needs_libtpu
@pytest.mark.slow
def test_what_does_not_fit_says_by_how_much():
    config = text_config(**{"mesh.data": 2, "sampling.max_tokens": 80, "sampling.rows": 2**20, "rl.responses": 2**10})
    devices = topology.topology_devices("v5e:2x4")
    mesh = plan.sharding.make_mesh(**config.mesh, devices=devices)
    policy = plan.setup.make_policy(config, mesh, plan.setup.model_config(config, 384))
    programs = tuple(topology._rollout_programs(config, policy, mesh, plan.Weights.of(config, policy, mesh), moments=0))
    report = topology.Report("", topology.HBM[devices[0].device_kind], programs)
    assert not report.fits
    prefill = {program.name: program for program in programs}["prefill"]
    assert re.search(r"needs [\d.,]+ GiB per chip, [\d.,]+ more than the 15.75", prefill.error)
    assert "does NOT fit" in str(report) and "sampling.rows" in str(report)
