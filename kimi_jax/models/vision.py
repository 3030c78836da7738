"""The vision tower: native-resolution patches in, one embedding per merged patch out (as in MoonViT and Qwen2-VL)."""

import jax
import jax.numpy as jnp
from flax import nnx

from kimi_jax.models import layers
from kimi_jax.models.config import VisionConfig


class VisionEnds(nnx.Module):
    """What stands before and after the blocks: patch embedding; norm, merge of merge² neighbours, MLP projector."""

    def __init__(self, config: VisionConfig, out_width: int, *, dtype, rngs):
        merged = config.merge_size**2 * config.width
        linear = lambda n_in, n_out: nnx.Linear(n_in, n_out, dtype=dtype, param_dtype=jnp.float32, rngs=rngs)  # noqa: E731
        self.patch_embed = linear(config.patch_dim, config.width)
        self.norm = layers.rms_norm(config.width, config.norm_eps, dtype, rngs)
        self.proj_in = linear(merged, merged)
        self.proj_out = linear(merged, out_width)

    def embed(self, patches):
        return self.patch_embed(patches)

    def project(self, x, merge_size: int):
        """x [R, P, width] -> [R, P / merge², out_width]. merge² neighbours stand together, so merging is a reshape."""
        x = self.norm(x)
        x = x.reshape(x.shape[0], x.shape[1] // merge_size**2, -1)
        return self.proj_out(jax.nn.gelu(self.proj_in(x)))


def vision_block(config: VisionConfig, *, dtype, rngs) -> layers.Block:
    return layers.Block(
        config.width,
        config.mlp_width,
        num_heads=config.num_heads,
        num_kv_heads=config.num_heads,
        head_dim=config.width // config.num_heads,
        qkv_bias=True,
        qk_norm=False,
        eps=config.norm_eps,
        out_scale=(2 * config.num_layers) ** -0.5,
        dtype=dtype,
        rngs=rngs,
    )
