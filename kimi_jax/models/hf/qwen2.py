"""Qwen2 and Qwen2.5 (arXiv 2407.10671, 2412.15115): grouped-query attention with biases on queries, keys and values."""

from kimi_jax.models.config import ModelConfig
from kimi_jax.models.hf.family import Family, Options, compute_dtype, decoder_options, decoder_tensors, read_rope


def config(options: Options) -> ModelConfig:
    base, scaling, _ = read_rope(options)
    return ModelConfig(
        rope_base=base,
        rope_scaling=scaling,
        qkv_bias=True,
        dtype=compute_dtype(options),
        **decoder_options(options),
    )


FAMILY = Family(architecture="Qwen2ForCausalLM", config=config, tensors=lambda config: decoder_tensors())
