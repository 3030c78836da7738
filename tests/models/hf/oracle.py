"""Models of transformers with random weights: what ours are compared with. Import after `pytest.importorskip`."""

import dataclasses
import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers

from kimi_jax.arrays import PackedRows
from kimi_jax.models import hf
from kimi_jax.models.policy import Policy

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
LENGTHS = (37, 23)  # of the two sequences of `rows`

_LLAMA3 = dict(
    rope_theta=500.0,
    rope_type="llama3",
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=29,  # so short that some frequencies stay, some change, some are in between
)
_ODD = dict(vocab_size=61, num_hidden_layers=3, intermediate_size=37, max_position_embeddings=128)
CASES = {
    "qwen2": ("Qwen2", dict(hidden_size=42, num_attention_heads=3, num_key_value_heads=1, rope_theta=1e6)),
    "qwen2 tied": (
        "Qwen2",
        dict(hidden_size=60, num_attention_heads=6, num_key_value_heads=2, tie_word_embeddings=True, rms_norm_eps=1e-5),
    ),
    "qwen3": (
        "Qwen3",
        dict(hidden_size=29, num_attention_heads=6, num_key_value_heads=3, head_dim=14, tie_word_embeddings=True),
    ),
    "qwen3 biased": (
        "Qwen3",
        dict(hidden_size=31, num_attention_heads=2, num_key_value_heads=2, head_dim=26, attention_bias=True),
    ),
    "llama": ("Llama", dict(hidden_size=50, num_attention_heads=5, num_key_value_heads=5)),
    "llama scaled": (
        "Llama",
        dict(
            hidden_size=52,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=22,
            attention_bias=True,
            tie_word_embeddings=True,
            rope_parameters=_LLAMA3,
        ),
    ),
}


def make(name: str, options: dict, *, seed: int, dtype=torch.float32):
    """A model in which every bias and scale counts, and predictions are far from uniform."""
    options = {**_ODD, **options, "bos_token_id": None, "eos_token_id": None}
    if "rope_theta" in options:
        options["rope_parameters"] = {"rope_theta": options.pop("rope_theta"), "rope_type": "default"}
    config = getattr(transformers, f"{name}Config")(**options)
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=rng)
            if parameter.ndim == 1:
                parameter.copy_(0.3 * noise + (1.0 if path.endswith("weight") else 0.0))
            else:
                parameter.copy_(noise * (1.0 if "embed" in path else 1.3 * parameter.shape[-1] ** -0.5))
    return model.to(dtype)


@functools.cache
def saved(case: str, root: pathlib.Path):
    """(directory, model)."""
    name, options = CASES[case]
    model = make(name, options, seed=len(case))
    directory = root / case.replace(" ", "_")
    model.save_pretrained(directory)
    return directory, model


def load(directory: pathlib.Path, *, dtype: str | None = None, unused=()) -> tuple[Policy, dict]:
    """dtype: of activations; None: what config.json says."""
    _, config = hf.read_config(directory, unused=unused)
    policy = Policy(dataclasses.replace(config, dtype=dtype or config.dtype))
    return policy, hf.load_params(directory, jax.eval_shape(policy.init, jax.random.key(0)), unused=unused)


def sequences(vocab_size: int, seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, vocab_size, n).astype(np.int32) for n in LENGTHS]


def rows(tokens: list[np.ndarray]) -> PackedRows:
    """The sequences side by side in one row with padding at its end; every next token is a target."""
    T = sum(map(len, tokens)) + 3
    arrays = {name: np.zeros((1, T), np.int32) for name in ("tokens", "targets", "positions", "segments")}
    mask = np.zeros((1, T), bool)
    start = 0
    for i, one in enumerate(tokens):
        here = slice(start, start + len(one))
        arrays["tokens"][0, here], arrays["segments"][0, here] = one, i + 1
        arrays["positions"][0, here] = np.arange(len(one))
        arrays["targets"][0, here] = np.append(one[1:], 0)
        mask[0, start : here.stop - 1] = True
        start = here.stop
    nothing = dict(
        image_index=np.full((1, T), -1, np.int32),
        patches=np.zeros((1, 0, 0), np.float32),
        patch_positions=np.zeros((1, 0, 2), np.int32),
        patch_segments=np.zeros((1, 0), np.int32),
    )
    return PackedRows(loss_mask=mask, **arrays, **nothing)


def split(per_row, tokens: list[np.ndarray]) -> list[np.ndarray]:
    """[1, T, ...] -> one array per sequence."""
    ends = np.cumsum([len(one) for one in tokens])
    return np.split(np.asarray(per_row)[0, : ends[-1]], ends[:-1])


def our_logits(policy: Policy, params: dict, packed: PackedRows):
    return policy._ends(params).logits(policy.hidden(params, packed))


def our_loss(policy: Policy, params: dict, packed: PackedRows):
    """(mean loss over all targets, logits)."""
    logits = our_logits(policy, params, packed)
    chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), packed.targets[..., None], axis=-1)[..., 0]
    return -jnp.sum(chosen * packed.loss_mask) / jnp.sum(packed.loss_mask), logits


def their_logits(model, tokens: list[np.ndarray]) -> list[torch.Tensor]:
    return [model(input_ids=torch.from_numpy(one).long()[None]).logits[0] for one in tokens]


def their_loss(model, tokens: list[np.ndarray]) -> torch.Tensor:
    losses = [
        torch.nn.functional.cross_entropy(logits[:-1], torch.from_numpy(one).long()[1:], reduction="sum")
        for logits, one in zip(their_logits(model, tokens), tokens, strict=True)
    ]
    return sum(losses) / sum(len(one) - 1 for one in tokens)
