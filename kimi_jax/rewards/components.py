"""What a response earns: one for being right, and named components beside it, each with a weight of the config.

    r = [correct] + Σ_c weight_c · c        nan where the response is ungradable, so that using it by mistake shows

A component is a pure function of a complete group and says something about each of its k responses. It sees all of the
group: the problem, texts, tokens, why each response ended, and its verdict.
"""

from collections.abc import Callable, Mapping

import numpy as np

from kimi_jax.rewards.length import length_reward
from kimi_jax.types import Outcome, RolloutGroup, StopReason

Component = Callable[[RolloutGroup], np.ndarray]


def length(group: RolloutGroup) -> np.ndarray:
    """λ of the length reward, in [-0.5, 0.5]; ungradable responses set neither min_len nor max_len (k1.5 §2.3.3)."""
    gradable = _gradable(group)
    correct = np.array([verdict.outcome == Outcome.CORRECT for verdict in group.verdicts], bool)
    lengths = np.array([len(rollout) for rollout in group.rollouts], int)
    reward = np.zeros(len(gradable))
    reward[gradable] = length_reward(correct[gradable], lengths[gradable])
    return reward


def repetition(group: RolloutGroup) -> np.ndarray:
    """-1 for a response that was stopped for repeating itself, else 0 (k1.5 §2.6.2)."""
    return np.array([-1.0 if rollout.stop == StopReason.REPETITION else 0.0 for rollout in group.rollouts])


def format(group: RolloutGroup) -> np.ndarray:
    """-1 for a response in which the verifier found no answer to judge, or more than one, else 0."""
    return np.array([0.0 if verdict.well_formed else -1.0 for verdict in group.verdicts])


COMPONENTS: dict[str, Component] = {"length": length, "repetition": repetition, "format": format}


def shaped_rewards(group: RolloutGroup, weights: Mapping[str, float]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """The reward of each response, float64 [k], and the components that it is made of, unweighted, correctness first.

    weights: of components by name; those that are not named count nothing. All are nan where a response is ungradable.
    """
    gradable = _gradable(group)
    correct = np.array([verdict.outcome == Outcome.CORRECT for verdict in group.verdicts], float)
    parts = {"correct": correct} | {name: component(group) for name, component in COMPONENTS.items()}
    parts = {name: np.where(gradable, part, np.nan) for name, part in parts.items()}
    return parts["correct"] + sum(weight * parts[name] for name, weight in weights.items()), parts


def _gradable(group: RolloutGroup) -> np.ndarray:
    return np.array([verdict.outcome != Outcome.UNGRADABLE for verdict in group.verdicts], bool)
