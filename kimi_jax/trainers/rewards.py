"""From config.rewards to what judges the responses of a run, and what refuses problems that cannot be judged."""

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Mapping, Sequence

import ml_collections
import numpy as np

from kimi_jax.rewards.components import COMPONENTS, Failure, Group, own_component
from kimi_jax.rewards.own import find_function
from kimi_jax.rewards.pool import WorkerPool
from kimi_jax.tasks import get_verifier, verify
from kimi_jax.training import distributed
from kimi_jax.types import Outcome, Problem, RolloutGroup, Verdict

_COMPONENT = re.compile(r"(?P<name>\w+)=(?P<weight>[^*]+)\*(?P<function>\S+)")


@dataclasses.dataclass(frozen=True)
class OwnComponent:
    weight: float
    function: str  # "module:function"


def verifier(options: Mapping) -> Callable[[Problem, str], Verdict]:
    """Judges by the user's verifiers and else by those of the tasks; workers can import it. options: config.rewards."""
    return functools.partial(verify, own=own_verifiers(options["verifiers"]), sandbox=options["sandbox"])


def own_verifiers(named: Sequence[str]) -> dict[str, str]:
    """{task: "module:function"} of entries "task=module:function". Raises ValueError for a name that leads nowhere."""
    own = {}
    for entry in named:
        task, equals, function = entry.partition("=")
        if not (task and equals):
            raise ValueError(f"config.rewards.verifiers has {entry!r}; write 'task=module:function'.")
        _find(function, "verifiers")
        own[task] = function
    return own


def own_components(named: Sequence[str]) -> dict[str, OwnComponent]:
    """By name, from entries "name=weight*module:function". Raises ValueError for what cannot be one."""
    own = dict[str, OwnComponent]()
    for entry in named:
        found = _COMPONENT.fullmatch(entry)
        try:
            weight = float(found["weight"]) if found else math.nan
        except ValueError:
            weight = math.nan
        if not found or not math.isfinite(weight):
            raise ValueError(
                f"config.rewards.components has {entry!r}; write 'name=weight*module:function', such as "
                "'brevity=0.1*my_rewards:brevity'."
            )
        name = found["name"]
        if name in (taken := ("correct", *COMPONENTS, *own)):
            raise ValueError(
                f"config.rewards.components has {entry!r}, but there is a {name} already. Call it none of "
                f"{', '.join(taken)}."
            )
        _find(found["function"], "components")
        own[name] = OwnComponent(weight, found["function"])
    return own


def _find(function: str, key: str) -> None:
    try:
        find_function(function)
    except ValueError as error:
        raise ValueError(f"config.rewards.{key}: {error}") from error


def check_problems(problems: Sequence[Problem], options: ml_collections.ConfigDict, *, from_files: bool) -> None:
    """Refuses problems that nothing can judge, by their id, and code that the sandbox cannot run.

    Of problems from files the ground truth is looked at: by it an empty response must be wrong, not ungradable. Those
    that a verifier of the user judges are the user's. Raises ValueError.
    """
    own, code = own_verifiers(options.verifiers), []
    for problem in problems:
        if problem.task in own:
            continue
        try:
            judge = get_verifier(problem.task)
        except ValueError as error:
            raise ValueError(f"Problem {problem.id!r}: {error}") from None
        if not from_files:
            continue
        try:
            verdict = judge(problem, "")
        except Exception as error:
            verdict = Verdict(Outcome.UNGRADABLE, str(error))
        if verdict.outcome == Outcome.UNGRADABLE:
            raise ValueError(
                f"Problem {problem.id!r} of task {problem.task!r} cannot be judged by its answer "
                f"{problem.answer!r:.80}: {verdict.detail}"
            )
        if problem.task == "code":
            code.append(problem)
    if code:
        _check_code(code, options)


def _check_code(problems: Sequence[Problem], options: ml_collections.ConfigDict) -> None:
    from kimi_jax.rewards.code import check_sandbox, ground_truth, longest_test_s

    needs: dict[tuple[str, str], str] = {}  # the first problem that needs a language
    for problem in problems:
        request = ground_truth(problem.answer)
        languages = [request.language, *([request.checker["language"]] if request.checker else [])]
        for language in languages:
            needs.setdefault((request.profile, language), problem.id)
        if (longest := longest_test_s(request)) >= options.deadline_s and options.workers:
            raise ValueError(
                f"Problem {problem.id!r}: one test may take {longest:g} s, and config.rewards.deadline_s="
                f"{options.deadline_s:g}: a program that never ends would be ungradable. Raise the deadline, which "
                "should have room for all tests of a response."
            )
    check_sandbox(options.sandbox, needs)


# --- components of the user -------------------------------------------------------------------------------------------


def component_pool(own: Mapping[str, OwnComponent], options: ml_collections.ConfigDict) -> WorkerPool:
    """Workers apart from those of the verifiers, and none without components."""
    workers = options.workers if own else 0
    return WorkerPool(own_component, failed=Failure, workers=workers, deadline_s=options.deadline_s)


def own_values(
    groups: Sequence[RolloutGroup], own: Mapping[str, OwnComponent], pool: WorkerPool
) -> tuple[list[dict[str, np.ndarray]], list[dict[str, str]]]:
    """(values, failures) per group, by component: float [k], nan where it failed; and why it did.

    All processes compute, and the first one decides: a deadline may be missed in one and not in another.
    """
    seen = [Group.of(group) for group in groups]
    tickets = [[pool.call(component.function, group) for component in own.values()] for group in seen]
    values: list[dict[str, np.ndarray]] = []
    failures: list[dict[str, str]] = []
    for group, called in zip(seen, tickets, strict=True):
        answers = dict(zip(own, (ticket.result() for ticket in called), strict=True))
        failures.append({name: answer.reason for name, answer in answers.items() if isinstance(answer, Failure)})
        nothing = np.full(len(group.responses), np.nan)
        values.append({name: nothing if name in failures[-1] else answer for name, answer in answers.items()})
    return distributed.agreed(values) if own else values, failures


def without_reward(
    groups: Sequence[RolloutGroup], rewards: Sequence[np.ndarray], failures: Sequence[Mapping[str, str]]
) -> list[str]:
    """Why, one reason for each response that has no reward."""
    reasons = []
    for group, reward, failed in zip(groups, rewards, failures, strict=True):
        of_group = next((f"{name}: {reason}" for name, reason in failed.items()), "as judged by process 0")
        for verdict, value in zip(group.verdicts, reward, strict=True):
            if not np.isfinite(value):
                reasons.append(verdict.detail if verdict.outcome == Outcome.UNGRADABLE else of_group)
    return reasons
