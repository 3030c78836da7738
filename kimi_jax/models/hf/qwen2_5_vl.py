"""Qwen2.5-VL (arXiv 2502.13923): a Qwen2.5 decoder with M-RoPE; a vision tower most of whose layers see windows."""

import functools

from kimi_jax.models.config import ModelConfig, VisionConfig
from kimi_jax.models.hf.family import TRANSPOSE, Family, Options, Tensor, decoder_tensors
from kimi_jax.models.hf.qwen_vl import decoder_config, tower_config, tower_tensors


def config(options: Options) -> ModelConfig:
    # Published directories keep the options of the decoder at the top level, newer ones in a part of their own.
    text = options.part("text_config") if "text_config" in options.values else options
    vision = options.part("vision_config")
    tower = _tower(vision, text.require("hidden_size"))
    shape = decoder_config(options, text, mrope_interleaved=False, qkv_bias=True, vision=tower)
    if text is not options:
        for name in text.values:  # some directories have them at both places, of which the part counts
            options.take(name, None)
        text.finish()
    vision.finish()
    return shape


def _tower(options: Options, out_width: int) -> VisionConfig:
    options.expect("hidden_act", "silu")
    shared = tower_config(options, out_width)
    options.expect("spatial_patch_size", shared["patch_size"])
    options.take("tokens_per_second", None)  # of videos
    listed = options.require("fullatt_block_indexes")  # of smaller towers, often still those of the published ones
    return VisionConfig(
        patch_bias=False,
        window=options.require("window_size") // (shared["patch_size"] * shared["merge_size"]),
        full_layers=tuple(layer for layer in range(shared["num_layers"]) if layer in listed),
        **shared,
    )


def tensors(config: ModelConfig) -> tuple[Tensor, ...]:
    theirs, ours = "visual.blocks.{i}.", "vision/layers/{i}/"
    linear = {f"visual.merger.mlp.{n}": f"vision/ends/{name}" for n, name in ((0, "proj_in"), (2, "proj_out"))}
    linear |= {f"{theirs}mlp.{name}_proj": f"{ours}mlp/{name}_proj" for name in ("gate", "up", "down")}
    norms = {f"{theirs}norm1": f"{ours}attn_norm", f"{theirs}norm2": f"{ours}mlp_norm"}
    norms |= {"visual.merger.ln_q": "vision/ends/norm"}
    return (
        *decoder_tensors(),
        *tower_tensors(config.vision, prefix="visual."),
        *(Tensor(f"{name}.weight", f"{path}/scale") for name, path in norms.items()),
        *(Tensor(f"{name}.weight", f"{path}/kernel", TRANSPOSE) for name, path in linear.items()),
        *(Tensor(f"{name}.bias", f"{path}/bias") for name, path in linear.items()),
    )


FAMILY = Family(
    architecture="Qwen2_5_VLForConditionalGeneration",
    config=config,
    tensors=functools.cache(tensors),
    renames=((r"^model\.language_model\.", "model."), (r"^model\.visual\.", "visual.")),
)
