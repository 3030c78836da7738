"""Components of the reward as users write them, most of them badly. Apart, so that no worker imports pytest."""

import os
import time

import numpy as np

from kimi_jax.rewards.components import Group


def share_of_tokens(group: Group) -> np.ndarray:
    tokens = np.array([response.tokens for response in group.responses])
    return tokens / tokens.sum()


def fails(group):
    return 1 / 0


def one_for_all(group):
    return 1.0


def too_many(group):
    return [0.0] * (len(group.responses) + 1)


def not_finite(group):
    return [np.inf] * len(group.responses)


def words(group):
    return [response.stop.value for response in group.responses]


def hangs(group):
    while True:
        time.sleep(1)


def crashes(group):
    os._exit(7)


def fails_on_even_problems(group: Group) -> list[float]:
    if sum(group.problem.id.encode()) % 2 == 0:
        raise RuntimeError("even")
    return [float(response.tokens) for response in group.responses]
