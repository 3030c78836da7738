"""Merged directories against averages in NumPy, tensor by tensor; what is read, what is held, and what is refused."""

import json
import tracemalloc

import jax
import ml_dtypes
import numpy as np
import pytest

from kimi_jax.long2short import merging
from kimi_jax.long2short.merging import average, merge_checkpoints, merge_models
from kimi_jax.models import hf
from kimi_jax.models.hf.shards import DTYPES, Entry, read_directory
from kimi_jax.models.policy import Policy
from kimi_jax.training.checkpoint import Checkpointer
from tests.models.hf.published import QWEN2, QWEN3, write_random
from tests.trainers import published

HEAD, EMBED = "lm_head.weight", "model.embed_tokens.weight"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Three of one shape: in one file, in shards, and of another dtype."""
    root = tmp_path_factory.mktemp("models")
    return [
        write_random(QWEN2, root / "long", dtype="BF16", seed=1),
        write_random(QWEN2, root / "short", dtype="BF16", seed=2, shard_bytes=9_000),
        write_random(QWEN2, root / "wide", dtype="F32", seed=3),
    ]


def tensors(directory) -> dict[str, np.ndarray]:
    return {name: np.array(entry.read()) for name, entry in read_directory(directory).items()}


def assert_average(out, sources, weights, dtype):
    found, parts = tensors(out), [tensors(source) for source in sources]
    assert found.keys() == parts[0].keys()
    for name, values in found.items():
        exact = np.sum([w * part[name].astype(np.float64) for w, part in zip(weights, parts, strict=True)], axis=0)
        assert values.dtype == DTYPES[dtype]
        np.testing.assert_array_equal(values, exact.astype(DTYPES[dtype]), err_msg=name)
        assert all((values != part[name].astype(values.dtype)).any() for part in parts)


@pytest.mark.parametrize("weights", [(0.5, 0.5), (0.3, 0.7), (1.25, -0.25)])
def test_two_models(models, tmp_path, weights):
    done = merge_models(models[:2], tmp_path / "out", weights=weights, shard_bytes=20_000)
    assert_average(tmp_path / "out", models[:2], weights, "BF16")
    assert done["tensors"] == len(tensors(models[0]))
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == QWEN2
    _, shape = hf.read_config(tmp_path / "out")
    hf.check_weights(tmp_path / "out", jax.eval_shape(Policy(shape).init, jax.random.key(0)))


def test_three_models_in_the_dtype_of_the_first(models, tmp_path):
    weights = (0.5, 0.2, 0.3)
    merge_models(models, tmp_path / "out", weights=weights, shard_bytes=10**9)
    assert_average(tmp_path / "out", models, weights, "BF16")
    merge_models(models[::-1], tmp_path / "wide", weights=weights[::-1], shard_bytes=10**9)
    assert_average(tmp_path / "wide", models[::-1], weights[::-1], "F32")


def test_half_of_each_is_what_numpy_says_in_float32_too(models, tmp_path):
    """For two models in 16 bits, half and half is exact before it is rounded."""
    merge_models(models[:2], tmp_path / "out", weights=(0.5, 0.5), shard_bytes=10**9)
    for name, values in tensors(tmp_path / "out").items():
        halves = [tensors(model)[name].astype(np.float32) for model in models[:2]]
        np.testing.assert_array_equal(values, np.mean(halves, axis=0).astype(ml_dtypes.bfloat16))


def test_blocks_do_not_show(monkeypatch):
    a, b = np.random.default_rng(0).normal(size=(2, 7, 11)).astype(np.float32)
    whole = average([a, b], (0.4, 0.6))
    monkeypatch.setattr(merging, "_BLOCK", 5)
    np.testing.assert_array_equal(average([a, b], (0.4, 0.6)), whole)
    np.testing.assert_array_equal(average([a[0, 0], b[0, 0]], (0.4, 0.6)), whole[0, 0])


def test_each_tensor_is_read_once_and_no_more_than_one_is_held(tmp_path, monkeypatch):
    config = QWEN2 | {"hidden_size": 240, "intermediate_size": 1013, "num_hidden_layers": 5, "vocab_size": 1511}
    sources = [write_random(config, tmp_path / f"{seed}", dtype="F32", seed=seed) for seed in (1, 2)]
    monkeypatch.setattr(merging, "_BLOCK", 4096)
    read, reads = Entry.read, []

    def counted(entry):
        reads.append((entry.path.parent.name, entry.name))
        return read(entry)

    entries = read_directory(sources[0])
    largest = max(read(entry).nbytes for entry in entries.values())
    total = sum(read(entry).nbytes for entry in entries.values())
    plan = merging._Model.read(sources[0])  # whatever is made on first use
    monkeypatch.setattr(Entry, "read", counted)
    tracemalloc.start()
    merge_models(sources, tmp_path / "out", weights=(0.5, 0.5), shard_bytes=10**9)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert largest < peak < 1.5 * largest + 10**6 < total  # memory maps are not memory
    # Once to see that it can be read, once for its values; those of both models together, tensor after tensor.
    values = reads[2 * len(entries) :]
    assert len(reads) == 4 * len(entries)
    assert values == [(s.name, entry.name) for entry in plan.entries.values() for s in sources]


def test_tied_embeddings_that_one_of_them_repeats(tmp_path):
    config = QWEN2 | {"tie_word_embeddings": True}
    plain = write_random(config, tmp_path / "plain", dtype="BF16", seed=1)
    twice = write_random(config, tmp_path / "twice", dtype="BF16", seed=2, copy_head=True)
    expected = average([tensors(plain)[EMBED], tensors(twice)[EMBED]], (0.5, 0.5))
    for name, sources in (("a", (plain, twice)), ("b", (twice, plain))):
        merge_models(sources, tmp_path / name, weights=(0.5, 0.5), shard_bytes=10**9)
        found = tensors(tmp_path / name)
        assert (HEAD in found) == (sources[0] == twice)
        for tensor in {HEAD, EMBED} & found.keys():
            np.testing.assert_array_equal(found[tensor], expected)


def test_others_than_the_first_are_refused_before_anything_is_written(models, tmp_path):
    def refused(other, told, weights=(0.5, 0.5)):
        with pytest.raises(ValueError, match=told):
            merge_models([models[0], other], tmp_path / "out", weights=weights, shard_bytes=10**9)
        assert not list(tmp_path.glob("out*"))

    refused(write_random(QWEN3, tmp_path / "q3", dtype="BF16"), "is a Qwen2ForCausalLM and .* a Qwen3ForCausalLM")
    deeper = write_random(QWEN2 | {"num_hidden_layers": 3}, tmp_path / "deeper", dtype="BF16")
    refused(deeper, "different shape .*num_layers is 2 and 3")
    turned = write_random(QWEN2 | {"rope_theta": 5e5}, tmp_path / "turned", dtype="BF16")
    refused(turned, "rope_base is 10000.0 and 500000.0")
    refused(models[1], "must be finite and sum to 1, but sum to 0.9", (0.5, 0.4))
    refused(models[1], "must be finite", (np.nan, 0.5))
    refused(models[1], "2 models and 3 weights", (0.5, 0.25, 0.25))
    with pytest.raises(ValueError, match="two models at least"):
        merge_models(models[:1], tmp_path / "out", weights=(1.0,), shard_bytes=10**9)
    damaged = write_random(QWEN2, tmp_path / "damaged", dtype="BF16", shard_bytes=9_000)
    next(damaged.glob("model-00002*")).unlink()
    with pytest.raises(FileNotFoundError, match="model-00002"):
        merge_models([models[0], damaged], tmp_path / "out", weights=(0.5, 0.5), shard_bytes=10**9)
    (tmp_path / "busy").mkdir()
    (tmp_path / "busy" / "config.json").touch()
    with pytest.raises(FileExistsError):
        merge_models(models[:2], tmp_path / "busy", weights=(0.5, 0.5), shard_bytes=10**9)
    assert not list(tmp_path.glob("*tmp*"))


def test_an_interrupted_merge_leaves_nothing(models, tmp_path, monkeypatch):
    calls = []

    def broken(tensors, weights):
        calls.append(1)
        if len(calls) == 5:
            raise OSError("the disk is full")
        return average(tensors, weights)

    monkeypatch.setattr(merging, "average", broken)
    with pytest.raises(OSError, match="full"):
        merge_models(models[:2], tmp_path / "out", weights=(0.5, 0.5), shard_bytes=10**9)
    assert not list(tmp_path.iterdir())


def test_tokenizers_are_compared_by_what_the_rows_mean(tmp_path):
    a, b, c = (published.write("qwen2", tmp_path / name) for name in "abc")
    text = (b / "tokenizer.json").read_text()
    (b / "tokenizer.json").write_text(json.dumps(json.loads(text)))  # written otherwise, the same
    (c / "tokenizer.json").write_text(text.replace("<|vision_start|>", "<|sight_start|>"))
    merge_models([a, b], tmp_path / "ab", weights=(0.5, 0.5), shard_bytes=10**9)
    assert (tmp_path / "ab" / "tokenizer.json").read_text() == text
    assert (tmp_path / "ab" / "tokenizer_config.json").is_file()
    with pytest.raises(ValueError, match="different tokenizers: token \\d+ is '<.vision_start.>' in one and '<.sight"):
        merge_models([a, c], tmp_path / "ac", weights=(0.5, 0.5), shard_bytes=10**9)
    (c / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match="has no tokenizer, so it is unknown"):
        merge_models([a, c], tmp_path / "ac", weights=(0.5, 0.5), shard_bytes=10**9)
    assert not (tmp_path / "ac").exists()


# --- checkpoints ------------------------------------------------------------------------------------------------------


def draw(seed, *, width=7, rl=False, extra=()):
    rng = np.random.default_rng(seed)
    params = {
        "decoder": {"runs": {"0": {"kernel": rng.normal(size=(3, 5, width)).astype(np.float32)}}},
        "scale": rng.normal(size=width).astype(ml_dtypes.bfloat16),
        **{name: {"a": np.ones(2, np.float32)} for name in extra},
    }
    state = {"params": params, "opt_state": {"mu": np.ones(11, np.float32)}, "step": np.int32([4])}
    return {"state": state, "prompts": np.arange(3)} if rl else state


def save(directory, step, arrays):
    with Checkpointer(directory, keep_last=2, keep_best=0, best_metric=None) as checkpoints:
        checkpoints.save(step, arrays, {}, wait=True)
    return directory, step


def test_checkpoints(tmp_path):
    a, b = draw(1, rl=True), draw(2)
    sources = [save(tmp_path / "rl", 5, a), save(tmp_path / "sft", 3, b)]
    save(tmp_path / "rl", 7, draw(3, rl=True))  # a newer one, which is not asked for
    merge_checkpoints(sources, tmp_path / "merged", weights=(0.3, 0.7), meta={"of": "two"})
    with Checkpointer.reader(tmp_path / "merged") as checkpoints:
        assert checkpoints.read_meta() == {"of": "two"}
        step, found, _ = checkpoints.restore({"params": jax.tree.map(np.zeros_like, b["params"])})
    assert step == 0
    mean = lambda x, y: (0.3 * x.astype(np.float64) + 0.7 * y.astype(np.float64)).astype(x.dtype)  # noqa: E731
    expected = {"params": jax.tree.map(mean, a["state"]["params"], b["params"])}
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_checkpoints_that_cannot_be_averaged(tmp_path):
    plain = save(tmp_path / "plain", 1, draw(1))
    for name, other, told in (
        ("wide", draw(2, width=11), r"scale is \(7,\) and \(11,\)"),
        ("more", draw(2, extra=["head"]), r"head/a is None and \(2,\)"),
    ):
        with pytest.raises(ValueError, match=told):
            merge_checkpoints([plain, save(tmp_path / name, 1, other)], tmp_path / "out", weights=(0.5, 0.5), meta={})
    adapted = [save(tmp_path / f"lora{i}", 1, draw(i, extra=["lora"])) for i in range(2)]
    with pytest.raises(ValueError, match="low-rank adapters.*export_weights"):
        merge_checkpoints(adapted, tmp_path / "out", weights=(0.5, 0.5), meta={})
    assert not (tmp_path / "out").exists()
