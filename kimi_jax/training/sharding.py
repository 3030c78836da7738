"""The mesh, and the two tables that say how parameters lie on it.

Axes: `data` and `fsdp` split rows; `fsdp` also splits the training copy of the parameters; `tensor` splits heads and widths in
both copies. The first pattern that matches the path of a parameter decides; a parameter that none matches is an error.
"""

import re
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

P = PartitionSpec
ROW_AXES = ("data", "fsdp")

_COLUMN = r"(q_proj|k_proj|v_proj|gate_proj|up_proj|proj_in)"
_ROW = r"(o_proj|down_proj|proj_out)"

TRAIN_RULES = (
    (r"(embed|head)/embedding", P("tensor", "fsdp")),
    (rf"{_COLUMN}/kernel", P("fsdp", "tensor")),
    (rf"{_COLUMN}/bias", P("tensor")),
    (rf"{_ROW}/kernel", P("tensor", "fsdp")),
    (rf"{_ROW}/bias", P()),
    (r"patch_embed/kernel", P(None, "fsdp")),
    (r"patch_embed/bias", P()),
    (r"scalar_head/(kernel|bias)", P()),
    (r"norm/scale", P()),
    (r"(^|/)count$", P()),  # of Adam
)

# Decode reads every weight once per step, so nothing is gathered over fsdp: each data-parallel copy holds its tensor slice.
SAMPLE_RULES = tuple((pattern, P(*(a if a == "tensor" else None for a in spec))) for pattern, spec in TRAIN_RULES)


def make_mesh(*, data: int, fsdp: int, tensor: int, devices=None) -> Mesh:
    """A mesh with axes data, fsdp, tensor. One size may be -1: what is left. Raises ValueError when the sizes do not fit."""
    devices = jax.devices() if devices is None else devices
    sizes = [data, fsdp, tensor]
    if sizes.count(-1) == 1 and len(devices) % int(-np.prod(sizes)) == 0:
        sizes[sizes.index(-1)] = len(devices) // int(-np.prod(sizes))
    if min(sizes) < 1 or int(np.prod(sizes)) != len(devices):
        raise ValueError(
            f"mesh data={data}, fsdp={fsdp}, tensor={tensor} does not cover {len(devices)} devices. The sizes must multiply to "
            "that number; one of them may be -1."
        )
    return jax.make_mesh(sizes, ("data", "fsdp", "tensor"), devices=devices, axis_types=(AxisType.Auto,) * 3)


def shardings(mesh: Mesh, tree: Any, rules) -> Any:
    """A NamedSharding per leaf of `tree` (arrays or shapes), by its path.

    Stacked layers (a path through "runs") have one more axis in front, which stays whole. An axis of the mesh that does not
    divide the dimension it should split is left out: that parameter is replicated along it.
    Raises KeyError that names a parameter which no rule matches.
    """

    def one(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        for pattern, spec in rules:
            if re.search(pattern, name):
                names = ((None,) if "runs" in name.split("/") and spec else ()) + tuple(spec)
                split = (a if a and leaf.shape[i] % mesh.shape[a] == 0 else None for i, a in enumerate(names))
                return NamedSharding(mesh, P(*split))
        raise KeyError(f"No sharding rule matches parameter {name!r} of shape {leaf.shape}. Add one to training.sharding.TRAIN_RULES.")

    return jax.tree_util.tree_map_with_path(one, tree)


def rows_sharding(mesh: Mesh) -> NamedSharding:
    """For arrays whose first axis is rows (packed rows, sampled rows)."""
    return NamedSharding(mesh, P(ROW_AXES))


def put_rows(mesh: Mesh, tree: Any) -> Any:
    """Places arrays on the mesh, split along their first axis where it divides evenly, else replicated."""
    split = mesh.shape["data"] * mesh.shape["fsdp"]
    place = lambda x: jax.device_put(x, rows_sharding(mesh) if x.shape[0] % split == 0 else NamedSharding(mesh, P()))  # noqa: E731
    return jax.tree.map(place, tree)
