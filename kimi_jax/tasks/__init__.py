"""The tasks by name, and the one entry point for verdicts."""

import difflib
import functools
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType

from kimi_jax.rewards.own import find_function
from kimi_jax.tasks.base import Task, verify_exact
from kimi_jax.tasks.equivalence import EQUIVALENCE
from kimi_jax.tasks.math import CHAIN, COUNTDOWN_TASKS
from kimi_jax.tasks.visual import VISUAL_TASKS
from kimi_jax.types import Outcome, Problem, Verdict

TASKS: dict[str, Task] = {task.name: task for task in (CHAIN, *COUNTDOWN_TASKS, *VISUAL_TASKS, EQUIVALENCE)}


def _verify_math(problem: Problem, text: str) -> Verdict:
    from kimi_jax.rewards.math_answer import verify_math  # imports an algebra system

    return verify_math(problem.answer, text)


def _verify_code(problem: Problem, text: str, *, sandbox: str | None = None) -> Verdict:
    from kimi_jax.rewards.code import verify_code  # imports the sandbox

    return verify_code(problem.answer, text, sandbox=sandbox)


# Of problems that come from files, which nothing here draws: `answer` after "Answer:", mathematics in any form, or a
# program that passes tests.
VERIFIERS: dict[str, Callable[..., Verdict]] = {"exact": verify_exact, "math": _verify_math, "code": _verify_code}


def get_task(name: str) -> Task:
    """The task called `name`. Raises ValueError with the nearest names where there is none."""
    if name not in TASKS:
        raise ValueError(_unknown(name, TASKS))
    return TASKS[name]


def get_verifier(name: str, *, sandbox: str | None = None) -> Callable[[Problem, str], Verdict]:
    """What judges problems whose `task` is `name`. Raises ValueError with the nearest names where there is nothing.

    sandbox: the URL of a service that runs code; None: one in the process that calls the verifier.
    """
    if name == "code":
        return functools.partial(_verify_code, sandbox=sandbox)
    if name not in (known := {task.name: task.verify for task in TASKS.values()} | VERIFIERS):
        raise ValueError(_unknown(name, known))
    return known[name]


def _unknown(name: str, known: Iterable[str]) -> str:
    [near] = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
    return f"no task is called {name!r}; did you mean {near!r}? There are: {', '.join(sorted(known))}"


def verify(
    problem: Problem, text: str, own: Mapping[str, str] = MappingProxyType({}), sandbox: str | None = None
) -> Verdict:
    """The verdict of the problem's task. A verifier that fails gives UNGRADABLE, with the reason.

    own: verifiers of the user by name of the task, "module:function", which go before those of the tasks here. sandbox:
    see `get_verifier`.
    """
    try:
        name = problem.task
        judge = find_function(own[name]) if name in own else get_verifier(name, sandbox=sandbox)
        verdict = judge(problem, text)
        if not isinstance(verdict, Verdict):
            raise TypeError(f"the verifier returned {verdict!r:.80}, not a Verdict")
        return verdict
    except Exception as error:  # a broken verifier or problem must neither stop a run nor pass for a wrong answer
        return Verdict(Outcome.UNGRADABLE, f"{type(error).__name__}: {error}")
