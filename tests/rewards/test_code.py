"""Programs as responses: which code a response gives, by hand; verdicts, by programs whose faults are known."""

import contextlib
import json
import os
import pathlib
import threading
import time

import pytest

from kimi_jax import tasks
from kimi_jax.rewards import code
from kimi_jax.rewards.pool import VerifierPool
from kimi_jax.rewards.sandbox.isolation import NoIsolation
from kimi_jax.rewards.sandbox.pool import LocalSandbox
from kimi_jax.rewards.sandbox.service import Service
from kimi_jax.types import Outcome, Problem

RIGHT, WRONG, UNGRADABLE = Outcome.CORRECT, Outcome.WRONG, Outcome.UNGRADABLE
SUM = {"tests": [{"stdin": "3 4\n", "expected": "7\n"}, {"stdin": "11 2\n", "expected": "13\n"}]}
ADD = {"tests": [{"arguments": [3, 4], "expected": 7}, {"arguments": [11, 2], "expected": 13}], "function": "add"}


@pytest.fixture(scope="module", autouse=True)
def isolation():
    try:
        LocalSandbox(workers=1).close()
    except NoIsolation as error:
        pytest.skip(str(error))


def fenced(source: str, mark: str = "python") -> str:
    return f"Let me think.\n```{mark}\n{source}\n```\nThat is it."


# --- which code -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, expected",
    [
        (fenced("a = 1"), "a = 1\n"),
        (fenced("a = 1", "py"), "a = 1\n"),
        (fenced("a = 1", "Python"), "a = 1\n"),
        (fenced("a = 1", "python title=main.py"), "a = 1\n"),
        (fenced("a = 1", ""), "a = 1\n"),
        (fenced("a = 1").replace("\n", "\r\n"), "a = 1\r\n"),
        (fenced("old") + fenced("new"), "new\n"),
        (fenced("a = 1") + fenced("7", "text"), "a = 1\n"),
        (fenced("a = 1") + fenced("7", ""), "a = 1\n"),  # what it prints
        (fenced("a = 1").replace("```", "~~~~"), "a = 1\n"),
        ('````python\ns = """\n```\n"""\n````', 's = """\n```\n"""\n'),
        ("```python\na = 1\n```", "a = 1\n"),
        ("```python\n```", ""),
    ],
)
def test_the_last_block_of_the_language(text, expected):
    assert code.extract_code(text, "python") == (expected, "")


@pytest.mark.parametrize(
    "text, why",
    [
        ("", "no block of python in 0 fenced blocks"),
        ("print(7)", "in 0 fenced"),
        ("```print(7)```", "in 0 fenced"),
        (fenced("print(7)", "java"), "in 1 fenced"),
        ("```python\nprint(7)\n", "ends within a block"),
        (fenced("print(7)") + "\n```python\nprint(8", "ends within a block"),
        ("````python\nprint(7)\n```\n", "ends within a block"),
        ("\0\udcff" * 1000, "in 0 fenced"),
    ],
)
def test_no_code(text, why):
    found, told = code.extract_code(text, "python")
    assert found is None and why in told
    verdict = tasks.verify(problem(SUM), text)
    assert (verdict.outcome, verdict.well_formed) == (WRONG, False) and why in verdict.detail


def test_long_lines_take_no_time():
    for hostile in ("```" + "a" * 1_000_003 + "`", "`" * 1_000_003, ("```" + "a" * 1009 + "`\n") * 1009):
        assert code.extract_code(hostile, "python")[0] is None


# --- verdicts ---------------------------------------------------------------------------------------------------------


def problem(truth, name="p") -> Problem:
    return Problem(name, "code", "Add.", truth if isinstance(truth, str) else json.dumps(truth))


READ = "a, b = map(int, input().split())\n"
PROGRAMS = [
    (SUM, READ + "print(a + b)", RIGHT, "2 tests passed"),
    (SUM, READ + "print(7)", WRONG, "wrong_answer: test 2 of 2: token 1 is '7', expected '13'"),
    (SUM, READ + "print(a + c)", WRONG, "runtime_error: test 1 of 2: exit code 1"),
    (SUM, "print(", WRONG, "SyntaxError"),
    (SUM, "\0", WRONG, "error"),
    (SUM | {"time_limit_s": 0.2}, "while True: pass", WRONG, "time_limit: test 1 of 2: time limit of 0.2 s"),
    (SUM | {"memory_limit_mb": 64}, "x = bytearray(10**9)", WRONG, "memory_limit: test 1 of 2"),
    (SUM | {"tolerance": 0.01}, READ + "print(a + b + 0.001)", RIGHT, "2 tests passed"),
    (ADD, "def add(a, b): return a + b", RIGHT, "2 tests passed"),
    (ADD, "class Solution:\n    def add(self, a, b): return a + b", RIGHT, "2 tests passed"),
    (ADD, "def add(a, b): return 7", WRONG, "wrong_answer: test 2 of 2"),
    (ADD, "def subtract(a, b): return a - b", WRONG, "runtime_error: test 1 of 2"),
    (
        {
            "tests": [{"stdin": "4"}],
            "checker": {"language": "python", "code": "import sys\nsys.exit(open(sys.argv[2]).read() != '2 2\\n')"},
        },
        "print(2, 2)",
        RIGHT,
        "1 tests passed",
    ),
    (SUM | {"language": "bash"}, "read a b\necho $((a + b))", RIGHT, "2 tests passed"),
]


def test_programs_are_judged_in_the_workers_of_the_pool():
    with VerifierPool(tasks.verify, workers=1, deadline_s=60.0) as pool:
        tickets = [
            pool.submit(problem(truth), fenced(source, "sh" if "bash" in truth.values() else "python"))
            for truth, source, _, _ in PROGRAMS
        ]
        verdicts = pool.verdicts(tickets)
    for (_, source, outcome, detail), verdict in zip(PROGRAMS, verdicts, strict=True):
        assert verdict.outcome == outcome and detail in verdict.detail and verdict.well_formed, (source, verdict)


def test_a_service_judges_too():
    with LocalSandbox(workers=1) as sandbox, contextlib.closing(Service(sandbox, host="127.0.0.1", port=0)) as service:
        threading.Thread(target=service.serve, daemon=True).start()
        url = f"http://127.0.0.1:{service.port}"
        for source, outcome in ((READ + "print(a + b)", RIGHT), ("print(8)", WRONG)):
            assert tasks.verify(problem(SUM), fenced(source), sandbox=url).outcome == outcome
        assert sandbox.metrics()['answers_total{kind="judge",outcome="correct"}'] == 1
        code.check_sandbox(url, {("default", "python"): "p"})
        with pytest.raises(ValueError, match="Problem 'p': the sandbox has no profile 'conda', only default"):
            code.check_sandbox(url, {("conda", "python"): "p"})


def test_where_there_is_no_sandbox_nothing_is_wrong(monkeypatch):
    def refuse(**options):
        raise NoIsolation("no namespaces here")

    monkeypatch.setattr(code, "LocalSandbox", refuse)
    monkeypatch.setattr(code, "_kept_sandbox", code.open_sandbox)
    verdict = tasks.verify(problem(SUM), fenced("print(7)"))
    assert (verdict.outcome, verdict.detail) == (UNGRADABLE, "NoIsolation: no namespaces here")
    with pytest.raises(ValueError, match="Problems of task 'code' need a sandbox, and no namespaces here"):
        code.check_sandbox(None, {("default", "python"): "p"})


def test_a_missing_language_is_named():
    with pytest.raises(ValueError, match="Problem 'p': the sandbox cannot run 'cobol'; profile 'default' has .*python"):
        code.check_sandbox(None, {("default", "cobol"): "p"})


def below(pid: int) -> set[int]:
    """All processes that this one started, and they."""
    parents = {}
    for path in pathlib.Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has just ended
            parents[int(path.parent.name)] = int(path.read_text().rpartition(")")[2].split()[1])
    found, more = set[int](), {pid}
    while more:
        found |= more
        more = {child for child, parent in parents.items() if parent in more}
    return found - {pid}


def alive(pids: set[int]) -> set[int]:
    return {pid for pid in pids if pathlib.Path(f"/proc/{pid}").exists()}


def test_a_worker_that_is_killed_leaves_no_sandbox_behind():
    before = below(os.getpid())
    sleeper = problem(SUM | {"time_limit_s": 60.0})
    with VerifierPool(tasks.verify, workers=1, deadline_s=4.0) as pool:
        hung = pool.submit(sleeper, fenced("import time\ntime.sleep(50)"))
        seen = set[int]()
        while not hung.done():
            seen |= below(os.getpid()) - before
            time.sleep(0.01)
        assert hung.result().detail == "deadline of 4 s"
        assert pool.submit(problem(SUM), fenced(READ + "print(a + b)")).result().outcome == RIGHT
    assert len(seen) >= 5  # template, worker, launcher, zygote, and the program at least
    for _ in range(500):
        if not alive(seen):
            return
        time.sleep(0.01)
    raise AssertionError(f"still there: {alive(seen)}")


# --- ground truth -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "truth, told",
    [
        ("7", "a JSON int; give an object with tests"),
        ("def f(): ...", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ({}, "'tests'"),
        ({"tests": []}, "tests must be a list of 1 to"),
        ({"tests": [{"stdin": "3"}]}, r"tests\[0\] has no expected output; give one, or a checker"),
        ({"tests": [{"stdin": "3", "expect": "4"}]}, r"tests\[0\] has 'expect'"),
        ({"tests": [{"arguments": [3], "expected": 4}]}, "name the function"),
        (SUM | {"function": "add"}, r"tests\[0\] calls add and has no list of arguments"),
        (ADD | {"function": "add(a, b)"}, "give its name alone"),
        (SUM | {"code": "print(7)"}, "'code' is nothing that a problem can say"),
        (SUM | {"time_limit_s": 1000}, "time_limit_s is 1000"),
        (SUM | {"laguage": "python"}, "'laguage'"),
    ],
)
def test_ground_truth_that_is_none(truth, told):
    answer = problem(truth).answer
    with pytest.raises(ValueError, match=told):
        code.ground_truth(answer)
    assert tasks.verify(problem(truth), fenced("print(7)")).outcome == UNGRADABLE
