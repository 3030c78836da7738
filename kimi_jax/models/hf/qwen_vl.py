"""What the vision-language families of Qwen share: M-RoPE in config.json, and most of a vision tower."""

import itertools
from typing import Any

import jax.numpy as jnp

from kimi_jax.models.config import ModelConfig, VisionConfig
from kimi_jax.models.hf.family import TRANSPOSE, Options, Tensor, Transform, compute_dtype, decoder_options, read_rope

_SPECIAL_TOKENS = ("image", "video", "vision", "vision_start", "vision_end")
_CHANNELS = 3


def decoder_config(options: Options, text: Options, *, mrope_interleaved: bool, **fields) -> ModelConfig:
    """options: all of config.json; text: the part that speaks of the decoder. fields: those that are the family's."""
    for part, name in itertools.product((options, text), _SPECIAL_TOKENS):  # the tokenizer knows them too
        part.take(f"{name}_token_id", None)
    text.require("rms_norm_eps")  # what it and rope_theta are when left out differs from family to family
    base, scaling, mrope = read_rope(text, default_base=None, extras=("mrope_section", "mrope_interleaved"))
    if "mrope_section" not in mrope:
        raise ValueError(f"{text.where} lacks 'mrope_section' in rope_parameters. Without it the model is not defined.")
    if mrope.get("mrope_interleaved", mrope_interleaved) != mrope_interleaved:
        raise ValueError(f"{text.where}: only mrope_interleaved={mrope_interleaved} is supported in this family.")
    shared = decoder_options(text)
    shared["tie_embeddings"] |= options.take("tie_word_embeddings", False)
    dtypes = [compute_dtype(part) for part in (options, text) if {"dtype", "torch_dtype"} & part.values.keys()]
    return ModelConfig(
        rope_base=base,
        rope_scaling=scaling,
        mrope_sections=tuple(mrope["mrope_section"]),
        mrope_interleaved=mrope_interleaved,
        dtype=dtypes[0] if dtypes else compute_dtype(options),
        **shared,
        **fields,
    )


def tower_config(options: Options, out_width: int) -> dict[str, Any]:
    """The fields of VisionConfig that the families share. options: vision_config."""
    for name in ("in_channels", "in_chans"):
        options.expect(name, _CHANNELS)
    options.expect("out_hidden_size", out_width)
    rope = Options(options.take("rope_parameters", {}), where=f"{options.where} RoPE", unused=options.unused)
    rope.expect("rope_type", "axial", "default")
    fields = {
        "patch_size": options.require("patch_size"),
        "temporal_patch_size": options.require("temporal_patch_size"),
        "merge_size": options.require("spatial_merge_size"),
        "width": options.require("hidden_size"),
        "num_layers": options.require("depth"),
        "num_heads": options.require("num_heads"),
        "mlp_width": options.require("intermediate_size"),
        "rope_base": float(rope.take("rope_theta", 10_000.0)),
        "norm_eps": 1e-6,
        "bias": True,
        "merger_activation": "gelu",
    }
    rope.finish()
    return fields


def tower_tensors(config: VisionConfig, *, prefix: str) -> tuple[Tensor, ...]:
    """The rows of patch embedding and attention."""
    block, ours = prefix + "blocks.{i}.attn.", "vision/layers/{i}/attn/"
    sides = (_CHANNELS, config.temporal_patch_size, config.patch_size, config.patch_size)
    # A patch is a vector here and a block of pixels there.
    patches = Transform(lambda w: w.reshape(w.shape[0], -1).T, lambda w: w.T.reshape(-1, *sides))
    rows = [
        Tensor(f"{prefix}patch_embed.proj.weight", "vision/ends/patch_embed/kernel", patches),
        Tensor(f"{prefix}patch_embed.proj.bias", "vision/ends/patch_embed/bias"),
        Tensor(f"{block}proj.weight", f"{ours}o_proj/kernel", TRANSPOSE),
        Tensor(f"{block}proj.bias", f"{ours}o_proj/bias"),
    ]
    for kind, their_kind, transform in (("kernel", "weight", _QKV_KERNEL), ("bias", "bias", _QKV_BIAS)):
        paths = tuple(f"{ours}{name}_proj/{kind}" for name in "qkv")
        rows.append(Tensor(f"{block}qkv.{their_kind}", paths, transform))
    return tuple(rows)


def _thirds(x):
    return tuple(x.reshape(3, -1, *x.shape[1:]))


_QKV_KERNEL = Transform(
    lambda qkv: tuple(part.T for part in _thirds(qkv)), lambda *qkv: jnp.concatenate([part.T for part in qkv])
)
_QKV_BIAS = Transform(_thirds, lambda *qkv: jnp.concatenate(qkv))
