"""Optimizer and learning-rate schedule, kept apart: the optimizer may be reset, the schedule runs on."""

import jax
import jax.numpy as jnp
import optax


def adam(*, b1: float, b2: float, eps: float, weight_decay: float) -> optax.GradientTransformation:
    """AdamW without the learning rate, which `training.step` applies: its step counter outlives the optimizer state."""
    moments = optax.scale_by_adam(b1=b1, b2=b2, eps=eps)
    return optax.chain(moments, optax.add_decayed_weights(weight_decay, mask=_matrices))


def sgd() -> optax.GradientTransformation:
    """Plain gradient descent: no state, no amplification of rounding, so equalities between layouts can be tested."""
    return optax.identity()


def learning_rate(
    step: jax.Array, *, kind: str, peak: float, end: float, warmup_steps: int, total_steps: int
) -> jax.Array:
    """Linear warm-up from 0 over `warmup_steps`, then constant or a cosine from `peak` to `end` at `total_steps`."""
    if kind not in ("constant", "cosine"):
        raise ValueError(f"Unknown schedule {kind!r}: use 'constant' or 'cosine'.")
    step = step.astype(jnp.float32)
    warm = jnp.minimum(1.0, (step + 1) / max(warmup_steps, 1))
    if kind == "constant":
        return peak * warm
    progress = jnp.clip((step - warmup_steps) / max(total_steps - warmup_steps, 1), 0.0, 1.0)
    return warm * (end + (peak - end) * 0.5 * (1 + jnp.cos(jnp.pi * progress)))


def _matrices(params):
    """Decay acts on matrices, those of adapters included, not on norms and biases; a leading layer axis does not make a
    vector a matrix."""

    def is_matrix(path, leaf):
        return jax.tree_util.keystr(path[-1:], simple=True) in ("kernel", "embedding", "a", "b")

    return jax.tree_util.tree_map_with_path(is_matrix, params)
