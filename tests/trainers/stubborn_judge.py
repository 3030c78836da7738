"""A judge that never comes back from some responses. It has a file of its own, so that no worker imports pytest."""

import time
import zlib

from kimi_jax import tasks
from kimi_jax.types import Problem, Verdict


def hangs(problem: Problem, text: str) -> bool:
    return zlib.crc32(f"{problem.id}: {text}".encode()) % 23 == 0


def verify(problem: Problem, text: str) -> Verdict:
    while hangs(problem, text):
        time.sleep(1)
    return tasks.verify(problem, text)
