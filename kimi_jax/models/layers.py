"""The block that both the decoder and the vision tower are made of, and rotary positions."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from kimi_jax.models import attention, paged
from kimi_jax.models.config import RopeScaling

MLP_TOKENS = 32_768  # of a device, that the MLP sees at once in training; enough of them to keep any device busy


def rope_angles(positions: jax.Array, head_dim: int, base: float, scaling: RopeScaling | None = None) -> jax.Array:
    """Angles of rotary positions over one or several axes (RoFormer, arXiv 2104.09864).

    positions: int [..., A], a coordinate per axis: A = 1 for text, (row, column) for patches.
    Returns float32 [..., head_dim / 2]. Each axis owns an equal, consecutive share of the pairs.
    """
    axes = positions.shape[-1]
    pairs = head_dim // 2 // axes
    frequencies = jnp.asarray(rope_frequencies(pairs, base, scaling))
    angles = positions[..., None].astype(jnp.float32) * jnp.expand_dims(frequencies, range(positions.ndim))
    return angles.reshape(*positions.shape[:-1], axes * pairs)


def rope_frequencies(pairs: int, base: float, scaling: RopeScaling | None) -> np.ndarray:
    """Radians per position, float32 [pairs]: base^(-i / pairs), stretched by `scaling` as in Llama 3.1.

    Computed on the host in float64: an error of the last digit grows with the position.
    """
    frequencies = base ** (-np.arange(pairs) / pairs)
    if scaling:
        turns = scaling.original_max_position * frequencies / (2 * np.pi)
        span = scaling.high_freq_factor - scaling.low_freq_factor
        kept = np.clip((turns - scaling.low_freq_factor) / span, 0, 1)
        frequencies = frequencies * (kept + (1 - kept) / scaling.factor)
    return frequencies.astype(np.float32)


def mrope_angles(positions: jax.Array, axes: tuple[int, ...], base: float, scaling: RopeScaling | None) -> jax.Array:
    """Angles of M-RoPE (Qwen2-VL, arXiv 2409.12191 §2.1): the frequencies of text, each turned by one coordinate.

    positions: int [..., 3], (time, row, column), equal in text; axes: of each pair of values, which of the three.
    Returns float32 [..., head_dim / 2].
    """
    frequencies = jnp.asarray(rope_frequencies(len(axes), base, scaling))
    return positions[..., jnp.array(axes)].astype(jnp.float32) * jnp.expand_dims(frequencies, range(positions.ndim - 1))


def apply_rope(x: jax.Array, angles: jax.Array) -> jax.Array:
    """Rotates x [..., heads, E] by angles [..., E / 2]. Value i pairs with i + E / 2, as in published Qwen models."""
    cos, sin = jnp.cos(angles)[..., None, :], jnp.sin(angles)[..., None, :]
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


class Attention(nnx.Module):
    """Grouped-query attention. Shapes: x [..., T, width], angles [..., T, E / 2]. `fused` is explained at `fuse`."""

    def __init__(
        self,
        width,
        *,
        num_heads,
        num_kv_heads,
        head_dim,
        qkv_bias,
        qk_norm,
        fused,
        eps,
        out_scale,
        dtype,
        rngs,
        o_bias=False,
    ):
        self.num_kv_heads, self.head_dim, self.fused = num_kv_heads, head_dim, fused

        def linear(n_in, n_out, bias=False, scale=1.0):
            init = nnx.initializers.variance_scaling(scale**2, "fan_in", "normal")
            return nnx.Linear(
                n_in, n_out, use_bias=bias, kernel_init=init, dtype=dtype, param_dtype=jnp.float32, rngs=rngs
            )

        if fused:
            self.qkv_proj = linear(width, (num_heads + 2 * num_kv_heads) * head_dim, qkv_bias)
        else:
            self.q_proj = linear(width, num_heads * head_dim, qkv_bias)
            self.k_proj = linear(width, num_kv_heads * head_dim, qkv_bias)
            self.v_proj = linear(width, num_kv_heads * head_dim, qkv_bias)
        self.o_proj = linear(num_heads * head_dim, width, o_bias, out_scale)
        self.q_norm = rms_norm(head_dim, eps, dtype, rngs) if qk_norm else None
        self.k_norm = rms_norm(head_dim, eps, dtype, rngs) if qk_norm else None

    def project(self, x, angles):
        """Rotated queries [..., T, H, E] and keys [..., T, K, E], and values [..., T, K, E]."""
        split = lambda y: y.reshape(*x.shape[:-1], -1, self.head_dim)  # noqa: E731
        if self.fused:
            groups = self.qkv_proj(x).reshape(*x.shape[:-1], self.num_kv_heads, -1, self.head_dim)
            q, k, v = split(groups[..., :-2, :]), groups[..., -2, :], groups[..., -1, :]
        else:
            q, k, v = (checkpoint_name(split(y(x)), "qkv") for y in (self.q_proj, self.k_proj, self.v_proj))
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        return apply_rope(q, angles), apply_rope(k, angles), v

    def output(self, heads):
        return self.o_proj(heads.reshape(*heads.shape[:-2], -1))


class SwiGLU(nnx.Module):
    """down(silu(gate(x)) · up(x)) (Shazeer, arXiv 2002.05202). `fused` is explained at `fuse`."""

    def __init__(self, width, mlp_width, *, bias, fused, out_scale, dtype, rngs):
        def linear(n_in, n_out, scale=1.0):
            init = nnx.initializers.variance_scaling(scale**2, "fan_in", "normal")
            return nnx.Linear(
                n_in, n_out, use_bias=bias, kernel_init=init, dtype=dtype, param_dtype=jnp.float32, rngs=rngs
            )

        self.fused = fused
        if fused:
            self.gate_up_proj = nnx.LinearGeneral(
                width, (2, mlp_width), use_bias=bias, dtype=dtype, param_dtype=jnp.float32, rngs=rngs
            )
        else:
            self.gate_proj = linear(width, mlp_width)
            self.up_proj = linear(width, mlp_width)
        self.down_proj = linear(mlp_width, width, out_scale)

    def __call__(self, x):
        return self.down_proj(self.gated(x))

    def gated(self, x):
        if self.fused:
            both = self.gate_up_proj(x)
            gate, up = both[..., 0, :], both[..., 1, :]
        else:
            gate, up = (checkpoint_name(y, "mlp") for y in (self.gate_proj(x), self.up_proj(x)))
        return jax.nn.silu(gate) * up


class GeluMLP(nnx.Module):
    """down(gelu(up(x))), with the tanh approximation of GELU."""

    def __init__(self, width, mlp_width, *, bias, fused, out_scale, dtype, rngs):
        del fused  # there is nothing to fuse
        options = dict(use_bias=bias, dtype=dtype, param_dtype=jnp.float32, rngs=rngs)
        init = nnx.initializers.variance_scaling(out_scale**2, "fan_in", "normal")
        self.up_proj = nnx.Linear(width, mlp_width, **options)
        self.down_proj = nnx.Linear(mlp_width, width, kernel_init=init, **options)

    def __call__(self, x):
        return self.down_proj(jax.nn.gelu(checkpoint_name(self.up_proj(x), "mlp"), approximate=True))


MLPS = {"swiglu": SwiGLU, "gelu_tanh": GeluMLP}


class Block(nnx.Module):
    """Pre-norm attention and MLP. `packed` sees whole sequences, `prefill` and `decode`
    write into a paged KV cache (`models.paged`) and read from it.

    The residual stream is float32 whatever the compute dtype: rounded to bfloat16 at each of its additions, it would be
    the largest part of what separates the log-probs of sampler and trainer.
    """

    def __init__(
        self, width, mlp_width, *, norm, mlp, mlp_bias, eps, dtype, rngs, out_scale, fused=False, **attention_shape
    ):
        parts = dict(fused=fused, out_scale=out_scale, dtype=dtype, rngs=rngs)
        self.attn_norm = NORMS[norm](width, eps, dtype, rngs)
        self.attn = Attention(width, eps=eps, **parts, **attention_shape)
        self.mlp_norm = NORMS[norm](width, eps, dtype, rngs)
        self.mlp = MLPS[mlp](width, mlp_width, bias=mlp_bias, **parts)

    def packed(self, x, angles, segments, *, causal, implementation, mesh, remat_mlp):
        """What the block adds to the stream, float32 [R, T, D], given the stream, x [R, T, D].

        Tokens see only their own segment. remat_mlp: nothing inside the MLP is kept for the backward pass anyway, so
        where there are many tokens it sees them piece by piece.
        """
        q, k, v = self.attn.project(self.attn_norm(x), angles)
        heads = attention.attend_packed(q, k, v, segments, causal=causal, implementation=implementation, mesh=mesh)
        attended = self.attn.output(heads).astype(jnp.float32)
        middle = checkpoint_name(x + attended, "middle")
        mlp = lambda x: self.mlp(self.mlp_norm(x))  # noqa: E731
        return attended + (_in_pieces(mlp, middle, mesh) if remat_mlp else mlp(middle))

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

    def decode(self, x, added, angles, pages, table, positions, *, implementation, mesh):
        """One new token per row, at positions int32 [B], -1 in empty rows. Returns x, added, pages.

        The residual stream is x + added: x [B, D]; added, the sum over parts [P, B, D] or None for nothing, is what the
        block before adds, left for the next norm, as a GPU does both at once. The new token goes into its page and
        sees all up to itself.
        """
        kernel = attention.paged_kernel(implementation, self.attn.head_dim)
        if kernel == "gpu":
            from kimi_jax.models import decode_gpu

            if decode_gpu.takes(self, mesh):
                return decode_gpu.decode(self, x, added, angles, pages, table, positions, interpret=False)
        x = x if added is None else x + jnp.sum(added, axis=0)
        q, k, v = self.attn.project(self.attn_norm(x), angles)
        heads, *pages = paged.decode_step(q, k, v, *pages, table, positions, implementation=kernel, mesh=mesh)
        x = x + self.attn.output(heads)
        return x, self.mlp(self.mlp_norm(x))[None], tuple(pages)


def _in_pieces(f, x, mesh):
    """f, which acts on each token, over x [R, T, D], at most MLP_TOKENS tokens of a device at a time.

    f is computed again in the backward pass, piece by piece: each array inside the MLP of the 1.5B shape would take
    2.2 GiB for a row of 131,072 tokens.
    """
    ways = mesh.shape["data"] * mesh.shape["fsdp"] if mesh is not None else 1
    rows = x.shape[0] // ways if x.shape[0] % ways == 0 else x.shape[0]
    tokens = max(MLP_TOKENS // rows, 1)
    if x.shape[1] <= tokens:
        return f(x)
    return jnp.moveaxis(jax.lax.map(jax.checkpoint(f), jnp.moveaxis(x, 1, 0), batch_size=tokens), 0, 1)


def fuse(block: dict, head_dim: int) -> dict:
    """Parameters of a Block -> those of a Block with fused=True: matrices that read the same input become one.

    A decode step takes as long as it takes to read the weights, and few large matrices are read faster than many small
    ones. Both have an axis to split over devices without cutting what belongs together: qkv_proj [D, K · (G + 2) · E]
    holds, for each of K key/value heads, its G query heads, the key and the value; gate_up_proj is [D, 2, F].
    """
    attn, mlp = dict(block["attn"]), dict(block["mlp"])
    q, k, v = (attn.pop(f"{name}_proj") for name in "qkv")
    K = k["kernel"].shape[-1] // head_dim

    def join(*qkv):  # kernels or biases
        groups = [w.reshape(*w.shape[:-1], K, -1, head_dim) for w in qkv]
        return jnp.concatenate(groups, axis=-2).reshape(*qkv[0].shape[:-1], -1)

    attn["qkv_proj"] = jax.tree.map(join, q, k, v)
    stack = lambda gate, up: jnp.stack([gate, up], axis=-2)  # noqa: E731
    mlp["gate_up_proj"] = jax.tree.map(stack, mlp.pop("gate_proj"), mlp.pop("up_proj"))
    return block | {"attn": attn, "mlp": mlp}


class RMSNorm(nnx.RMSNorm):
    """x / rms(x) · scale over the last axis (arXiv 1910.07467), in float32, cast back to the compute dtype."""

    def __call__(self, x):
        x = x.astype(jnp.float32)
        # The scale comes last: of this order, and of no other, XLA makes a single kernel on GPUs.
        normalized = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + self.epsilon)
        scale = self.scale[...].astype(self.dtype)  # as in the sampling layout, so that both round alike
        return (normalized * jnp.expand_dims(scale, range(x.ndim - 1))).astype(self.dtype)


def rms_norm(width, eps, dtype, rngs) -> RMSNorm:
    return RMSNorm(width, epsilon=eps, dtype=dtype, param_dtype=jnp.float32, rngs=rngs)


class LayerNorm(nnx.LayerNorm):
    """(x - mean) / std · scale + bias over the last axis (arXiv 1607.06450), in float32, cast back."""

    def __call__(self, x, **_):
        x = x.astype(jnp.float32)
        x = x - jnp.mean(x, axis=-1, keepdims=True)
        x = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + self.epsilon)
        scale, bias = (jnp.expand_dims(p[...].astype(jnp.float32), range(x.ndim - 1)) for p in (self.scale, self.bias))
        return (x * scale + bias).astype(self.dtype)


def layer_norm(width, eps, dtype, rngs) -> LayerNorm:
    return LayerNorm(width, epsilon=eps, dtype=dtype, param_dtype=jnp.float32, rngs=rngs)


NORMS = {"rms": rms_norm, "layer": layer_norm}
