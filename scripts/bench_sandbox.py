"""How fast the sandbox is, beside others, whether it loses anything under load, and whether verdicts are the same.

    python scripts/bench_sandbox.py speed --runs=200 --workers=2
    python scripts/bench_sandbox.py load --judgements=5000 --clients=64
    python scripts/bench_sandbox.py repeat --times=20

speed  `start`: from a request to the end of a Python program that does nothing, one after the other: median and p99 in
       ms. `per_s_core`: the same from as many threads as there are processors, divided by them. For a plain process;
       for our sandbox, with all that a judgement is (queue, sandbox, run, comparison); and, where they are installed,
       for bubblewrap and crun with a new sandbox each time and no supervisor. The launch alone is `start` less that of
       plain. All run `python3 -S`, in turns, so that what else the machine does is shared.
load   A service in a process of its own, many clients, programs that are right, wrong, slow and hostile; it is killed
       and restarted in the middle. Counts answers that are lost, wrong, or those of another program, the most memory
       that the service had, and processes and control groups that are left. --keep does not kill it.
repeat The same programs in every language here, and those of `load`, many times, each time in another order: counts
       those whose verdicts differ.

Prints a line per figure and, last, one JSON line. Exit status: 0 measured; 1 a verdict was wrong or a process was left;
2 what was given cannot work.
"""

import argparse
import concurrent.futures
import contextlib
import json
import os
import pathlib
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

ROOT = pathlib.Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from kimi_jax.rewards.sandbox import cgroups  # noqa: E402
from kimi_jax.rewards.sandbox.api import JudgeRequest, RunRequest, Test  # noqa: E402
from kimi_jax.rewards.sandbox.client import SandboxClient  # noqa: E402
from kimi_jax.rewards.sandbox.pool import LocalSandbox  # noqa: E402

PYTHON = ("/usr/bin/python3", "-S", "-c", "print(input())")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    commands = parser.add_subparsers(dest="command", required=True)
    speed, load, repeat = (commands.add_parser(name, allow_abbrev=False) for name in ("speed", "load", "repeat"))
    speed.add_argument("--runs", type=int, default=200, help="of each (200)")
    speed.add_argument("--rounds", type=int, default=5, help="in which they take turns (5)")
    speed.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), help="threads (one per processor)")
    speed.add_argument("--bwrap", default=shutil.which("bwrap"), help="path of bubblewrap")
    speed.add_argument("--crun", default=shutil.which("crun"), help="path of crun")
    load.add_argument("--judgements", type=int, default=5000, help="(5000)")
    load.add_argument("--clients", type=int, default=64, help="(64)")
    load.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), help="of the service")
    load.add_argument("--seed", type=int, default=0, help="of the mixture of programs (0)")
    load.add_argument("--keep", action="store_true", help="do not kill the service in the middle")
    repeat.add_argument("--times", type=int, default=20, help="(20)")
    repeat.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), help="of the sandbox")
    repeat.add_argument("--seed", type=int, default=0, help="of the order (0)")
    return parser.parse_args(argv)


# --- speed ------------------------------------------------------------------------------------------------------------


def _command(words: Sequence[str], **options) -> Callable[[], None]:
    def once() -> None:
        run = subprocess.run(words, input=b"7\n", capture_output=True, **options)
        if run.stdout != b"7\n":
            raise SystemExit(f"{words[0]} failed: {run.stderr.decode()[-500:]}")

    return once


def _bwrap(path: str) -> Callable[[], None]:
    links = [word for name in ("bin", "lib", "lib64") for word in ("--symlink", f"usr/{name}", f"/{name}")]
    places = ["--ro-bind", "/usr", "/usr", *links, "--proc", "/proc", "--dev", "/dev", "--tmpfs", "/tmp"]
    return _command([path, "--unshare-all", "--die-with-parent", *places, "--clearenv", "--", *PYTHON])


def _own_ids() -> dict[str, int]:
    return {"uid": os.getuid(), "gid": os.getgid()}


def _crun(path: str, directory: str) -> Callable[[], None]:
    """A bundle with the same view as bubblewrap's."""
    root = pathlib.Path(directory, "rootfs")
    for name in ("usr", "proc", "dev", "tmp"):
        (root / name).mkdir(parents=True)
    for name in ("bin", "lib", "lib64"):
        (root / name).symlink_to(f"usr/{name}")
    mounts = [
        {"destination": "/proc", "type": "proc", "source": "proc"},
        {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["mode=755", "size=64k"]},
        {"destination": "/tmp", "type": "tmpfs", "source": "tmpfs", "options": ["size=128m"]},
        {"destination": "/usr", "type": "bind", "source": "/usr", "options": ["rbind", "ro"]},
    ]
    spaces = [{"type": kind} for kind in ("pid", "network", "ipc", "uts", "mount", "user")]
    maps = {f"{kind}Mappings": [{"containerID": 0, "hostID": own, "size": 1}] for kind, own in _own_ids().items()}
    process = {"args": list(PYTHON), "cwd": "/", "user": {"uid": 0, "gid": 0}, "noNewPrivileges": True}
    spec = {
        "ociVersion": "1.0.0",
        "root": {"path": "rootfs", "readonly": True},
        "mounts": mounts,
        "linux": {"namespaces": spaces, **maps},
    }
    pathlib.Path(directory, "config.json").write_text(json.dumps(spec | {"process": process}))
    counter = iter(range(10**9))

    def once() -> None:
        words = [path, f"--root={directory}/state", "--cgroup-manager=disabled", "run", "-b", directory]
        _command([*words, f"bench_{os.getpid()}_{next(counter)}"])()

    return once


@contextlib.contextmanager
def _contenders(arguments: argparse.Namespace) -> Iterator[dict[str, Callable[[], None]]]:
    request = JudgeRequest(language="python", code="print(input())", tests=[Test(stdin="7\n", expected="7")])
    with LocalSandbox(workers=arguments.workers) as sandbox, tempfile.TemporaryDirectory() as directory:

        def ours() -> None:
            if (judgement := sandbox.judge(request)).outcome != "correct":
                raise SystemExit(f"our own sandbox failed: {judgement}")

        found: dict[str, Callable[[], None]] = {"plain": _command(PYTHON), "ours": ours}
        if arguments.bwrap:
            found["bwrap"] = _bwrap(arguments.bwrap)
        if arguments.crun:
            found["crun"] = _crun(arguments.crun, directory)
        for name, once in list(found.items()):
            try:
                once()
            except SystemExit as error:
                print(f"{name}: left out; {error}", file=sys.stderr)
                del found[name]
        print(f"walls: {sandbox.health()['walls']}")
        yield found


def speed(arguments: argparse.Namespace) -> dict:
    with _contenders(arguments) as contenders:
        times: dict[str, list[float]] = {name: [] for name in contenders}
        rates: dict[str, list[float]] = {name: [] for name in contenders}
        each = max(1, arguments.runs // arguments.rounds)
        with concurrent.futures.ThreadPoolExecutor(arguments.workers) as pool:
            for _ in range(arguments.rounds):
                for name, once in contenders.items():
                    for _ in range(each):
                        begin = time.perf_counter()
                        once()
                        times[name].append(1e3 * (time.perf_counter() - begin))
                    begin = time.perf_counter()
                    for job in [pool.submit(once) for _ in range(each)]:
                        job.result()
                    rates[name].append(each / (time.perf_counter() - begin) / arguments.workers)
    figures = {}
    for name in contenders:
        ordered = sorted(times[name])
        figures[name] = {
            "start_median_ms": round(statistics.median(ordered), 2),
            "start_p99_ms": round(ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))], 2),
            "per_s_core": round(statistics.median(rates[name]), 1),
        }
        figures[name]["launch_ms"] = round(figures[name]["start_median_ms"] - figures["plain"]["start_median_ms"], 2)
        print(f"{name:6} {figures[name]}")
    user = "root" if os.getuid() == 0 else f"uid {os.getuid()}"
    return {"command": "speed", "user": user, "runs": arguments.runs, "workers": arguments.workers, **figures}


# --- load -------------------------------------------------------------------------------------------------------------

# code with {n}, the status that its one test must get, weight in the mixture
PROGRAMS = (
    ("print(int(input()) + {n})", "ok", 60),
    ("print(int(input()) - {n} - 1)", "wrong_answer", 20),
    ("raise ValueError({n})", "runtime_error", 6),
    ("import time\ntime.sleep(0.05)\nprint(int(input()) + {n})", "ok", 4),
    ("while True: {n}", "time_limit", 1),
    ("import os\nwhile True:\n    try: os.fork()\n    except OSError: {n}", "time_limit", 1),
    ("x = b'x' * (300 << 20)\nprint({n})", "memory_limit", 1),
    ("while True: print({n}, 'x' * 9999)", "output_limit", 1),
    ("import os, time\nif not os.fork():\n    os.setsid()\n    time.sleep(99)\nprint(int(input()) + {n})", "ok", 2),
    ("import os\nos.kill(1, 9)\nos.kill(os.getppid(), 15)\nprint(int(input()) + {n})", "ok", 2),
)


Job = tuple[JudgeRequest | RunRequest, str, str]


def workload(number: int, seed: int) -> list[Job]:
    """Requests, each with the status that it must get, and words that only its own answer has, if it has any."""
    chosen = random.Random(seed).choices(PROGRAMS, [weight for _, _, weight in PROGRAMS], k=number)
    jobs: list[Job] = []
    for n, (code, status, _) in enumerate(chosen):
        right = n * n + n
        common: dict[str, Any] = {"language": "python", "code": code.format(n=n), "memory_limit_mb": 64}
        common["time_limit_s"] = 0.2 if status == "time_limit" else 5.0
        words = {"wrong_answer": f"expected '{right}'", "runtime_error": f"ValueError: {n}\n"}.get(status, "")
        if status == "ok" and n % 2:
            jobs.append((RunRequest(stdin=str(n * n), **common), status, f"\n{right}\n"))
        else:
            test = Test(stdin=str(n * n), expected=str(right))
            jobs.append((JudgeRequest(tests=[test], **common), status, words))
    return jobs


def ask(client: SandboxClient, request: JudgeRequest | RunRequest) -> tuple[str, str]:
    """The status of an answer, and what it says."""
    if isinstance(request, RunRequest):
        result = client.run(request)
        return result.status, f"\n{result.stdout}"
    judgement = client.judge(request)
    return judgement.verdicts[-1].status if judgement.verdicts else judgement.outcome, f"{judgement.feedback}\n"


def start_service(workers: int, port: int = 0) -> tuple[subprocess.Popen, int]:
    command = [sys.executable, "-m", "kimi_jax.rewards.sandbox", f"--port={port}", f"--workers={workers}"]
    service = subprocess.Popen([*command, "--output_mb=1"], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    line = service.stdout.readline()
    if not line:
        raise SystemExit(2)
    return service, int(line.rpartition(":")[2])


def descendants(pid: int) -> set[int]:
    """A process and all that it started, as far as their parents live."""
    parents = {}
    for name in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            parents[int(name)] = int(pathlib.Path(f"/proc/{name}/stat").read_text().rpartition(")")[2].split()[1])
    found = {pid}
    while more := {p for p, parent in parents.items() if parent in found} - found:
        found |= more
    return found


def load(arguments: argparse.Namespace) -> dict:
    jobs = workload(arguments.judgements, arguments.seed)
    places = set(cgroups.find()[0].values())
    service, port = start_service(arguments.workers)
    services = [service.pid]
    own, done, peak = threading.local(), threading.Semaphore(0), 0.0

    def answer(job: Job) -> str:
        if not hasattr(own, "client"):
            own.client = SandboxClient(f"http://127.0.0.1:{port}")
        status, text = ask(own.client, job[0])
        done.release()
        return status if job[2] in text else f"{status} with {text!r:.60}"

    def memory_mb() -> float:
        return int(pathlib.Path(f"/proc/{service.pid}/statm").read_text().split()[1]) * 4096 / 2**20

    begin, family = time.perf_counter(), set[int]()
    with concurrent.futures.ThreadPoolExecutor(arguments.clients) as pool:
        answers = pool.map(answer, jobs)
        for i in range(len(jobs)):
            done.acquire()
            if i % 50 == 0:
                peak = max(peak, memory_mb())
            if i == len(jobs) // 2 and not arguments.keep:
                family |= descendants(service.pid)
                service.send_signal(signal.SIGKILL)
                service.communicate()
                service, _ = start_service(arguments.workers, port)
                services.append(service.pid)
        verdicts = list(answers)
    seconds = time.perf_counter() - begin
    family |= descendants(service.pid)
    service.terminate()
    service.communicate()
    time.sleep(1.0)
    wrong = [(job[0].code, verdict, job[1]) for job, verdict in zip(jobs, verdicts, strict=True) if verdict != job[1]]
    for code, verdict, expected in wrong[:10]:
        print(f"{verdict}, not {expected}: {code!r:.100}")
    return {
        "command": "load",
        "judgements": len(verdicts),
        "clients": arguments.clients,
        "seconds": round(seconds, 1),
        "per_s": round(len(jobs) / seconds, 1),
        "lost_or_wrong": len(jobs) - len(verdicts) + len(wrong),
        "service_peak_mb": round(peak, 1),
        "processes_left": sum(pathlib.Path(f"/proc/{pid}").exists() for pid in family),
        "groups_left": sum(len(list(place.glob(f"kimi_jax_sandbox_{pid}_*"))) for place in places for pid in services),
        "killed_in_the_middle": not arguments.keep,
    }


# --- repeat -----------------------------------------------------------------------------------------------------------


def repeat(arguments: argparse.Namespace) -> dict:
    sys.path.append(str(ROOT / "tests/rewards/sandbox"))
    import programs

    tables = (programs.DOUBLE, programs.DOES_NOT_COMPILE, programs.EXITS_WITH_3, programs.TAKES_MEMORY)
    tests = [Test(stdin="3\n", expected="6"), Test(stdin="-5\n", expected="-10")]
    with LocalSandbox(workers=arguments.workers) as sandbox:
        requests = [
            JudgeRequest(language=name, code=code, tests=tests, time_limit_s=5.0, memory_limit_mb=64)
            for table in tables
            for name, code in table.items()
            if name in sandbox.profiles["default"].languages
        ]
        requests += [request for request, _, _ in workload(100, arguments.seed) if isinstance(request, JudgeRequest)]
        verdicts: list[set[tuple[str, ...]]] = [set() for _ in requests]
        rng = random.Random(arguments.seed)
        for _ in range(arguments.times):
            order = rng.sample(range(len(requests)), len(requests))
            for i, future in [(i, sandbox.submit(requests[i])) for i in order]:
                verdicts[i].add((future.result().outcome, *(verdict.status for verdict in future.result().verdicts)))
    for request, found in zip(requests, verdicts, strict=True):
        if len(found) > 1:
            print(f"{sorted(found)}: {request.language}, {request.code!r:.100}")
    return {
        "command": "repeat",
        "programs": len(requests),
        "languages": sorted({request.language for request in requests}),
        "times": arguments.times,
        "kinds_of_verdict": sorted({found[-1] for kinds in verdicts for found in kinds}),
        "different": sum(len(found) > 1 for found in verdicts),
    }


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse(argv)
    result = {"speed": speed, "load": load, "repeat": repeat}[arguments.command](arguments)
    print(json.dumps(result))
    failures = ("lost_or_wrong", "processes_left", "groups_left", "different")
    return 1 if any(result.get(failure) for failure in failures) else 0


if __name__ == "__main__":
    sys.exit(main())
