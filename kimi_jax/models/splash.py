"""Packed attention on TPUs by JAX's splash attention kernel, which knows segments and skips what no query may see.

A Pallas kernel is opaque to the partitioner of XLA, so it runs under `jax.shard_map`: every device attends for its own
rows and heads, and no communication is needed.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jax.sharding import Mesh, PartitionSpec

_LANES = 128  # what a block must be a multiple of
_BLOCK_SIZES = (512, 256, _LANES)  # larger blocks keep the matrix unit busier; 512 fits the vector memory of every TPU


def attend(q, k, v, segments, *, causal: bool, mesh: Mesh | None, interpret: bool):
    """Attention within segments, differentiable; see `models.attention.attend_packed`.

    q [R, T, H, E], k and v [R, T, K, E], segments int32 [R, T]. Returns [R, T, H, E]. Rows lie over the mesh axes data
    and fsdp and heads over tensor, each where it divides evenly; what does not is computed on every device of that
    axis. mesh None: one device. interpret: run the kernel as ordinary JAX, on any platform.
    """
    T = q.shape[1]
    padding = -T % _LANES
    q, k, v = (jnp.pad(x, ((0, 0), (0, padding), (0, 0), (0, 0))) for x in (q * q.shape[-1] ** -0.5, k, v))
    segments = jnp.pad(segments, ((0, 0), (0, padding)), constant_values=-1)  # a segment that no token sees

    local = functools.partial(_attend_local, causal=causal, interpret=interpret)
    if mesh is not None:
        rows, tensor = mesh.shape["data"] * mesh.shape["fsdp"], mesh.shape["tensor"]
        row_axes = ("data", "fsdp") if q.shape[0] % rows == 0 else None
        head_axis = None
        if q.shape[2] % tensor == 0:
            # Consecutive query heads share a key/value head. Those are repeated until they split as well.
            head_axis, repeats = "tensor", tensor // math.gcd(k.shape[2], tensor)
            k, v = (jnp.repeat(x, repeats, axis=2) for x in (k, v))
        heads = PartitionSpec(row_axes, None, head_axis)
        specs = (heads, heads, heads, PartitionSpec(row_axes))
        # The kernel does not say along which axes its outputs vary, so shard_map cannot check it.
        local = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=heads, check_vma=False)
    return local(q, k, v, segments)[:, :T]


def _attend_local(q, k, v, segments, *, causal, interpret):
    T, H = q.shape[1:3]
    block = next(size for size in _BLOCK_SIZES if T % size == 0)
    mask = masks.CausalMask((T, T)) if causal else masks.FullMask((T, T))
    kernel = kernels.make_splash_mha(
        masks.MultiHeadMask([mask] * H),
        block_sizes=kernels.BlockSizes(
            block_q=block,
            block_kv=block,
            block_q_dkv=block,
            block_kv_dkv=block,
            block_q_dq=block,
            block_kv_dq=block,
        ),
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
    )

    def one_row(q, k, v, segments):  # heads first is how the kernel wants them
        q, k, v = (jnp.moveaxis(x, 1, 0) for x in (q, k, v))
        return jnp.moveaxis(kernel(q, k, v, segment_ids=kernels.SegmentIds(segments, segments)), 0, 1)

    return jax.vmap(one_row)(q, k, v, segments)
