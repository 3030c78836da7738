"""What a family of published models is made of: a translation of config.json and a table of tensors.

A new family is one file that ends in a `Family`, and a line in `hf.FAMILIES`. Its two functions are

    config   Options -> ModelConfig. Reads every option that it supports with `Options.take` or `Options.require`;
             options that nobody read are refused by name afterwards, unless they are known to change no number.
    tensors  ModelConfig -> table. A row of the table is a `Tensor`: their name, our path or paths, and the transform
             between the two, in both directions.

Names in both columns count layers with {i}. Our layers are numbered through all runs of a tower, so that a table need
not know how runs are cut: "decoder/layers/{i}/attn/q_proj/kernel" stands for row 5 of run 1 when run 0 has the layers
before. A row whose path the model lacks (a bias, the head of tied embeddings) is skipped.
"""

import dataclasses
import difflib
import fnmatch
from collections.abc import Callable, Iterable
from typing import Any

from kimi_jax.models.config import ModelConfig, RopeScaling


@dataclasses.dataclass(frozen=True)
class Transform:
    """Both directions take and return arrays of one layer, NumPy or jax; they run under jit.

    to_ours: their array -> ours, a tuple when the tensor has several paths. to_theirs: our arrays -> theirs.
    """

    to_ours: Callable[..., Any]
    to_theirs: Callable[..., Any]


AS_IS = Transform(lambda x: x, lambda x: x)
TRANSPOSE = Transform(lambda x: x.T, lambda x: x.T)  # torch keeps [out, in]


@dataclasses.dataclass(frozen=True)
class Tensor:
    name: str  # "model.layers.{i}.mlp.up_proj.weight"
    paths: str | tuple[str, ...]  # "decoder/layers/{i}/mlp/up_proj/kernel"
    transform: Transform = AS_IS


@dataclasses.dataclass(frozen=True)
class Family:
    """architecture: as in config.json. renames: (regular expression, replacement) pairs that make names of older
    directories those of the table. ignored: globs of tensors that are computed from the config and never read.
    tied: (copy, original), names of what a directory with tied embeddings may hold a second time, and of the first.
    """

    architecture: str
    config: Callable[["Options"], ModelConfig]
    tensors: Callable[[ModelConfig], tuple[Tensor, ...]]
    renames: tuple[tuple[str, str], ...] = ()
    ignored: tuple[str, ...] = ("*.rotary_emb.inv_freq",)
    tied: tuple[str, str] = ("lm_head.weight", "model.embed_tokens.weight")


# Options that change no number we compute: bookkeeping, training, generation.
_INERT = """
    architectures model_type transformers_version _name_or_path torch_dtype dtype use_cache auto_map name_or_path
    initializer_range attention_dropout hidden_dropout embd_pdrop attn_implementation _attn_implementation
    bos_token_id eos_token_id pad_token_id sep_token_id decoder_start_token_id unk_token_id
    max_position_embeddings max_window_layers pretraining_tp model_max_length
    output_attentions output_hidden_states return_dict chunk_size_feed_forward is_encoder_decoder is_decoder
    id2label label2id problem_type num_labels task_specific_params base_model_tp_plan tokenizer_class
    unsloth_version unsloth_fixed is_llama_config transformers.js_config _attn_implementation_autoset
    use_bfloat16 max_length min_length top_k top_p temperature repetition_penalty
""".split()


class Options:
    """config.json, or a part of it, with a note of what was read. unused: globs of keys that may stay unread."""

    def __init__(self, values: dict[str, Any], *, where: str, unused: Iterable[str] = ()):
        self.values, self.where, self.unused = values, where, tuple(unused)
        self._read: set[str] = set()

    def take(self, name: str, default: Any) -> Any:
        """The value of an option; the default if it is missing or null."""
        self._read.add(name)
        value = self.values.get(name)
        return default if value is None else value

    def require(self, name: str) -> Any:
        """The value of an option that must be there. Raises ValueError."""
        value = self.take(name, None)
        if value is None:
            near = difflib.get_close_matches(name, self.values, n=1)
            hint = f" (it has {near[0]!r})" if near else ""
            raise ValueError(f"{self.where} lacks {name!r}{hint}. Without it the model is not defined.")
        return value

    def expect(self, name: str, *allowed: Any) -> Any:
        """The value of an option of which only some values are supported; missing or null is the first of them."""
        value = self.take(name, allowed[0])
        if value not in allowed:
            choices = " or ".join(repr(a) for a in allowed)
            raise ValueError(f"{self.where}: {name}={value!r} is not supported, only {choices}.")
        return value

    def part(self, name: str) -> "Options":
        """A nested part, such as "vision_config". Call its `finish` too. Raises ValueError when it is missing."""
        value = self.require(name)
        if not isinstance(value, dict):
            raise ValueError(f"{self.where}: {name} must hold options of its own, but is {value!r}.")
        return Options(value, where=f"{self.where} {name}", unused=self.unused)

    def finish(self) -> None:
        """Raises ValueError that names an option which nobody read and which is not known to change nothing."""
        quantization = self.values.get("quantization_config")
        if quantization:
            method = quantization.get("quant_method", "unnamed") if isinstance(quantization, dict) else quantization
            raise ValueError(
                f"{self.where}: quantization_config with quant_method={method!r} is not supported. Take the release in "
                "bfloat16, or dequantize this one and delete quantization_config."
            )
        for name, value in self.values.items():
            known = name in self._read or name in _INERT or any(fnmatch.fnmatch(name, u) for u in self.unused)
            if not known and value not in (None, False, {}, []):
                raise ValueError(
                    f"{self.where}: option {name}={value!r} is unknown, so it is not known whether it changes what the "
                    f"model computes. If it does not, import it with --unused={name}, or name it: unused=({name!r},)."
                )


def read_rope(
    options: Options, *, default_base: float | None = 10_000.0, extras: tuple[str, ...] = ()
) -> tuple[float, RopeScaling | None, dict[str, Any]]:
    """(base, scaling, extras) from `rope_parameters`, or from `rope_theta` and `rope_scaling` as they were before 2026.

    default_base: where none is given; None: it must be. extras: further keys that the family reads from there; those
    present are returned. Raises ValueError for a kind of scaling that is not supported, and for two that differ.
    """
    old, new = options.take("rope_scaling", {}), options.take("rope_parameters", {})
    if old and new and old != new:
        raise ValueError(f"{options.where}: rope_scaling={old} is not rope_parameters={new}. Keep the one that counts.")
    outer = {"rope_theta": options.take("rope_theta", default_base)}
    rope = Options(outer | old | new, where=f"{options.where} RoPE", unused=options.unused)
    base = float(rope.require("rope_theta"))
    options.expect("partial_rotary_factor", 1.0)
    rope.expect("partial_rotary_factor", 1.0)
    kinds = ("default", "llama3", *(("mrope",) if extras else ()))
    legacy = rope.expect("type", *kinds)
    kind = rope.expect("rope_type", *kinds) if "rope_type" in rope.values else legacy
    scaling = None
    if kind == "llama3":
        scaling = RopeScaling(
            factor=float(rope.require("factor")),
            low_freq_factor=float(rope.require("low_freq_factor")),
            high_freq_factor=float(rope.require("high_freq_factor")),
            original_max_position=int(rope.require("original_max_position_embeddings")),
        )
    found = {name: value for name in extras if (value := rope.take(name, None)) is not None}
    rope.finish()
    return base, scaling, found


def compute_dtype(options: Options) -> str:
    """What the model computes in. float16 becomes bfloat16, which does not overflow in training."""
    name = str(options.take("dtype", options.take("torch_dtype", "float32"))).removeprefix("torch.")
    allowed = {"float32": "float32", "bfloat16": "bfloat16", "float16": "bfloat16"}
    if name not in allowed:
        raise ValueError(f"{options.where}: dtype {name!r} is not supported, only {', '.join(allowed)}.")
    return allowed[name]


def decoder_options(options: Options, *, default_head_dim: int | None = None) -> dict[str, Any]:
    """The fields of ModelConfig that text families share, biases and norms apart. Refuses sliding windows."""
    num_layers, num_heads = options.require("num_hidden_layers"), options.require("num_attention_heads")
    options.expect("hidden_act", "silu")
    width = options.require("hidden_size")
    windows = options.take("use_sliding_window", False) and options.take("sliding_window", None)
    options.take("sliding_window", None)  # without use_sliding_window it means nothing
    kinds = options.take("layer_types", ["full_attention"] * num_layers)
    windowed = windows and options.take("max_window_layers", 0) < num_layers
    if set(kinds) != {"full_attention"} or len(kinds) != num_layers or windowed and "layer_types" not in options.values:
        raise ValueError(
            f"{options.where}: sliding-window attention is not supported (use_sliding_window, sliding_window, "
            f"layer_types={sorted(set(kinds))}). Only full attention in all {num_layers} layers is."
        )
    return {
        "vocab_size": options.require("vocab_size"),
        "width": width,
        "num_layers": num_layers,
        "num_heads": num_heads,
        "num_kv_heads": options.take("num_key_value_heads", num_heads),
        "head_dim": options.take("head_dim", default_head_dim or width // num_heads),
        "mlp_width": options.require("intermediate_size"),
        "norm_eps": float(options.take("rms_norm_eps", 1e-6)),
        "tie_embeddings": options.take("tie_word_embeddings", False),
    }


def decoder_tensors(*, prefix: str = "model.", head: str = "lm_head.weight") -> tuple[Tensor, ...]:
    """The rows of a decoder of `layers.Block`s, under the names that Qwen and Llama models share."""
    theirs, ours = prefix + "layers.{i}.", "decoder/layers/{i}/"
    rows = [
        Tensor(f"{prefix}embed_tokens.weight", "decoder/ends/embed/embedding"),
        Tensor(f"{prefix}norm.weight", "decoder/ends/norm/scale"),
        Tensor(head, "decoder/ends/head/embedding"),
        Tensor(f"{theirs}input_layernorm.weight", f"{ours}attn_norm/scale"),
        Tensor(f"{theirs}post_attention_layernorm.weight", f"{ours}mlp_norm/scale"),
    ]
    for name in ("q_norm", "k_norm"):
        rows.append(Tensor(f"{theirs}self_attn.{name}.weight", f"{ours}attn/{name}/scale"))
    for room, our_room, names in (("self_attn", "attn", "qkvo"), ("mlp", "mlp", ("gate", "up", "down"))):
        for name in names:
            rows.append(Tensor(f"{theirs}{room}.{name}_proj.weight", f"{ours}{our_room}/{name}_proj/kernel", TRANSPOSE))
            rows.append(Tensor(f"{theirs}{room}.{name}_proj.bias", f"{ours}{our_room}/{name}_proj/bias"))
    return tuple(rows)
