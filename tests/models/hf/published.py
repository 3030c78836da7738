"""Directories as they are published, made up at any size, tensor by tensor: the writer never holds a model."""

import json
import math
import pathlib

import jax
import numpy as np

from kimi_jax.models import hf
from kimi_jax.models.hf.placement import place
from kimi_jax.models.hf.shards import DTYPES, Planned, write_directory
from kimi_jax.models.policy import Policy

_DRAWN = 1 << 22  # values of a tensor that are drawn; larger ones repeat them: gigabytes are wanted within seconds


def config_json(architecture: str, **changes) -> dict:
    return {
        "architectures": [architecture],
        "hidden_act": "silu",
        "hidden_size": 42,
        "intermediate_size": 37,
        "num_attention_heads": 3,
        "num_hidden_layers": 2,
        "num_key_value_heads": 1,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10_000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "vocab_size": 61,
    } | changes


QWEN2 = config_json("Qwen2ForCausalLM")
QWEN3 = config_json("Qwen3ForCausalLM", head_dim=10, num_attention_heads=6, num_key_value_heads=2)
LLAMA = config_json("LlamaForCausalLM", tie_word_embeddings=True)


def write_random(
    config: dict,
    out: pathlib.Path,
    *,
    dtype: str,
    seed: int = 0,
    shard_bytes: int = 5 * 10**9,
    copy_head: bool = False,
) -> pathlib.Path:
    """A directory of random weights, `dtype` as in safetensors, that makes predictions far from uniform. Returns `out`.

    config: what config.json shall hold. copy_head: repeat tied embeddings as lm_head.weight, as some publish them.
    """
    out.mkdir(parents=True)
    (out / "config.json").write_text(json.dumps(config, indent=2))
    family, shape = hf.read_config(out)
    places = place(family.tensors(shape), jax.eval_shape(Policy(shape).init, jax.random.key(0)))
    planned = [Planned(name, dtype, spot.shape) for name, spot in sorted(places.items())]
    copy, original = family.tied
    if copy_head:
        planned.append(Planned(copy, dtype, places[original].shape))

    def draw(tensor: Planned) -> np.ndarray:
        name = original if copy_head and tensor.name == copy else tensor.name
        rng = np.random.default_rng([seed, *name.encode()])
        values = np.resize(rng.standard_normal(min(math.prod(tensor.shape), _DRAWN), np.float32), tensor.shape)
        values *= 0.3 if len(tensor.shape) == 1 else 0.02 if "embed" in name else tensor.shape[-1] ** -0.5
        values += len(tensor.shape) == 1 and name.endswith("weight")
        return values.astype(DTYPES[tensor.dtype])

    write_directory(out, planned, draw, shard_bytes=shard_bytes)
    return out
