"""The service in a process of its own, with many clients at once, killed and restarted under their hands."""

import concurrent.futures
import dataclasses
import http.client
import json
import pathlib
import shutil
import signal
import subprocess
import sys
import threading
import time

import pytest

from kimi_jax.rewards.sandbox.api import JudgeRequest, RunRequest, Status, Test
from kimi_jax.rewards.sandbox.client import SandboxClient, SandboxUnreachable

ROOT = pathlib.Path(__file__).parents[3]
sys.path.append(str(ROOT / "scripts"))
from bench_sandbox import ask as ask_client  # noqa: E402
from bench_sandbox import descendants, workload  # noqa: E402


def start(*flags, port=0):
    """A service; returns its process and port."""
    command = [sys.executable, "-m", "kimi_jax.rewards.sandbox", f"--port={port}", "--workers=2", *flags]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    started.append(process)
    line = process.stdout.readline()
    if not line:
        error = process.communicate()[1]
        pytest.skip(error) if "namespaces" in error else pytest.fail(error)
    return process, int(line.rpartition(":")[2])


started: list[subprocess.Popen] = []


@pytest.fixture(scope="module", autouse=True)
def none_is_left():
    yield
    for process in started:
        process.terminate()
        process.communicate(timeout=20)


@pytest.fixture(scope="module")
def port():
    return start("--max_request_mb=1")[1]


@pytest.fixture
def client(port):
    with SandboxClient(f"http://127.0.0.1:{port}", patience_s=30) as client:
        yield client


def ask(port, method, path, body=None, headers=None):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    connection.request(method, path, body, headers or {})
    response = connection.getresponse()
    text = response.read().decode()
    connection.close()
    return response.status, text


def test_run_over_http_as_documented(port):
    body = {
        "language": "python",
        "code": "import sys; print(input(), open('f').read()); print('e', file=sys.stderr); sys.exit(3)",
        "stdin": "in\n",
        "files": {"f": "file"},
        "time_limit_s": 2,
        "memory_limit_mb": 64,
    }
    status, text = ask(port, "POST", "/run", json.dumps(body))
    answer = json.loads(text)
    assert status == 200
    assert set(answer) >= {"status", "exit_code", "stdout", "stderr", "seconds", "peak_memory_mb"}
    assert (answer["status"], answer["exit_code"]) == ("runtime_error", 3)
    assert (answer["stdout"], answer["stderr"]) == ("in file\n", "e\n")


def test_judge_over_http_as_documented(port):
    tests = [{"stdin": "2", "expected": "4"}, {"stdin": "3", "expected": "9"}, {"stdin": "4", "expected": "8"}]
    status, text = ask(
        port, "POST", "/judge", json.dumps({"language": "python", "code": "print(2 * int(input()))", "tests": tests})
    )
    answer = json.loads(text)
    assert (status, answer["outcome"], [v["status"] for v in answer["verdicts"]]) == (
        200,
        "wrong",
        ["ok", "wrong_answer"],
    )


def test_health_and_metrics(port, client):
    client.run(RunRequest(language="python", code=""))
    health = client.health()
    assert (health["status"], health["sandbox"], health["workers"]) == ("ok", "namespaces", 2)
    assert health["walls"]["seccomp"] and "python" in health["profiles"]["default"]["languages"]
    status, text = ask(port, "GET", "/metrics")
    assert status == 200 and "# TYPE sandbox_answers_total counter\n" in text
    values = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert float(values['sandbox_answers_total{kind="run",outcome="ok"}']) >= 1 and "sandbox_waiting_requests" in values


@pytest.mark.parametrize(
    ("method", "path", "body", "headers", "status", "complaint"),
    [
        ("GET", "/", None, {}, 404, "GET /health and /metrics, POST /run and /judge"),
        ("POST", "/jugde", "{}", {}, 404, "POST /run and /judge"),
        ("POST", "/run", "{", {}, 400, "Expecting property name"),
        ("POST", "/run", "[]", {}, 400, "is not a JSON object"),
        ("POST", "/judge", "[]", {}, 400, "is not a JSON object"),
        ("POST", "/run", b"\xff\xfe", {}, 400, ""),
        ("POST", "/run", "[" * 100_000, {}, 400, ""),
        ("POST", "/run", '{"language": "python"}', {}, 400, "the request has no 'code'"),
        ("POST", "/run", '{"language": "cobol", "code": ""}', {}, 400, "language is 'cobol'; known are python"),
        ("POST", "/run", "x" * (1 << 20) + "x", {}, 413, "at most 1048576 are taken"),
        ("POST", "/run", None, {"Content-Length": "-1"}, 413, ""),
        ("POST", "/run", None, {"Content-Length": "many"}, 411, "no Content-Length"),
        ("POST", "/run", None, {"Content-Length": str(10**12)}, 413, "1000000000000 bytes"),
    ],
)
def test_bad_input_is_refused_with_a_reason(port, method, path, body, headers, status, complaint):
    actual, text = ask(port, method, path, body, headers)
    assert actual == status and complaint in json.loads(text)["error"]


def test_the_client_says_what_was_refused(client):
    with pytest.raises(ValueError, match="known are python"):
        client.run(RunRequest(language="cobol", code=""))
    with pytest.raises(ValueError, match="has no expected output"):
        client.judge(JudgeRequest(language="python", code="", tests=[Test()]))
    with pytest.raises(ValueError, match="give http://host:port"):
        SandboxClient("localhost:80")
    with (
        SandboxClient("http://127.0.0.1:1", patience_s=0.1) as nobody,
        pytest.raises(SandboxUnreachable, match="--port=1"),
    ):
        nobody.health()


def test_what_was_asked_twice_is_executed_once(client):
    """The program shows the time, so that two executions differ."""
    request = RunRequest(language="python", code="import time; time.sleep(0.2); print(time.time_ns())", id="one")
    with concurrent.futures.ThreadPoolExecutor(5) as pool:
        answers = list(pool.map(client.run, [request] * 5))
    answers += [client.run(request)]
    assert all(answer == answers[0] and answer.status is Status.OK for answer in answers)
    assert client.run(dataclasses.replace(request, id="two")).stdout != answers[0].stdout
    assert client.run(dataclasses.replace(request, id="")).stdout != answers[0].stdout


def test_many_clients_lose_nothing_when_the_service_is_killed():
    process, port = start("--output_mb=1")
    jobs = workload(199, seed=3)
    done = threading.Semaphore(0)
    own = threading.local()

    def answer(job):
        if not hasattr(own, "client"):
            own.client = SandboxClient(f"http://127.0.0.1:{port}", patience_s=60)
        status, text = ask_client(own.client, job[0])
        done.release()
        return status, job[2] in text

    with concurrent.futures.ThreadPoolExecutor(64) as pool:
        answers = pool.map(answer, jobs)
        for _ in range(50):
            done.acquire()
        family = descendants(process.pid)
        assert len(family) > 4
        process.send_signal(signal.SIGKILL)
        process.communicate()
        process, _ = start("--output_mb=1", port=port)
        assert list(answers) == [(status, True) for _, status, _ in jobs]
    family |= descendants(process.pid)
    process.terminate()
    process.communicate(timeout=20)
    for _ in range(1000):
        if not any(pathlib.Path(f"/proc/{pid}").exists() for pid in family):
            break
        time.sleep(0.02)
    assert not [pid for pid in family if pathlib.Path(f"/proc/{pid}").exists()]


def test_unsafe_is_in_every_line_of_the_log():
    process, port = start("--sandbox=unsafe")
    with SandboxClient(f"http://127.0.0.1:{port}") as client:
        assert client.run(RunRequest(language="python", code="print(1)")).stdout == "1\n"
        assert "UNSAFE" in client.health()["sandbox"]
    process.terminate()
    lines = process.communicate(timeout=20)[1].splitlines()
    assert len(lines) >= 2 and all("UNSAFE" in line for line in lines)


def test_what_the_container_copies_is_all_that_the_service_needs(tmp_path):
    lines = (ROOT / "scripts/sandbox/Containerfile").read_text().splitlines()
    copies = [line.split()[1:] for line in lines if line.startswith("COPY")]
    assert len(copies) == 3
    for source, target in copies:
        goal = tmp_path / target.lstrip("/")
        goal.parent.mkdir(parents=True, exist_ok=True)
        (shutil.copytree if (ROOT / source).is_dir() else shutil.copy)(ROOT / source, goal)
    code = f"import sys; sys.path.insert(0, {str(tmp_path / 'service')!r}); import kimi_jax.rewards.sandbox.__main__"
    subprocess.run([sys.executable, "-I", "-S", "-c", code], check=True)


@pytest.mark.parametrize("flag", ["--profile=x", "--sandbox=maybe", "--workers=0", "--profile=x=/does/not/exist"])
def test_flags_that_cannot_work_are_refused(flag):
    command = [sys.executable, "-m", "kimi_jax.rewards.sandbox", "--port=0", flag]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=30)
    assert run.returncode == 2 and run.stderr
