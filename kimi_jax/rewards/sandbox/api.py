"""What is asked of a sandbox and what it answers: the same in one process and over HTTP, where it is JSON."""

import dataclasses
import enum
import json
from typing import Any, Protocol


class Status(enum.StrEnum):
    """How a program ended. The first that applies, from the bottom up."""

    OK = "ok"
    WRONG_ANSWER = "wrong_answer"  # only of a test
    RUNTIME_ERROR = "runtime_error"  # an exit code other than 0, or a signal
    COMPILE_ERROR = "compile_error"
    TIME_LIMIT = "time_limit"
    MEMORY_LIMIT = "memory_limit"
    OUTPUT_LIMIT = "output_limit"
    SANDBOX_ERROR = "sandbox_error"  # the sandbox failed; says nothing about the program


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunRequest:
    """One program, once.

    Time is that of the processor, summed over all processes; a program that sleeps has twice that and a second more.
    Memory is what all processes together have resident, without that of the language's own runtime.
    """

    language: str
    code: str
    stdin: str = ""
    files: dict[str, str] = dataclasses.field(default_factory=dict)  # by relative path, in the working directory
    time_limit_s: float = 2.0
    memory_limit_mb: int = 256
    profile: str = "default"
    id: str = ""  # of equal requests with the same id only one is executed


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunResult:
    status: Status
    exit_code: int | None  # negative: the number of a signal; None: there is none
    stdout: str
    stderr: str
    seconds: float  # of the processor
    peak_memory_mb: float
    feedback: str = ""  # one line that says what went wrong


@dataclasses.dataclass(frozen=True, kw_only=True)
class Test:
    """Either input and output of the program, or arguments and value of a function."""

    __test__ = False  # for pytest

    stdin: str = ""
    expected: Any = None  # a string, or, for a function, any JSON value
    arguments: list | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class JudgeRequest:
    """One program and its tests. It is compiled once and runs once per test, the limits being those of each run."""

    language: str
    code: str
    tests: list[Test]
    files: dict[str, str] = dataclasses.field(default_factory=dict)
    time_limit_s: float = 2.0
    memory_limit_mb: int = 256
    function: str = ""  # its name, where the tests are calls
    # Numbers that are this near to the expected ones, absolutely or relatively, are right; 0: tokens must be equal.
    tolerance: float = 0.0
    # {"language", "code"} of a program that is called with the paths of input, output and expected output, and exits
    # with 0 if the output is right, 1 or 2 if it is wrong (as testlib's checkers do)
    checker: dict[str, str] | None = None
    stop_at_failure: bool = True
    profile: str = "default"
    id: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TestVerdict:
    __test__ = False

    status: Status
    seconds: float
    peak_memory_mb: float
    feedback: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Judgement:
    """`outcome` is "correct", "wrong", or "ungradable" if a verdict could not be given.

    One verdict per test, in order, up to the first that is not `ok` if the request says so. A program that does not
    compile has one verdict for the whole.
    """

    outcome: str
    verdicts: list[TestVerdict]
    feedback: str = ""  # of the first failure


class Sandbox(Protocol):
    """What `LocalSandbox` and `SandboxClient` have in common. Calls wait for the answer; any thread may call."""

    def run(self, request: RunRequest) -> RunResult: ...

    def judge(self, request: JudgeRequest) -> Judgement: ...

    def health(self) -> dict: ...

    def close(self) -> None: ...


MAX_TIME_S, MAX_MEMORY_MB, MAX_TESTS = 60.0, 8192, 1000
_KINDS: dict[str, tuple[type, ...]] = {
    str(str): (str,),
    str(dict[str, str]): (dict,),
    str(float): (float, int),
    str(int): (int,),
    str(bool): (bool,),
}
_LIMITS = {"time_limit_s": (0.05, MAX_TIME_S), "memory_limit_mb": (16, MAX_MEMORY_MB), "tolerance": (0.0, 1.0)}


def check(request: RunRequest | JudgeRequest) -> None:
    """Raises ValueError, which says what to change, if the request makes no sense."""
    for field in dataclasses.fields(request):
        value = getattr(request, field.name)
        kinds = _KINDS.get(str(field.type), ())
        if kinds and (not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds)):
            raise ValueError(f"{field.name} is {value!r:.60}; give a {kinds[0].__name__}")
    for name, (low, high) in _LIMITS.items():
        value = getattr(request, name, low)
        if not low <= value <= high:
            raise ValueError(f"{name} is {value}; give a number from {low:g} to {high:g}")
    for name, content in request.files.items():
        parts = name.split("/") if isinstance(name, str) else [""]
        if not all(0 < len(part.encode("utf-8", "replace")) < 256 and part not in (".", "..") for part in parts):
            raise ValueError(f"files has {name!r:.60}; give relative paths without . and ..")
        if "\0" in name or not isinstance(content, str):
            raise ValueError(f"files[{name!r:.60}] is not a text, or its name has a zero byte")
    if isinstance(request, JudgeRequest):
        _check_tests(request)


def _check_tests(request: JudgeRequest) -> None:
    if not isinstance(request.tests, list) or not 0 < len(request.tests) <= MAX_TESTS:
        raise ValueError(f"tests must be a list of 1 to {MAX_TESTS} tests")
    if request.checker is not None:
        checker = request.checker
        if not isinstance(checker, dict) or {"language", "code"} != set(checker):
            raise ValueError('checker must be {"language": ..., "code": ...} or null')
        if request.function:
            raise ValueError("give a checker or the name of a function, not both")
    for i, test in enumerate(request.tests):
        if not isinstance(test.stdin, str):
            raise ValueError(f"tests[{i}].stdin is {test.stdin!r:.60}; give a string")
        if request.function and not isinstance(test.arguments, list):
            raise ValueError(f"tests[{i}] calls {request.function} and has no list of arguments")
        if not request.function and test.arguments is not None:
            raise ValueError(f'tests[{i}] has arguments; name the function that takes them in "function"')
        if test.expected is None and not request.function and request.checker is None:
            raise ValueError(f"tests[{i}] has no expected output; give one, or a checker that needs none")
        if not request.function and not isinstance(test.expected, str | None):
            raise ValueError(f"tests[{i}].expected is {test.expected!r:.60}; give a string")


def to_json(message: RunRequest | RunResult | JudgeRequest | Judgement) -> bytes:
    return json.dumps(dataclasses.asdict(message)).encode()


def run_request(data: dict) -> RunRequest:
    return _parse(RunRequest, data)


def judge_request(data: dict) -> JudgeRequest:
    tests = data.get("tests") if isinstance(data, dict) else None
    if isinstance(tests, list):
        data = data | {"tests": [_parse(Test, test, f"tests[{i}]") for i, test in enumerate(tests)]}
    return _parse(JudgeRequest, data)


def run_result(data: dict) -> RunResult:
    return RunResult(**data | {"status": Status(data["status"])})


def judgement(data: dict) -> Judgement:
    verdicts = [TestVerdict(**verdict | {"status": Status(verdict["status"])}) for verdict in data["verdicts"]]
    return Judgement(**data | {"verdicts": verdicts})


def _parse(kind: type, data: Any, where: str = "the request") -> Any:
    if not isinstance(data, dict):
        raise ValueError(f"{where} is not a JSON object")
    fields = dataclasses.fields(kind)
    unknown = sorted(set(data) - {field.name for field in fields})
    if unknown:
        raise ValueError(f"{where} has {unknown[0]!r:.60}; known are {', '.join(field.name for field in fields)}")
    required = [f.name for f in fields if f.default is f.default_factory is dataclasses.MISSING]
    missing = [name for name in required if name not in data]
    if missing:
        raise ValueError(f"{where} has no {missing[0]!r}")
    return kind(**data)
