"""The block that both the decoder and the vision tower are made of, and rotary positions."""

import jax
import jax.numpy as jnp
from flax import nnx

from kimi_jax.models import attention, paged


def rope_angles(positions: jax.Array, head_dim: int, base: float) -> jax.Array:
    """Angles of rotary positions over one or several axes (RoFormer, arXiv 2104.09864).

    positions: int [..., A], a coordinate per axis: A = 1 for text, (row, column) for patches.
    Returns float32 [..., head_dim / 2]. Each axis owns an equal, consecutive share of the pairs.
    """
    axes = positions.shape[-1]
    pairs = head_dim // 2 // axes
    frequencies = base ** (-jnp.arange(pairs, dtype=jnp.float32) / pairs)
    angles = positions[..., None].astype(jnp.float32) * jnp.expand_dims(frequencies, range(positions.ndim))
    return angles.reshape(*positions.shape[:-1], axes * pairs)


def apply_rope(x: jax.Array, angles: jax.Array) -> jax.Array:
    """Rotates x [..., heads, E] by angles [..., E / 2]. Value i pairs with i + E / 2, as in published Qwen models."""
    cos, sin = jnp.cos(angles)[..., None, :], jnp.sin(angles)[..., None, :]
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


class Attention(nnx.Module):
    """Grouped-query attention. Shapes: x [..., T, width], angles [..., T, E / 2]."""

    def __init__(self, width, *, num_heads, num_kv_heads, head_dim, qkv_bias, qk_norm, eps, out_scale, dtype, rngs):
        self.head_dim = head_dim

        def linear(n_in, n_out, bias=False, scale=1.0):
            init = nnx.initializers.variance_scaling(scale**2, "fan_in", "normal")
            return nnx.Linear(
                n_in, n_out, use_bias=bias, kernel_init=init, dtype=dtype, param_dtype=jnp.float32, rngs=rngs
            )

        self.q_proj = linear(width, num_heads * head_dim, qkv_bias)
        self.k_proj = linear(width, num_kv_heads * head_dim, qkv_bias)
        self.v_proj = linear(width, num_kv_heads * head_dim, qkv_bias)
        self.o_proj = linear(num_heads * head_dim, width, scale=out_scale)
        self.q_norm = rms_norm(head_dim, eps, dtype, rngs) if qk_norm else None
        self.k_norm = rms_norm(head_dim, eps, dtype, rngs) if qk_norm else None

    def project(self, x, angles):
        """Rotated queries [..., T, H, E] and keys [..., T, K, E], and values [..., T, K, E]."""
        split = lambda y: y.reshape(*y.shape[:-1], -1, self.head_dim)  # noqa: E731
        q, k, v = split(self.q_proj(x)), split(self.k_proj(x)), split(self.v_proj(x))
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        return apply_rope(q, angles), apply_rope(k, angles), v

    def output(self, heads):
        return self.o_proj(heads.reshape(*heads.shape[:-2], -1))


class SwiGLU(nnx.Module):
    """down(silu(gate(x)) · up(x)) (Shazeer, arXiv 2002.05202)."""

    def __init__(self, width, mlp_width, *, out_scale, dtype, rngs):
        def linear(n_in, n_out, scale=1.0):
            init = nnx.initializers.variance_scaling(scale**2, "fan_in", "normal")
            return nnx.Linear(
                n_in, n_out, use_bias=False, kernel_init=init, dtype=dtype, param_dtype=jnp.float32, rngs=rngs
            )

        self.gate_proj = linear(width, mlp_width)
        self.up_proj = linear(width, mlp_width)
        self.down_proj = linear(mlp_width, width, out_scale)

    def __call__(self, x):
        return self.down_proj(jax.nn.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nnx.Module):
    """Pre-norm attention and MLP. `packed` sees whole sequences, `prefill` and `decode`
    write into a paged KV cache (`models.paged`) and read from it."""

    def __init__(self, width, mlp_width, *, eps, dtype, rngs, out_scale, **attention_shape):
        self.attn_norm = rms_norm(width, eps, dtype, rngs)
        self.attn = Attention(width, eps=eps, out_scale=out_scale, dtype=dtype, rngs=rngs, **attention_shape)
        self.mlp_norm = rms_norm(width, eps, dtype, rngs)
        self.mlp = SwiGLU(width, mlp_width, out_scale=out_scale, dtype=dtype, rngs=rngs)

    def packed(self, x, angles, segments, *, causal, implementation, mesh):
        """x [R, T, D] -> (x, (keys, values) each [R, T, K, E]). Tokens see only their own segment."""
        q, k, v = self.attn.project(self.attn_norm(x), angles)
        heads = attention.attend_packed(q, k, v, segments, causal=causal, implementation=implementation, mesh=mesh)
        x = x + self.attn.output(heads)
        return x + self.mlp(self.mlp_norm(x)), (k, v)

    def prefill(self, x, angles, rows, pages, table, *, fresh, implementation, mesh):
        """Pieces of sequences, one per row, into the cache. x [R, T, D] -> x, pages.

        rows.positions say where the tokens stand, -1 for padding. fresh: every piece begins its sequence, so a piece
        sees itself alone and the cache need not be read.
        """
        q, k, v = self.attn.project(self.attn_norm(x), angles)
        k_pages, v_pages = (
            paged.write(old, new, table, rows.positions, mesh=mesh) for old, new in zip(pages, (k, v), strict=True)
        )
        if fresh:
            heads = attention.attend_packed(
                q, k, v, rows.segments, causal=True, implementation=implementation, mesh=mesh
            )
        else:
            kernel = attention.paged_kernel(implementation, self.attn.head_dim)
            heads = paged.attend_piece(q, k_pages, v_pages, table, rows.positions, implementation=kernel, mesh=mesh)
        x = x + self.attn.output(heads)
        return x + self.mlp(self.mlp_norm(x)), (k_pages, v_pages)

    def decode(self, x, angles, pages, table, positions, *, implementation, mesh):
        """One new token per row, at positions int32 [B], -1 in empty rows. x [B, D] -> x, pages.

        The new token goes into its page and sees all up to itself.
        """
        q, k, v = self.attn.project(self.attn_norm(x), angles)
        kernel = attention.paged_kernel(implementation, self.attn.head_dim)
        heads, *pages = paged.decode_step(q, k, v, *pages, table, positions, implementation=kernel, mesh=mesh)
        x = x + self.attn.output(heads)
        return x + self.mlp(self.mlp_norm(x)), tuple(pages)


def rms_norm(width, eps, dtype, rngs):
    """RMSNorm in float32, cast back to the compute dtype (nnx.RMSNorm reduces in float32)."""
    return nnx.RMSNorm(width, epsilon=eps, dtype=dtype, param_dtype=jnp.float32, rngs=rngs)
