"""Stacks of blocks: scanned with rematerialisation for training, unrolled over separate arrays for sampling.

A stack is a sequence of *runs* of equal layers. In the training layout the parameters of a run are stacked along a
leading layer axis, so that a run compiles as one layer; in the sampling layout every layer has arrays of its own,
because a decode step that slices a stack re-reads it (twice the time per step, measured on an H100 at the 1.5B shape),
and its matrices are fused (`layers.fuse`).

    training   {"runs": {"0": stacked, "1": stacked, ...}}
    sampling   {"layers": {"0": fused, "1": fused, ...}}
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from kimi_jax.models import layers, lora


@dataclasses.dataclass(frozen=True)
class Run:
    """`count` equal layers with one graph definition."""

    graphdef: Any
    make: Callable[[nnx.Rngs], layers.Block]
    count: int

    @classmethod
    def of(cls, make: Callable[[nnx.Rngs], layers.Block], count: int) -> "Run":
        return cls(graphdef=nnx.split(nnx.eval_shape(lambda: make(nnx.Rngs(0))))[0], make=make, count=count)


def init_runs(runs: tuple[Run, ...], key: jax.Array) -> dict:
    """Parameters in the training layout."""
    one = lambda run, key: nnx.to_pure_dict(nnx.state(run.make(nnx.Rngs(key)), nnx.Param))  # noqa: E731
    keys = jax.random.split(key, len(runs))
    return {
        str(i): jax.vmap(lambda k, run=run: one(run, k))(jax.random.split(key, run.count))
        for i, (run, key) in enumerate(zip(runs, keys, strict=True))
    }


def unstack_runs(stacked: dict, head_dim: int) -> dict:
    """Training layout -> sampling layout."""
    layers_: dict = {}
    for i in range(len(stacked)):
        run = stacked[str(i)]
        for index in range(jax.tree.leaves(run)[0].shape[0]):
            layer = jax.tree.map(lambda leaf, index=index: leaf[index], run)
            layers_[str(len(layers_))] = layers.fuse(lora.merged(layer), head_dim)
    return layers_


def apply_packed(runs, params, x, angles, segments, deepstack=None, **options):
    """All layers over packed rows in the training layout. x [R, T, D] -> float32 [R, T, D].

    deepstack: [n, R, T, D], added to what leaves the n layers of the first run; None: nothing. options: of `apply_run`.
    """
    for i, run in enumerate(runs):
        x = apply_run(run, params["runs"][str(i)], x, angles, segments, None if i else deepstack, **options)
    return x


def apply_run(
    run,
    stacked,
    x,
    angles,
    segments,
    deepstack=None,
    *,
    dtype,
    causal,
    implementation,
    mesh,
    remat: bool,
    kept,
    unroll: int,
) -> jax.Array:
    """The layers of one run over packed rows. x [R, T, D] -> float32 [R, T, D].

    segments: int32 [R, T], or [L, R, T] if each layer has its own. deepstack: [L, R, T, D], added to what leaves each
    layer. remat: compute each layer again in the backward pass, from the stream in `dtype`, which is what it reads, but
    for what is `kept`, names of `models.config.KEEPABLE`.
    """
    per_layer = segments.ndim == 3
    options = dict(causal=causal, implementation=implementation, mesh=mesh, remat_mlp=remat and "mlp" not in kept)

    def added(x, layer_params, own_segments):
        block = nnx.merge(run.graphdef, lora.merged(layer_params))
        return block.packed(x, angles, own_segments if per_layer else segments, **options)

    if remat:
        added = jax.checkpoint(added, policy=jax.checkpoint_policies.save_only_these_names(*kept))

    def layer(x, inputs):
        layer_params, own_segments, own_deepstack = inputs
        x = x + added(x.astype(dtype), layer_params, own_segments)
        return x if own_deepstack is None else x + own_deepstack, None

    inputs = (stacked, segments if per_layer else None, deepstack)
    return jax.lax.scan(layer, x.astype(jnp.float32), inputs, unroll=unroll)[0]


def apply_prefill(runs, params, x, angles, rows, pages, table, deepstack=None, **options):
    """All layers over pieces of sequences in the sampling layout. x [R, T, D] -> float32 [R, T, D], pages.

    See `layers.Block`. deepstack: see `apply_packed`.
    """
    x, added, updated = x.astype(jnp.float32), () if deepstack is None else deepstack, []
    for index, (block, own) in enumerate(zip(_blocks(runs, params), pages, strict=True)):
        x, own = block.prefill(x, angles, rows, own, table, **options)
        if index < len(added):
            x = x + added[index]
        updated.append(own)
    return x, tuple(updated)


def apply_decode(runs, params, x, angles, pages, table, positions, **options):
    """All layers over one new token per row in the sampling layout. x [B, D] -> float32 [B, D], pages."""
    x, added, updated = x.astype(jnp.float32), None, []
    for block, own in zip(_blocks(runs, params), pages, strict=True):
        x, added, own = block.decode(x, added, angles, own, table, positions, **options)
        updated.append(own)
    return x + jnp.sum(added, axis=0), tuple(updated)


def _blocks(runs, params):
    graphdefs = [run.graphdef for run in runs for _ in range(run.count)]
    return (nnx.merge(graphdef, params["layers"][str(index)]) for index, graphdef in enumerate(graphdefs))
