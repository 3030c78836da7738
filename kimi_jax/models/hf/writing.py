"""Weights out: tensor by tensor from the devices into shards, beside them the files that came with the model."""

import contextlib
import functools
import json
import os
import pathlib
import shutil
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from kimi_jax.models import paths
from kimi_jax.models.hf.family import Family
from kimi_jax.models.hf.placement import Place, canonical, place
from kimi_jax.models.hf.shards import DTYPES, Planned, read_directory, write_directory

TENSORS = "tensors.json"  # in a folder of side files: names and dtypes of the tensors that they came with
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".gguf", ".onnx", ".h5", ".msgpack", ".index.json")


def copy_side_files(source: str | os.PathLike, out: str | os.PathLike) -> None:
    """Keeps what is needed to export a model later: the files beside its weights, and names and dtypes of its tensors.

    source: a directory with weights, or a folder that this function made. Raises what `shards.read_directory` does.
    """
    source, out = pathlib.Path(source), pathlib.Path(out)
    out.mkdir(parents=True, exist_ok=True)
    dtypes = tensor_dtypes(source)
    copy_files(source, out)
    (out / TENSORS).write_text(json.dumps(dtypes, indent=0) + "\n")


def tensor_dtypes(source: pathlib.Path) -> dict[str, str]:
    """Names and dtypes ("BF16") of the tensors of a directory, in their order."""
    if (source / TENSORS).is_file():
        return json.loads((source / TENSORS).read_text())
    entries = sorted(read_directory(source).values(), key=lambda entry: (entry.path, entry.offset))
    return {entry.name: entry.dtype for entry in entries}


def copy_files(source: pathlib.Path, out: pathlib.Path) -> None:
    """Copies the files beside the weights: configuration, tokenizer, chat templates."""
    for path in sorted([*source.iterdir(), *source.glob("additional_chat_templates/*.jinja")]):
        if path.is_file() and not path.name.endswith(_WEIGHTS) and path.name != TENSORS:
            copy = out / path.relative_to(source)
            copy.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, copy)


def save(
    family: Family, tensors, params: dict, out: pathlib.Path, source: pathlib.Path, *, shard_bytes: int, overwrite: bool
) -> None:
    """See `hf.save_params`."""
    leaves, places = dict(paths.flatten(params)), place(tensors, params)
    dtypes = tensor_dtypes(source)
    spots = {name: places.get(canonical(family, name)) for name in dtypes}
    for name in spots:
        if canonical(family, name) == family.tied[0]:
            spots[name] = spots[name] or places[family.tied[1]]  # the directory repeated it, so it gets it back
    if absent := sorted(places.keys() - {canonical(family, name) for name in dtypes}):
        raise ValueError(f"{source} does not say how to write {absent[0]!r}: it is of another model.")
    planned = [Planned(name, dtypes[name], spot.shape) for name, spot in spots.items() if spot]
    read = lambda tensor: _take(spots[tensor.name], leaves, tensor.dtype)  # noqa: E731
    if jax.process_index():
        write_directory(None, planned, read, shard_bytes=shard_bytes)  # takes part in what the devices exchange
        return
    with replaced(out, overwrite=overwrite) as directory:
        copy_files(source, directory)
        write_directory(directory, planned, read, shard_bytes=shard_bytes)


@contextlib.contextmanager
def replaced(out: pathlib.Path, *, overwrite: bool) -> Iterator[pathlib.Path]:
    """A new directory beside `out`, which takes its place once the block is left without an error.

    Raises FileExistsError when there is something at `out`, unless it may be overwritten.
    """
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        if not overwrite:
            raise FileExistsError(f"{out} exists and is not empty. Choose another place, or overwrite it.")
        if not (out / "config.json").is_file():
            raise FileExistsError(f"{out} holds no model (no config.json), so it is not overwritten.")
    out.parent.mkdir(parents=True, exist_ok=True)
    new, old = (out.with_name(f"{out.name}.{kind}-{os.getpid()}") for kind in ("tmp", "old"))
    try:
        new.mkdir()
        yield new
        if out.exists():
            out.rename(old)
        new.rename(out)
    finally:
        if old.exists() and not out.exists():  # stopped between the two
            old.rename(out)
        for path in (new, old):
            shutil.rmtree(path, ignore_errors=True)


def _take(spot: Place, leaves: dict[str, Any], dtype: str) -> np.ndarray:
    """One tensor as it is written, on the host."""
    parts = [leaves[path] for path in spot.paths]
    mesh = next((p.sharding.mesh for p in parts if isinstance(getattr(p, "sharding", None), NamedSharding)), None)
    whole = NamedSharding(mesh, PartitionSpec()) if mesh is not None else None
    options = dict(to_theirs=spot.tensor.transform.to_theirs, dtype=DTYPES[dtype], whole=whole)
    return np.asarray(_to_theirs(parts, spot.index, **options))


@functools.partial(jax.jit, static_argnames=("to_theirs", "dtype", "whole"))
def _to_theirs(parts, index, *, to_theirs, dtype, whole):
    if index is not None:  # traced: one program for all layers
        parts = [jax.lax.dynamic_index_in_dim(part, index, 0, keepdims=False) for part in parts]
    array = to_theirs(*parts).astype(dtype)
    return array if whole is None else jax.lax.with_sharding_constraint(array, whole)
