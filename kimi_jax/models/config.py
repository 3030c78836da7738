"""Shapes of models. Every named size says where its numbers come from."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """A vision tower on native-resolution patches: width and depth, and how patches become tokens."""

    patch_size: int  # pixels per side
    merge_size: int  # merge_size² patches become one token of the language model
    width: int
    num_layers: int
    num_heads: int
    mlp_width: int
    rope_base: float = 10_000.0
    norm_eps: float = 1e-6

    @property
    def patch_dim(self) -> int:
        return self.patch_size**2 * 3


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A decoder-only transformer, optionally with a vision tower and a scalar head."""

    vocab_size: int
    width: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_width: int
    rope_base: float
    tie_embeddings: bool
    qkv_bias: bool = False
    qk_norm: bool = False
    norm_eps: float = 1e-6
    scalar_head: bool = False
    vision: VisionConfig | None = None
    dtype: str = "float32"  # of activations; parameters are float32 masters whatever this says

    def __post_init__(self):
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads={self.num_heads} must be a multiple of num_kv_heads={self.num_kv_heads}: "
                "each key/value head serves the same number of query heads."
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} must be even: RoPE rotates pairs of values.")
        if self.vision and self.vision.width % (4 * self.vision.num_heads):
            raise ValueError(
                f"vision width={self.vision.width} over {self.vision.num_heads} heads must give a head width that is a "
                "multiple of 4: 2-D RoPE rotates pairs of values along rows and along columns."
            )


def _qwen25(**shape) -> ModelConfig:
    # Qwen2.5 technical report (arXiv 2412.15115), table 1, and the published config.json of each size.
    return ModelConfig(rope_base=1_000_000.0, qkv_bias=True, dtype="bfloat16", **shape)


NAMED_SIZES: dict[str, ModelConfig] = {
    # Ours: what two CPU cores can train in minutes.
    "tiny": ModelConfig(
        vocab_size=512,
        width=128,
        num_layers=4,
        num_heads=4,
        num_kv_heads=2,
        head_dim=32,
        mlp_width=384,
        rope_base=10_000.0,
        tie_embeddings=True,
        qk_norm=True,
        vision=VisionConfig(patch_size=4, merge_size=2, width=64, num_layers=2, num_heads=4, mlp_width=192),
    ),
    # Ours: what one GPU can train in minutes.
    "small": ModelConfig(
        vocab_size=512,
        width=384,
        num_layers=8,
        num_heads=6,
        num_kv_heads=2,
        head_dim=64,
        mlp_width=1024,
        rope_base=10_000.0,
        tie_embeddings=True,
        qk_norm=True,
        vision=VisionConfig(patch_size=4, merge_size=2, width=192, num_layers=4, num_heads=6, mlp_width=512),
        dtype="bfloat16",
    ),
    "qwen2.5-0.5b": _qwen25(
        vocab_size=151_936,
        width=896,
        num_layers=24,
        num_heads=14,
        num_kv_heads=2,
        head_dim=64,
        mlp_width=4_864,
        tie_embeddings=True,
    ),
    "qwen2.5-1.5b": _qwen25(
        vocab_size=151_936,
        width=1_536,
        num_layers=28,
        num_heads=12,
        num_kv_heads=2,
        head_dim=128,
        mlp_width=8_960,
        tie_embeddings=True,
    ),
    "qwen2.5-7b": _qwen25(
        vocab_size=152_064,
        width=3_584,
        num_layers=28,
        num_heads=28,
        num_kv_heads=4,
        head_dim=128,
        mlp_width=18_944,
        tie_embeddings=False,
    ),
}


def named_size(name: str, **changes) -> ModelConfig:
    """The named shape with some fields changed. Raises ValueError that lists the names."""
    if name not in NAMED_SIZES:
        raise ValueError(f"There is no model size {name!r}. Choose one of {', '.join(NAMED_SIZES)}.")
    return dataclasses.replace(NAMED_SIZES[name], **changes)
