"""Attention over packed rows (training, prefill). That over the KV cache is in `paged`.

Implementations, chosen by name so that nothing depends on guesses inside a library:

    xla     everywhere; materialises [T, T] scores
    cudnn   NVIDIA GPUs, 16-bit types; reads a [T, T] mask
    flash   NVIDIA GPUs, rows of any length: intervals instead of a mask (`models.flash`)
    splash  TPUs (a Pallas kernel that knows segments)
    flash_interpret, splash_interpret   the same kernels, interpreted: how CPU tests run the paths of GPU and TPU
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh, PartitionSpec

from kimi_jax.models import paged

IMPLEMENTATIONS = ("xla", "cudnn", "flash", "splash", "flash_interpret", "splash_interpret")
# The longest row on which cuDNN gets a mask, which grows with the square of the length (32 GiB at 131,072 tokens), as
# does the time spent on what it hides. Forward and backward on an H100, one sequence per row, heads of 128: `flash`
# takes 1.8 ms in place of 5.3 at 16 rows of 2,048, and 1.0 in place of 1.9 at 64 rows of 512. With heads of 64 it takes
# as long there, and its choice between two kernels makes XLA ask the host, which small models feel.
_LONGEST_MASK = 512
_LANES = 128  # what the rows of kernels are a multiple of


def choose_implementation(platform: str, dtype: str, *, row_tokens: int) -> str:
    """What suits `platform` ("cpu", "gpu", "tpu"), compute in `dtype` and packed rows of `row_tokens`."""
    if platform == "tpu":
        return "splash"
    if platform not in ("gpu", "cuda") or dtype not in ("bfloat16", "float16"):
        return "xla"
    return "cudnn" if row_tokens <= _LONGEST_MASK else "flash"


def attend_packed(q, k, v, segments, *, causal: bool, implementation: str, mesh: Mesh | None = None):
    """Attention within the segments of packed rows.

    q [R, T, H, E], k and v [R, T, K, E], segments int32 [R, T], each segment in one piece. Returns [R, T, H, E].
    Token s is visible to token t when their segments are equal and, if `causal`, s <= t:

        segments 1 1 2 2 0          visible (causal)   1 . . . .
                                                       1 1 . . .
                                                       . . 1 . .
                                                       . . 1 1 .
                                                       . . . . 1

    Nothing but padding (segment 0) sees padding. What padding gets is finite and means nothing: it sees itself, so that
    no row of the softmax is empty, and depending on the implementation other tokens too.
    """
    name, _, interpret = implementation.partition("_")
    if name in ("xla", "cudnn"):
        visible = packed_mask(segments, causal=causal)
        heads = jax.nn.dot_product_attention(q, k, v, mask=visible[:, None], implementation=implementation)  # type: ignore[call-overload]
        return checkpoint_name(heads, "attention")
    if name == "flash":
        from kimi_jax.models.flash import attend_rows
    else:
        from kimi_jax.models.splash import attend_rows
    kernel = functools.partial(attend_rows, causal=causal, interpret=bool(interpret))
    return _on_mesh(kernel, mesh, q, k, v, segments)


def packed_mask(segments, *, causal: bool):
    """bool [R, T, T]: see `attend_packed`."""
    visible = segments[:, :, None] == segments[:, None, :]
    return visible & jnp.tri(segments.shape[1], dtype=bool)[None] if causal else visible


def _on_mesh(kernel: Callable, mesh: Mesh | None, q, k, v, segments):
    """`kernel` on rows that are padded to whole blocks.

    A Pallas kernel is opaque to the partitioner of XLA, so it runs under `jax.shard_map`, without communication. Rows
    lie over the mesh axes data and fsdp and heads over tensor, each where it divides evenly; what does not is computed
    on every device of that axis.
    """
    T = q.shape[1]
    padding = -T % _LANES
    q, k, v = (jnp.pad(x, ((0, 0), (0, padding), (0, 0), (0, 0))) for x in (q, k, v))
    segments = jnp.pad(segments, ((0, 0), (0, padding)), constant_values=-1)  # a segment that no token sees
    if mesh is not None and mesh.size > 1:
        rows, tensor = mesh.shape["data"] * mesh.shape["fsdp"], mesh.shape["tensor"]
        row_axes = ("data", "fsdp") if q.shape[0] % rows == 0 else None
        head_axis = None
        if q.shape[2] % tensor == 0:
            # Consecutive query heads share a key/value head. Those are repeated until they split as well.
            head_axis, repeats = "tensor", tensor // math.gcd(k.shape[2], tensor)
            k, v = (jnp.repeat(x, repeats, axis=2) for x in (k, v))
        heads = PartitionSpec(row_axes, None, head_axis)
        specs = (heads, heads, heads, PartitionSpec(row_axes))
        # The kernels do not say along which axes their outputs vary, so shard_map cannot check it.
        kernel = jax.shard_map(kernel, mesh=mesh, in_specs=specs, out_specs=heads, check_vma=False)
    return kernel(q, k, v, segments)[:, :T]


def paged_kernel(implementation: str, head_dim: int) -> str:
    """What goes with `implementation` over the cache: a name of `models.paged`."""
    kernel = {"cudnn": "gpu", "flash": "gpu", "splash": "tpu"}.get(implementation, "xla")
    return kernel if paged.takes(kernel, head_dim) else "xla"
