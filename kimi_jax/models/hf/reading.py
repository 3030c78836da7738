"""Weights in: tensor by tensor from disk straight into sharded arrays, so that the host never holds the model."""

import functools
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from kimi_jax.models import paths
from kimi_jax.models.hf.family import Family
from kimi_jax.models.hf.placement import Place, match, place
from kimi_jax.models.hf.shards import Entry

_COMPARED = 1 << 24  # bytes of two copies that are compared at once


def check(family: Family, tensors, entries: dict[str, Entry], params_like: dict, *, unused: Iterable[str]) -> None:
    """See `hf.check_weights`."""
    found, _ = match(family, place(tensors, params_like), entries, unused=unused)
    for entry in found.values():
        entry.read()  # maps it, and refuses dtypes


def load(family: Family, tensors, entries: dict[str, Entry], params_like: dict, *, unused: Iterable[str]) -> dict:
    """See `hf.load_params`."""
    places = place(tensors, params_like)
    found, copy = match(family, places, entries, unused=unused)
    if copy:
        _check_copy(copy, found[family.tied[1]])
    targets = dict(paths.flatten(params_like))
    leaves: dict[str, jax.Array] = {}
    # In the order of the files, which disks like; and a leaf exists from the first of its layers on.
    for name, entry in sorted(found.items(), key=lambda item: (item[1].path, item[1].offset)):
        spot = places[name]
        of = [targets[path] for path in spot.paths]
        if spot.index is not None:
            for path, target in zip(spot.paths, of, strict=True):
                if path not in leaves:
                    leaves[path] = _zeros(target.shape, target.dtype, target.sharding)
        for path, leaf in zip(spot.paths, _place(spot, entry, of, leaves), strict=True):
            leaves[path] = leaf
    return paths.nest((path, leaves[path]) for path in targets)


def _place(spot: Place, entry: Entry, targets: list[Any], leaves: dict[str, jax.Array]) -> tuple[jax.Array, ...]:
    source = _put(entry.read(), targets[0].sharding)
    # Transfers are asynchronous and keep the memory map. Waiting here keeps one tensor at a time on its way.
    source.block_until_ready()
    static = dict(
        to_ours=spot.tensor.transform.to_ours,
        dtypes=tuple(jnp.dtype(t.dtype) for t in targets),
        shardings=tuple(t.sharding for t in targets),
    )
    if spot.index is None:
        return _convert(source, **static)
    return _fill(tuple(leaves[path] for path in spot.paths), source, spot.index, **static)


def _put(array: np.ndarray, sharding: Sharding | None) -> jax.Array:
    """A tensor as it is on disk, onto the devices of `sharding`: each reads an equal share of consecutive rows.

    The devices then exchange among themselves what the layout wants, which is faster than reading columns from disk.
    """
    if not isinstance(sharding, NamedSharding):
        return jax.device_put(array, sharding)
    mesh, count = sharding.mesh, 1
    axes: list[str] = []
    for axis, size in mesh.shape.items():
        if size > 1 and array.ndim and array.shape[0] % (count * size) == 0:
            axes, count = [*axes, axis], count * size
    rows = NamedSharding(mesh, PartitionSpec(tuple(axes)) if axes else PartitionSpec())
    return jax.make_array_from_callback(array.shape, rows, lambda index: array[index])


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _zeros(shape, dtype, sharding):
    return _pin(jnp.zeros(shape, dtype), sharding)


def _to_ours(source, to_ours, dtypes) -> tuple[jax.Array, ...]:
    parts = to_ours(source)
    parts = parts if isinstance(parts, tuple) else (parts,)
    return tuple(part.astype(dtype) for part, dtype in zip(parts, dtypes, strict=True))


_STATIC = ("to_ours", "dtypes", "shardings")


@functools.partial(jax.jit, static_argnames=_STATIC)
def _convert(source, *, to_ours, dtypes, shardings):
    return tuple(map(_pin, _to_ours(source, to_ours, dtypes), shardings))


@functools.partial(jax.jit, donate_argnums=0, static_argnames=_STATIC)
def _fill(leaves, source, index, *, to_ours, dtypes, shardings):
    """Writes one layer into stacked leaves, in place. `index` is traced: one program for all layers."""
    parts = _to_ours(source, to_ours, dtypes)
    update = jax.lax.dynamic_update_index_in_dim
    return tuple(_pin(update(leaf, part, index, 0), s) for leaf, part, s in zip(leaves, parts, shardings, strict=True))


def _pin(array, sharding: Sharding | None):
    return array if sharding is None else jax.lax.with_sharding_constraint(array, sharding)


def _check_copy(copy: Entry, original: Entry) -> None:
    """Tied embeddings that a directory holds twice must be equal, or they are not tied."""
    same = copy.shape == original.shape and copy.dtype == original.dtype
    if same:
        one, two = (entry.read().reshape(-1).view(np.uint8) for entry in (copy, original))
        pieces = range(0, one.size, _COMPARED)
        same = all(np.array_equal(one[at : at + _COMPARED], two[at : at + _COMPARED]) for at in pieces)
    if not same:
        raise ValueError(
            f"{copy.path}: config.json ties {copy.name!r} to {original.name!r}, but they differ. Correct "
            f"tie_word_embeddings, or import without the second: --unused={copy.name}, unused=({copy.name!r},)."
        )
