"""Qwen3, dense (arXiv 2505.09388): queries and keys are normalised per head, and the width of a head is free."""

from kimi_jax.models.config import ModelConfig
from kimi_jax.models.hf.family import Family, Options, compute_dtype, decoder_options, decoder_tensors, read_rope


def config(options: Options) -> ModelConfig:
    base, scaling, _ = read_rope(options)
    bias = options.take("attention_bias", False)
    return ModelConfig(
        rope_base=base,
        rope_scaling=scaling,
        qkv_bias=bias,
        o_bias=bias,
        qk_norm=True,
        dtype=compute_dtype(options),
        **decoder_options(options, default_head_dim=128),
    )


FAMILY = Family(architecture="Qwen3ForCausalLM", config=config, tensors=lambda config: decoder_tensors())
