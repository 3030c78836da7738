"""Programs of which one knows how they end, in every language that this machine has."""

import contextlib
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time

import pytest

from kimi_jax.rewards.sandbox import languages, pool
from kimi_jax.rewards.sandbox.api import JudgeRequest, RunRequest, Status, Test
from kimi_jax.rewards.sandbox.isolation import NoIsolation, SandboxError, Zygote
from kimi_jax.rewards.sandbox.pool import Busy, LocalSandbox

HERE = os.path.dirname(__file__)
sys.path.append(HERE)
import programs  # noqa: E402


@pytest.fixture(scope="module")
def sandbox():
    try:
        with LocalSandbox(workers=2) as sandbox:
            yield sandbox
    except NoIsolation as error:
        pytest.skip(str(error))


def python(code, **options):
    return RunRequest(language="python", code=code, **options)


def wait_until(holds) -> None:
    for _ in range(2000):
        if holds():
            return
        time.sleep(0.01)
    raise AssertionError("not even after twenty seconds")


def cases_of(*pairs):
    return [Test(stdin=stdin, expected=expected) for stdin, expected in pairs]


def available(sandbox, table):
    return [name for name in table if name in sandbox.profiles["default"].languages]


# --- languages --------------------------------------------------------------------------------------------------------


def test_the_table_has_the_ten_languages(sandbox):
    assert len(programs.DOUBLE) == 10 and set(programs.DOUBLE) == set(languages.LANGUAGES)
    health = sandbox.health()["profiles"]["default"]
    assert set(health["languages"]) | set(health["missing"]) == set(languages.LANGUAGES)
    assert {"python", "bash"} <= set(health["languages"])


def test_every_language_here_reads_and_writes(sandbox):
    asked = {
        name: sandbox.submit(
            JudgeRequest(language=name, code=code, tests=cases_of(("3\n", "6"), ("-5\n", "-10")), time_limit_s=10)
        )
        for name, code in programs.DOUBLE.items()
        if name in available(sandbox, programs.DOUBLE)
    }
    assert {name: (j.result().outcome, j.result().feedback) for name, j in asked.items()} == dict.fromkeys(
        asked, ("correct", "")
    )


@pytest.mark.parametrize(
    ("table", "status"),
    [("DOES_NOT_COMPILE", "compile_error"), ("EXITS_WITH_3", "runtime_error"), ("TAKES_MEMORY", "memory_limit")],
)
def test_every_language_here_fails_in_the_same_ways(sandbox, table, status):
    table = getattr(programs, table)
    asked = {
        name: sandbox.submit(RunRequest(language=name, code=table[name], memory_limit_mb=64, time_limit_s=10))
        for name in available(sandbox, table)
    }
    for name, answer in asked.items():
        assert answer.result().status == status, (name, answer.result())
        if status == "runtime_error":
            assert answer.result().exit_code == 3


ODD = 'a\u00f1\U0001f600 "x\\ y\n z'


@pytest.mark.parametrize(
    ("function", "table", "cases"),
    [
        (
            "weigh",
            programs.WEIGH,
            [([[1, 2], [[0.5], [1, 2.25]], 'añ\n"x\\'], [6.75, '\\x"\nña']), ([[], [], ""], [0, ""])],
        ),
        ("total", programs.TOTAL, [([[1, 2], [[0.5], [1, 2.25]]], [3, 0.5, 3.25]), ([[], []], [0])]),
        ("echo", programs.ECHO, [([ODD], ODD)]),
    ],
)
def test_functions_are_called(sandbox, function, table, cases):
    cases = [Test(arguments=arguments, expected=expected) for arguments, expected in cases]
    wrong = [Test(arguments=cases[0].arguments, expected=["something", "else"])]
    for name in available(sandbox, table):
        ask = {"language": name, "code": table[name], "function": function}
        if table is programs.ECHO and name == "php":
            ask["function"] = "echo_"
        judgement = sandbox.judge(JudgeRequest(tests=cases, tolerance=1e-9, time_limit_s=10, **ask))
        assert (name, judgement.outcome, judgement.feedback) == (name, "correct", "")
        if name in ("python", "javascript"):
            assert sandbox.judge(JudgeRequest(tests=wrong, **ask)).verdicts[0].status == "wrong_answer"


def test_a_function_cannot_fake_its_value(sandbox):
    for code in (
        "def f(x): print('\\n41', flush=True); return x",
        "def f(x):\n    import os; print(41, flush=True); os._exit(0)",
        "import sys\nprint(41)\nsys.exit(0)\ndef f(x): return x",
    ):
        test = [Test(arguments=[40], expected=40)]
        expected = "correct" if "return x" in code and "exit" not in code else "wrong"
        request = JudgeRequest(language="python", code=code, function="f", tests=test)
        assert sandbox.judge(request).outcome == expected


# --- runs and tests ---------------------------------------------------------------------------------------------------


def test_a_run_reports_everything(sandbox):
    code = "import sys\nprint(input(), open('a/b.txt').read())\nprint('e', file=sys.stderr)\nx = b'x' * (50 << 20)"
    result = sandbox.run(python(code, stdin="né", files={"a/b.txt": "中"}))
    assert (result.status, result.exit_code, result.stdout, result.stderr) == (Status.OK, 0, "né 中\n", "e\n")
    assert 50 < result.peak_memory_mb < 80 and 0 < result.seconds < 2 and result.feedback == ""


def test_a_program_finds_a_clean_and_equal_world(sandbox):
    code = """
import locale, os, sys, time
print(os.getcwd(), os.listdir("."), sorted(os.environ.items()), time.tzname, os.uname().nodename)
print(locale.setlocale(locale.LC_ALL, ""), hash("kimi"), sys.argv, __name__, __file__, sorted(globals()), os.getuid())
exit()
"""
    (result,) = {sandbox.run(python(code)).stdout for _ in range(5)}
    assert "/tmp [] [('HOME', '/tmp'), ('LANG', 'C.UTF-8')" in result and "('UTC', 'UTC')" in result


@pytest.mark.parametrize(
    ("code", "pieces"),
    [
        ("def f(x):\n    return 1 / x\nf(0)", ["line 3,", "f(0)", "line 2, in f", "return 1 / x", "ZeroDivisionError"]),
        ("x = 1\nx = = 3", ["line 2", "x = = 3", "SyntaxError"]),
        ("try: {}[1]\nexcept KeyError as e: raise ValueError from e", ["line 1", "KeyError", "line 2", "ValueError"]),
    ],
)
def test_tracebacks_show_the_lines_of_the_program_and_no_others(sandbox, code, pieces):
    text = sandbox.run(python(code)).stderr
    assert "exec" not in text
    for piece in pieces:
        assert piece in text
        text = text[text.index(piece) :]


def test_bytes_that_are_no_text_are_replaced(sandbox):
    result = sandbox.run(python("import os\nos.write(1, bytes(range(128, 133)) + b'ok')"))
    assert result.status is Status.OK and result.stdout == "\ufffd" * 5 + "ok"


JUNK = bytes(random.Random(5).choices(range(256), k=4001)).decode("latin-1")


@pytest.mark.parametrize("code", ["", " \n", "\0", "\ud800", JUNK])
def test_what_is_no_program_is_wrong_in_every_language(sandbox, code):
    asked = {
        name: sandbox.submit(JudgeRequest(language=name, code=code, tests=cases_of(("1\n", "2")), time_limit_s=10))
        for name in available(sandbox, programs.DOUBLE)
    }
    for name, answer in asked.items():
        judgement = answer.result()
        assert judgement.outcome == "wrong" and judgement.feedback, (name, judgement)
        assert judgement.verdicts[0].status in ("wrong_answer", "runtime_error", "compile_error"), (name, judgement)


def test_a_hundred_megabytes_of_output_are_cut_and_named(sandbox):
    code = "import os\nfor i in range(1600): os.write(1, b'\\xff\\0' * 32768)"
    result = sandbox.run(python(code, time_limit_s=5))
    assert (result.status, result.feedback) == (Status.OUTPUT_LIMIT, "output limit of 16 MB exceeded")
    assert len(result.stdout) == 16 << 20
    judgement = sandbox.judge(JudgeRequest(language="python", code=code, tests=cases_of(("", "")), time_limit_s=5))
    assert (judgement.outcome, judgement.verdicts[0].status) == ("wrong", Status.OUTPUT_LIMIT)


def test_large_input_and_output_go_through(sandbox):
    text = "x" * 3_000_017
    assert sandbox.run(python("import sys\nsys.stdout.write(sys.stdin.read())", stdin=text)).stdout == text
    assert sandbox.run(python("pass", stdin=text)).status is Status.OK  # nobody reads it


def test_runs_of_one_submission_share_nothing(sandbox):
    code = "import os\nprint(sorted(os.listdir()))\nopen('x', 'w').write('x')\nif os.fork() == 0:\n    while True: pass"
    request = JudgeRequest(language="python", code=code, tests=cases_of(*[("", "['data']")] * 3), files={"data": "1"})
    assert sandbox.judge(request).outcome == "correct"


def test_judging_stops_at_the_first_failure_unless_told(sandbox):
    code = "x = int(input())\nprint(10 // x)"
    cases = cases_of(("1", "10"), ("2", "6"), ("0", "0"), ("5", "2"))
    request = JudgeRequest(language="python", code=code, tests=cases)
    judgement = sandbox.judge(request)
    assert [v.status for v in judgement.verdicts] == ["ok", "wrong_answer"]
    assert judgement.outcome == "wrong" and judgement.feedback == "test 2 of 4: token 1 is '5', expected '6'"
    judgement = sandbox.judge(JudgeRequest(language="python", code=code, tests=cases, stop_at_failure=False))
    assert [v.status for v in judgement.verdicts] == ["ok", "wrong_answer", "runtime_error", "ok"]
    assert "ZeroDivisionError" in judgement.verdicts[2].feedback


CHECKER = """
import sys
given, output, expected = (open(path).read() for path in sys.argv[1:])
a, b = map(int, output.split())
if a + b != int(given): sys.exit("the sum is not " + given)
"""


def test_a_checker_decides(sandbox):
    def ask(code, checker=CHECKER):
        checker = {"language": "python", "code": checker}
        request = JudgeRequest(language="python", code=code, tests=[Test(stdin="7"), Test(stdin="9")], checker=checker)
        return sandbox.judge(request)

    assert ask("print(3, int(input()) - 3)").outcome == "correct"
    wrong = ask("print(3, 4)")
    assert (wrong.outcome, wrong.feedback) == ("wrong", "test 2 of 2: the sum is not 9")
    assert ask("print(3, 4)", "import sys; sys.exit(7)").outcome == "ungradable"
    assert ask("print(3, 4)", "while True: print('x' * 9999)").outcome == "ungradable"


def test_the_same_submissions_get_the_same_verdicts(sandbox):
    codes = {
        "print(sum(map(int, input().split())))": 2.0,
        "print(eval(input().replace(' ', '-')))": 2.0,
        "print(len({'a', 'b', 'c'}), *{'a', 'b', 'c'})": 2.0,
        "x = [0] * 10**9": 2.0,
        "raise SystemExit(2)": 2.0,
        "while True: pass": 0.1,
        "while True: print('x' * 9999)": 2.0,
        "import os; os.kill(os.getpid(), 9)": 2.0,
    }
    requests = [
        JudgeRequest(language="python", code=code, tests=cases_of(("1 2", "3"), ("5 7", "12")), time_limit_s=limit)
        for code, limit in codes.items()
    ]
    rounds = [[sandbox.submit(request) for request in requests] for _ in range(20)]
    verdicts = [[(j.result().outcome, [v.status for v in j.result().verdicts]) for j in line] for line in rounds]
    for line in verdicts:
        assert line == verdicts[0]
    assert {outcome for outcome, _ in verdicts[0]} == {"correct", "wrong"}


def test_what_makes_no_sense_is_refused_at_once(sandbox):
    for request, complaint in (
        (RunRequest(language="cobol", code=""), "known are python, java"),
        (python("", profile="nowhere"), "there are default"),
    ):
        with pytest.raises(ValueError, match=complaint):
            sandbox.submit(request)
    absent = set(languages.LANGUAGES) - set(sandbox.profiles["default"].languages)
    for name in absent:
        with pytest.raises(ValueError, match=f"{name} is missing here"):
            sandbox.submit(RunRequest(language=name, code=""))


# --- the pool ---------------------------------------------------------------------------------------------------------


def test_a_sandbox_that_fails_is_replaced(sandbox, monkeypatch):
    failures = ["once"]

    def take(self, actual=Zygote.take):
        if failures:
            self.close()
            raise SandboxError(failures.pop())
        return actual(self)

    before = sandbox.retries
    monkeypatch.setattr(Zygote, "take", take)
    assert sandbox.run(python("print(1)")).stdout == "1\n"
    assert sandbox.retries == before + 1
    failures[:] = ["twice", "twice"]
    result = sandbox.run(python("print(1)"))
    assert (result.status, result.feedback) == (Status.SANDBOX_ERROR, "SandboxError: twice")
    failures[:] = ["twice", "twice"]
    assert sandbox.judge(JudgeRequest(language="python", code="", tests=cases_of(("", "")))).outcome == "ungradable"


def test_killing_the_zygote_costs_nothing(sandbox):
    slow = [sandbox.submit(python("import time; time.sleep(0.3); print(1)")) for _ in range(2)]
    time.sleep(0.1)
    children = subprocess.run(["ps", "-o", "pid=", "--ppid", str(os.getpid())], capture_output=True, text=True).stdout
    for pid in map(int, children.split()):
        with contextlib.suppress(OSError):  # it has ended, as `ps` itself has
            if "zygote.main" in open(f"/proc/{pid}/cmdline").read():
                os.kill(pid, 9)
    assert [job.result().stdout for job in slow] == ["1\n", "1\n"]


def test_a_request_that_was_given_up_costs_no_worker(sandbox):
    jobs = [sandbox.submit(python("print(1)")) for _ in range(9)]
    assert not any(job.cancel() for job in jobs)
    assert [job.result().stdout for job in jobs] == ["1\n"] * 9


def test_a_full_queue_says_so(monkeypatch):
    try:
        sandbox = LocalSandbox(workers=1, max_waiting=3, max_waiting_mb=1)
    except NoIsolation as error:
        pytest.skip(str(error))
    go = threading.Event()

    def take(self, actual=Zygote.take):
        go.wait()
        return actual(self)

    def begun():
        """A program that runs until `go`, and nothing that waits."""
        go.clear()
        job = sandbox.submit(python("pass"))
        wait_until(lambda: sandbox.health()["waiting"] == 0)
        return job

    monkeypatch.setattr(Zygote, "take", take)
    with sandbox:
        jobs = [begun()] + [sandbox.submit(python("pass")) for _ in range(3)]
        with pytest.raises(Busy, match="3 requests"):
            sandbox.submit(python("pass"))
        go.set()
        assert all(job.result().status is Status.OK for job in jobs)
        jobs = [begun(), sandbox.submit(python("#" * 900_000))]
        with pytest.raises(Busy):
            sandbox.submit(python("#" * 900_000))
        go.set()
    with pytest.raises(RuntimeError, match="closed"):
        sandbox.submit(python("pass"))


def test_closing_leaves_nothing(sandbox):
    def count():
        return len(os.listdir("/proc/self/fd")), threading.active_count()

    before = count()
    with LocalSandbox(workers=2) as other:
        job = other.submit(python("import os, time\nos.fork()\nos.setsid()\ntime.sleep(0.1)"))
    assert job.done()
    wait_until(lambda: all(now <= then for now, then in zip(count(), before, strict=True)))  # `sandbox` may tidy up


def test_numbers_out_of_range_are_refused():
    with pytest.raises(ValueError, match="workers is 0"):
        LocalSandbox(workers=0)
    with pytest.raises(ValueError, match="mode is 'safe'"):
        LocalSandbox(mode="safe")


def test_a_machine_without_isolation_runs_nothing(monkeypatch):
    monkeypatch.setattr(pool.kernel, "supported", lambda: "this is not Linux")
    with pytest.raises(NoIsolation, match="this is not Linux. Untrusted code is not run .* --sandbox=unsafe"):
        LocalSandbox(workers=1)


def test_a_profile_is_another_root_with_its_own_languages():
    """A root with nothing but a shell."""
    with tempfile.TemporaryDirectory() as root:
        os.chmod(root, 0o755)  # whoever runs programs must be able to read it
        libraries = subprocess.run(["ldd", "/bin/bash"], capture_output=True, text=True).stdout
        for path in ["/bin/bash", *re.findall(r"(/\S+) \(0x", libraries)]:
            os.makedirs(root + os.path.dirname(path), exist_ok=True)
            shutil.copy(path, root + path)
        with open(f"{root}/here", "w") as file:
            file.write("the other root")
        try:
            with LocalSandbox(workers=1, profiles={"shell": root}) as sandbox:
                assert sandbox.health()["profiles"]["shell"]["languages"] == ["bash"]
                code = "echo $(</here); echo /*; : > /here"
                result = sandbox.run(RunRequest(language="bash", code=code, profile="shell"))
                assert result.stdout == "the other root\n/bin /box /dev /here /lib /lib64 /proc /tmp\n"
                assert "Read-only file system" in result.stderr
                assert "the other root" not in sandbox.run(RunRequest(language="bash", code=code)).stdout
        except NoIsolation as error:
            pytest.skip(str(error))


def test_a_profile_that_does_not_exist_is_refused(sandbox):
    with pytest.raises(NoIsolation, match="/does/not/exist"):
        LocalSandbox(workers=1, profiles={"x": "/does/not/exist"})


def test_unsafe_says_so_and_works(caplog):
    scratch = lambda: {name for name in os.listdir("/tmp") if name.startswith("unsafe_sandbox_")}  # noqa: E731
    before = scratch()
    with LocalSandbox(workers=1, mode="unsafe") as sandbox:
        assert "UNSAFE" in sandbox.health()["sandbox"] and not sandbox.health()["walls"]["namespaces"]
        assert sandbox.run(python("print(6 * 7)")).stdout == "42\n"
        assert sandbox.run(python("while True: pass", time_limit_s=0.1)).status is Status.TIME_LIMIT
        request = JudgeRequest(language="python", code="print(input())", tests=cases_of(("1", "1"), ("2", "2")))
        assert sandbox.judge(request).outcome == "correct"
    assert len(caplog.records) >= 3 and all("UNSAFE" in record.message for record in caplog.records)
    left, patience = scratch() - before, time.monotonic() + 60
    while (left := left & scratch()) and time.monotonic() < patience:  # other tests may have some, for a while
        time.sleep(0.2)
    assert not left
