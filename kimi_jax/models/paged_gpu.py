"""Paged attention on NVIDIA GPUs: Pallas kernels through Triton. See `models.paged` for pools, tables and shapes.

Decoding is bound by reading keys and values, so the work is cut into splits of a row's tokens, one program each, and a
second kernel merges what the splits of a row found (Flash-Decoding). The number of tokens per split is fixed, and grows
only with the row's own length: programs without tokens leave at once, so the cost follows the tokens that there are,
and what a row gets does not depend on the others.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

_LOG2_E = math.log2(math.e)  # exp2 is the instruction that GPUs have
_QUERIES = 16  # the fewest rows that tensor cores multiply


@functools.partial(jax.jit, static_argnames=("interpret", "block", "split", "most", "warps", "stages", "form"))
def decode_step(
    q, k, v, k_pages, v_pages, table, positions, *, interpret,
    block=64, split=256, most=32, warps=4, stages=3, form="page",
):
    B, H, E = q.shape
    K, _, p, _ = k_pages.shape
    splits = pl.next_power_of_2(min(most, pl.cdiv(table.shape[1] * p, split)))
    block = min(block, p) if form == "page" else block
    partial = jax.ShapeDtypeStruct((B, H, splits), jnp.float32)
    sizes = dict(split=split, splits=splits)
    o, m, l, k_pages, v_pages = pl.pallas_call(  # noqa: E741
        functools.partial(_split_kernel, block=block, form=form, **sizes),
        grid=(B, K, splits),
        out_shape=[
            jax.ShapeDtypeStruct((B, H, splits, E), jnp.float32), partial, partial,
            jax.ShapeDtypeStruct(k_pages.shape, k_pages.dtype), jax.ShapeDtypeStruct(v_pages.shape, v_pages.dtype),
        ],
        input_output_aliases={3: 3, 4: 4},
        compiler_params=triton.CompilerParams(num_warps=warps, num_stages=stages),
        interpret=interpret,
        name="paged_split",
    )(q.reshape(B, K, H // K, E), k, v, k_pages, v_pages, table, positions)
    heads = pl.pallas_call(
        functools.partial(_merge_kernel, **sizes),
        grid=(B, H),
        out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
        compiler_params=triton.CompilerParams(num_warps=4, num_stages=1),
        interpret=interpret,
        name="paged_merge",
    )(o, m, l, positions)
    return heads, k_pages, v_pages


def _tokens_per_split(position, split, splits):
    return jnp.maximum(jax.lax.div(position + split * splits - 1, split * splits), 1) * split


def _split_kernel(
    q_ref, k_ref, v_ref, k_pages_ref, v_pages_ref, table_ref, positions_ref,
    o_ref, m_ref, l_ref, k_out_ref, v_out_ref, *, block, split, splits, form,
):
    b, h, s = (pl.program_id(axis) for axis in range(3))
    G, E = q_ref.shape[2:]
    p = k_pages_ref.shape[2]
    position = positions_ref[b]
    per = _tokens_per_split(position, split, splits)
    begin = s * per
    end = jnp.minimum(begin + per, position)

    @pl.when((s == 0) | (begin < position))
    def attend():
        head = jnp.minimum(jnp.arange(_QUERIES), G - 1)
        q = q_ref[b, h, head]
        k_new, v_new = k_ref[b, h], v_ref[b, h]
        scale = E**-0.5 * _LOG2_E

        first = s == 0
        m_new = jnp.sum(q.astype(jnp.float32) * k_new.astype(jnp.float32)[None], axis=1) * scale
        m = jnp.where(first, m_new, -jnp.inf)
        l = jnp.where(first, jnp.ones_like(m), 0.0)
        o = jnp.where(first, jnp.broadcast_to(v_new.astype(jnp.float32)[None], (_QUERIES, E)), 0.0)

        def body(i, carry):
            o, m, l = carry
            t0 = begin + i * block
            t = t0 + jnp.arange(block)
            live = t < end
            mask = jnp.broadcast_to(live[:, None], (block, E))
            if form == "page":
                at = (h, table_ref[b, jax.lax.div(t0, p)], pl.ds(jax.lax.rem(t0, p), block))
            else:
                tc = jnp.minimum(t, end - 1)
                at = (h, table_ref[b, jax.lax.div(tc, p)], jax.lax.rem(tc, p))
            if form == "page":
                k = triton.load(k_pages_ref.at[at], mask=mask, other=0.0)
                v = triton.load(v_pages_ref.at[at], mask=mask, other=0.0)
            else:
                k, v = k_pages_ref[at], v_pages_ref[at]
            logits = jax.lax.dot_general(q, k, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32) * scale
            logits = jnp.where(live[None], logits, -jnp.inf)
            m_next = jnp.maximum(m, jnp.max(logits, axis=1))
            weights, decay = jnp.exp2(logits - m_next[:, None]), jnp.exp2(m - m_next)
            l = l * decay + jnp.sum(weights, axis=1)
            o = o * decay[:, None] + jnp.dot(weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
            return o, m_next, l

        o, m, l = jax.lax.fori_loop(0, jax.lax.div(end - begin + block - 1, block), body, (o, m, l))
        at = (b, h * G + head, s)
        o_ref[at], m_ref[at], l_ref[at] = o, m, l

        @pl.when(first & (position >= 0))
        def write():
            at = (h, table_ref[b, jax.lax.div(position, p)], jax.lax.rem(position, p))
            k_out_ref[at], v_out_ref[at] = k_new, v_new


def _merge_kernel(o_ref, m_ref, l_ref, positions_ref, heads_ref, *, split, splits):
    b, h = pl.program_id(0), pl.program_id(1)
    position = positions_ref[b]
    live = jnp.arange(splits) * _tokens_per_split(position, split, splits) < jnp.maximum(position, 1)
    m = triton.load(m_ref.at[b, h], mask=live, other=-jnp.inf)
    l = triton.load(l_ref.at[b, h], mask=live, other=0.0)
    o = triton.load(o_ref.at[b, h], mask=jnp.broadcast_to(live[:, None], o_ref.shape[2:]), other=0.0)
    weights = jnp.exp2(m - jnp.max(m))
    heads_ref[b, h] = (jnp.sum(o * weights[:, None], axis=0) / jnp.sum(l * weights)).astype(heads_ref.dtype)


@functools.partial(jax.jit, static_argnames=("interpret", "rows", "block", "warps", "stages", "form"))
def attend_piece(q, k_pages, v_pages, table, positions, *, interpret, rows=128, block=64, warps=8, stages=3, form="page"):
    R, T, H, E = q.shape
    rows = min(rows, T & -T)
    block = min(block, k_pages.shape[2]) if form == "page" else block
    return pl.pallas_call(
        functools.partial(_piece_kernel, rows=rows, block=block, form=form),
        grid=(T // rows, H, R),
        out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
        compiler_params=triton.CompilerParams(num_warps=warps, num_stages=stages),
        interpret=interpret,
        name="paged_piece",
    )(q, k_pages, v_pages, table, positions)


def _piece_kernel(q_ref, k_pages_ref, v_pages_ref, table_ref, positions_ref, o_ref, *, rows, block, form):
    i, h, r = (pl.program_id(axis) for axis in range(3))
    K, _, p, E = k_pages_ref.shape
    queries = pl.ds(i * rows, rows)
    last = jnp.maximum(positions_ref[r, queries], 0)
    end = jnp.max(last) + 1
    kv = jax.lax.div(h, q_ref.shape[2] // K)
    q = q_ref[r, queries, h]
    scale = E**-0.5 * _LOG2_E

    def body(j, carry):
        o, m, l = carry
        t0 = j * block
        t = t0 + jnp.arange(block)
        live = t < end
        mask = jnp.broadcast_to(live[:, None], (block, E))
        if form == "page":
            at = (kv, table_ref[r, jax.lax.div(t0, p)], pl.ds(jax.lax.rem(t0, p), block))
        else:
            tc = jnp.minimum(t, end - 1)
            at = (kv, table_ref[r, jax.lax.div(tc, p)], jax.lax.rem(tc, p))
        if form == "page":
            k = triton.load(k_pages_ref.at[at], mask=mask, other=0.0)
            v = triton.load(v_pages_ref.at[at], mask=mask, other=0.0)
        else:
            k, v = k_pages_ref[at], v_pages_ref[at]
        logits = jax.lax.dot_general(q, k, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32) * scale
        logits = jnp.where(t[None] <= last[:, None], logits, -jnp.inf)
        m_next = jnp.maximum(m, jnp.max(logits, axis=1))
        weights, decay = jnp.exp2(logits - m_next[:, None]), jnp.exp2(m - m_next)
        l = l * decay + jnp.sum(weights, axis=1)
        o = o * decay[:, None] + jnp.dot(weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
        return o, m_next, l

    start = (jnp.zeros((rows, E), jnp.float32), jnp.full((rows,), -jnp.inf), jnp.zeros((rows,), jnp.float32))
    o, _, l = jax.lax.fori_loop(0, jax.lax.div(end + block - 1, block), body, start)
    o_ref[r, queries, h] = (o / l[:, None]).astype(o_ref.dtype)
