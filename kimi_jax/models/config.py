"""Shapes of models. Every named size says where its numbers come from."""

import dataclasses

# What a layer that is recomputed in the backward pass may keep, under the names that `jax.checkpoint` knows it by: what
# attention puts out, with its statistics; queries, keys and values; the sum after attention; gate and up. With
# all of it, no matrix product and no attention is computed twice.
KEEPABLE = ("attention", "qkv", "middle", "mlp")

_VISION_KINDS = {"norm": ("rms", "layer"), "mlp": ("swiglu", "gelu_tanh"), "merger_activation": ("gelu_tanh", "gelu")}


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
    temporal_patch_size: int = 1  # frames per patch; a still image is repeated
    norm: str = "rms"  # or "layer"
    mlp: str = "swiglu"  # or "gelu_tanh", whose gate is missing
    bias: bool = False  # of the attention's output and of the MLP; queries, keys and values have one in any case
    patch_bias: bool = True
    merger_activation: str = "gelu_tanh"  # or "gelu", the exact one
    window: int | None = None  # side of the windows that layers attend within, in merged patches; None: the whole image
    full_layers: tuple[int, ...] = ()  # those that attend to the whole image although there are windows
    pos_embed_side: int | None = None  # of the square of learned positions that is stretched over an image
    deepstack_layers: tuple[int, ...] = ()  # whose outputs also go to the decoder, to its first layers, one each

    def __post_init__(self):
        for name, allowed in _VISION_KINDS.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"vision {name}={getattr(self, name)!r} is not one of {', '.join(allowed)}.")
        for name in ("full_layers", "deepstack_layers"):
            layers = getattr(self, name)
            if sorted(set(layers)) != list(layers) or any(not 0 <= layer < self.num_layers for layer in layers):
                raise ValueError(f"vision {name}={layers} must be ascending layers of 0..{self.num_layers - 1}.")

    @property
    def patch_dim(self) -> int:
        return self.temporal_patch_size * self.patch_size**2 * 3


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Rotary frequencies stretched for longer contexts, as in Llama 3.1 (`layers.rope_frequencies`)."""

    factor: float  # low frequencies turn so many times slower
    low_freq_factor: float  # they are those with fewer turns than this within the original length ...
    high_freq_factor: float  # ... and those with more turns than this stay; in between, a smooth passage
    original_max_position: int

    def __post_init__(self):
        if not (0 < self.low_freq_factor < self.high_freq_factor and self.factor > 0 < self.original_max_position):
            raise ValueError(f"{self} must have positive fields with low_freq_factor < high_freq_factor.")


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
    o_bias: bool = False
    qk_norm: bool = False
    rope_scaling: RopeScaling | None = None
    norm_eps: float = 1e-6
    scalar_head: bool = False
    vision: VisionConfig | None = None
    mrope_sections: tuple[int, int, int] | None = None  # pairs of values that turn by time, row, column; None: plain
    mrope_interleaved: bool = False  # pairs take turns (row after time after column), instead of section after section
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
        if self.mrope_sections and sum(self.mrope_sections) != self.head_dim // 2:
            raise ValueError(
                f"mrope_sections={self.mrope_sections} must add up to {self.head_dim // 2}, the pairs of values of a "
                f"head of width {self.head_dim}."
            )
        if self.vision and len(self.vision.deepstack_layers) > self.num_layers:
            raise ValueError(
                f"vision deepstack_layers={self.vision.deepstack_layers} feed as many layers of the decoder, which has "
                f"{self.num_layers}."
            )

    @property
    def mrope_axes(self) -> tuple[int, ...]:
        """Which of (time, row, column) turns each pair of values of a head."""
        sections = self.mrope_sections or (self.head_dim // 2, 0, 0)
        if not self.mrope_interleaved:
            return tuple(axis for axis, pairs in enumerate(sections) for _ in range(pairs))
        turns = ((pair, pair % 3) for pair in range(self.head_dim // 2))
        return tuple(axis if pair < 3 * sections[axis] else 0 for pair, axis in turns)

    @property
    def extras(self) -> tuple[str, ...]:
        """The optional arrays of `arrays.PackedRows` that this model reads."""
        reads = {
            "rope_positions": self.mrope_sections,
            "patch_windows": self.vision and self.vision.window,
            "patch_grids": self.vision and self.vision.pos_embed_side,
        }
        return tuple(name for name, fact in reads.items() if fact)


def _qwen25(**shape) -> ModelConfig:
    # Qwen2.5 technical report (arXiv 2412.15115), table 1, and the published config.json of each size.
    return ModelConfig(rope_base=1_000_000.0, qkv_bias=True, dtype="bfloat16", **shape)


def _qwen25_vl_tower() -> VisionConfig:
    # The published config.json of Qwen2.5-VL, whose sizes share one tower (arXiv 2502.13923, table 1).
    return VisionConfig(
        patch_size=14,
        merge_size=2,
        width=1_280,
        num_layers=32,
        num_heads=16,
        mlp_width=3_420,
        temporal_patch_size=2,
        bias=True,
        patch_bias=False,
        merger_activation="gelu",
        window=4,
        full_layers=(7, 15, 23, 31),
    )


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
    "qwen2.5-vl-3b": _qwen25(
        vocab_size=151_936,
        width=2_048,
        num_layers=36,
        num_heads=16,
        num_kv_heads=2,
        head_dim=128,
        mlp_width=11_008,
        tie_embeddings=True,
        vision=_qwen25_vl_tower(),
        mrope_sections=(16, 24, 24),
    ),
    "qwen2.5-vl-7b": _qwen25(
        vocab_size=152_064,
        width=3_584,
        num_layers=28,
        num_heads=28,
        num_kv_heads=4,
        head_dim=128,
        mlp_width=18_944,
        tie_embeddings=False,
        vision=_qwen25_vl_tower(),
        mrope_sections=(16, 24, 24),
    ),
    # Qwen3-VL technical report (arXiv 2511.21631) and the published config.json.
    "qwen3-vl-2b": ModelConfig(
        vocab_size=151_936,
        width=2_048,
        num_layers=28,
        num_heads=16,
        num_kv_heads=8,
        head_dim=128,
        mlp_width=6_144,
        rope_base=5_000_000.0,
        tie_embeddings=True,
        qk_norm=True,
        mrope_sections=(24, 20, 20),
        mrope_interleaved=True,
        vision=VisionConfig(
            patch_size=16,
            merge_size=2,
            width=1_024,
            num_layers=24,
            num_heads=16,
            mlp_width=4_096,
            temporal_patch_size=2,
            norm="layer",
            mlp="gelu_tanh",
            bias=True,
            merger_activation="gelu",
            pos_embed_side=48,
            deepstack_layers=(5, 11, 17),
        ),
        dtype="bfloat16",
    ),
}


def named_size(name: str, **changes) -> ModelConfig:
    """The named shape with some fields changed. Raises ValueError that lists the names."""
    if name not in NAMED_SIZES:
        raise ValueError(f"There is no model size {name!r}. Choose one of {', '.join(NAMED_SIZES)}.")
    return dataclasses.replace(NAMED_SIZES[name], **changes)
