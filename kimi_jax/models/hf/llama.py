"""Llama 2 and 3 (arXiv 2407.21783): no biases unless asked for, and since 3.1 rotary frequencies that are stretched."""

from kimi_jax.models.config import ModelConfig
from kimi_jax.models.hf.family import Family, Options, compute_dtype, decoder_options, decoder_tensors, read_rope


def config(options: Options) -> ModelConfig:
    base, scaling, _ = read_rope(options)
    bias = options.take("attention_bias", False)
    options.expect("mlp_bias", False)
    return ModelConfig(
        rope_base=base,
        rope_scaling=scaling,
        qkv_bias=bias,
        o_bias=bias,
        dtype=compute_dtype(options),
        **decoder_options(options),
    )


FAMILY = Family(architecture="LlamaForCausalLM", config=config, tensors=lambda config: decoder_tensors())
