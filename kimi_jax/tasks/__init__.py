"""The tasks by name, and the one entry point for verdicts."""

import difflib

from kimi_jax.tasks.base import Task
from kimi_jax.tasks.math import CHAIN, COUNTDOWN_TASKS
from kimi_jax.tasks.visual import VISUAL_TASKS
from kimi_jax.types import Outcome, Problem, Verdict

TASKS: dict[str, Task] = {task.name: task for task in (CHAIN, *COUNTDOWN_TASKS, *VISUAL_TASKS)}


def get_task(name: str) -> Task:
    """The task called `name`. Raises ValueError with the nearest names where there is none."""
    if name not in TASKS:
        near = difflib.get_close_matches(name, TASKS, n=1) or [min(TASKS)]
        raise ValueError(f"no task is called {name!r}; did you mean {near[0]!r}? There are: {', '.join(sorted(TASKS))}")
    return TASKS[name]


def verify(problem: Problem, text: str) -> Verdict:
    """The verdict of the problem's task. A verifier that fails gives UNGRADABLE, with the reason."""
    try:
        return get_task(problem.task).verify(problem, text)
    except Exception as error:  # a broken verifier or problem must neither stop a run nor pass for a wrong answer
        return Verdict(Outcome.UNGRADABLE, f"{type(error).__name__}: {error}")
