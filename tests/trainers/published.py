"""Whole directories of tiny published models, with all that a run reads of them: weights, tokenizer, template, images.

Each family has sizes of its own. Weights are float32, so that float32 on both sides can be compared.
"""

import json
import pathlib

import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from tests.models.hf.published import config_json, write_random

SPECIAL = "<|endoftext|> <|im_start|> <|im_end|> <|vision_start|> <|vision_end|> <|image_pad|>".split()
_WORDS = "system user assistant Reckon. How many pips Answer: <|im_start|>user\n <|im_end|>\n +1 -2 *3 =? 45 67 89"
VOCAB = 307  # rows of the embedding; the tokenizer has a few less

TEMPLATE = """{%- for turn in messages -%}
<|im_start|>{{ turn.role }}
{% if turn.content is string %}{{ turn.content }}{% else %}{% for part in turn.content %}
{%- if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part.text }}{% endif %}
{%- endfor %}{% endif %}<|im_end|>
{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""

PREPROCESSOR = {
    "image_processor_type": "Qwen2VLImageProcessor",
    "patch_size": 3,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "min_pixels": 4 * 36,  # 4 to 11 tokens of 6 x 6 pixels
    "max_pixels": 11 * 36,
}
_TOWER = {"in_channels": 3, "patch_size": 3, "temporal_patch_size": 2, "spatial_merge_size": 2}
_SHARED = {"vocab_size": VOCAB, "torch_dtype": "float32"}
CONFIGS = {
    "qwen2": config_json("Qwen2ForCausalLM", model_type="qwen2", hidden_size=30, num_hidden_layers=1, **_SHARED),
    "qwen3": config_json(
        "Qwen3ForCausalLM",
        model_type="qwen3",
        hidden_size=26,
        head_dim=10,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_hidden_layers=1,
        **_SHARED,
    ),
    "llama": config_json(
        "LlamaForCausalLM",
        model_type="llama",
        hidden_size=24,
        num_attention_heads=2,
        num_hidden_layers=1,
        rope_scaling={
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 29,
        },
        **_SHARED,
    ),
    "qwen2.5-vl": config_json(
        "Qwen2_5_VLForConditionalGeneration",
        model_type="qwen2_5_vl",
        hidden_size=24,
        num_attention_heads=2,
        num_hidden_layers=1,
        rope_scaling={"type": "mrope", "mrope_section": [1, 2, 3]},
        vision_config=_TOWER
        | {
            "model_type": "qwen2_5_vl",
            "depth": 2,
            "hidden_act": "silu",
            "hidden_size": 16,
            "intermediate_size": 18,
            "num_heads": 2,
            "out_hidden_size": 24,
            "window_size": 12,  # 2 x 2 tokens
            "fullatt_block_indexes": [1],
        },
        **_SHARED,
    ),
    "qwen3-vl": {
        "architectures": ["Qwen3VLForConditionalGeneration"],
        "model_type": "qwen3_vl",
        "dtype": "float32",
        "tie_word_embeddings": False,
        "text_config": {
            key: value
            for key, value in config_json(
                "",
                model_type="qwen3_vl_text",
                hidden_size=22,
                head_dim=12,
                num_attention_heads=2,
                rope_scaling={"rope_type": "default", "mrope_section": [2, 2, 2], "mrope_interleaved": True},
                **_SHARED,
            ).items()
            if key != "architectures"
        },
        "vision_config": _TOWER
        | {
            "model_type": "qwen3_vl",
            "depth": 2,
            "hidden_act": "gelu_pytorch_tanh",
            "hidden_size": 16,
            "intermediate_size": 14,
            "num_heads": 2,
            "out_hidden_size": 22,
            "num_position_embeddings": 9,
            "deepstack_visual_indexes": [0],
        },
    },
}
TEXT = ("qwen2", "qwen3", "llama")
IMAGE = ("qwen2.5-vl", "qwen3-vl")


def vocabulary() -> tokenizers.Tokenizer:
    """Bytes, a few words and the special tokens."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=293, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    backend.train_from_iterator([_WORDS] * 2, trainer)
    backend.add_special_tokens([AddedToken(token, normalized=False) for token in SPECIAL])
    return backend


def write(family: str, out: pathlib.Path, *, dtype: str = "F32", **changes) -> pathlib.Path:
    """A directory of random weights. dtype: of the tensors; changes: to config.json. Returns `out`."""
    config, backend = CONFIGS[family] | changes, vocabulary()
    if family in IMAGE:
        for name, token in (("image", "image_pad"), ("vision_start", "vision_start"), ("vision_end", "vision_end")):
            config |= {f"{name}_token_id": backend.token_to_id(f"<|{token}|>")}
    write_random(config, out, dtype=dtype, shard_bytes=20_000)
    backend.save(str(out / "tokenizer.json"))
    files = {
        "tokenizer_config.json": {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "chat_template": TEMPLATE},
        "generation_config.json": {"eos_token_id": [backend.token_to_id("<|im_end|>"), 293], "do_sample": True},
    }
    if family in IMAGE:
        files["preprocessor_config.json"] = PREPROCESSOR
    for name, content in files.items():
        (out / name).write_text(json.dumps(content, indent=1))
    return out
