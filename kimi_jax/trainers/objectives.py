"""The objectives of RL by name (`config.rl.objective`): how rewards become advantages, and what is minimized."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import ml_collections
import numpy as np

from kimi_jax.losses import policy_gradient
from kimi_jax.losses.mirror_descent import baseline, surrogate_loss


@dataclasses.dataclass(frozen=True)
class Objective:
    """advantages: of the gradable responses of one problem, from their rewards [k] and whether they are correct [k].
    loss: `loss(logprobs, batch, **hyper)` gives (loss, parts), as `losses.mirror_descent.surrogate_loss`.
    hyper: its numbers, which are runtime values: others compile nothing.
    """

    advantages: Callable[[np.ndarray, np.ndarray], np.ndarray]
    loss: Callable[..., tuple[jax.Array, dict[str, jax.Array]]]
    hyper: dict[str, np.float32] = dataclasses.field(default_factory=dict)


def find(options: ml_collections.ConfigDict) -> Objective:
    """That of config.rl, whose names `trainers.config.check_config` has looked at."""
    return _OBJECTIVES[options.objective](options)


def _mirror_descent(options: ml_collections.ConfigDict) -> Objective:
    def advantages(rewards: np.ndarray, correct: np.ndarray) -> np.ndarray:
        return rewards - float(baseline(rewards, kind=options.baseline, tau=options.tau))

    loss = functools.partial(surrogate_loss, form=options.form)
    return Objective(advantages, loss, {"tau": np.float32(options.tau)})


def _grpo(options: ml_collections.ConfigDict) -> Objective:
    hyper = {name: np.float32(options.grpo[name]) for name in ("clip", "beta")}
    return Objective(policy_gradient.standardized, policy_gradient.clipped_loss, hyper)


def _policy_gradient(advantages: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> Callable[..., Objective]:
    return lambda options: Objective(advantages, policy_gradient.policy_gradient_loss)


_OBJECTIVES: dict[str, Callable[[ml_collections.ConfigDict], Objective]] = {
    "mirror_descent": _mirror_descent,
    "grpo": _grpo,
    "reinforce": _policy_gradient(policy_gradient.rewards_themselves),
    "rloo": _policy_gradient(policy_gradient.leave_one_out),
    "rest": _policy_gradient(policy_gradient.best_only),
}
