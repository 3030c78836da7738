"""Which tensor of a directory stands where in our parameters: the table of a family, spelled out for one model."""

import dataclasses
import difflib
import fnmatch
import re
from collections.abc import Iterable
from typing import Any

import jax

from kimi_jax.models import paths
from kimi_jax.models.hf.family import Family, Tensor
from kimi_jax.models.hf.shards import Entry


@dataclasses.dataclass(frozen=True)
class Place:
    """Where one tensor stands: in these leaves of the tree, at this index of their first axis (None: it is all)."""

    tensor: Tensor
    paths: tuple[str, ...]  # "decoder/runs/0/mlp/up_proj/kernel"
    index: int | None
    shape: tuple[int, ...]  # theirs


def place(tensors: tuple[Tensor, ...], tree: dict) -> dict[str, Place]:
    """The tensors of a model by name. `tree`: its parameters in the training layout, or shapes of them.

    Raises ValueError that names a parameter for which the table has no row, or two.
    """
    leaves = dict(paths.flatten(tree))
    slots = _slots(leaves)
    layers = 1 + max((int(n) for path in slots for n in re.findall(r"/(\d+)(?=/)", path)), default=-1)
    places: dict[str, Place] = {}
    filled: dict[str, str] = {}
    for tensor in tensors:
        patterns = (tensor.paths,) if isinstance(tensor.paths, str) else tensor.paths
        for i in range(layers) if "{i}" in tensor.name else (None,):
            spell = lambda pattern, i=i: pattern.replace("{i}", str(i))  # noqa: E731
            ours = [slots[path] for path in map(spell, patterns) if path in slots]
            if len(ours) < len(patterns):
                continue  # the model has no such parameter
            name, shapes = spell(tensor.name), []
            for path, index in ours:
                leaf = leaves[path]
                shapes.append(jax.ShapeDtypeStruct(leaf.shape if index is None else leaf.shape[1:], leaf.dtype))
            theirs = jax.eval_shape(tensor.transform.to_theirs, *shapes)
            places[name] = Place(tensor, tuple(path for path, _ in ours), ours[0][1], theirs.shape)
            for path in map(spell, patterns):
                if path in filled:
                    raise ValueError(f"Both {filled[path]!r} and {name!r} are said to be our parameter {path!r}.")
                filled[path] = name
    if left := sorted(slots.keys() - filled.keys()):
        raise ValueError(
            f"Parameter {left[0]!r} has no counterpart in the layout of this family ({len(left)} of {len(slots)} have "
            "none), so it can be neither imported nor exported."
        )
    return places


def _slots(leaves: dict[str, Any]) -> dict[str, tuple[str, int | None]]:
    """(path, index) of every layer's every parameter, by a name that counts layers through all runs of a tower."""
    slots: dict[str, tuple[str, int | None]] = {}
    before: dict[str, list[int]] = {}  # per tower, the number of layers before each run
    for path, leaf in leaves.items():
        tower, run, rest = re.fullmatch(r"(?:(.*)/runs/(\d+)/)?(.+)", path).groups()
        if tower is None:
            slots[path] = (path, None)
            continue
        starts = before.setdefault(tower, _run_starts(tower, leaves))
        for index in range(leaf.shape[0]):
            slots[f"{tower}/layers/{starts[int(run)] + index}/{rest}"] = (path, index)
    return slots


def _run_starts(tower: str, leaves: dict[str, Any]) -> list[int]:
    counts: dict[int, int] = {}
    for path, leaf in leaves.items():
        if match := re.match(re.escape(tower) + r"/runs/(\d+)/", path):
            counts[int(match[1])] = leaf.shape[0]
    return [sum(counts[j] for j in range(i)) for i in range(len(counts))]


def canonical(family: Family, name: str) -> str:
    """The name that the table uses for a tensor, which an older directory may call otherwise."""
    for pattern, replacement in family.renames:
        name, count = re.subn(pattern, replacement, name, count=1)
        if count:
            break
    return name


def match(
    family: Family, places: dict[str, Place], entries: dict[str, Entry], *, unused: Iterable[str]
) -> tuple[dict[str, Entry], Entry | None]:
    """(entries by the name that the table has for them, the copy of tied embeddings if the directory repeats it).

    Raises ValueError that names a tensor which is missing, unknown or of another shape than the config says.
    """
    found: dict[str, Entry] = {}
    copy, unknown, unused = None, [], tuple(unused)
    for key, entry in entries.items():
        name = canonical(family, key)
        if name in found:
            raise ValueError(f"{entry.path}: {key!r} and {found[name].name!r} are two names of the same tensor.")
        if name in places:
            found[name] = entry
        elif not any(fnmatch.fnmatch(key, glob) for glob in (*family.ignored, *unused)):
            if name == family.tied[0]:
                copy = entry
            else:
                unknown.append(entry)
    missing = [name for name in places if name not in found]
    if unknown:
        near = _near(canonical(family, unknown[0].name), missing or places)
        raise ValueError(
            f"{unknown[0].path}: tensor {unknown[0].name!r} belongs to nothing that config.json speaks of "
            f"({len(unknown)} such; the nearest that is expected is {near!r}). If it is not needed, import it with "
            f"--unused={unknown[0].name}, or name it: unused=({unknown[0].name!r},)."
        )
    if missing:
        there = next(iter(entries.values())).path.parent if entries else "The directory"
        raise ValueError(
            f"{there} lacks the tensor {missing[0]!r} ({len(missing)} of {len(places)} are missing; the nearest "
            f"that is there is {_near(missing[0], [entry.name for entry in entries.values()])!r})."
        )
    for name, entry in found.items():
        if entry.shape != places[name].shape:
            raise ValueError(
                f"{entry.path}: tensor {entry.name!r} has shape {entry.shape}, but config.json makes it "
                f"{places[name].shape}."
            )
    return found, copy


def _near(name: str, names: Iterable[str]) -> str | None:
    return next(iter(difflib.get_close_matches(name, list(names), n=1, cutoff=0.0)), None)
