"""The mesh, and the two tables that say how parameters lie on it.

Axes: `data` and `fsdp` split rows; `fsdp` also splits the training copy of the parameters; `tensor` splits heads and
widths in both copies. The first pattern that matches the path of a parameter decides; a parameter that none matches is
an error.
"""

import math
import re
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
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
    (rf"{_COLUMN}/a$", P("fsdp", None)),  # adapters: A B comes out as its kernel lies, each device computing its part
    (rf"{_COLUMN}/b$", P(None, "tensor")),
    (rf"{_ROW}/a$", P("tensor", None)),
    (rf"{_ROW}/b$", P(None, "fsdp")),
    (r"lora/scale", P()),
    (r"patch_embed/kernel", P(None, "fsdp")),
    (r"patch_embed/bias", P()),
    (r"scalar_head/(kernel|bias)", P()),
    (r"norm/(scale|bias)", P()),
    (r"(^|/)(count|step)$", P()),  # of Adam, of TrainState
    (r"(^|/)parts/", P()),  # of a loss
)

# Decode reads every weight once per step, so nothing is gathered over fsdp: each data-parallel copy holds its slice.
SAMPLE_RULES = (
    (r"qkv_proj/kernel", P(None, "tensor")),  # by key/value heads, each with all that belongs to it
    (r"qkv_proj/bias", P("tensor")),
    (r"gate_up_proj/kernel", P(None, None, "tensor")),
    *((pattern, P(*(a if a == "tensor" else None for a in spec))) for pattern, spec in TRAIN_RULES),
)


def make_mesh(*, data: int, fsdp: int, tensor: int, devices=None) -> Mesh:
    """A mesh with axes data, fsdp, tensor. One size may be -1: what is left. Raises ValueError when they do not fit."""
    devices = jax.devices() if devices is None else devices
    sizes = [data, fsdp, tensor]
    given = int(-np.prod(sizes))  # what the other two multiply to, if one is -1
    if sizes.count(-1) == 1 and given > 0 and len(devices) % given == 0:
        sizes[sizes.index(-1)] = len(devices) // given
    if min(sizes) < 1 or int(np.prod(sizes)) != len(devices):
        raise ValueError(
            f"mesh data={data}, fsdp={fsdp}, tensor={tensor} does not cover {len(devices)} devices. The sizes must "
            "multiply to that number; one of them may be -1."
        )
    # A size need not match a side of the torus that the chips of a TPU slice form: v5p:4x4x4 can be 2 x 16 x 2.
    grid = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    return Mesh(grid, ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)


def shardings(mesh: Mesh, tree: Any, rules) -> Any:
    """A NamedSharding per leaf of `tree` (arrays or shapes), by its path.

    Stacked layers (a path through "runs") have one more axis in front, which stays whole.
    Raises KeyError that names a parameter which no rule matches.
    """

    def one(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        for pattern, spec in rules:
            if re.search(pattern, name):
                stacked = "runs" in name.split("/") and spec
                return _split(mesh, leaf.shape, (None, *spec) if stacked else spec)
        raise KeyError(
            f"No sharding rule matches parameter {name!r} of shape {leaf.shape}. Add one to "
            "training.sharding.TRAIN_RULES."
        )

    return jax.tree_util.tree_map_with_path(one, tree)


def row_shardings(mesh: Mesh, tree: Any) -> Any:
    """A sharding per array: split along the first axis, which is rows, where it divides evenly, else replicated."""
    return jax.tree.map(lambda x: _split(mesh, x.shape, (ROW_AXES,)), tree)


def put_rows(mesh: Mesh, tree: Any) -> Any:
    """Places host arrays on the mesh as `row_shardings` says. All processes give the same ones."""
    return jax.tree.map(put, tree, row_shardings(mesh, tree))


def replicate(mesh: Mesh, tree: Any) -> Any:
    """Places host arrays on the mesh, whole on every device."""
    return jax.tree.map(lambda x: put(x, NamedSharding(mesh, P())), tree)


def put(array: Any, sharding: NamedSharding) -> jax.Array:
    """One host array onto the mesh. Each process sends its own part, and nobody compares."""
    if sharding.is_fully_addressable:
        return jax.device_put(array, sharding)
    array = np.asarray(array)
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def page_shapes(mesh: Mesh | None, shapes: Any) -> Any:
    """Shapes of a paged cache, [K, pages, p, E] each, with their shardings: heads over tensor, pages over the rows."""
    place = lambda s: None if mesh is None else _split(mesh, s.shape, ("tensor", ROW_AXES))  # noqa: E731
    return jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=place(s)), shapes)


def _split(mesh: Mesh, shape: tuple[int, ...], names) -> NamedSharding:
    """Dimension i split over the axes names[i]; those that do not divide it, or have size 1, are left out.

    Each layout is written in one way, that of XLA: what a program gives back then lies as what it was given, by name
    too, and no program is compiled twice for the same layout.
    """
    spec: list = []
    for size, name in zip(shape, names, strict=False):
        axes = tuple(a for a in ((name,) if isinstance(name, str) else name or ()) if mesh.shape[a] > 1)
        divides = size % math.prod(mesh.shape[a] for a in axes) == 0
        spec.append(None if not (axes and divides) else axes if len(axes) > 1 else axes[0])
    while spec and spec[-1] is None:
        spec.pop()
    return NamedSharding(mesh, P(*spec))
