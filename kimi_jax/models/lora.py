"""Low-rank adapters (LoRA, arXiv 2106.09685): W + (α / r) · A B in place of W, where only A and B are trained.

They are part of the parameters, each at the path of the matrix that it adapts:

    decoder/runs/0/attn/q_proj/kernel     W [L, D, N]
    lora/decoder/runs/0/attn/q_proj/a     A [L, D, r], at first normal with variance 1 / D
    lora/decoder/runs/0/attn/q_proj/b     B [L, r, N], at first 0: the model begins as it was
    lora/scale                            α / r

Whoever computes with parameters calls `attached`, which puts the adapters of a layer where they are sliced together
with it, and `merged` on as much as should exist at once: on one layer in training, where the others stay as small as
they are stored, and in the hand-over to sampling; on all of them for export. Without adapters both change nothing.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from kimi_jax.models import paths


def init(params: dict, key: jax.Array, *, rank: int, alpha: float, targets: Sequence[str]) -> dict:
    """New adapters, float32: what belongs under params["lora"].

    params: of the model (arrays or shapes). targets: patterns over the paths of kernels of stacked layers. Raises
    ValueError where one matches none.
    """
    kernels = {
        path: leaf.shape
        for path, leaf in paths.flatten(params)
        if path.endswith("/kernel") and "runs" in path.split("/") and len(leaf.shape) == 3
    }
    chosen = sorted(paths.matching(kernels, targets, purpose="the kernels to adapt"))
    adapters = {"scale": jnp.float32(alpha / rank)}
    for path, one_key in zip(chosen, jax.random.split(key, len(chosen)), strict=True):
        L, D, N = kernels[path]
        module = path.removesuffix("/kernel")
        adapters[f"{module}/a"] = jax.random.normal(one_key, (L, D, rank), jnp.float32) * D**-0.5
        adapters[f"{module}/b"] = jnp.zeros((L, rank, N), jnp.float32)
    return paths.nest(adapters.items())


def attached(params: dict) -> dict:
    """Parameters without "lora", the adapters standing beside their kernels instead: a scan slices both."""
    if "lora" not in params:
        return params
    adapters = dict(params["lora"])
    scale = jax.lax.stop_gradient(adapters.pop("scale"))
    return _attach({name: child for name, child in params.items() if name != "lora"}, adapters, scale)


def merged(params: dict) -> dict:
    """Any part of attached parameters, one layer or stacks of them, as the model reads it. What is adapted is float32.

    The product is as exact as the adapters, on every device: sampler and trainer see the same matrix.
    """
    if "lora" in params:
        params, adapter = dict(params), params["lora"]
        product = jnp.matmul(adapter["a"], adapter["b"], precision=jax.lax.Precision.HIGHEST)
        params["kernel"] = params["kernel"].astype(jnp.float32) + adapter["scale"][..., None, None] * product
        del params["lora"]
    return {name: merged(child) if isinstance(child, dict) else child for name, child in params.items()}


def merge(params: dict) -> dict:
    """A whole model in the training layout, without adapters, that computes the same."""
    return merged(attached(params))


def _attach(params: dict, adapters: dict, scale: jax.Array) -> dict:
    if adapters.keys() == {"a", "b"}:
        return params | {"lora": adapters | {"scale": jnp.broadcast_to(scale, adapters["a"].shape[:1])}}
    return params | {name: _attach(params[name], below, scale) for name, below in adapters.items()}
