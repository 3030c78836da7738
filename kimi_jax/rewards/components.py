"""What a response earns: one for being right, and named components beside it, each with a weight of the config.

    r = [correct] + Σ_c weight_c · c        nan where the response is ungradable, so that using it by mistake shows

A component is a pure function of a complete group and says something about each of its k responses. It sees all that
`Group` has: the problem, and of each response its text, its length, why it ended, and its verdict. Those of the user
run in worker processes (`rewards.pool`); where one fails, it is nan for its group, and so is the reward.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

import numpy as np

from kimi_jax.rewards.length import length_reward
from kimi_jax.rewards.own import find_function
from kimi_jax.types import Outcome, Problem, RolloutGroup, StopReason, Verdict


@dataclasses.dataclass(frozen=True)
class Response:
    text: str
    tokens: int  # how many, the end token included
    stop: StopReason
    verdict: Verdict


@dataclasses.dataclass(frozen=True)
class Group:
    """What a component sees of the responses to one problem."""

    problem: Problem  # without its images
    responses: tuple[Response, ...]

    @classmethod
    def of(cls, group: RolloutGroup) -> "Group":
        pairs = zip(group.rollouts, group.verdicts, strict=True)
        responses = tuple(Response(rollout.text, len(rollout), rollout.stop, verdict) for rollout, verdict in pairs)
        return cls(dataclasses.replace(group.problem, images=()), responses)

    @property
    def gradable(self) -> np.ndarray:
        """bool [k]"""
        return np.array([response.verdict.outcome != Outcome.UNGRADABLE for response in self.responses], bool)

    @property
    def correct(self) -> np.ndarray:
        """bool [k]"""
        return np.array([response.verdict.outcome == Outcome.CORRECT for response in self.responses], bool)


Component = Callable[[Group], Sequence[float] | np.ndarray]


def length(group: Group) -> np.ndarray:
    """λ of the length reward, in [-0.5, 0.5]; ungradable responses set neither min_len nor max_len (k1.5 §2.3.3)."""
    lengths = np.array([response.tokens for response in group.responses], int)
    reward = np.zeros(len(lengths))
    reward[group.gradable] = length_reward(group.correct[group.gradable], lengths[group.gradable])
    return reward


def repetition(group: Group) -> np.ndarray:
    """-1 for a response that was stopped for repeating itself, else 0 (k1.5 §2.6.2)."""
    return np.array([-1.0 if response.stop == StopReason.REPETITION else 0.0 for response in group.responses])


def format(group: Group) -> np.ndarray:
    """-1 for a response in which the verifier found no answer to judge, or more than one, else 0."""
    return np.array([0.0 if response.verdict.well_formed else -1.0 for response in group.responses])


COMPONENTS: dict[str, Component] = {"length": length, "repetition": repetition, "format": format}


def shaped_rewards(
    group: RolloutGroup, weights: Mapping[str, float], own: Mapping[str, np.ndarray] = MappingProxyType({})
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """The reward of each response, float64 [k], and the components that it is made of, unweighted, correctness first.

    weights: of components by name; those that are not named count nothing. own: components of the user, each float [k],
    nan where there is none; one that counts takes the reward with it. All are nan where a response is ungradable.
    """
    seen = Group.of(group)
    parts = {"correct": seen.correct.astype(float)}
    parts |= {name: np.asarray(component(seen)) for name, component in COMPONENTS.items()} | dict(own)
    parts = {name: np.where(seen.gradable, part, np.nan) for name, part in parts.items()}
    return parts["correct"] + sum(weight * parts[name] for name, weight in weights.items() if weight), parts


@dataclasses.dataclass(frozen=True)
class Failure:
    """In place of the values of a component."""

    reason: str


def own_component(function: str, group: Group) -> np.ndarray:
    """The values, float64 [k], of a component of the user, "module:function". Raises what it raises, or ValueError."""
    k = len(group.responses)
    values = np.asarray(find_function(function)(group), float)
    if values.shape != (k,):
        raise ValueError(f"{function} returned the shape {values.shape} for {k} responses; return one number for each")
    if not np.isfinite(values).all():
        raise ValueError(f"{function} returned {values[~np.isfinite(values)][0]}; return finite numbers")
    return values
