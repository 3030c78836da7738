"""The policy π: a multimodal decoder as pure functions of its parameters.

`Policy` holds only static things (shapes, graph definitions, choice of kernels); it is hashable and closed over by
jitted functions. Parameters are plain nested dicts of arrays, merged with the graph definitions at trace time.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import nnx

from kimi_jax.arrays import PackedRows
from kimi_jax.models import decoder, head, layers, lora, vision
from kimi_jax.models.config import ModelConfig


class DecoderEnds(nnx.Module):
    """What stands before and after the blocks: token embedding; final norm, vocabulary head, optional scalar head."""

    def __init__(self, config: ModelConfig, *, dtype, rngs):
        # Small enough that a fresh model with tied embeddings predicts nearly uniformly.
        init = nnx.initializers.normal(0.02)
        shape = (config.vocab_size, config.width)
        table = lambda: nnx.Embed(*shape, embedding_init=init, param_dtype=jnp.float32, rngs=rngs)  # noqa: E731
        linear = lambda n: nnx.Linear(config.width, n, dtype=jnp.float32, param_dtype=jnp.float32, rngs=rngs)  # noqa: E731
        self.dtype = dtype
        self.embed = table()
        self.norm = layers.rms_norm(config.width, config.norm_eps, dtype, rngs)
        self.head = None if config.tie_embeddings else table()
        self.scalar_head = linear(1) if config.scalar_head else None

    def embeddings(self, tokens):
        """Tokens [...] -> [..., D].

        Rows of the table are cast, not the table: its gradient is then summed in the table's own precision. In bfloat16
        a token that is seen often would stop at 256 times what one occurrence adds, and a GPU would take longer.
        """
        return jnp.take(self.embed.embedding[...], tokens, axis=0).astype(self.dtype)

    def logits(self, x):
        """x [..., D] after the final norm -> float32 [..., V]."""
        return jnp.einsum("...d,vd->...v", x, self.table.astype(x.dtype), preferred_element_type=jnp.float32)

    @property
    def table(self):
        """What hidden states are multiplied with, [V, D]."""
        return (self.head or self.embed).embedding[...]


@dataclasses.dataclass(frozen=True)
class Policy:
    """See the module.

    implementation: a name of `models.attention`. mesh: for kernels that GSPMD cannot partition. remat: recompute each
    layer in the backward pass, but for what is `kept`, names of `models.config.KEEPABLE`. unroll: layers per step of
    the scan over a run.
    """

    config: ModelConfig
    implementation: str = "xla"
    mesh: jax.sharding.Mesh | None = None
    remat: bool = True
    kept: tuple[str, ...] = ()
    unroll: int = 1

    def init(self, key: jax.Array) -> dict:
        """Float32 parameters in the training layout."""
        k_ends, k_runs, k_vision_ends, k_vision_runs = jax.random.split(key, 4)
        ends = DecoderEnds(self.config, dtype=self._dtype, rngs=nnx.Rngs(k_ends))
        params = {"decoder": {"ends": _pure(ends), "runs": decoder.init_runs(self._runs, k_runs)}}
        if self.config.vision:
            tower = vision.VisionEnds(
                self.config.vision, self.config.width, dtype=self._dtype, rngs=nnx.Rngs(k_vision_ends)
            )
            params["vision"] = {"ends": _pure(tower), "runs": decoder.init_runs(self._vision_runs, k_vision_runs)}
        return params

    # --- training layout ---

    def hidden(self, params: dict, rows: PackedRows) -> jax.Array:
        """Final hidden states [R, T, D] of packed rows."""
        params = lora.attached(params)
        x, angles, deepstack = self._embed(params, rows, remat=self.remat)
        x = decoder.apply_packed(
            self._runs,
            params["decoder"],
            x,
            angles,
            rows.segments,
            deepstack,
            dtype=self._dtype,
            causal=True,
            implementation=self.implementation,
            mesh=self.mesh,
            remat=self.remat,
            kept=self.kept,
            unroll=self.unroll,
        )
        return self._ends(params).norm(x)

    def logprobs(
        self, params: dict, rows: PackedRows, *, temperature, logits_chunk: int
    ) -> tuple[jax.Array, jax.Array]:
        """Log-probs of rows.targets and the entropy at each position, both float32 [R, T]; see `head`.

        The distribution is softmax(logits / temperature), the one that is sampled from. Raises ValueError when
        logits_chunk does not divide the row length T.
        """
        table = self._ends(params).table
        x = self.hidden(params, rows)
        return head.target_logprobs(x, table, rows.targets, temperature=temperature, chunk=logits_chunk)

    def scalars(self, params: dict, rows: PackedRows) -> jax.Array:
        """Output of the scalar head at every position, float32 [R, T]. Raises ValueError if the model has none."""
        if not self.config.scalar_head:
            raise ValueError("This model has no scalar head. Build it with ModelConfig(scalar_head=True).")
        return self._ends(params).scalar_head(self.hidden(params, rows).astype(jnp.float32))[..., 0]

    # --- sampling layout ---

    def to_sampling_layout(self, params: dict, dtype: str) -> dict:
        """Merges adapters, casts, unstacks and fuses the decoder.

        The vision tower stays in the training layout: it runs once per prompt.
        """
        params = lora.attached(params)
        stacked = params["decoder"]
        unstacked = decoder.unstack_runs(stacked["runs"], self.config.head_dim)
        params = params | {"decoder": {"ends": stacked["ends"], "layers": unstacked}}
        return jax.tree.map(lambda leaf: leaf.astype(dtype), lora.merged(params))

    def new_pages(self, count: int, page: int):
        """An empty cache of `count` pages of `page` tokens: per layer (keys, values), each [K, count, page, E]."""
        shape = (self.config.num_kv_heads, count, page, self.config.head_dim)
        empty = lambda: jnp.zeros(shape, self._dtype)  # noqa: E731
        return tuple((empty(), empty()) for _ in range(self.config.num_layers))

    def prefill(self, params: dict, pages, rows: PackedRows, table: jax.Array, *, fresh: bool):
        """Reads a piece of a sequence per row into the cache and returns that.

        rows: tokens, positions (-1: padding), segments (1, 0: padding) and what belongs to images; targets and
        loss_mask are not looked at. table int32 [R, M]. fresh: every piece begins its sequence.
        """
        x, angles, deepstack = self._embed(params, rows, remat=False)
        options = dict(fresh=fresh, implementation=self.implementation, mesh=self.mesh)
        return decoder.apply_prefill(
            self._fused_runs, params["decoder"], x, angles, rows, pages, table, deepstack, **options
        )[1]

    def decode(
        self,
        params: dict,
        pages,
        table: jax.Array,
        token: jax.Array,
        positions: jax.Array,
        rope_offsets: jax.Array | None = None,
    ):
        """Reads one token per row, int32 [B], at positions int32 [B], -1 in empty rows.

        rope_offsets: see `arrays.Slots`. Returns next-token logits float32 [B, V] and the cache.
        """
        ends = self._ends(params)
        turns = positions if rope_offsets is None else positions + rope_offsets
        angles = self._angles(turns[:, None])
        options = dict(implementation=self.implementation, mesh=self.mesh)
        x, pages = decoder.apply_decode(
            self._fused_runs, params["decoder"], ends.embeddings(token), angles, pages, table, positions, **options
        )
        return ends.logits(ends.norm(x)), pages

    # --- shared ---

    def _embed(self, params, rows, *, remat):
        """What the decoder reads: embeddings [R, T, D], angles, and what images add to its first layers or None."""
        x, deepstack = self._ends(params).embeddings(rows.tokens), None
        if self.config.vision and rows.patches.shape[1]:
            features, deeper = self._image_features(params, rows, remat=remat)
            is_image = rows.image_index[..., None] >= 0
            # Text points beyond the features, so that it adds nothing to the gradient of any: GPUs would add the zeros
            # of all the text of a row to the gradient of one feature, one after the other.
            at = jnp.where(is_image, rows.image_index[..., None], features.shape[1])
            take = lambda features: jnp.take_along_axis(features, at, axis=1, mode="fill", fill_value=0)  # noqa: E731
            x = jnp.where(is_image, take(features), x)
            if deeper:
                deepstack = jnp.stack([take(features) for features in deeper])
        if self.config.mrope_sections:
            config = self.config
            angles = layers.mrope_angles(rows.rope_positions, config.mrope_axes, config.rope_base, config.rope_scaling)
            return x, angles, deepstack
        return x, self._angles(rows.positions[..., None]), deepstack

    def _angles(self, positions):
        return layers.rope_angles(positions, self.config.head_dim, self.config.rope_base, self.config.rope_scaling)

    def _image_features(self, params, rows, *, remat):
        """See `vision.features`."""
        return vision.features(
            self.config.vision,
            nnx.merge(_vision_ends_graphdef(self.config), params["vision"]["ends"]),
            self._vision_runs,
            params["vision"]["runs"],
            rows,
            dtype=self._dtype,
            implementation=self.implementation,
            mesh=self.mesh,
            remat=remat,
            kept=self.kept,
            unroll=self.unroll,
        )

    def _ends(self, params) -> DecoderEnds:
        return nnx.merge(_decoder_ends_graphdef(self.config), params["decoder"]["ends"])

    @property
    def _dtype(self):
        return jnp.dtype(self.config.dtype)

    @property
    def _runs(self):
        return _decoder_runs(self.config, fused=False)

    @property
    def _fused_runs(self):
        return _decoder_runs(self.config, fused=True)

    @property
    def _vision_runs(self):
        return _vision_runs(self.config)


# Graph definitions depend on the shapes alone: built once per shape, not per call.


@functools.cache
def _decoder_runs(config: ModelConfig, *, fused: bool) -> tuple[decoder.Run, ...]:
    def make(rngs):
        return layers.Block(
            config.width,
            config.mlp_width,
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            qkv_bias=config.qkv_bias,
            o_bias=config.o_bias,
            qk_norm=config.qk_norm,
            norm="rms",
            mlp="swiglu",
            mlp_bias=False,
            fused=fused,
            eps=config.norm_eps,
            out_scale=(2 * config.num_layers) ** -0.5,
            dtype=jnp.dtype(config.dtype),
            rngs=rngs,
        )

    # Layers to which images add something are a run of their own.
    first = len(config.vision.deepstack_layers) if config.vision else 0
    return tuple(decoder.Run.of(make, count) for count in (first, config.num_layers - first) if count)


@functools.cache
def _vision_runs(config: ModelConfig) -> tuple[decoder.Run, ...]:
    return vision.make_runs(config.vision, dtype=jnp.dtype(config.dtype))


@functools.cache
def _decoder_ends_graphdef(config: ModelConfig):
    return nnx.split(nnx.eval_shape(lambda: DecoderEnds(config, dtype=jnp.dtype(config.dtype), rngs=nnx.Rngs(0))))[0]


@functools.cache
def _vision_ends_graphdef(config: ModelConfig):
    make = lambda: vision.VisionEnds(config.vision, config.width, dtype=jnp.dtype(config.dtype), rngs=nnx.Rngs(0))  # noqa: E731
    return nnx.split(nnx.eval_shape(make))[0]


def _pure(module: nnx.Module) -> dict:
    return nnx.to_pure_dict(nnx.state(module, nnx.Param))
