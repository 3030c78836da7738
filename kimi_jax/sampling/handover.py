"""The hand-over: from the training copy of the weights to the sampling copy, on the same mesh, in one jitted call."""

from collections.abc import Callable

import jax

from kimi_jax.models.policy import Policy
from kimi_jax.training import sharding


def make_handover(policy: Policy, mesh: jax.sharding.Mesh, *, dtype: str) -> Callable[[dict, dict | None], dict]:
    """`to_rollout(params, previous)`: casts to `dtype`, unstacks and fuses the layers, lays them out for sampling.

    `previous`, the last rollout copy or None, is donated, so that never more than one exists; the masters are not.
    """
    layout = lambda params, previous: policy.to_sampling_layout(params, dtype)  # noqa: E731
    shapes = jax.eval_shape(lambda: layout(policy.init(jax.random.key(0)), None))
    out = sharding.shardings(mesh, shapes, sharding.SAMPLE_RULES)
    # keep_unused: the computation does not read `previous`, it writes into its memory.
    return jax.jit(layout, donate_argnums=1, keep_unused=True, out_shardings=out)


def num_bytes(params: dict) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(params))
