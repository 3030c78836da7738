"""Published model -> checkpoint -> published model, and a run exported midway, by the commands themselves."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers

from kimi_jax.arrays import TrainState
from kimi_jax.models import hf
from kimi_jax.models.hf.shards import DTYPES, read_directory
from kimi_jax.models.policy import Policy
from kimi_jax.trainers import setup
from kimi_jax.trainers.config import default_config
from kimi_jax.training import sharding
from kimi_jax.training.checkpoint import Checkpointer
from scripts import export_weights, import_weights
from tests.models.hf.published import QWEN2, write_random

KERNEL = "model.layers.1.mlp.up_proj.weight"


def contents(directory):
    return {name: (entry.dtype, entry.read().tobytes()) for name, entry in read_directory(directory).items()}


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    path = write_random(QWEN2, tmp_path_factory.mktemp("model") / "qwen", dtype="BF16", shard_bytes=10_000)
    (path / "generation_config.json").write_text('{"eos_token_id": 7}')
    write_tokenizer(path, vocab_size=61)
    return path


def write_tokenizer(path, vocab_size):
    words = {f"w{i}": i for i in range(vocab_size)}
    tokenizers.Tokenizer(tokenizers.models.WordLevel(words, "w0")).save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text('{"eos_token": "w7", "unk_token": "w0"}')


def run(script, capsys, **flags):
    status = script.main([f"--{name}={value}" if value is not True else f"--{name}" for name, value in flags.items()])
    out, err = capsys.readouterr()
    return status, json.loads(out) if out else None, err


def test_export_of_an_import_is_the_published_directory(published, tmp_path, capsys):
    status, result, _ = run(import_weights, capsys, model=published, out=tmp_path / "ckpt")
    assert status == 0 and result["architecture"] == "Qwen2ForCausalLM" and result["tensors"] == 27
    assert result["bytes"] == 2 * result["parameters"]
    status, result, _ = run(export_weights, capsys, checkpoint=tmp_path / "ckpt", out=tmp_path / "out", shard_gb=1e-5)
    assert status == 0 and result["stage"] == "import"
    assert contents(tmp_path / "out") == contents(published)
    for name in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (published / name).read_bytes()
    status, _, err = run(import_weights, capsys, model=published, out=tmp_path / "ckpt")
    assert status == 2 and "not empty" in err
    assert run(import_weights, capsys, model=published, out=tmp_path / "ckpt", overwrite=True)[0] == 0
    status, _, err = run(export_weights, capsys, checkpoint=tmp_path / "ckpt", out=tmp_path / "new", step=3)
    assert status == 2 and "no steps" in err


def test_what_may_stay_unread_is_named_once(published, tmp_path, capsys):
    model = shutil.copytree(published, tmp_path / "model")
    values = json.loads((model / "config.json").read_text()) | {"our_note": "x"}
    (model / "config.json").write_text(json.dumps(values))
    status, _, err = run(import_weights, capsys, model=model, out=tmp_path / "ckpt")
    assert status == 2 and "--unused=our_note" in err
    assert run(import_weights, capsys, model=model, out=tmp_path / "ckpt", unused="our_*")[0] == 0
    hf.copy_side_files(tmp_path / "ckpt" / "hf", tmp_path / "run" / "hf")  # as a run does
    for place in (tmp_path / "ckpt" / "hf", tmp_path / "run" / "hf"):
        assert hf.read_config(place)[1] == hf.read_config(published)[1]
        (place / "config.json").write_text(json.dumps(values | {"their_note": "y"}))
        with pytest.raises(ValueError, match="their_note"):
            hf.read_config(place)


@pytest.mark.parametrize("size", ["0", "-1", "nan", "inf"])
def test_the_size_of_shards_must_be_one(size, tmp_path, capsys):
    for script, flag in ((import_weights, "model"), (export_weights, "checkpoint")):
        with pytest.raises(SystemExit):
            script.main([f"--{flag}={tmp_path}", f"--out={tmp_path}", f"--shard_gb={size}"])
        assert "must be a positive number" in capsys.readouterr().err


def start_run(workdir, published, *, rank):
    """What a run keeps that began with a published model. Returns (its parameters, save(stage, step, params))."""
    config = default_config()
    config.model.lora.rank = rank
    workdir.mkdir()
    (workdir / "config.json").write_text(config.to_json_best_effort())
    hf.copy_side_files(published, workdir / "hf")
    mesh = sharding.make_mesh(data=-1, fsdp=1, tensor=1)
    policy = Policy(hf.read_config(published)[1])
    like = setup.params_like(config, policy, mesh)
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda s: jax.device_put(rng.normal(size=s.shape).astype(s.dtype), s.sharding), like)
    params |= hf.load_params(published, {name: tree for name, tree in like.items() if name != "lora"})

    def save(stage, step, params):
        state = TrainState(params, None, jnp.asarray(step))
        arrays = {"state": state, "prompts": {"correct": np.arange(5)}} if stage == "rl" else state
        directory = workdir / "checkpoints" / stage
        with Checkpointer(directory, keep_last=2, keep_best=0, best_metric=None) as checkpoints:
            checkpoints.save(step, arrays, {}, wait=True)

    return params, save


def changed(params, by):
    kernel = params["decoder"]["runs"]["0"]["mlp"]["up_proj"]["kernel"].at[1].add(by)
    mlp = params["decoder"]["runs"]["0"]["mlp"] | {"up_proj": {"kernel": kernel}}
    runs = {"0": params["decoder"]["runs"]["0"] | {"mlp": mlp}}
    return params | {"decoder": params["decoder"] | {"runs": runs}}


def test_a_run_is_exported_at_any_stage_and_step(published, tmp_path, capsys):
    workdir = tmp_path / "run"
    params, save = start_run(workdir, published, rank=0)
    status, _, err = run(export_weights, capsys, checkpoint=workdir, out=tmp_path / "early")
    assert status == 2 and "no complete checkpoint yet" in err
    before = contents(published)
    kernel = read_directory(published)[KERNEL].read().astype(np.float32)
    save("sft", 4, changed(params, 1.0))
    save("rl", 1, changed(params, 2.0))
    save("rl", 2, changed(params, 3.0))
    for flags, by in (({}, 3.0), ({"step": 1}, 2.0), ({"stage": "sft"}, 1.0)):
        out = tmp_path / f"out{by}"
        status, result, _ = run(export_weights, capsys, checkpoint=workdir, out=out, **flags)
        assert status == 0 and result == {"stage": "sft" if by == 1 else "rl", "step": {1: 4, 2: 1, 3: 2}[by]} | {
            "out": str(out)
        }
        after = contents(out)
        assert {name for name in before if before[name] != after[name]} == {KERNEL}
        np.testing.assert_array_equal(read_directory(out)[KERNEL].read(), (kernel + by).astype(DTYPES["BF16"]))
    for flags, message in (({"step": 9}, "holds \\[1, 2\\]"), ({"stage": "sft", "step": 1}, "holds \\[4\\]")):
        status, _, err = run(export_weights, capsys, checkpoint=workdir, out=tmp_path / "none", **flags)
        assert status == 2 and message.replace("\\", "") in err


def test_adapters_are_merged(published, tmp_path, capsys):
    workdir = tmp_path / "run"
    params, save = start_run(workdir, published, rank=3)
    save("rl", 5, params)
    assert run(export_weights, capsys, checkpoint=workdir, out=tmp_path / "out")[0] == 0
    adapter = jax.tree.map(np.asarray, params["lora"]["decoder"]["runs"]["0"]["mlp"]["up_proj"])
    product = np.asarray(params["lora"]["scale"]) * (adapter["a"][1].astype(np.float64) @ adapter["b"][1])
    expected = read_directory(published)[KERNEL].read().astype(np.float64) + product.T
    found = read_directory(tmp_path / "out")[KERNEL].read().astype(np.float64)
    np.testing.assert_allclose(found, expected, atol=2**-8 * np.abs(expected).max())
    assert np.abs(product).max() > 0.1 * np.abs(expected).max()


def test_what_cannot_be_imported_or_exported_is_said_in_one_line(published, tmp_path, capsys):
    own = tmp_path / "own"
    own.mkdir()
    (own / "config.json").write_text(default_config().to_json_best_effort())
    status, _, err = run(export_weights, capsys, checkpoint=own, out=tmp_path / "out")
    assert status == 2 and "one of our own sizes" in err and not (tmp_path / "out").exists()

    larger = write_random(QWEN2, tmp_path / "larger", dtype="BF16")
    write_tokenizer(larger, vocab_size=62)
    status, _, err = run(import_weights, capsys, model=larger, out=tmp_path / "ckpt")
    assert status == 2 and "embedding" in err and not (tmp_path / "ckpt").exists()
    status, _, err = run(import_weights, capsys, model=tmp_path / "nowhere", out=tmp_path / "ckpt")
    assert status == 2 and "config.json" in err
    (tmp_path / "busy" / "checkpoints").mkdir(parents=True)
    status, _, err = run(import_weights, capsys, model=published, out=tmp_path / "busy", overwrite=True)
    assert status == 2 and "holds a run" in err
