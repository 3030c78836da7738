"""The vision tower: native-resolution patches in, one embedding per merged patch out (as in MoonViT and Qwen2-VL).

Ends and runs of blocks, like the decoder. What else published towers have is a fact of the config: layers that attend
within windows (Qwen2.5-VL, arXiv 2502.13923 §2.1.1), learned positions stretched over the image, and features of middle
layers that go to the decoder too (Qwen3-VL; DeepStack, arXiv 2406.04334).
"""

import functools
import itertools

import jax
import jax.numpy as jnp
from flax import nnx

from kimi_jax.arrays import PackedRows
from kimi_jax.models import decoder, layers
from kimi_jax.models.config import VisionConfig


class Merger(nnx.Module):
    """merge² patches to one token: norm, linear, GELU, linear. over_merged: the norm is over all of them at once."""

    def __init__(self, config: VisionConfig, out_width: int, *, over_merged: bool, dtype, rngs):
        merged = config.merge_size**2 * config.width
        self.exact = config.merger_activation == "gelu"
        self.norm_width, self.merged = merged if over_merged else config.width, merged
        self.norm = layers.NORMS[config.norm](self.norm_width, config.norm_eps, dtype, rngs)
        self.proj_in = _linear(merged, merged, dtype=dtype, rngs=rngs)
        self.proj_out = _linear(merged, out_width, dtype=dtype, rngs=rngs)

    def merge(self, x):
        """x [R, P, width] -> [R, P / merge², out_width]. merge² neighbours stand together, so merging is a reshape."""
        x = self.norm(x.reshape(x.shape[0], -1, self.norm_width))
        x = self.proj_in(x.reshape(x.shape[0], -1, self.merged))
        return self.proj_out(jax.nn.gelu(x, approximate=not self.exact))


class VisionEnds(Merger):
    """What stands before and after the blocks: patch embedding and learned positions; mergers, the first in its own."""

    def __init__(self, config: VisionConfig, out_width: int, *, dtype, rngs):
        self.patch_embed = _linear(config.patch_dim, config.width, bias=config.patch_bias, dtype=dtype, rngs=rngs)
        super().__init__(config, out_width, over_merged=False, dtype=dtype, rngs=rngs)
        for i in range(len(config.deepstack_layers)):
            setattr(self, f"merger_{i}", Merger(config, out_width, over_merged=True, dtype=dtype, rngs=rngs))
        options = dict(dtype=dtype, param_dtype=jnp.float32, rngs=rngs, embedding_init=nnx.initializers.normal(0.02))
        side = config.pos_embed_side
        self.pos_embed = nnx.Embed(side**2, config.width, **options) if side else None

    def embed(self, rows: PackedRows, dtype):
        """Patches [R, P, C] -> [R, P, width]."""
        x = self.patch_embed(rows.patches.astype(dtype))
        if self.pos_embed is None:
            return x
        table = self.pos_embed.embedding[...]
        return x + stretched(table, rows.patch_positions, rows.patch_grids).astype(dtype)


def stretched(table: jax.Array, positions: jax.Array, grids: jax.Array) -> jax.Array:
    """A square of learned positions, stretched over images of other shapes by bilinear interpolation.

    table [S², width], its rows in reading order; positions int32 [..., 2], the (row, column) of patches; grids int32
    [..., 2], rows and columns of their images, whose corners lie on the corners of the square.
    Returns float32 [..., width].
    """
    side = round(table.shape[0] ** 0.5)
    at = positions.astype(jnp.float32) * (side - 1) / jnp.maximum(grids - 1, 1)
    low = jnp.floor(at)
    # (place, weight) of the neighbours before and after, [..., 2] each.
    near = [(jnp.minimum(low.astype(jnp.int32) + i, side - 1), 1 - jnp.abs(at - low - i)) for i in (0, 1)]
    total = jnp.float32(0)
    for (row, by_row), (column, by_column) in itertools.product(near, repeat=2):
        weight = by_row[..., :1] * by_column[..., 1:]
        total += table[row[..., 0] * side + column[..., 1]].astype(jnp.float32) * weight
    return total


def make_runs(config: VisionConfig, *, dtype) -> tuple[decoder.Run, ...]:
    """Equal blocks, in runs that end where features leave for the decoder."""
    ends = {layer + 1 for layer in config.deepstack_layers} | {config.num_layers}
    make = functools.partial(_block, config, dtype=dtype)
    return tuple(decoder.Run.of(make, stop - start) for start, stop in itertools.pairwise([0, *sorted(ends)]))


def features(
    config: VisionConfig,
    ends: VisionEnds,
    runs: tuple[decoder.Run, ...],
    params: dict,
    rows: PackedRows,
    *,
    dtype,
    **options,
) -> tuple[jax.Array, list[jax.Array]]:
    """Embeddings of merged patches [R, P / merge², out_width], and those for the first layers of the decoder.

    params: of the runs. Images do not see each other. options: see `decoder.apply_run`.
    """
    x = ends.embed(rows, dtype)
    angles = layers.rope_angles(rows.patch_positions, config.width // config.num_heads, config.rope_base)
    segments = rows.patch_segments
    if config.window:  # layers differ in what they see and in nothing else, so they remain one run
        full = jnp.isin(jnp.arange(config.num_layers), jnp.array(config.full_layers, jnp.int32))
        segments = jnp.where(full[:, None, None], segments, rows.patch_windows)
    deepstack: list[jax.Array] = []
    depth = 0
    for i, run in enumerate(runs):
        seen = segments[depth : depth + run.count] if config.window else segments
        x = decoder.apply_run(run, params[str(i)], x, angles, seen, dtype=dtype, causal=False, **options)
        depth += run.count
        if depth - 1 in config.deepstack_layers:
            deepstack.append(getattr(ends, f"merger_{len(deepstack)}").merge(x))
    return ends.merge(x), deepstack


def _block(config: VisionConfig, rngs, *, dtype) -> layers.Block:
    return layers.Block(
        config.width,
        config.mlp_width,
        num_heads=config.num_heads,
        num_kv_heads=config.num_heads,
        head_dim=config.width // config.num_heads,
        qkv_bias=True,
        o_bias=config.bias,
        qk_norm=False,
        norm=config.norm,
        mlp=config.mlp,
        mlp_bias=config.bias,
        eps=config.norm_eps,
        out_scale=(2 * config.num_layers) ** -0.5,
        dtype=dtype,
        rngs=rngs,
    )


def _linear(n_in, n_out, *, bias=True, dtype, rngs) -> nnx.Linear:
    return nnx.Linear(n_in, n_out, use_bias=bias, dtype=dtype, param_dtype=jnp.float32, rngs=rngs)
