"""Attention over keys and values that live in pages, so that a row of the batch takes no more memory than it may fill.

A layer has two pools, `k_pages` and `v_pages`, each [K, N, p, E]: key/value heads, pages, slots per page, head width.
`table` int32 [B, M] names the pages of each row in order: its token at position t lies in page table[b, t // p], slot
t % p. Rows may share pages that none of them writes to any more. Page 0 fills up the table, and belongs to no row:

    p = 4, row b has 6 tokens      table[b] = 7 2 0     page 7: tokens 0 1 2 3     page 2: tokens 4 5 . .

Implementations, chosen by name:

    xla   everywhere: a loop over blocks of pages, as many as the longest row needs
    gpu   NVIDIA GPUs, 16-bit types, head widths that are powers of 2: Pallas kernels of our own (`models.paged_gpu`)
    tpu   TPUs, head widths that are multiples of 128: decoding by the Pallas kernel that ships with JAX, pieces by xla
    gpu_interpret, tpu_interpret   the same kernels, interpreted: how CPU tests run them

On a mesh, rows are split over the axes data and fsdp, and with them the pages: a table holds page numbers within the
part of the pool that its row shares a device with. Heads are split over tensor where it divides the key/value heads.
"""

import contextlib
import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

IMPLEMENTATIONS = ("xla", "gpu", "tpu", "gpu_interpret", "tpu_interpret")
# Tokens per trip of the loop in XLA. On CPUs a block should stay in the caches; elsewhere every trip has its price.
_DECODE_BLOCK = {"cpu": 32, "default": 256}
_PIECE_BLOCK = {"cpu": 64, "default": 512}
TPU_LANES = 128  # the TPU kernel copies whole vector registers
_GPU_WIDTH = 16  # the least that tensor cores multiply
_TPU_BLOCK = 512  # tokens per step of the TPU kernel


def takes(implementation: str, head_dim: int) -> bool:
    """Whether `implementation` exists for this head width. Raises ValueError for one that does not exist at all."""
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"No paged attention is called {implementation!r}: choose from {', '.join(IMPLEMENTATIONS)}.")
    if implementation.startswith("gpu"):
        return head_dim >= _GPU_WIDTH and head_dim & (head_dim - 1) == 0
    return implementation == "xla" or head_dim % TPU_LANES == 0


def write(pages, new, table, positions, *, mesh: Mesh | None):
    """Puts keys or values into their slots, in place where the caller gives `pages` away.

    pages [K, N, p, E]; new [B, K, E], one token per row, or [R, T, K, E], a piece of a sequence per row; table int32
    [B, M]; positions int32 [B] or [R, T]. What has a negative position (padding, finished rows) goes nowhere.
    """
    return _on_mesh(_write, mesh, pages.shape[0], "pages heads rows rows", "pages")(pages, new, table, positions)


def decode_step(q, k, v, k_pages, v_pages, table, positions, *, implementation: str, mesh: Mesh | None):
    """Writes one new token per row, and attends from it to its row up to and including itself.

    q [B, H, E], k and v [B, K, E], pools [K, N, p, E], table int32 [B, M], positions int32 [B] of the new tokens.
    Returns (heads [B, H, E], k_pages, v_pages). Query head h reads key/value head h // (H / K); the softmax is that of
    q·k / sqrt(E), in float32. A row with a negative position is finished: it writes nothing and its heads mean nothing,
    but are finite. What a row gets does not depend on the other rows. Raises ValueError for an `implementation` that
    does not exist or does not take this head width.
    """
    _check(implementation, q)
    interpret = implementation.endswith("_interpret")
    if implementation.startswith("gpu"):
        from kimi_jax.models import paged_gpu

        step: Callable = functools.partial(paged_gpu.decode_step, interpret=interpret)
    elif implementation.startswith("tpu"):
        step = functools.partial(_decode_tpu, interpret=interpret)
    else:
        step = _decode_xla
    step = _on_mesh(step, mesh, k_pages.shape[0], "heads heads heads pages pages rows rows", "heads pages pages")
    return step(q, k, v, k_pages, v_pages, table, positions)


def attend_piece(q, k_pages, v_pages, table, positions, *, implementation: str, mesh: Mesh | None):
    """Attention from pieces of sequences, one per row, to all of their sequence up to themselves.

    q [R, T, H, E], pools [K, N, p, E], which hold the keys and values of these tokens already, table int32 [R, M],
    positions int32 [R, T]. Returns [R, T, H, E], finite but meaningless where the position is negative (padding).
    """
    _check(implementation, q)
    if implementation.startswith("gpu"):
        from kimi_jax.models import paged_gpu

        attend: Callable = functools.partial(paged_gpu.attend_piece, interpret=implementation.endswith("_interpret"))
    else:
        attend = functools.partial(_attend_xla, blocks=_PIECE_BLOCK)
    attend = _on_mesh(attend, mesh, k_pages.shape[0], "heads pages pages rows rows", "heads")
    return attend(q, k_pages, v_pages, table, positions)


def _check(implementation, q):
    if not takes(implementation, q.shape[-1]):
        raise ValueError(
            f"Paged attention {implementation!r} does not take heads of width {q.shape[-1]}: 'gpu' takes powers of 2 "
            f"from {_GPU_WIDTH} on, 'tpu' multiples of {TPU_LANES}, 'xla' any."
        )


def _on_mesh(function, mesh, K, takes: str, gives: str):
    """`function` on every device's share of its arguments. takes and gives: what each array is split like."""
    if mesh is None or mesh.size == 1:
        return function
    tensor = "tensor" if K % mesh.shape["tensor"] == 0 else None
    rows = ("data", "fsdp")
    specs = {"rows": PartitionSpec(rows), "pages": PartitionSpec(tensor, rows)}

    def call(*args):
        for arg, kind in zip(args, takes.split(), strict=True):
            shards = math.prod(mesh.shape[axis] for axis in rows)
            size = arg.shape[1 if kind == "pages" else 0]
            if size % shards:
                raise ValueError(f"{size} {kind} do not divide into the {shards} shards that data and fsdp make.")
            if kind == "heads":  # of queries, keys or values, [B, heads, E] or [R, T, heads, E]
                specs["heads"] = PartitionSpec(rows, *(None,) * (arg.ndim - 3), tensor)
        ins, outs = (tuple(specs[kind] for kind in kinds.split()) for kinds in (takes, gives))
        # Kernels do not say along which axes their outputs vary, so shard_map cannot check it.
        mapped = jax.shard_map(
            function, mesh=mesh, in_specs=ins, out_specs=outs if len(outs) > 1 else outs[0], check_vma=False
        )
        return mapped(*args)

    return call


def _write(pages, new, table, positions):
    K, N, p, E = pages.shape
    B = table.shape[0]
    new, at = new.reshape(B, -1, K, E), positions.reshape(B, -1)
    page = jnp.take_along_axis(table, jnp.maximum(at, 0) // p, axis=1)
    # One index per vector of E values: a scatter that needs no transposed pool, so that it happens in place.
    vector = (jnp.arange(K)[:, None, None] * N + page[None]) * p + (at % p)[None]
    vector = jnp.where(at[None] < 0, K * N * p, vector)  # out of bounds: dropped
    flat = pages.reshape(K * N * p, E)
    flat = flat.at[vector].set(jnp.moveaxis(new, 2, 0), mode="drop", unique_indices=True)
    return flat.reshape(pages.shape)


def _decode_xla(q, k, v, k_pages, v_pages, table, positions):
    k_pages, v_pages = _write(k_pages, k, table, positions), _write(v_pages, v, table, positions)
    heads = _attend_xla(q[:, None], k_pages, v_pages, table, positions[:, None], blocks=_DECODE_BLOCK)
    return heads[:, 0], k_pages, v_pages


def _attend_xla(q, k_pages, v_pages, table, positions, *, blocks: dict):
    variants = {platform: functools.partial(_attend_blocks, block=block) for platform, block in blocks.items()}
    return jax.lax.platform_dependent(q, k_pages, v_pages, table, positions, **variants)


def _attend_blocks(q, k_pages, v_pages, table, positions, *, block: int):
    """Online softmax over blocks of whole pages (FlashAttention, arXiv 2205.14135), so that no scores [T, S] exist.

    The number of blocks follows the longest row at run time. What lies beyond a row's own end adds exact zeros, and
    the size of a block depends on nothing, so each row's result is the same to the last bit whatever the others do.
    """
    R, T, H, E = q.shape
    K, _, p, _ = k_pages.shape
    n = max(1, block // p)
    S = n * p
    table = jnp.pad(table, ((0, 0), (0, -table.shape[1] % n)))
    positions = jnp.maximum(positions, 0)  # padding sees its row's first token, so that no softmax is empty
    q = jnp.moveaxis(q.reshape(R, T, K, H // K, E), 2, 0).reshape(K, R, T * H // K, E)
    last = jnp.repeat(positions, H // K, axis=1)[None, :, :, None]  # that a query sees

    def body(carry):
        i, o, m, z = carry  # sum of weighted values, maximum of the logits, sum of weights
        ids = jax.lax.dynamic_slice_in_dim(table, i * n, n, axis=1)
        k, v = (pages.at[:, ids].get(mode="promise_in_bounds").reshape(K, R, S, E) for pages in (k_pages, v_pages))
        logits = jnp.einsum("krqe,krse->krqs", q, k, preferred_element_type=jnp.float32) * E**-0.5
        visible = (i * S + jnp.arange(S))[None, None, None] <= last
        logits = jnp.where(visible, logits, -jnp.inf)
        m_next = jnp.maximum(m, jnp.max(logits, axis=-1, keepdims=True))
        weights, decay = jnp.exp(logits - m_next), jnp.exp(m - m_next)
        z = z * decay + jnp.sum(weights, axis=-1, keepdims=True)
        o = o * decay + jnp.einsum("krqs,krse->krqe", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
        return i + 1, o, m_next, z

    blocks = jnp.max(positions) // S + 1
    zeros = jnp.zeros((*q.shape[:3], 1), jnp.float32)
    start = (jnp.int32(0), jnp.zeros(q.shape, jnp.float32), zeros - jnp.inf, zeros)
    _, o, _, z = jax.lax.while_loop(lambda carry: carry[0] < blocks, body, start)
    heads = (o / z).astype(q.dtype).reshape(K, R, T, H // K, E)
    return jnp.moveaxis(heads, 0, 2).reshape(R, T, H, E)


def _decode_tpu(q, k, v, k_pages, v_pages, table, positions, *, interpret):
    from jax.experimental.pallas import tpu
    from jax.experimental.pallas.ops.tpu.paged_attention import paged_attention

    k_pages, v_pages = _write(k_pages, k, table, positions), _write(v_pages, v, table, positions)
    n = min(max(1, _TPU_BLOCK // k_pages.shape[2]), table.shape[1])
    table = jnp.pad(table, ((0, 0), (0, -table.shape[1] % n)))
    scaled = q.astype(jnp.float32) * q.shape[-1] ** -0.5  # the kernel leaves scaling to us, and computes in float32
    with tpu.force_tpu_interpret_mode() if interpret else contextlib.nullcontext():
        heads = paged_attention(
            scaled, k_pages, v_pages, jnp.maximum(positions, 0) + 1, table, pages_per_compute_block=n
        )
    return heads.astype(q.dtype), k_pages, v_pages
