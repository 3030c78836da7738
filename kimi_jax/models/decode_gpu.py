"""A layer of a decode step on one NVIDIA GPU, in fewer kernels than XLA makes of it: 8 in place of 12.

For tens or hundreds of rows a step is a chain of short kernels, a third of which do next to nothing: sum up a product
that was split over its inner axis to occupy the whole GPU, add a bias, rotate, add to the residual stream, normalise.
Here the products stay split, and whoever reads them sums them up: the next norm, or the attention kernel.

    x, y = x + added, norm(x + added)    add_norm          `added` and all other products: parts, to be summed,
    qkv = y W_qkv                        product           float32 [P, B, N]
    heads = attention(qkv, pages)        models.paged_gpu  biases, norms of q and k, rotation, write and read
    x, y = x + heads W_o, norm(...)      product, add_norm
    added = swiglu(y)                    product
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from kimi_jax.models import layers, paged_gpu

_PROGRAMS = 132  # that run at once: an H100 or H200 has so many multiprocessors
_TILE = 128  # rows and columns of a product that are about one program's work
_STEP = 32  # a part's share of the inner axis is a multiple of it
_LONG = 2_048  # such a share is worth splitting further


def takes(block: layers.Block, mesh: jax.sharding.Mesh | None) -> bool:
    """Whether `decode` can stand in for `layers.Block.decode`: one device, fused matrices, RMSNorm, SwiGLU."""
    kinds = isinstance(block.attn_norm, layers.RMSNorm) and isinstance(block.mlp, layers.SwiGLU)
    biased = kinds and (block.attn.o_proj.bias is not None or block.mlp.gate_up_proj.bias is not None)
    return kinds and block.attn.fused and not biased and (mesh is None or mesh.size == 1)


def decode(block: layers.Block, x, added, angles, pages, table, positions, *, interpret: bool):
    """`layers.Block.decode`, for blocks that `takes` accepts."""
    attn, mlp = block.attn, block.mlp
    x, y = add_norm(x, added, block.attn_norm, interpret=interpret)
    qkv = product(y, attn.qkv_proj.kernel[...])
    heads, *pages = paged_gpu.project_and_step(qkv, attn, angles, pages, table, positions, interpret=interpret)
    o = product(heads.reshape(len(x), -1), attn.o_proj.kernel[...])
    x, y = add_norm(x, o, block.mlp_norm, interpret=interpret)
    return x, product(mlp.gated(y), mlp.down_proj.kernel[...]), tuple(pages)


def product(x, w):
    """x [B, D] times w [D, N], in parts of the sum over D: float32 [P, B, N], P a power of 2."""
    B, D = x.shape
    tiles, P = pl.cdiv(B, _TILE) * pl.cdiv(w.shape[1], _TILE), 1
    # More parts occupy more of the GPU, and are more to read for what comes next: worth it for long sums only.
    while tiles * 2 * P <= (_PROGRAMS if D > P * _LONG else _PROGRAMS // 2) and D % (2 * P * _STEP) == 0:
        P *= 2
    x, w = x.reshape(B, P, D // P), w.reshape(P, D // P, -1)
    return jnp.einsum("bpd,pdn->pbn", x, w, preferred_element_type=jnp.float32)


def add_norm(x, added, norm: nnx.RMSNorm, *, interpret: bool):
    """The stream x + added, float32 [B, D], and its norm. added: parts [P, B, D], or None for nothing."""
    if added is None:
        return x, norm(x)
    return _add_norm(x, added, norm.scale[...].astype(norm.dtype), eps=norm.epsilon, interpret=interpret)


@functools.partial(jax.jit, static_argnames=("eps", "interpret"))
def _add_norm(x, added, scale, *, eps, interpret):
    return pl.pallas_call(
        functools.partial(_add_norm_kernel, eps=eps),
        grid=(x.shape[0],),
        out_shape=tuple(jax.ShapeDtypeStruct(x.shape, like.dtype) for like in (x, scale)),
        compiler_params=triton.CompilerParams(num_warps=16, num_stages=1),
        interpret=interpret,
        name="add_norm",
    )(x, added, scale)


def _add_norm_kernel(x_ref, added_ref, scale_ref, sum_ref, norm_ref, *, eps):
    b, D = pl.program_id(0), x_ref.shape[1]
    at = jnp.arange(pl.next_power_of_2(D))
    there = at < D
    load = lambda ref, *rows: triton.load(ref.at[*rows, at], mask=there, other=0).astype(jnp.float32)  # noqa: E731
    x = load(x_ref, b)
    for part in range(added_ref.shape[0]):
        x += load(added_ref, part, b)
    triton.store(sum_ref.at[b, at], x, mask=there)
    x = x * jax.lax.rsqrt(jnp.sum(x * x) / D + eps) * load(scale_ref)
    triton.store(norm_ref.at[b, at], x.astype(norm_ref.dtype), mask=there)
