"""Tests for code problems that have a statement and known solutions but no tests (k1.5 §2.3.5).

A generator (`generators`) writes inputs. Reference submissions, most of which are right, vote on the output of each:
where enough of them agree the input becomes a test with that output, and the problem is admitted if enough of them pass
all of its tests. The report's figures are the defaults of `Rules`. What it leaves open is decided here: inputs are
distinct and of bounded size, a test expects an output that is not empty, and not all tests expect the same one, since a
program that always prints it would pass.
"""

import collections
import dataclasses
import json
import random
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from kimi_jax.curation.code_problems import CodeProblem, Control, Submission
from kimi_jax.curation.generators import SandboxFailed, generate_inputs
from kimi_jax.rewards.sandbox.api import JudgeRequest, RunRequest, Sandbox, Status, Test
from kimi_jax.rewards.sandbox.languages import LANGUAGES

# Why a problem is dropped, in the order in which it is found out.
REASONS = ("special_judge", "few_submissions", "no_generator", "few_inputs", "few_cases", "one_output", "few_passes")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rules:
    """What a problem must satisfy. `agree` must be more than half, so that no two outputs can both win."""

    cases: int = 50  # inputs that the generator is asked for
    min_cases: int = 40  # of which at least so many must be valid
    submissions: int = 10  # reference submissions that vote, drawn at random if there are more
    agree: int = 7  # an input is valid if so many of them give the same output
    passes: int = 9  # a problem is admitted if so many of them pass all valid cases
    max_input_bytes: int = 256_000  # of one test
    max_output_bytes: int = 256_000
    generator_time_s: float = 10.0
    generator_memory_mb: int = 1024

    def __post_init__(self):
        if not 1 <= self.min_cases <= self.cases:
            raise ValueError(f"min_cases={self.min_cases} must be from 1 to cases={self.cases}")
        if not self.submissions / 2 < self.agree <= self.submissions:
            raise ValueError(
                f"agree={self.agree} must be more than half of submissions={self.submissions} and not more"
            )
        if not 1 <= self.passes <= self.submissions:
            raise ValueError(f"passes={self.passes} must be from 1 to submissions={self.submissions}")


@dataclasses.dataclass(frozen=True)
class Case:
    """A test, and which of the voters gave its output."""

    stdin: str
    expected: str
    agreeing: tuple[bool, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Decision:
    """What became of a problem. `reason` is "" if it is admitted, else one of REASONS."""

    id: str
    reason: str
    detail: str = ""
    inputs: Mapping[str, int] = dataclasses.field(default_factory=dict)  # of the generator, by what became of them
    runs: Mapping[str, int] = dataclasses.field(default_factory=dict)  # of the submissions, by their status
    valid_cases: int = 0
    passing: int = 0  # submissions that pass all of them
    record: Mapping[str, Any] | None = None  # of the admitted problem, for `tasks.base.problem_from_record`


# --- the rules ---


def valid_case(agreeing: Sequence[bool], rules: Rules) -> bool:
    """Whether an input is a test, given which of the submissions agree on its output."""
    return sum(agreeing) >= rules.agree


def passing(cases: Sequence[Case]) -> int:
    """How many submissions pass all cases."""
    return sum(all(votes) for votes in zip(*(case.agreeing for case in cases), strict=True))


def reason_to_drop(cases: Sequence[Case], rules: Rules) -> str:
    """ "" if a problem with these valid cases is admitted, else one of REASONS."""
    if len(cases) < rules.min_cases:
        return "few_cases"
    if len({tuple(case.expected.split()) for case in cases}) == 1:
        return "one_output"
    return "few_passes" if passing(cases) < rules.passes else ""


def choose(problem: CodeProblem, *, languages: Collection[str], number: int, seed: int) -> list[Submission]:
    """`number` submissions in these languages, or fewer if there are not so many; a program that occurs twice votes
    once. Equal arguments give equal submissions."""
    usable = [s for s in dict.fromkeys(problem.submissions) if s.language in languages]
    return random.Random(f"{seed} {problem.id}").sample(usable, min(number, len(usable)))


# --- running ---


def vote(
    problem: CodeProblem, inputs: Sequence[str], submissions: Sequence[Submission], *, sandbox: Sandbox, rules: Rules
) -> tuple[list[Case], dict[str, int]]:
    """The valid cases among the inputs, in order, and how many runs ended in which status.

    A submission proposes its outputs, and the others are judged by them exactly as responses will be, in one request
    each. Any n - agree + 1 of n submissions contain one of a majority, so that many proposals are enough, and the first
    one nearly always is. Raises SandboxFailed.
    """
    runs: collections.Counter[str] = collections.Counter()
    proposers = sorted(submissions, key=lambda s: bool(LANGUAGES[s.language].compile))  # each of their runs compiles
    cases: dict[int, Case] = {}
    for proposer in proposers[: len(submissions) - rules.agree + 1]:
        undecided = [i for i in range(len(inputs)) if i not in cases]
        proposed = _propose(problem, proposer, {i: inputs[i] for i in undecided}, sandbox, rules, runs)
        agreeing = {i: [False] * len(submissions) for i in proposed}
        for j, submission in enumerate(submissions):
            # those that can still become valid
            open_cases = [i for i in proposed if sum(agreeing[i]) + len(submissions) - j >= rules.agree]
            tests = [Test(stdin=inputs[i], expected=proposed[i]) for i in open_cases]
            same = [True] * len(tests) if submission == proposer else _judge(problem, submission, tests, sandbox, runs)
            for i, agrees in zip(open_cases, same, strict=True):
                agreeing[i][j] = agrees
        for i, votes in agreeing.items():
            if valid_case(votes, rules):
                cases[i] = Case(inputs[i], proposed[i], tuple(votes))
        if len(cases) == len(inputs):
            break
    return [cases[i] for i in sorted(cases)], dict(runs)


def _propose(
    problem: CodeProblem,
    submission: Submission,
    inputs: Mapping[int, str],
    sandbox: Sandbox,
    rules: Rules,
    runs: collections.Counter[str],
) -> dict[int, str]:
    outputs = {}
    for i, text in inputs.items():
        result = sandbox.run(
            RunRequest(
                language=submission.language,
                code=submission.code,
                stdin=text,
                time_limit_s=problem.time_limit_s,
                memory_limit_mb=problem.memory_limit_mb,
            )
        )
        if result.status is Status.SANDBOX_ERROR:
            raise SandboxFailed(f"a submission to {problem.id!r} could not be run: {result.feedback}")
        status = result.status.value
        if result.status is Status.OK:
            too_long = len(result.stdout.encode("utf-8", "replace")) > rules.max_output_bytes
            status = "empty_output" if not result.stdout.split() else "long_output" if too_long else "ok"
        runs[status] += 1
        if status == "ok":
            outputs[i] = result.stdout
        if result.status is Status.COMPILE_ERROR:
            break
    return outputs


def _judge(
    problem: CodeProblem,
    submission: Submission,
    tests: list[Test],
    sandbox: Sandbox,
    runs: collections.Counter[str],
    *,
    stop_at_failure: bool = False,
) -> list[bool]:
    """Which of the tests a submission passes."""
    if not tests:
        return []
    judgement = sandbox.judge(
        JudgeRequest(
            language=submission.language,
            code=submission.code,
            tests=tests,
            time_limit_s=problem.time_limit_s,
            memory_limit_mb=problem.memory_limit_mb,
            tolerance=problem.tolerance,
            stop_at_failure=stop_at_failure,
        )
    )
    if judgement.outcome == "ungradable":
        raise SandboxFailed(f"a submission to {problem.id!r} could not be judged: {judgement.feedback}")
    runs.update(verdict.status.value for verdict in judgement.verdicts)
    passed = [verdict.status is Status.OK for verdict in judgement.verdicts]
    return passed + [False] * (len(tests) - len(passed))


def make_tests(
    problem: CodeProblem, *, sandbox: Sandbox, languages: Collection[str], rules: Rules, seed: int
) -> Decision:
    """Generates, votes and decides.

    Args:
        languages: those that the sandbox has.
        seed: of the choice of submissions.

    Raises:
        SandboxFailed: the problem is as good as before.
    """
    if problem.special_judge:
        return Decision(id=problem.id, reason="special_judge")
    submissions = choose(problem, languages=languages, number=rules.submissions, seed=seed)
    if len(submissions) < rules.submissions:
        detail = f"{len(submissions)} different ones in {', '.join(sorted(languages))}; {rules.submissions} are needed"
        return Decision(id=problem.id, reason="few_submissions", detail=detail)
    if not problem.generator:
        return Decision(id=problem.id, reason="no_generator")
    inputs, kinds, failure = generate_inputs(
        problem.generator,
        sandbox=sandbox,
        cases=rules.cases,
        needed=rules.min_cases,
        max_bytes=rules.max_input_bytes,
        time_limit_s=rules.generator_time_s,
        memory_limit_mb=rules.generator_memory_mb,
    )
    if len(inputs) < rules.min_cases:
        return Decision(id=problem.id, reason="few_inputs", detail=failure, inputs=kinds)
    cases, runs = vote(problem, inputs, submissions, sandbox=sandbox, rules=rules)
    reason = reason_to_drop(cases, rules)
    return Decision(
        id=problem.id,
        reason=reason,
        inputs=kinds,
        runs=runs,
        valid_cases=len(cases),
        passing=passing(cases),
        record=None if reason else to_record(problem, cases),
    )


def to_record(problem: CodeProblem, cases: Sequence[Case]) -> dict[str, Any]:
    """The admitted problem as a line of a problem file of the task "code"."""
    answer = {
        **({"language": problem.language} if problem.language else {}),
        "tests": [{"stdin": case.stdin, "expected": case.expected} for case in cases],
        "time_limit_s": problem.time_limit_s,
        "memory_limit_mb": problem.memory_limit_mb,
        **({"tolerance": problem.tolerance} if problem.tolerance else {}),
    }
    return {"id": problem.id, "task": "code", "prompt": problem.statement, "answer": json.dumps(answer)}


def check_controls(
    problem: CodeProblem, controls: Sequence[Control], record: Mapping[str, Any], *, sandbox: Sandbox
) -> list[bool]:
    """Which of the controls pass the tests of a record of the problem. Raises SandboxFailed."""
    tests = [Test(**test) for test in json.loads(record["answer"])["tests"]]
    ignored: collections.Counter[str] = collections.Counter()
    return [
        all(_judge(problem, control.submission, tests, sandbox, ignored, stop_at_failure=True)) for control in controls
    ]
