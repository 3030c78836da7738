"""From the ending of a program to a verdict: compiling, running the tests, comparing outputs.

Expected outputs stay here: a program sees its input and nothing else.
"""

import dataclasses
import json
import math
import signal
from collections.abc import Callable
from typing import Any

from kimi_jax.rewards.sandbox import drivers
from kimi_jax.rewards.sandbox.api import Judgement, JudgeRequest, RunRequest, RunResult, Status, Test, TestVerdict
from kimi_jax.rewards.sandbox.isolation import Box, Ending, Limits, SandboxError
from kimi_jax.rewards.sandbox.languages import Language

_LIMIT_STATUS = {"time": Status.TIME_LIMIT, "memory": Status.MEMORY_LIMIT, "output": Status.OUTPUT_LIMIT}
_MAX_FEEDBACK = 1000
_MAX_SHOWN = 80


@dataclasses.dataclass(frozen=True)
class Bounds:
    """What holds for all requests."""

    output_mb: int
    compile_time_s: float
    compile_memory_mb: int
    processes: int = 64


class Program:
    """A submission in its sandbox."""

    def __init__(self, box: Box, language: Language, code: str, *, bounds: Bounds, paths: dict[str, str]):
        self._box, self._language, self._bounds, self._paths = box, language, bounds, paths
        self._code = code
        self._name = language.name_of(code)

    def compile(self, files: dict[str, bytes], extra: dict[str, str] | None = None) -> RunResult | None:
        """Writes the sources; returns why they do not compile, or None."""
        language = self._language
        sources = {language.source.replace("{name}", self._name): self._code, **dict(language.extra), **(extra or {})}
        self._box.write(files | {name: _encode(text) for name, text in sources.items()})
        if not language.compile:
            return None
        limits = Limits(
            cpu_s=self._bounds.compile_time_s,
            memory_mb=self._bounds.compile_memory_mb,
            output_bytes=self._bounds.output_mb << 20,
            processes=self._bounds.processes + language.threads,
        )
        ending = self._box.run(
            self._argv(language.compile, limits.memory_mb),
            stdin=b"",
            files={},
            limits=limits,
            in_box=True,
            environment=dict(language.environment),
        )
        if not ending.verdict and ending.exit_code == 0:
            return None
        result = _result(ending, language, limits)
        what = "" if result.status is Status.RUNTIME_ERROR else f"the compiler: {result.feedback}\n"
        text = (what + (result.stderr.strip() or result.stdout.strip()))[:_MAX_FEEDBACK]
        return dataclasses.replace(result, status=Status.COMPILE_ERROR, feedback=text or "the compiler failed")

    def run(
        self, stdin: bytes, files: dict[str, bytes], *, time_s: float, memory_mb: int, arguments: tuple[str, ...] = ()
    ) -> RunResult:
        language = self._language
        limits = Limits(
            cpu_s=time_s,
            memory_mb=int(memory_mb * language.memory_factor) + language.runtime_mb,
            output_bytes=self._bounds.output_mb << 20,
            processes=self._bounds.processes + language.threads,
        )
        ending = self._box.run(
            self._argv(language.run, memory_mb) + list(arguments), stdin=stdin, files=files, limits=limits
        )
        return _result(ending, language, limits)

    def _argv(self, command: tuple[str, ...], memory_mb: int) -> list[str]:
        return self._language.argv(command, name=self._name, memory_mb=memory_mb, paths=self._paths)


def _result(ending: Ending, language: Language, limits: Limits) -> RunResult:
    if ending.verdict == "start":
        raise SandboxError(f"{language.name} did not start: {ending.error}")
    stdout, stderr = ending.stdout.decode("utf-8", "replace"), ending.stderr.decode("utf-8", "replace")
    status = _LIMIT_STATUS.get(ending.verdict)
    if status is None:
        failed = ending.verdict or ending.exit_code
        status = Status.RUNTIME_ERROR if failed else Status.OK
        if failed and language.out_of_memory and language.out_of_memory in stderr:
            status = Status.MEMORY_LIMIT  # the runtime was told how much there is, and kept to it
    feedback = {
        Status.OK: "",
        Status.TIME_LIMIT: f"time limit of {limits.cpu_s:g} s exceeded",
        Status.MEMORY_LIMIT: f"memory limit of {limits.memory_mb} MB exceeded",
        Status.OUTPUT_LIMIT: f"output limit of {limits.output_bytes >> 20} MB exceeded",
    }.get(status)
    if feedback is None:
        code = ending.exit_code
        how = f"died of {_signal_name(-code)}" if code < 0 else f"exit code {code}"
        if ending.verdict == "processes":
            how = f"more than {limits.processes} processes"
        feedback = f"{how}\n{stderr.strip()[-_MAX_FEEDBACK:]}".strip()
    return RunResult(
        status=status,
        exit_code=ending.exit_code,
        stdout=stdout,
        stderr=stderr,
        seconds=round(ending.cpu_s if ending.verdict != "time" else max(ending.cpu_s, limits.cpu_s), 6),
        peak_memory_mb=round(ending.memory_mb, 3),
        feedback=feedback,
    )


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _encode(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def run(request: RunRequest, start: Callable[[str, str], Program]) -> RunResult:
    """`start(language, code)` returns the program in a fresh sandbox."""
    files = {name: _encode(text) for name, text in request.files.items()}
    program = start(request.language, request.code)
    failure = program.compile(files)
    return failure or program.run(
        _encode(request.stdin), files, time_s=request.time_limit_s, memory_mb=request.memory_limit_mb
    )


def judge(request: JudgeRequest, start: Callable[[str, str], Program]) -> Judgement:
    files = {name: _encode(text) for name, text in request.files.items()}
    code, extra = request.code, dict[str, str]()
    if request.function:
        code, extra = drivers.wrap(request.language, code, request.function)
    program = start(request.language, code)
    failure = program.compile(files, extra)
    if failure:
        verdict = TestVerdict(
            status=failure.status,
            seconds=failure.seconds,
            peak_memory_mb=failure.peak_memory_mb,
            feedback=failure.feedback,
        )
        return Judgement(outcome="wrong", verdicts=[verdict], feedback=failure.feedback)
    checker = None
    if request.checker:
        checker = start(request.checker["language"], request.checker["code"])
        if failure := checker.compile({}):
            raise SandboxError(f"the checker does not compile: {failure.feedback}")
    verdicts: list[TestVerdict] = []
    for test in request.tests:
        verdicts.append(_judge_one(request, test, program, checker, files))
        if verdicts[-1].status is not Status.OK and request.stop_at_failure:
            break
    failures = [(i, verdict) for i, verdict in enumerate(verdicts) if verdict.status is not Status.OK]
    feedback = f"test {failures[0][0] + 1} of {len(request.tests)}: {failures[0][1].feedback}" if failures else ""
    return Judgement(outcome="wrong" if failures else "correct", verdicts=verdicts, feedback=feedback)


def _judge_one(
    request: JudgeRequest, test: Test, program: Program, checker: Program | None, files: dict[str, bytes]
) -> TestVerdict:
    stdin = drivers.stdin(request.language, test.arguments) if request.function else _encode(test.stdin)
    result = program.run(stdin, files, time_s=request.time_limit_s, memory_mb=request.memory_limit_mb)
    status, feedback = result.status, result.feedback
    if status is Status.OK:
        if checker:
            feedback = _ask(checker, test, result.stdout)
        elif request.function:
            feedback = _compare_value(request, test.expected, result.stdout)
        else:
            feedback = compare(result.stdout, test.expected, tolerance=request.tolerance)
        status = Status.WRONG_ANSWER if feedback else Status.OK
    return TestVerdict(
        status=status, seconds=result.seconds, peak_memory_mb=result.peak_memory_mb, feedback=feedback[:_MAX_FEEDBACK]
    )


def _ask(checker: Program, test: Test, output: str) -> str:
    """Why the checker does not accept the output; empty if it does."""
    files = {"input": _encode(test.stdin), "output": _encode(output), "expected": _encode(test.expected or "")}
    paths = ("/tmp/input", "/tmp/output", "/tmp/expected")
    result = checker.run(b"", files, time_s=10.0, memory_mb=512, arguments=paths)
    if result.status is Status.OK:
        return ""
    if result.status is Status.RUNTIME_ERROR and result.exit_code in (1, 2):
        return (result.stderr.strip() or result.stdout.strip() or "the checker says no")[:_MAX_FEEDBACK]
    raise SandboxError(f"the checker failed: {result.feedback}")


def compare(output: str, expected: str, *, tolerance: float) -> str:
    """Token by token: "" if they are equal, else where they first differ. White space only separates."""
    want = expected.split()
    got = output.split(maxsplit=len(want))  # a flood of tokens stays one
    if got == want:
        return ""
    for i, (a, b) in enumerate(zip(got, want, strict=False)):
        if a != b and not (tolerance and _near(_number(a), _number(b), tolerance)):
            return f"token {i + 1} is {a[:_MAX_SHOWN]!r}, expected {b[:_MAX_SHOWN]!r}"
    if len(got) != len(want):
        return f"{len(got)} tokens{' or more' * (len(got) > len(want))}, expected {len(want)}"
    return ""


def _number(token: str) -> float | None:
    try:
        return float(token) if "_" not in token else None
    except ValueError:
        return None


def _near(a: float | None, b: float | None, tolerance: float) -> bool:
    if a is None or b is None:
        return False
    try:
        return math.isclose(a, b, rel_tol=tolerance, abs_tol=tolerance)
    except OverflowError:  # an integer beyond all floating-point numbers
        return False


def _compare_value(request: JudgeRequest, expected: Any, stdout: str) -> str:
    try:
        value = drivers.value(request.language, stdout)
    except (ValueError, RecursionError):
        return "the function returned nothing that JSON can express"
    if request.language == "bash" and not isinstance(expected, str):
        expected = json.dumps(expected)
    if _equal(value, expected, request.tolerance):
        return ""
    return f"the function returned {json.dumps(value)[:_MAX_SHOWN]}, expected {json.dumps(expected)[:_MAX_SHOWN]}"


def _equal(a: Any, b: Any, tolerance: float) -> bool:
    """JSON values; 1 equals 1.0, but neither equals true."""
    if isinstance(a, bool) or isinstance(b, bool):
        return a is b
    if isinstance(a, int | float) and isinstance(b, int | float):
        return a == b or bool(tolerance) and _near(a, b, tolerance)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(_equal(x, y, tolerance) for x, y in zip(a, b, strict=True))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_equal(a[key], b[key], tolerance) for key in a)
    return type(a) is type(b) and a == b
