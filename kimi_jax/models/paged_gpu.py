"""Paged attention on NVIDIA GPUs: Pallas kernels, compiled by Triton. Shapes and meaning are those of `models.paged`.

A decode step is bound by reading keys and values. They are cut into splits of a row's tokens, one program each, and a
second kernel merges what the splits of a row found (Flash-Decoding). A split has a fixed number of tokens, more only
where a row alone has too many, and programs beyond the end of their row leave at once: the time follows the tokens that
there are, and what a row gets does not depend on the others.

Rows that are many and short get a program each, and there is nothing to merge. Figures: docs/log.md.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

_MIN_DOT = 16  # the fewest rows and columns that tensor cores multiply
_SPLIT = 128  # tokens of a row that one program reads
_SHORT = 1024  # tokens that one program may read if there are at least so many programs:
_PROGRAMS = 128  # an H100 or H200 has 132 multiprocessors
_LOG2_E = math.log2(math.e)  # weights are powers of 2, for which GPUs have an instruction


# Compiled functions of their own, so that all layers of a model share one compilation of the kernels.
@functools.partial(jax.jit, static_argnames=("interpret", "split", "max_splits"))
def decode_step(q, k, v, k_pages, v_pages, table, positions, *, interpret: bool, split=None, max_splits=32):
    """`models.paged.decode_step` on one device. split: tokens per program, where max_splits of them do for the row."""
    B, H, E = q.shape
    K = len(k_pages)
    # One array, so that XLA makes all of it, biases and rotations included, in one kernel.
    new = jnp.concatenate([q.reshape(B, K, H // K, E), k[:, :, None], v[:, :, None]], axis=2)[None]
    bias, angles = jnp.zeros(new.shape[2:], new.dtype), jnp.zeros((B, E // 2))
    sizes = dict(interpret=interpret, split=split, max_splits=max_splits)
    return _decode_step(new, bias, angles, (), k_pages, v_pages, table, positions, eps=None, **sizes)


def project_and_step(parts, attn, angles, pages, table, positions, *, interpret: bool):
    """`decode_step` of what is still to be made of a product with the matrix qkv_proj of `attn`, a `layers.Attention`.

    parts [P, B, K · (G + 2) · E], to be summed; angles [B, E / 2].
    """
    K, _, _, E = pages[0].shape
    new = parts.reshape(*parts.shape[:2], K, -1, E)
    bias, eps = attn.qkv_proj.bias, None
    norms: tuple = ()
    bias = jnp.zeros(new.shape[2:], pages[0].dtype) if bias is None else bias[...].reshape(new.shape[2:])
    if attn.q_norm is not None:
        norms, eps = (attn.q_norm.scale[...], attn.k_norm.scale[...]), attn.q_norm.epsilon
    return _decode_step(new, bias, angles, norms, *pages, table, positions, eps=eps, interpret=interpret)


@functools.partial(jax.jit, static_argnames=("eps", "interpret", "split", "max_splits"))
def _decode_step(
    new, bias, angles, norms, k_pages, v_pages, table, positions, *, eps, interpret, split=None, max_splits=32
):
    _, B, K, members, E = new.shape
    H, capacity = K * (members - 2), table.shape[1] * k_pages.shape[2]
    # Rows that are short and many need no splits, and so no merging. Few programs would leave the GPU idle.
    split = split or (_SHORT if capacity <= _SHORT and B * K >= _PROGRAMS else _SPLIT)
    splits = pl.next_power_of_2(min(max_splits, pl.cdiv(capacity, split)))
    sizes = dict(split=split, splits=splits)
    heads = jax.ShapeDtypeStruct((B, H, E), k_pages.dtype)
    statistics = jax.ShapeDtypeStruct((B, H, splits), jnp.float32)
    parts = (jax.ShapeDtypeStruct((B, H, splits, E), jnp.float32), statistics, statistics)
    found = (heads,) if splits == 1 else parts
    pools = tuple(jax.ShapeDtypeStruct(pool.shape, pool.dtype) for pool in (k_pages, v_pages))
    *found, k_pages, v_pages = pl.pallas_call(
        functools.partial(_split_kernel, **sizes, eps=eps),
        grid=(B, K, splits),
        out_shape=(*found, *pools),
        input_output_aliases={2: len(found), 3: len(found) + 1},  # the pools are written in place
        compiler_params=triton.CompilerParams(num_warps=2, num_stages=5 if B * K * splits < 2 * _PROGRAMS else 3),
        interpret=interpret,
        name="paged_split",
    )(table, positions, k_pages, v_pages, new, bias, jnp.cos(angles), jnp.sin(angles), *norms)
    if splits == 1:
        return *found, k_pages, v_pages
    heads = pl.pallas_call(
        functools.partial(_merge_kernel, **sizes),
        grid=(B, H),
        out_shape=heads,
        compiler_params=triton.CompilerParams(num_warps=4, num_stages=1),
        interpret=interpret,
        name="paged_merge",
    )(*found, positions)
    return heads, k_pages, v_pages


def _tokens_per_split(position, split, splits):
    return split * jnp.maximum(jax.lax.div(position + split * splits - 1, split * splits), 1)


def _split_kernel(table, positions, k_pages_in, v_pages_in, *refs, split, splits, eps):
    """One row, key/value head and split: online softmax over its tokens, unnormalised unless it is the only split.

    refs: what `_new_token` reads; then outputs: heads [B, H, E] or their parts (o, m, z), and the pools.

    The first split, which every row has, starts from the new token instead of from nothing, and writes it. The others
    read positions before it only, so nobody reads what is being written.
    """
    inputs = refs[: 4 if eps is None else 6]
    *found, k_pages_out, v_pages_out = refs[len(inputs) :]
    b, kv, s = (pl.program_id(axis) for axis in range(3))
    G = inputs[0].shape[3] - 2
    position = positions[b]
    tokens = _tokens_per_split(position, split, splits)
    begin = s * tokens
    end = jnp.minimum(begin + tokens, position)
    first = s == 0

    @pl.when(first | (begin < position))
    def attend():
        # Tensor cores want more rows than there are query heads.
        member = jnp.arange(pl.next_power_of_2(max(G, _MIN_DOT)))
        q, k_new, v_new = _new_token(*inputs, row=b, kv=kv, member=member, dtype=k_pages_in.dtype, eps=eps)
        logits = jnp.sum(q.astype(jnp.float32) * k_new.astype(jnp.float32)[None], axis=1)
        logits *= q.shape[1] ** -0.5 * _LOG2_E
        m = jnp.where(first, logits, -jnp.inf)
        z = jnp.where(first, jnp.ones_like(m), 0.0)
        o = jnp.where(first, jnp.broadcast_to(v_new.astype(jnp.float32)[None], q.shape), 0.0)
        last = jnp.full_like(member, end - 1)
        pools = (k_pages_in, v_pages_in)
        o, m, z = _online_softmax(q, last, pools, table, b, kv, begin, end, (o, m, z))
        head, there, e = kv * G + member, member < G, jnp.arange(q.shape[1])[None]
        all_there = jnp.broadcast_to(there[:, None], q.shape)
        if splits == 1:
            (heads_ref,) = found
            triton.store(heads_ref.at[b, head[:, None], e], (o / z[:, None]).astype(heads_ref.dtype), mask=all_there)
        else:
            o_ref, m_ref, z_ref = found
            triton.store(o_ref.at[b, head[:, None], s, e], o, mask=all_there)
            triton.store(m_ref.at[b, head, s], m, mask=there)
            triton.store(z_ref.at[b, head, s], z, mask=there)

        @pl.when(first & (position >= 0))
        def write():
            p = k_pages_in.shape[2]
            at = (kv, table[b, jax.lax.div(position, p)], jax.lax.rem(position, p))
            k_pages_out[at], v_pages_out[at] = k_new, v_new


def _new_token(new, bias, cos, sin, *norms, row, kv, member, dtype, eps):
    """The new token's queries [len(member), E], 0 beyond the last, key [E] and value [E]: of a row and key/value head.

    new: parts [P, B, K, G + 2, E], to be summed; bias [K, G + 2, E]; cos and sin [B, E / 2]; norms: the scales of q
    and k, [E] each, if they have norms.
    """
    P, _, _, members, E = new.shape
    G = members - 2

    def read(member, e, there=None):
        load = functools.partial(triton.load, mask=there, other=None if there is None else 0)
        values = load(bias.at[kv, member, e]).astype(jnp.float32)
        for part in range(P):
            values += load(new.at[part, row, kv, member, e]).astype(jnp.float32)
        return values.astype(dtype).astype(jnp.float32)

    def turn(member, e, which, there=None):  # as `layers.apply_rope` does, after `layers.RMSNorm`
        values, partners = read(member, e, there), read(member, e ^ (E // 2), there)
        if norms:
            factor = jax.lax.rsqrt(jnp.sum(values * values, axis=-1, keepdims=True) / E + eps)
            scale = lambda e: norms[which][e].astype(jnp.float32)  # noqa: E731
            values = (values * factor * scale(e)).astype(dtype).astype(jnp.float32)
            partners = (partners * factor * scale(e ^ (E // 2))).astype(dtype).astype(jnp.float32)
        angle = e & (E // 2 - 1)
        partners = jnp.where(e < E // 2, -partners, partners)
        return (values * cos[row, angle] + partners * sin[row, angle]).astype(dtype)

    e, there = jnp.arange(E), jnp.broadcast_to(member[:, None] < G, (member.size, E))
    return turn(member[:, None], e[None], 0, there), turn(G, e, 1), read(G + 1, e).astype(dtype)


def _merge_kernel(o_ref, m_ref, z_ref, positions, heads_ref, *, split, splits):
    b, h = pl.program_id(0), pl.program_id(1)
    position = positions[b]
    exists = jnp.arange(splits) * _tokens_per_split(position, split, splits) < jnp.maximum(position, 1)
    m = triton.load(m_ref.at[b, h], mask=exists, other=-jnp.inf)
    z = triton.load(z_ref.at[b, h], mask=exists, other=0.0)
    o = triton.load(o_ref.at[b, h], mask=jnp.broadcast_to(exists[:, None], o_ref.shape[2:]), other=0.0)
    weights = jnp.exp2(m - jnp.max(m))
    heads_ref[b, h] = (jnp.sum(o * weights[:, None], axis=0) / jnp.sum(z * weights)).astype(heads_ref.dtype)


@functools.partial(jax.jit, static_argnames=("interpret",))
def attend_piece(q, k_pages, v_pages, table, positions, *, interpret: bool):
    """`models.paged.attend_piece` on one device: FlashAttention over the pages of the row."""
    T = q.shape[1]
    padding = -T % _MIN_DOT
    q = jnp.pad(q, ((0, 0), (0, padding), (0, 0), (0, 0)))
    positions = jnp.pad(positions, ((0, 0), (0, padding)), constant_values=-1)
    queries = min(64, q.shape[1] & -q.shape[1])  # per program: a power of 2 that divides the piece
    heads = pl.pallas_call(
        functools.partial(_piece_kernel, queries=queries),
        grid=(q.shape[1] // queries, q.shape[2], q.shape[0]),
        out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
        compiler_params=triton.CompilerParams(num_warps=4, num_stages=3),
        interpret=interpret,
        name="paged_piece",
    )(q, k_pages, v_pages, table, positions)
    return heads[:, :T]


def _piece_kernel(q_ref, k_pages, v_pages, table, positions, heads_ref, *, queries):
    i, h, r = (pl.program_id(axis) for axis in range(3))
    at = (r, pl.ds(i * queries, queries))
    q = q_ref[*at, h]
    last = jnp.maximum(positions[at], 0)  # padding sees its row's first token, so that no softmax is empty
    kv = jax.lax.div(h, q_ref.shape[2] // k_pages.shape[0])
    o = jnp.zeros(q.shape, jnp.float32)
    m = jnp.full(last.shape, -jnp.inf)
    z = jnp.zeros(last.shape, jnp.float32)
    o, m, z = _online_softmax(q, last, (k_pages, v_pages), table, r, kv, 0, jnp.max(last) + 1, (o, m, z))
    heads_ref[*at, h] = (o / z[:, None]).astype(heads_ref.dtype)


def _online_softmax(q, last, pools, table, row, kv, begin, end, start, block=64):
    """Queries q [rows, E] over tokens begin..end of `row`, query i up to last[i], continuing from (o, m, z) in `start`.

    o [rows, E] is the sum of values weighted by 2^(logit - m), m [rows] the maximum, z [rows] the sum of weights.
    """
    k_pages, v_pages = pools
    p = k_pages.shape[2]
    scale = q.shape[1] ** -0.5 * _LOG2_E

    def body(i, carry):
        o, m, z = carry
        token = begin + i * block + jnp.arange(block)
        there = jnp.minimum(token, end - 1)  # beyond the end the last token is read again, and masked
        at = (kv, table[row, jax.lax.div(there, p)], jax.lax.rem(there, p))
        k, v = k_pages[at], v_pages[at]
        logits = jax.lax.dot_general(q, k, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32) * scale
        logits = jnp.where(token[None] <= last[:, None], logits, -jnp.inf)
        m_next = jnp.maximum(m, jnp.max(logits, axis=1))
        weights, decay = jnp.exp2(logits - m_next[:, None]), jnp.exp2(m - m_next)
        o = o * decay[:, None] + jnp.dot(weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
        return o, m_next, z * decay + jnp.sum(weights, axis=1)

    return jax.lax.fori_loop(0, jax.lax.div(end - begin + block - 1, block), body, start)
