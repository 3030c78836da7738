"""Qwen3-VL (arXiv 2511.21631): a Qwen3 decoder with interleaved M-RoPE; a vision tower with learned positions, whose
middle layers feed the first layers of the decoder too (DeepStack)."""

import functools
import math

from kimi_jax.models.config import ModelConfig, VisionConfig
from kimi_jax.models.hf.family import TRANSPOSE, Family, Options, Tensor, decoder_tensors
from kimi_jax.models.hf.qwen_vl import decoder_config, tower_config, tower_tensors


def config(options: Options) -> ModelConfig:
    text, vision = options.part("text_config"), options.part("vision_config")
    bias = text.take("attention_bias", False)
    tower = _tower(vision, text.require("hidden_size"))
    flags = dict(mrope_interleaved=True, qkv_bias=bias, o_bias=bias, qk_norm=True)
    shape = decoder_config(options, text, vision=tower, **flags)
    text.finish()
    vision.finish()
    return shape


def _tower(options: Options, out_width: int) -> VisionConfig:
    options.expect("hidden_act", "gelu_pytorch_tanh")
    positions = options.require("num_position_embeddings")
    if math.isqrt(positions) ** 2 != positions:
        raise ValueError(f"{options.where}: num_position_embeddings={positions} must be the square of a whole number.")
    return VisionConfig(
        norm="layer",
        mlp="gelu_tanh",
        pos_embed_side=math.isqrt(positions),
        deepstack_layers=tuple(options.require("deepstack_visual_indexes")),
        **tower_config(options, out_width),
    )


def tensors(config: ModelConfig) -> tuple[Tensor, ...]:
    prefix, ours = "model.visual.", "vision/layers/{i}/"
    theirs = prefix + "blocks.{i}."
    linear = {f"{theirs}mlp.linear_fc1": f"{ours}mlp/up_proj", f"{theirs}mlp.linear_fc2": f"{ours}mlp/down_proj"}
    norms = {f"{theirs}norm1": f"{ours}attn_norm", f"{theirs}norm2": f"{ours}mlp_norm"}
    for merger, path in (("merger", ""), ("deepstack_merger_list.{i}", "merger_{i}/")):
        linear[f"{prefix}{merger}.linear_fc1"] = f"vision/ends/{path}proj_in"
        linear[f"{prefix}{merger}.linear_fc2"] = f"vision/ends/{path}proj_out"
        norms[f"{prefix}{merger}.norm"] = f"vision/ends/{path}norm"
    return (
        *decoder_tensors(prefix="model.language_model."),
        *tower_tensors(config.vision, prefix=prefix),
        Tensor(f"{prefix}pos_embed.weight", "vision/ends/pos_embed/embedding"),
        *(Tensor(f"{name}.weight", f"{path}/scale") for name, path in norms.items()),
        *(Tensor(f"{name}.weight", f"{path}/kernel", TRANSPOSE) for name, path in linear.items()),
        *(Tensor(f"{name}.bias", f"{path}/bias") for name, path in (linear | norms).items()),
    )


FAMILY = Family(
    architecture="Qwen3VLForConditionalGeneration",
    config=config,
    tensors=functools.cache(tensors),
    tied=("lm_head.weight", "model.language_model.embed_tokens.weight"),
)
