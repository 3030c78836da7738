"""Model merging (k1.5 §2.4): the weights of a long-CoT model and of a short one, averaged.

    θ = Σ_m w_m θ_m    with Σ_m w_m = 1, in float64, rounded once to the dtype of the first model

Models in the Hugging Face layout are read through memory maps and written tensor by tensor: in memory is one tensor of
the result, and a block of each model. Checkpoints of runs are read array by array too, but the result is held as a
whole, since Orbax writes whole trees; a model that is too large for that is exported first.
"""

import contextlib
import dataclasses
import itertools
import math
import pathlib
import re
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from kimi_jax.data.hf_tokenizer import HFTokenizer
from kimi_jax.models import hf, paths
from kimi_jax.models.hf.placement import match, place
from kimi_jax.models.hf.shards import Entry, Planned, read_directory, write_directory
from kimi_jax.models.hf.writing import copy_files, replaced
from kimi_jax.models.policy import Policy
from kimi_jax.training.checkpoint import Checkpointer

_BLOCK = 1 << 20  # values of each model that are averaged at once
_SHOWN = 3  # differences in a message


def average(tensors: Sequence[np.ndarray], weights: Sequence[float]) -> np.ndarray:
    """Σ_m w_m x_m in float64, block by block, rounded to the dtype of the first; all have one shape."""
    out = np.empty(tensors[0].shape, tensors[0].dtype)
    flat = [tensor.reshape(-1) for tensor in (out, *tensors)]
    for begin in range(0, out.size, _BLOCK):
        block, *values = (x[begin : begin + _BLOCK] for x in flat)
        total = np.zeros(block.shape, np.float64)
        for weight, x in zip(weights, values, strict=True):
            total += weight * x.astype(np.float64)
        block[:] = total.astype(out.dtype)
    return out


def check_weights(weights: Sequence[float], models: int) -> None:
    """Raises ValueError unless there is a finite weight for each of at least two models, and their sum is 1."""
    if models < 2:
        raise ValueError(f"A merge is of two models at least; {models} given.")
    if len(weights) != models:
        raise ValueError(f"There are {models} models and {len(weights)} weights ({_listed(weights)}): give one each.")
    if not all(map(math.isfinite, weights)) or abs(sum(weights) - 1) > 1e-6:
        raise ValueError(
            f"The weights {_listed(weights)} must be finite and sum to 1, but sum to {sum(weights):.6g}: a model whose "
            "weights are all scaled is another model. For equal shares leave them out."
        )


def _listed(weights: Sequence[float]) -> str:
    return ",".join(f"{weight:g}" for weight in weights)


# --- models in the Hugging Face layout --------------------------------------------------------------------------------


def merge_models(
    sources: Sequence[pathlib.Path], out: pathlib.Path, *, weights: Sequence[float], shard_bytes: int
) -> dict[str, int]:
    """Writes the average of model directories at `out`, with the configuration and tokenizer files of the first.

    Nothing appears at `out` before it is complete. Names and dtypes of the tensors are those of the first. Returns
    {"tensors", "bytes"}.

    Raises ValueError, before anything is written, for architectures, shapes, tensors or tokenizers that differ;
    FileExistsError when there is something at `out`; and what `hf.read_config` and `shards.read_directory` raise.
    """
    check_weights(weights, len(sources))
    first, *others = [_Model.read(source) for source in sources]
    for other in others:
        first.check_same(other)
    names = {entry.name: name for name, entry in first.entries.items()}
    planned = [Planned(entry.name, entry.dtype, entry.shape) for entry in first.entries.values()]

    def read(tensor: Planned) -> np.ndarray:
        return average([model.entry(names[tensor.name]).read() for model in (first, *others)], weights)

    with replaced(out, overwrite=False) as directory:
        copy_files(first.directory, directory)
        write_directory(directory, planned, read, shard_bytes=shard_bytes)
    return {"tensors": len(planned), "bytes": sum(tensor.nbytes for tensor in planned)}


@dataclasses.dataclass(frozen=True)
class _Model:
    """A directory, judged by what stands beside its weights and in the headers of their files."""

    directory: pathlib.Path
    family: hf.Family
    shape: dict[str, Any]  # the fields of its ModelConfig, but the dtype that it computes in
    entries: dict[str, Entry]  # by the names that its family has for them, in the order of the files

    @classmethod
    def read(cls, directory: pathlib.Path) -> "_Model":
        family, config = hf.read_config(directory, unused=("*",))  # nothing is computed with it
        places = place(family.tensors(config), jax.eval_shape(Policy(config).init, jax.random.key(0)))
        found, copy = match(family, places, read_directory(directory), unused=())
        found |= {family.tied[0]: copy} if copy else {}
        for entry in found.values():
            entry.read()  # maps it, and refuses dtypes
        in_order = sorted(found.items(), key=lambda item: (item[1].path, item[1].offset))
        shape = {name: value for name, value in dataclasses.asdict(config).items() if name != "dtype"}
        return cls(directory, family, shape, dict(in_order))

    def entry(self, name: str) -> Entry:
        """A tensor; what one directory repeats of tied embeddings is the original in another one."""
        return self.entries.get(name) or self.entries[self.family.tied[1]]

    def check_same(self, other: "_Model") -> None:
        """Raises ValueError that says in what the other is of another kind."""
        if self.family is not other.family:
            raise ValueError(
                f"{self.directory} is a {self.family.architecture} and {other.directory} a "
                f"{other.family.architecture}. Only models of one architecture can be averaged, and only two that were "
                "trained from the same weights should be."
            )
        _check_same(self.directory, other.directory, self.shape, other.shape)
        check_vocabularies(self.directory, other.directory)


def _check_same(here: pathlib.Path, there: pathlib.Path, mine: dict[str, Any], theirs: dict[str, Any]) -> None:
    differing = [name for name in sorted({*mine, *theirs}) if mine.get(name) != theirs.get(name)]
    if differing:
        shown = [f"{name} is {mine.get(name)} and {theirs.get(name)}" for name in differing[:_SHOWN]]
        raise ValueError(
            f"{here} and {there} are models of different shape ({len(differing)} differences): {'; '.join(shown)}. "
            "Only models of one shape can be averaged."
        )


def check_vocabularies(here: pathlib.Path, there: pathlib.Path) -> None:
    """Raises ValueError when the rows of the two embeddings mean different tokens."""
    mine, theirs = _vocabulary(here), _vocabulary(there)
    if (mine is None) != (theirs is None):
        with_one, without = (there, here) if mine is None else (here, there)
        raise ValueError(
            f"{without} has no tokenizer, so it is unknown whether it has that of {with_one}. If it has, copy its "
            "files there."
        )
    if mine is None or theirs is None or mine == theirs:
        return
    token = next(i for i, (a, b) in enumerate(itertools.zip_longest(mine, theirs)) if a != b)
    a, b = (repr(texts[token]) if token < len(texts) else "nothing" for texts in (mine, theirs))
    raise ValueError(
        f"{here} and {there} have different tokenizers: token {token} is {a} in one and {b} in the other. Rows of "
        "their embeddings that mean different tokens cannot be averaged."
    )


def _vocabulary(directory: pathlib.Path) -> list[str | None] | None:
    try:
        tokenizer = HFTokenizer.load(directory)
    except FileNotFoundError:
        return None
    return [tokenizer.text_of(token) for token in range(tokenizer.vocab_size)]


# --- checkpoints of runs ----------------------------------------------------------------------------------------------


def merge_checkpoints(
    sources: Sequence[tuple[pathlib.Path, int]], out: pathlib.Path, *, weights: Sequence[float], meta: dict
) -> dict[str, int]:
    """Writes the average of the parameters of checkpoints, each (directory of a stage, step), as step 0 of stage `out`.

    Arrays have the dtypes of the first. Returns {"tensors", "bytes"}. Raises ValueError for arrays of other names or
    shapes, and for adapters, whose average is not the adapter of the average.
    """
    check_weights(weights, len(sources))
    with contextlib.ExitStack() as stack:
        readers = [stack.enter_context(Checkpointer.reader(stage)) for stage, _ in sources]
        described = [_parameters(reader.arrays(step)) for reader, (_, step) in zip(readers, sources, strict=True)]
        shapes = [{name: spec.shape for name, (_, spec) in arrays.items()} for arrays in described]
        for (stage, _), arrays, shape in zip(sources, described, shapes, strict=True):
            _check_same(sources[0][0], stage, shapes[0], shape)
            if any(name.startswith("lora/") for name in arrays):
                raise ValueError(
                    f"{stage} has low-rank adapters, and the average of two products is not the product of two "
                    "averages. Export both runs (scripts/export_weights.py merges the adapters) and merge those."
                )

        def read(name: str) -> np.ndarray:
            values = []
            for reader, arrays, (_, step) in zip(readers, described, sources, strict=True):
                path, spec = arrays[name]
                like = np.broadcast_to(np.zeros((), spec.dtype), spec.shape)  # a target that takes no memory
                values.append(reader.restore({path: like}, step, partial=True)[1][path])
            return average(values, weights)

        merged = {name: read(name) for name in described[0]}
    with Checkpointer(out, keep_last=1, keep_best=0, best_metric=None) as checkpoints:
        checkpoints.save(0, {"params": paths.nest(merged.items())}, meta, wait=True)
    return {"tensors": len(merged), "bytes": sum(array.nbytes for array in merged.values())}


def _parameters(arrays: dict[str, str]) -> dict[str, tuple[str, jax.ShapeDtypeStruct]]:
    """{name: (path, what is there)} of those arrays of a checkpoint that are parameters."""
    found = {}
    for path, described in arrays.items():
        if named := re.fullmatch(r"(?:state/)?params/(.+)", path):
            dtype, _, sizes = described.removesuffix("]").partition("[")
            shape = tuple(int(size) for size in sizes.split(",") if size)
            found[named[1]] = path, jax.ShapeDtypeStruct(shape, np.dtype(dtype))
    return found
