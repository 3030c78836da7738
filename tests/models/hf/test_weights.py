"""Weights in and out: byte for byte, on any mesh, in shards of any size, and one clear error for what does not fit."""

import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kimi_jax.models import hf
from kimi_jax.models.config import ModelConfig, RopeScaling
from kimi_jax.models.hf.shards import DTYPES, INDEX, SINGLE, Planned, read_directory, read_header, write_directory
from kimi_jax.models.policy import Policy
from kimi_jax.training import sharding
from tests.models.hf.published import LLAMA, QWEN2, QWEN3, config_json, write_random

ROOT = pathlib.Path(__file__).parents[3]


def params_like(directory, mesh=None, dtype="float32"):
    policy = Policy(hf.read_config(directory)[1])
    shapes = jax.eval_shape(policy.init, jax.random.key(0))
    shapes = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, dtype), shapes)
    if mesh is None:
        return shapes
    place = lambda s, sharding: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding)  # noqa: E731
    return jax.tree.map(place, shapes, sharding.shardings(mesh, shapes, sharding.TRAIN_RULES))


def load(directory, **options):
    return hf.load_params(directory, params_like(directory), **options)


def contents(directory) -> dict[str, tuple[str, bytes]]:
    return {name: (entry.dtype, entry.read().tobytes()) for name, entry in read_directory(directory).items()}


@pytest.fixture
def qwen2(tmp_path):
    return write_random(QWEN2, tmp_path / "qwen2", dtype="BF16", shard_bytes=10_000)


# --- config.json ---


def test_every_number_of_config_json_arrives_in_the_old_spelling_and_the_new():
    base = dict(vocab_size=61, width=42, num_layers=3, mlp_width=37, norm_eps=1e-5, dtype="bfloat16")
    expected = {
        "Qwen2ForCausalLM": dict(num_heads=6, num_kv_heads=2, head_dim=7 * 2, rope_base=1e6, qkv_bias=True),
        "Qwen3ForCausalLM": dict(num_heads=6, num_kv_heads=2, head_dim=14, rope_base=1e6, qk_norm=True),
        "LlamaForCausalLM": dict(
            num_heads=6, num_kv_heads=2, head_dim=14, rope_base=1e6, rope_scaling=RopeScaling(8.0, 1.0, 4.0, 29)
        ),
    }
    scaling = dict(factor=8, low_freq_factor=1, high_freq_factor=4, original_max_position_embeddings=29)
    for architecture, fields in expected.items():
        llama3 = {"rope_type": "llama3", **scaling} if "Llama" in architecture else {"rope_type": "default"}
        common = dict(
            architectures=[architecture],
            vocab_size=61,
            hidden_size=42,
            num_hidden_layers=3,
            num_attention_heads=6,
            num_key_value_heads=2,
            head_dim=14,
            intermediate_size=37,
            rms_norm_eps=1e-5,
            use_sliding_window=False,
            sliding_window=4096,
        )
        spellings = (
            dict(torch_dtype="bfloat16", rope_theta=1e6, rope_scaling=llama3 if "Llama" in architecture else None),
            dict(dtype="bfloat16", rope_parameters={"rope_theta": 1e6, **llama3}),
        )
        for spelling in spellings:
            config = read(common | spelling)
            assert config == ModelConfig(tie_embeddings=False, **base | fields)
            assert read(common | spelling | {"tie_word_embeddings": True}).tie_embeddings


def read(values):
    options = hf.Options(values, where="config.json")
    config = hf.FAMILIES[values["architectures"][0]].config(options)
    options.finish()
    return config


VISION = dict(
    depth=3,
    hidden_size=24,
    intermediate_size=29,
    num_heads=3,
    out_hidden_size=42,
    patch_size=7,
    spatial_merge_size=2,
    temporal_patch_size=2,
)
IDS = {f"{name}_token_id": i for i, name in enumerate(("image", "video", "vision", "vision_start", "vision_end"))}


def qwen2_5_vl(**changes):
    tower = VISION | dict(window_size=42, fullatt_block_indexes=[1], in_chans=3, spatial_patch_size=7)
    rope = dict(rope_theta=1e6, rope_scaling={"type": "mrope", "mrope_section": [2, 2, 3]})
    values = config_json("Qwen2_5_VLForConditionalGeneration", vision_config=tower, sliding_window=37, **rope, **IDS)
    return values | {"use_sliding_window": False, "tie_word_embeddings": True} | changes


def qwen3_vl(**rope):
    text = dict(QWEN3, torch_dtype=None, rope_theta=None, rope_parameters={"mrope_section": [1, 2, 2], **rope})
    tower = VISION | dict(
        hidden_act="gelu_pytorch_tanh", num_position_embeddings=9, deepstack_visual_indexes=[0], in_channels=3
    )
    names = {"architectures": ["Qwen3VLForConditionalGeneration"], "dtype": "bfloat16"}
    return names | {"text_config": text, "vision_config": tower, **IDS}


def test_options_of_a_decoder_may_stand_at_the_top_in_a_part_or_at_both_places():
    """Published, as transformers 4.56 saved it, and as 4.53 did: of what is there twice, the part counts."""
    flat = qwen2_5_vl()
    ours = read(flat)
    assert (ours.num_layers, ours.tie_embeddings, ours.mrope_interleaved) == (2, True, False)
    part = {name: value for name, value in flat.items() if name != "vision_config"}
    part |= {"sliding_window": None, "layer_types": ["full_attention"] * 2, "image_token_id": None}
    outer = {
        name: flat[name] for name in ("architectures", "vision_config", "tie_word_embeddings", "torch_dtype", *IDS)
    }
    assert read(outer | {"text_config": part}) == ours
    assert read(flat | {"num_hidden_layers": 7, "text_config": part}) == ours
    flat["vision_config"]["fullatt_block_indexes"] = [31, 1, 7]
    assert read(flat) == ours
    with pytest.raises(ValueError, match="option only_at_the_top=3 is unknown"):
        read(flat | {"only_at_the_top": 3, "text_config": part})


def test_what_families_take_for_granted_about_rope():
    assert read(qwen3_vl(rope_theta=5e6)).mrope_interleaved
    assert read(qwen3_vl(rope_theta=5e6, mrope_interleaved=True)).rope_base == 5e6
    with pytest.raises(ValueError, match="only mrope_interleaved=True is supported"):
        read(qwen3_vl(rope_theta=5e6, mrope_interleaved=False))
    with pytest.raises(ValueError, match="RoPE lacks 'rope_theta'"):
        read(qwen3_vl())
    for name in ("rope_theta", "rms_norm_eps"):
        with pytest.raises(ValueError, match=f"lacks '{name}'"):
            read(qwen2_5_vl(**{name: None}))
    for name in ("rope_theta", "rms_norm_eps"):
        assert read(QWEN2 | {name: None}) == read(QWEN2)


@pytest.mark.parametrize(
    "change, message",
    [
        (
            {"rope_scaling": {"rope_type": "yarn"}, "rope_parameters": {"rope_type": "default", "rope_theta": 7.0}},
            "rope_scaling=.*yarn.* is not rope_parameters=.*Keep the one",
        ),
        ({"architectures": ["Qwen2MoeForCausalLM"]}, "Qwen2MoeForCausalLM is not supported.*Qwen2ForCausalLM"),
        ({"architectures": None, "model_type": "bert"}, "model_type='bert'"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'.*'silu'"),
        ({"hidden_size": None}, "lacks 'hidden_size'"),
        ({"num_hidden_layers": "2"}, "option of the wrong kind.*'str'"),
        ({"rope_scaling": "yarn"}, "option of the wrong kind"),
        ({"num_attention_heads": 0}, "a size that is 0"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "'yarn' is not supported"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 4.0}}, "'dynamic' is not supported"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        ({"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1}, "sliding-window"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding_attention"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quant_method='fp8'.*bfloat16"),
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping=50.0 is unknown"),
        ({"torch_dtype": "int8"}, "int8"),
        ({"num_key_value_heads": 4}, "num_kv_heads=4"),
    ],
)
def test_options_that_are_not_supported_are_refused_by_name(change, message, qwen2):
    edit_config(qwen2, **change)
    with pytest.raises(ValueError, match=message):
        hf.read_config(qwen2)


def edit_config(directory, **change):
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))


def test_an_unknown_option_can_be_declared_harmless_and_windows_that_no_layer_uses_are(qwen2):
    edit_config(qwen2, our_note="x", use_sliding_window=True, sliding_window=16, max_window_layers=99)
    assert hf.read_config(qwen2, unused=("our_*",))[1].num_layers == 2


# --- round trip ---


def poke(entry, values):
    """Overwrites the first values of a tensor in its file."""
    with entry.path.open("r+b") as file:
        file.seek(entry.offset)
        file.write(values.tobytes())


@pytest.mark.parametrize("values, dtype", [(QWEN2, "BF16"), (QWEN3, "F16"), (LLAMA, "F32")])
def test_export_after_import_is_equal_byte_for_byte(values, dtype, tmp_path):
    source = write_random(values, tmp_path / "source", dtype=dtype, shard_bytes=7_000)
    if dtype != "F32":  # also numbers that arithmetic might round to zero; transposed and not
        odd = np.array([5e-324, 6e-8, -6e-8, 1e-40, -0.0, np.inf, -np.inf], np.float64).astype(DTYPES[dtype])
        for name in ("model.norm.weight", "model.layers.1.mlp.up_proj.weight"):
            poke(read_directory(source)[name], odd)
    (source / "chat_template.jinja").write_text("{{ messages }}")
    assert (source / INDEX).is_file()
    params = load(source)
    hf.copy_side_files(source, tmp_path / "kept")
    for shard_bytes in (3_000, 10**9):
        out = tmp_path / f"out{shard_bytes}"
        hf.save_params(params, out, source=tmp_path / "kept", shard_bytes=shard_bytes)
        assert contents(out) == contents(source)
        shards = list(out.glob("*.safetensors"))
        for header in map(read_header, shards):
            sizes = [entry.read().nbytes for entry in header.values()]
            assert len(sizes) == 1 or sum(sizes) <= shard_bytes
        assert (len(shards) == 1) == (shard_bytes == 10**9)
        assert {p.name for p in out.iterdir()} - {p.name for p in shards} - {INDEX} == {
            "config.json",
            "chat_template.jinja",
        }
    assert not list(tmp_path.glob("*.tmp*"))


def test_what_was_trained_comes_out_and_bfloat16_bases_stay_exact(qwen2, tmp_path):
    params = hf.load_params(qwen2, params_like(qwen2, dtype="bfloat16"))
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("bfloat16")}
    before = contents(qwen2)
    kernel = params["decoder"]["runs"]["0"]["attn"]["k_proj"]["kernel"]
    params["decoder"]["runs"]["0"]["attn"]["k_proj"]["kernel"] = kernel.at[1].add(1.0)
    hf.save_params(params, tmp_path / "out", source=qwen2, shard_bytes=10**9)
    after = contents(tmp_path / "out")
    assert {name for name in before if before[name] != after[name]} == {"model.layers.1.self_attn.k_proj.weight"}
    entry = read_directory(tmp_path / "out")["model.layers.1.self_attn.k_proj.weight"]
    np.testing.assert_array_equal(entry.read(), (kernel[1] + 1).T)


def test_tied_embeddings_that_are_there_twice_are_given_back(tmp_path):
    source = write_random(LLAMA, tmp_path / "source", dtype="F32", copy_head=True)
    assert json.loads((source / "config.json").read_text())["tie_word_embeddings"]
    hf.save_params(load(source), tmp_path / "out", source=source, shard_bytes=10**9)
    assert contents(tmp_path / "out") == contents(source)


@pytest.mark.parametrize("axes", [dict(data=1, fsdp=4, tensor=2), dict(data=2, fsdp=2, tensor=2)])
def test_sharded_parameters_are_those_of_one_device(axes, qwen2, tmp_path):
    mesh = sharding.make_mesh(**axes)
    like = params_like(qwen2, mesh)
    params = hf.load_params(qwen2, like)
    split = 0
    for leaf, whole, target in zip(*map(jax.tree.leaves, (params, load(qwen2), like)), strict=True):
        assert leaf.sharding == target.sharding and leaf.dtype == jnp.float32
        split += not leaf.sharding.is_fully_replicated
        np.testing.assert_array_equal(leaf, whole)
    assert split > 5
    hf.save_params(params, tmp_path / "out", source=qwen2, shard_bytes=10**9)
    assert contents(tmp_path / "out") == contents(qwen2)


def test_the_safetensors_library_reads_what_is_written_and_writes_what_is_read(tmp_path):
    numpy_io = pytest.importorskip("safetensors.numpy")
    rng = np.random.default_rng(0)
    arrays = {
        "a": rng.normal(size=(3, 5)).astype(DTYPES["BF16"]),
        "b": rng.normal(size=(7,)).astype(np.float32),
        "c": np.zeros((0, 4), np.float16),
        "d": np.full((), 3.0, np.float32),
    }
    kinds = {str(dtype): name for name, dtype in DTYPES.items()}
    planned = [Planned(name, kinds[str(x.dtype)], x.shape) for name, x in arrays.items()]
    write_directory(tmp_path, planned, lambda tensor: arrays[tensor.name], shard_bytes=10**6)
    numpy_io.save_file(arrays, tmp_path / "library.safetensors")
    theirs = numpy_io.load_file(tmp_path / SINGLE)
    ours = {name: entry.read() for name, entry in read_header(tmp_path / "library.safetensors").items()}
    for found in (theirs, ours):
        assert found.keys() == arrays.keys()
        for name, array in arrays.items():
            assert found[name].dtype == array.dtype
            np.testing.assert_array_equal(found[name], array)


def test_an_exported_directory_loads_in_transformers_and_says_the_same(tmp_path):
    pytest.importorskip("transformers")
    import torch
    import transformers

    from tests.models.hf import oracle

    source, model = oracle.saved("qwen2 tied", tmp_path)
    hf.save_params(oracle.load(source)[1], tmp_path / "out", source=source, shard_bytes=20_000)
    again, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    tokens = oracle.sequences(61)
    with torch.no_grad():
        for one, two in zip(oracle.their_logits(model, tokens), oracle.their_logits(again.eval(), tokens), strict=True):
            assert torch.equal(one, two)


# --- what does not fit ---


def rewrite(directory, change):
    """Changes the tensors of a directory: `change` gets {name: array} and returns another such dict."""
    arrays = {name: np.array(entry.read()) for name, entry in read_directory(directory).items()}
    for path in (*directory.glob("*.safetensors"), directory / INDEX):
        path.unlink(missing_ok=True)
    arrays = change(arrays)
    planned = [Planned(name, "BF16", x.shape) for name, x in arrays.items()]
    write_directory(directory, planned, lambda tensor: arrays[tensor.name], shard_bytes=10**9)


def without(name):
    return lambda arrays: {key: x for key, x in arrays.items() if key != name}


def renamed(name, other):
    return lambda arrays: {other if key == name else key: x for key, x in arrays.items()}


NORM = "model.layers.1.input_layernorm.weight"


@pytest.mark.parametrize(
    "change, message",
    [
        (without(NORM), f"lacks the tensor {NORM!r} .1 of 27 are missing.*model.layers.0.input_layernorm.weight"),
        (
            renamed(NORM, "model.layers.1.input_norm.weight"),
            f"'model.layers.1.input_norm.weight' belongs to nothing.*nearest that is expected is {NORM!r}",
        ),
        (lambda a: a | {"model.layers.2.mlp.up_proj.weight": a["lm_head.weight"]}, "model.layers.2.mlp.up_proj.weight"),
        (
            lambda a: a | {"lm_head.weight": a["lm_head.weight"][:-1]},
            r"'lm_head.weight' has shape \(60, 42\).*\(61, 42\)",
        ),
        (lambda a: a | {NORM: a[NORM][None]}, r"shape \(1, 42\).*\(42,\)"),
    ],
)
def test_tensors_that_do_not_fit_are_named_with_the_nearest(change, message, qwen2):
    rewrite(qwen2, change)
    with pytest.raises(ValueError, match=message):
        load(qwen2)


def test_unused_tensors_are_read_when_named_and_rotary_tables_are_never(qwen2):
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.zeros(3, DTYPES["BF16"])}
    rewrite(qwen2, lambda arrays: arrays | extra | {"value_head.weight": extra.popitem()[1]})
    with pytest.raises(ValueError, match="value_head.weight"):
        load(qwen2)
    load(qwen2, unused=("value_head.*",))


def test_tied_embeddings_that_differ_are_refused(tmp_path):
    source = write_random(LLAMA, tmp_path / "source", dtype="BF16", copy_head=True)
    rewrite(source, lambda arrays: arrays | {"lm_head.weight": arrays["lm_head.weight"] * DTYPES["BF16"].type(2)})
    with pytest.raises(ValueError, match="ties 'lm_head.weight' to 'model.embed_tokens.weight', but they differ"):
        load(source)
    load(source, unused=("lm_head.weight",))


def first_shard(directory):
    return sorted(directory.glob("*.safetensors"))[0]


def cut(path, size):
    path.write_bytes(path.read_bytes()[:size])


def drop_from_index(directory):
    index = json.loads((directory / INDEX).read_text())
    gone = first_shard(directory).name
    index["weight_map"] = {key: file for key, file in index["weight_map"].items() if file != gone}
    (directory / INDEX).write_text(json.dumps(index))


def rename_in_index(directory):
    text = (directory / INDEX).read_text()
    (directory / INDEX).write_text(text.replace("model.norm.weight", "model.nrom.weight"))


def as_pickle(directory):
    for path in (*directory.glob("*.safetensors"), directory / INDEX):
        path.unlink()
    (directory / "pytorch_model.bin").write_bytes(b"\x80\x04cos\nsystem\n.")


def as_quantized(directory):
    path = first_shard(directory)
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = data[8 : 8 + length].replace(b'"BF16"', b'"I16" ')
    path.write_bytes(data[:8] + header + data[8 + length :])


@pytest.mark.parametrize(
    "entry",
    [
        {"shape": [2], "data_offsets": [0, "x"]},
        {"shape": [2], "data_offsets": [-8, 0]},
        {"shape": [0], "data_offsets": [0, 8]},
        {"shape": [3], "data_offsets": [0, 8]},
        {"shape": None, "data_offsets": [0, 8]},
        {"shape": [2]},
        7,
    ],
)
def test_headers_that_make_no_sense(entry, tmp_path):
    entry = entry | {"dtype": "F32"} if isinstance(entry, dict) else entry
    header = json.dumps({"a": entry}).encode()
    (tmp_path / SINGLE).write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    with pytest.raises(ValueError, match="no sound safetensors file"):
        read_header(tmp_path / SINGLE)


@pytest.mark.parametrize(
    "damage, error, message",
    [
        (lambda d: cut(first_shard(d), 5), ValueError, "end within the header"),
        (lambda d: cut(first_shard(d), 100), ValueError, "end within the header"),
        (lambda d: cut(first_shard(d), -3), ValueError, "speaks of .* bytes, but it has"),
        (
            lambda d: first_shard(d).write_bytes(b"\x10" + bytes(7) + b"{broken header}!"),
            ValueError,
            "header cannot be",
        ),
        (lambda d: first_shard(d).write_text("version https://git-lfs.github.com/spec/v1\n"), ValueError, "Git LFS"),
        (lambda d: first_shard(d).unlink(), FileNotFoundError, "model-00001-of-.*not there"),
        (drop_from_index, ValueError, "does not name the shard model-00001"),
        (rename_in_index, ValueError, "holds 'model.norm.weight', but the index does not name it"),
        (lambda d: (d / INDEX).write_text("{"), ValueError, f"{INDEX} cannot be read"),
        (lambda d: (d / INDEX).write_text('{"weight_map": {"a": "../b"}}'), ValueError, "must lie beside"),
        (lambda d: (d / INDEX).unlink(), FileNotFoundError, f"no {INDEX}"),
        (as_pickle, ValueError, "pytorch_model.bin, a pickle, which is never loaded"),
        (as_quantized, ValueError, "dtype I16.*quantized release"),
        (lambda d: (d / "config.json").unlink(), FileNotFoundError, "config.json"),
        (lambda d: (d / "config.json").write_text("{"), ValueError, "is not JSON"),
    ],
)
def test_damaged_directories_are_refused_with_one_clear_error(damage, error, message, qwen2):
    like = params_like(qwen2)
    damage(qwen2)
    with pytest.raises(error, match=message):
        hf.load_params(qwen2, like)


def test_export_replaces_nothing_unasked_and_leaves_nothing_half_written(qwen2, tmp_path):
    params = load(qwen2)
    out = tmp_path / "out"
    out.mkdir()
    hf.save_params(params, out, source=qwen2, shard_bytes=10**9)  # an empty directory is free
    with pytest.raises(FileExistsError, match="not empty"):
        hf.save_params(params, out, source=qwen2, shard_bytes=10**9)
    hf.save_params(params, out, source=qwen2, shard_bytes=9_000, overwrite=True)
    assert contents(out) == contents(qwen2) and not (out / SINGLE).exists()
    home = tmp_path / "home"
    home.mkdir()
    (home / "thesis.tex").write_text("")
    with pytest.raises(FileExistsError, match="holds no model"):
        hf.save_params(params, home, source=qwen2, shard_bytes=10**9, overwrite=True)
    broken = params | {"decoder": {**params["decoder"], "ends": {}}}
    with pytest.raises(ValueError, match="'decoder/ends/embed/embedding' is nothing here"):
        hf.save_params(broken, tmp_path / "broken", source=qwen2, shard_bytes=10**9)
    assert {path.name for path in tmp_path.iterdir()} == {"qwen2", "out", "home"}


def test_an_export_that_is_stopped_while_it_replaces_leaves_what_was_there(qwen2, tmp_path, monkeypatch):
    params, out = load(qwen2), tmp_path / "out"
    hf.save_params(params, out, source=qwen2, shard_bytes=10**9)
    rename = pathlib.Path.rename

    def stop(self, target):
        if ".tmp-" in self.name:
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(pathlib.Path, "rename", stop)
    with pytest.raises(KeyboardInterrupt):
        hf.save_params(params, out, source=qwen2, shard_bytes=9_000, overwrite=True)
    assert contents(out) == contents(qwen2) and (out / SINGLE).exists()
    assert {path.name for path in tmp_path.iterdir()} == {"qwen2", "out"}


def test_a_model_that_no_family_has_is_not_exported(qwen2, tmp_path):
    params = load(qwen2)
    params["decoder"]["ends"]["scalar_head"] = {"kernel": jnp.zeros((42, 1))}
    with pytest.raises(ValueError, match="scalar_head/kernel' is .42, 1. here and nothing there"):
        hf.save_params(params, tmp_path / "out", source=qwen2, shard_bytes=10**9)


# --- memory ---


def test_the_host_never_holds_the_model(tmp_path):
    """Anonymous memory at its peak, device arrays excluded, during import and export of 290 MB."""
    shape = dict(hidden_size=1024, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=8, vocab_size=4096)
    values = config_json("LlamaForCausalLM", **shape)
    source = write_random(values, tmp_path / "source", dtype="BF16", shard_bytes=10**8)
    command = [sys.executable, ROOT / "tests" / "models" / "hf" / "memory.py", source, tmp_path / "out"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": ""}
    run = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert run.returncode == 0, run.stderr[-2000:]
    result = json.loads(run.stdout)
    compilation = 180e6  # of some twenty small programs, whatever the size of the model
    assert result["bytes"] > 280e6
    assert result["import"] < 2 * result["largest"] + compilation
    assert result["export"] < 2 * result["largest"] + compilation
