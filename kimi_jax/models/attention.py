"""Attention over packed rows (training, prefill). That over the KV cache is in `paged`.

Implementations, chosen by name so that nothing depends on guesses inside a library:

    xla     everywhere; materialises [T, T] scores
    cudnn   NVIDIA GPUs, 16-bit types
    splash  TPUs (a Pallas kernel that knows segments)
    splash_interpret   the same kernel, interpreted: how CPU tests run the TPU path
"""

import jax
import jax.numpy as jnp

from kimi_jax.models import paged

IMPLEMENTATIONS = ("xla", "cudnn", "splash", "splash_interpret")


def choose_implementation(platform: str, dtype: str) -> str:
    """The fastest implementation that `platform` ("cpu", "gpu", "tpu") has for `dtype`."""
    if platform == "tpu":
        return "splash"
    return "cudnn" if platform in ("gpu", "cuda") and dtype in ("bfloat16", "float16") else "xla"


def attend_packed(q, k, v, segments, *, causal: bool, implementation: str, mesh=None):
    """Attention within the segments of packed rows.

    q [R, T, H, E], k and v [R, T, K, E], segments int32 [R, T]. Returns [R, T, H, E].
    Token s is visible to token t when their segments are equal and, if `causal`, s <= t:

        segments 1 1 2 2 0          visible (causal)   1 . . . .
                                                       1 1 . . .
                                                       . . 1 . .
                                                       . . 1 1 .
                                                       . . . . 1

    Padding (segment 0) sees padding, so that no row of the softmax is empty; nothing else sees it.
    """
    if implementation.startswith("splash"):
        from kimi_jax.models import splash

        return splash.attend(
            q, k, v, segments, causal=causal, mesh=mesh, interpret=implementation == "splash_interpret"
        )
    visible = packed_mask(segments, causal=causal)
    return jax.nn.dot_product_attention(q, k, v, mask=visible[:, None], implementation=implementation)  # type: ignore[call-overload]


def packed_mask(segments, *, causal: bool):
    """bool [R, T, T]: see `attend_packed`."""
    visible = segments[:, :, None] == segments[:, None, :]
    return visible & jnp.tri(segments.shape[1], dtype=bool)[None] if causal else visible


def paged_kernel(implementation: str, head_dim: int) -> str:
    """What goes with `implementation` over the cache: a name of `models.paged`."""
    kernel = {"cudnn": "gpu", "splash": "tpu"}.get(implementation, "xla")
    return kernel if paged.takes(kernel, head_dim) else "xla"
