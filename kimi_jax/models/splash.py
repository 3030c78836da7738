"""Packed attention on TPUs by JAX's splash attention kernel, which knows segments and skips what no query may see."""

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

_BLOCK_SIZES = (512, 256, 128)  # larger blocks keep the matrix unit busier; 512 fits the vector memory of every TPU


def attend_rows(q, k, v, segments, *, causal: bool, interpret: bool):
    """Attention within segments on one device, differentiable; see `models.attention.attend_packed`.

    q [R, T, H, E], k and v [R, T, K, E], segments int32 [R, T], T a multiple of 128. Returns [R, T, H, E].
    interpret: run the kernel as ordinary JAX, on any platform.
    """
    q = q * q.shape[-1] ** -0.5  # the kernel leaves scaling to us
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
        residual_checkpoint_name="attention",  # see `models.config.KEEPABLE`
        interpret=interpret,
    )

    def one_row(q, k, v, segments):  # heads first is how the kernel wants them
        q, k, v = (jnp.moveaxis(x, 1, 0) for x in (q, k, v))
        return jnp.moveaxis(kernel(q, k, v, segment_ids=kernels.SegmentIds(segments, segments)), 0, 1)

    return jax.vmap(one_row)(q, k, v, segments)
