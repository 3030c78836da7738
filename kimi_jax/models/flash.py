"""Packed attention on NVIDIA GPUs in memory that grows with the length of a row, not with its square.

The Pallas kernels of this module, compiled by Triton, are FlashAttention-2 (Dao, arXiv 2307.08691) with intervals:
the sequences of a row lie side by side, so what a token sees is an interval of positions, first..stop, and both ends
grow along the row. A program skips what none of its tokens sees: a row of n sequences takes 1/n of the time that the
mask of a row would take, and padding takes none. Query heads that share keys and values are added up inside.

A row of a single sequence needs no intervals: padding stands on its right, and nothing looks to the right. Then cuDNN
takes over, at run time; long responses and what prefill reads are such rows.

Both leave behind the same two arrays, the output and the logarithm of the softmax's denominators. `jax.checkpoint`
knows them by the name "attention" (`models.config.KEEPABLE`): where they are kept, attention is not computed again.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

_LANES = 128  # what a row is a multiple of
# Tokens that a program keeps, and tokens that stream past them at a time: queries and keys, in the backward pass of the
# keys and values the other way round.
_FORWARD = (128, 64)
_BACKWARD = (128, 32)
_LOG2_E = math.log2(math.e)  # weights are powers of 2, for which GPUs have an instruction
_LOWEST = -1e30  # finite, so that a block of which a token sees nothing gives weights of 0 and not of nan


def attend_rows(q, k, v, segments, *, causal: bool, interpret: bool):
    """Attention within segments on one device, differentiable; see `models.attention.attend_packed`.

    q [R, T, H, E], k and v [R, T, K, E], segments int32 [R, T], 0 or less for padding; the tokens of a segment lie side
    by side. Returns [R, T, H, E]. interpret: run the kernels as ordinary JAX, on any platform, and XLA in place of
    cuDNN. Raises ValueError for a T that is no multiple of 128.
    """
    T, E = q.shape[1], q.shape[3]
    if T % _LANES:
        raise ValueError(f"Attention 'flash' takes rows of a multiple of {_LANES} tokens, not {T}.")
    if wider := max(16, 1 << (E - 1).bit_length()) - E:  # the kernels take powers of 2 from 16 on, as Triton does
        q = q * ((E + wider) / E) ** 0.5  # they scale by the width that they see
        q, k, v = (jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, wider))) for x in (q, k, v))
        return attend_rows(q, k, v, segments, causal=causal, interpret=interpret)[..., :E]
    first, stop = _intervals(segments)
    alone = jnp.all((first == 0) | (segments <= 0))
    return _attend(q, k, v, first, stop, alone, causal, interpret)


def _intervals(segments):
    """first, stop int32 [R, T]: the positions of each token's segment. Padding is a segment per token, seen by itself.

    segments  1 1 2 2 2 0 0      first  0 0 2 2 2 5 6      stop  2 2 5 5 5 6 7
    """
    T = segments.shape[1]
    at = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), segments.shape)
    edge = (segments[:, 1:] != segments[:, :-1]) | (segments[:, 1:] <= 0)  # between t - 1 and t
    begins, ends = jnp.pad(edge, ((0, 0), (1, 0))), jnp.pad(edge, ((0, 0), (0, 1)), constant_values=True)
    first = jax.lax.cummax(jnp.where(begins, at, 0), axis=1)
    return first, jax.lax.cummin(jnp.where(ends, at + 1, T), axis=1, reverse=True)


@functools.partial(jax.custom_vjp, nondiff_argnums=(6, 7))
def _attend(q, k, v, first, stop, alone, causal, interpret):
    return _forward(q, k, v, first, stop, alone, causal, interpret)[0]


def _forward(q, k, v, first, stop, alone, causal, interpret):
    packed = functools.partial(_packed_forward, causal=causal, interpret=interpret)
    if _cudnn_may_take(q, causal, interpret):
        o, lse = jax.lax.cond(alone, functools.partial(_alone_forward, interpret), packed, q, k, v, first, stop)
    else:
        o, lse = packed(q, k, v, first, stop)
    o, lse = (checkpoint_name(x, "attention") for x in (o, lse))
    return o, (q, k, v, first, stop, alone, o, lse)


def _backward(causal, interpret, residuals, do):
    q, k, v, first, stop, alone, o, lse = residuals
    packed = functools.partial(_packed_backward, causal=causal, interpret=interpret)
    arguments = (q, k, v, first, stop, o, lse, do)
    if _cudnn_may_take(q, causal, interpret):
        grads = jax.lax.cond(alone, functools.partial(_alone_backward, interpret), packed, *arguments)
    else:
        grads = packed(*arguments)
    return *grads, None, None, None


_attend.defvjp(_forward, _backward)


def _cudnn_may_take(q, causal, interpret):
    return causal and (interpret or q.dtype.itemsize == 2)


def _alone(interpret):
    return functools.partial(
        jax.nn.dot_product_attention, is_causal=True, implementation="xla" if interpret else "cudnn"
    )


def _alone_forward(interpret, q, k, v, first, stop):
    o, gradient = jax.vjp(_alone(interpret), q, k, v)
    shape = (q.shape[0], q.shape[2], q.shape[1])
    kept = [x for x in jax.tree.leaves(gradient) if x.shape == shape]  # XLA, which interprets, keeps no such thing
    return o, kept[0] if kept else jnp.zeros(shape, jnp.float32)


def _alone_backward(interpret, q, k, v, first, stop, o, lse, do):
    """cuDNN's gradient from what its forward pass left, which JAX has no public function for.

    It is asked for forward pass and gradient; what the gradient reads of the former is put in, so that nobody uses the
    former, and the compiler drops it.
    """
    again, gradient = jax.vjp(_alone(interpret), q, k, v)
    put = lambda x: o if x is again else lse if x.shape == lse.shape else x  # noqa: E731
    return jax.tree.map(put, gradient)(do)


def _call(kernel, blocks, grid, out_shape, *, head_dim, interpret, name):
    return pl.pallas_call(
        kernel,
        grid=(grid[0] // blocks[0], *grid[1:]),
        out_shape=out_shape,
        compiler_params=triton.CompilerParams(num_warps=4 if head_dim <= 64 else 8, num_stages=3),
        interpret=interpret,
        name=name,
    )


def _packed_forward(q, k, v, first, stop, *, causal, interpret):
    R, T, H, E = q.shape
    out_shape = (jax.ShapeDtypeStruct(q.shape, q.dtype), jax.ShapeDtypeStruct((R, H, T), jnp.float32))
    kernel = functools.partial(_forward_kernel, causal=causal)
    call = _call(kernel, _FORWARD, (T, H, R), out_shape, head_dim=E, interpret=interpret, name="flash_forward")
    return call(q, k, v, first, stop)


def _packed_backward(q, k, v, first, stop, o, lse, do, *, causal, interpret):
    R, T, H, E = q.shape
    delta = jnp.einsum("rthe,rthe->rht", do, o, preferred_element_type=jnp.float32)
    inputs = (q, k, v, first, stop, do, lse, delta)
    like = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype)  # noqa: E731
    kernel = functools.partial(_queries_kernel, causal=causal)
    call = _call(kernel, _BACKWARD, (T, H, R), like(q), head_dim=E, interpret=interpret, name="flash_queries")
    dq = call(*inputs)
    kernel = functools.partial(_keys_kernel, causal=causal)
    shapes, grid = (like(k), like(v)), (T, k.shape[2], R)
    call = _call(kernel, _BACKWARD, grid, shapes, head_dim=E, interpret=interpret, name="flash_keys")
    return dq, *call(*inputs)


def _forward_kernel(q_ref, k_ref, v_ref, first, stop, o_ref, lse_ref, *, causal):
    """o = softmax(q kᵀ / sqrt(E)) v and the logarithm, base 2, of the softmax's denominators."""
    kept, block = _FORWARD
    i, h, r = (pl.program_id(axis) for axis in range(3))
    rows = pl.ds(i * kept, kept)
    q = q_ref[r, rows, h]
    begin, end = _seen(first, stop, r, i * kept, kept, causal)
    kv = jax.lax.div(h, q_ref.shape[2] // k_ref.shape[2])

    def body(j, carry):
        o, m, z = carry
        columns = pl.ds(j * block, block)
        k, v = k_ref[r, columns, kv], v_ref[r, columns, kv]
        position = j * block + jnp.arange(block)
        visible = (begin[:, None] <= position[None]) & (position[None] < end[:, None])
        logits = jnp.where(visible, _products(q, k) * (q.shape[1] ** -0.5 * _LOG2_E), -jnp.inf)
        m_next = jnp.maximum(m, jnp.max(logits, axis=1))
        weights, decay = jnp.exp2(logits - m_next[:, None]), jnp.exp2(m - m_next)
        o = o * decay[:, None] + _dot(weights, v)
        return o, m_next, z * decay + jnp.sum(weights, axis=1)

    zeros = jnp.zeros((kept,), jnp.float32)
    o, m, z = _stream(begin, end, block, body, (jnp.zeros(q.shape, jnp.float32), zeros + _LOWEST, zeros))
    o_ref[r, rows, h] = (o / z[:, None]).astype(o_ref.dtype)
    lse_ref[r, h, rows] = m + jnp.log2(z)


def _queries_kernel(q_ref, k_ref, v_ref, first, stop, do_ref, lse_ref, delta_ref, dq_ref, *, causal):
    """dq = ds k / sqrt(E), ds = p (do vᵀ - delta), delta = do · o."""
    kept, block = _BACKWARD
    i, h, r = (pl.program_id(axis) for axis in range(3))
    rows = pl.ds(i * kept, kept)
    q, do, lse, delta = q_ref[r, rows, h], do_ref[r, rows, h], lse_ref[r, h, rows], delta_ref[r, h, rows]
    begin, end = _seen(first, stop, r, i * kept, kept, causal)
    kv = jax.lax.div(h, q_ref.shape[2] // k_ref.shape[2])
    scale = q.shape[1] ** -0.5

    def body(j, dq):
        columns = pl.ds(j * block, block)
        k, v = k_ref[r, columns, kv], v_ref[r, columns, kv]
        position = j * block + jnp.arange(block)
        visible = (begin[:, None] <= position[None]) & (position[None] < end[:, None])
        p = jnp.exp2(jnp.where(visible, _products(q, k) * (scale * _LOG2_E) - lse[:, None], -jnp.inf))
        return dq + _dot(p * (_products(do, v) - delta[:, None]), k)

    dq = _stream(begin, end, block, body, jnp.zeros(q.shape, jnp.float32))
    dq_ref[r, rows, h] = (dq * scale).astype(dq_ref.dtype)


def _keys_kernel(q_ref, k_ref, v_ref, first, stop, do_ref, lse_ref, delta_ref, dk_ref, dv_ref, *, causal):
    """dv = pᵀ do and dk = dsᵀ q / sqrt(E), summed over the query heads of this key/value head."""
    kept, block = _BACKWARD
    i, kv, r = (pl.program_id(axis) for axis in range(3))
    columns = pl.ds(i * kept, kept)
    k, v = k_ref[r, columns, kv], v_ref[r, columns, kv]
    begin, end = _seeing(first, stop, r, i * kept, kept, causal)
    group = q_ref.shape[2] // k_ref.shape[2]
    scale = k.shape[1] ** -0.5

    def body(h, j, carry):
        dk, dv = carry
        rows = pl.ds(j * block, block)
        q, do, lse, delta = q_ref[r, rows, h], do_ref[r, rows, h], lse_ref[r, h, rows], delta_ref[r, h, rows]
        position = j * block + jnp.arange(block)
        visible = (begin[:, None] <= position[None]) & (position[None] < end[:, None])
        p = jnp.exp2(jnp.where(visible, _products(k, q) * (scale * _LOG2_E) - lse[None], -jnp.inf))  # transposed
        return dk + _dot(p * (_products(v, do) - delta[None]), q), dv + _dot(p, do)

    def head(g, carry):
        return _stream(begin, end, block, functools.partial(body, kv * group + g), carry)

    zeros = jnp.zeros(k.shape, jnp.float32)
    dk, dv = jax.lax.fori_loop(0, group, head, (zeros, zeros))
    dk_ref[r, columns, kv] = (dk * scale).astype(dk_ref.dtype)
    dv_ref[r, columns, kv] = dv.astype(dv_ref.dtype)


def _seen(first, stop, row, at, count, causal):
    """Interval of keys that each of `count` queries from position `at` on sees. Grows along the queries."""
    rows = pl.ds(at, count)
    return first[row, rows], at + jnp.arange(count) + 1 if causal else stop[row, rows]


def _seeing(first, stop, row, at, count, causal):
    """Interval of queries that see each of `count` keys from position `at` on. Grows along the keys."""
    rows = pl.ds(at, count)
    return at + jnp.arange(count) if causal else first[row, rows], stop[row, rows]


def _stream(begin, end, block, body, carry):
    """`body` over the blocks that hold something of the intervals."""
    return jax.lax.fori_loop(jax.lax.div(jnp.min(begin), block), pl.cdiv(jnp.max(end), block), body, carry)


def _products(a, b):
    """a [m, E], b [n, E] -> a bᵀ, float32 [m, n]."""
    return jax.lax.dot_general(a, b, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)


def _dot(weights, x):
    return jnp.dot(weights.astype(x.dtype), x, preferred_element_type=jnp.float32)
