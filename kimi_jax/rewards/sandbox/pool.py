"""Sandboxes for one machine, in this process: a queue before worker threads, each with zygotes of its own.

    with LocalSandbox(workers=2) as sandbox:
        result = sandbox.run(RunRequest(language="python", code="print(6 * 7)"))

No program runs in this process or as a copy of it: zygotes are fresh interpreters. A request whose sandbox fails is
given a second one, and only if that fails too is the answer `sandbox_error` or `ungradable`.
"""

import contextlib
import dataclasses
import logging
import os
import queue
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from typing import Any

from kimi_jax.rewards.sandbox import cgroups, judge, kernel, languages
from kimi_jax.rewards.sandbox.api import Judgement, JudgeRequest, RunRequest, RunResult, Status, check
from kimi_jax.rewards.sandbox.isolation import Box, NoIsolation, SandboxError, Zygote

UNSAFE = "UNSAFE: programs run without isolation"
_ATTEMPTS = 2
_log = logging.getLogger(__name__)


class Busy(RuntimeError):
    """Too much is waiting already; ask again later."""


@dataclasses.dataclass(frozen=True)
class Profile:
    """A root file system and the languages in it."""

    root: str
    paths: dict[str, str]  # of commands in it
    languages: dict[str, languages.Language]


class LocalSandbox:
    """A pool of `workers` sandboxes with the interface `api.Sandbox`.

    Args:
        workers: how many programs run at the same time; by default one per processor.
        profiles: root file systems by name, besides "default", which is made of this machine's read-only directories.
            A container image unpacked into a directory is one.
        mode: "isolated", or "unsafe", which runs programs as ordinary processes of this user whether
            isolation would work or not: for tests, and for code that one wrote oneself.
        max_waiting: requests that may wait.
        max_waiting_mb: and their size together.
        output_mb: standard output and error of one run.
        compile_time_s, compile_memory_mb: for compilers.

    Raises:
        NoIsolation: this machine cannot isolate programs; the message says why and what to do.
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        *,
        workers: int | None = None,
        profiles: Mapping[str, str] | None = None,
        mode: str = "isolated",
        max_waiting: int = 4096,
        max_waiting_mb: int = 512,
        output_mb: int = 16,
        compile_time_s: float = 30.0,
        compile_memory_mb: int = 1024,
    ):
        if mode not in ("isolated", "unsafe"):
            raise ValueError(f"mode is {mode!r}; give 'isolated' or 'unsafe'")
        workers = len(os.sched_getaffinity(0)) if workers is None else workers
        if workers < 1:
            raise ValueError(f"workers is {workers}; give a number of processes that may run at the same time")
        self.mode = mode
        self.counts: dict[str, int] = {}  # of answers, by kind and outcome
        self.retries = 0  # sandboxes that failed
        self.busy_s = 0.0
        self._bounds = judge.Bounds(output_mb, compile_time_s, compile_memory_mb)
        self._max_waiting, self._max_bytes = max_waiting, max_waiting_mb << 20
        self._waiting_bytes = 0
        self._lock = threading.Lock()
        self._queue: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._closed = False
        self._groups, self._cgroup_version = cgroups.find() if mode == "isolated" else ({}, 0)
        self.profiles = {name: self._probe(root) for name, root in {"default": "/", **(profiles or {})}.items()}
        self._threads = [threading.Thread(target=self._work, name=f"sandbox-{i}", daemon=True) for i in range(workers)]
        for thread in self._threads:
            thread.start()

    # --- what anyone may call -----------------------------------------------------------------------------------------

    def run(self, request: RunRequest) -> RunResult:
        """Runs one program. Raises ValueError if the request makes no sense and Busy if too much is waiting."""
        return self.submit(request).result()

    def judge(self, request: JudgeRequest) -> Judgement:
        """Runs one program on its tests. Raises as `run` does."""
        return self.submit(request).result()

    def submit(self, request: RunRequest | JudgeRequest) -> "Future[Any]":
        """Queues a request; its answer comes with the future."""
        check(request)
        self._check_languages(request)
        job = _Job(request, Future(), _size(request))
        job.answer.set_running_or_notify_cancel()  # from now on it cannot be cancelled, which would cost a worker
        with self._lock:
            if self._closed:
                raise RuntimeError("this LocalSandbox is closed; ask within its `with` block")
            full = self._queue.qsize() >= self._max_waiting or self._waiting_bytes + job.size > self._max_bytes
            if full and self._waiting_bytes:
                raise Busy(f"{self._queue.qsize()} requests of {self._waiting_bytes >> 20} MB are waiting; try again")
            self._waiting_bytes += job.size
            self._queue.put(job)
        return job.answer

    def health(self) -> dict:
        """What runs, and behind which walls."""
        isolated = self.mode == "isolated"
        walls = {
            "namespaces": ["user", "mount", "pid", "net", "ipc", "uts", "cgroup"] if isolated else [],
            "seccomp": isolated,
            "no_new_privileges": isolated,
            "read_only_root": isolated,
            "rlimits": True,
            "cgroups": f"v{self._cgroup_version}" if self._groups else "none; memory and processes are polled",
            "user": ("nobody" if os.getuid() == 0 else f"uid {os.getuid()}") if isolated else f"uid {os.getuid()}",
        }
        return {
            "status": "ok" if not self._closed else "closed",
            "sandbox": "namespaces" if isolated else UNSAFE,
            "walls": walls,
            "workers": len(self._threads),
            "waiting": self._queue.qsize(),
            "profiles": {
                name: {"languages": sorted(p.languages), "missing": languages.missing(p.paths)}
                for name, p in self.profiles.items()
            },
        }

    def metrics(self) -> dict[str, float]:
        """Numbers that only grow, but for those that wait."""
        return {
            **{f"answers_total{{{key}}}": float(count) for key, count in sorted(self.counts.items())},
            "failed_sandboxes_total": float(self.retries),
            "busy_seconds_total": self.busy_s,
            "waiting_requests": float(self._queue.qsize()),
            "waiting_bytes": float(self._waiting_bytes),
        }

    def close(self) -> None:
        """Waits for the programs that run, and answers those that wait with an error."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            with contextlib.suppress(queue.Empty):
                while job := self._queue.get_nowait():
                    job.answer.set_exception(RuntimeError("the LocalSandbox was closed before this request had a turn"))
            for _ in self._threads:
                self._queue.put(None)
        for thread in self._threads:
            thread.join()
        for parent in self._groups.values():  # of one that was killed just before this one started
            cgroups.remove_stale(parent)

    def __enter__(self) -> "LocalSandbox":
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    # --- profiles -----------------------------------------------------------------------------------------------------

    def _probe(self, root: str) -> Profile:
        """Makes one sandbox there and looks around in it."""
        problem = kernel.supported()
        if not problem:
            try:
                with contextlib.closing(self._start(root)) as zygote:
                    box = zygote.take()
                    commands = dict.fromkeys(c for entry in languages.LANGUAGES.values() for c in entry.commands())
                    paths = box.find(list(commands))
                    box.discard()
                    return Profile(root, paths, languages.available(paths))
            except (NoIsolation, SandboxError) as error:
                problem = str(error)
        raise NoIsolation(
            f"{problem}. Untrusted code is not run on this machine. Allow this user to make user namespaces (sysctl "
            f"user.max_user_namespaces, kernel.apparmor_restrict_unprivileged_userns; in a container: an unmasked "
            f"/proc and a seccomp profile that allows unshare and mount), or start it with --sandbox=unsafe"
        )

    def _start(self, root: str) -> Zygote:
        group = cgroups.ControlGroup(self._groups, version=self._cgroup_version) if self._groups else None
        return Zygote(root, isolated=self.mode == "isolated", group=group)

    def _check_languages(self, request: RunRequest | JudgeRequest) -> None:
        profile = self.profiles.get(request.profile)
        if profile is None:
            raise ValueError(f"profile is {request.profile!r:.60}; there are {', '.join(self.profiles)}")
        checker = getattr(request, "checker", None)
        for name in (request.language, *([checker["language"]] if checker else [])):
            if name not in languages.LANGUAGES:
                raise ValueError(f"language is {name!r:.60}; known are {', '.join(languages.LANGUAGES)}")
            if name not in profile.languages:
                lacking = ", ".join(languages.missing(profile.paths)[name])
                raise ValueError(
                    f"{name} is missing here: profile {request.profile!r} has no {lacking}; "
                    f"it has {', '.join(sorted(profile.languages))}"
                )

    # --- workers ------------------------------------------------------------------------------------------------------

    def _work(self) -> None:
        zygotes: dict[str, Zygote] = {}
        try:
            while job := self._queue.get():
                begin = time.monotonic()
                with self._lock:
                    self._waiting_bytes -= job.size
                with contextlib.ExitStack() as stack:  # sandboxes are discarded after the answer is given
                    answer = self._answer(job.request, zygotes, stack)
                    with self._lock:
                        outcome = answer.status if isinstance(answer, RunResult) else answer.outcome
                        key = f'kind="{"run" if isinstance(answer, RunResult) else "judge"}",outcome="{outcome}"'
                        self.counts[key] = self.counts.get(key, 0) + 1
                        self.busy_s += time.monotonic() - begin
                    job.answer.set_result(answer)
        finally:
            for zygote in zygotes.values():
                zygote.close()

    def _answer(self, request: RunRequest | JudgeRequest, zygotes: dict, stack: contextlib.ExitStack) -> Any:
        reason = ""
        for _ in range(_ATTEMPTS):
            try:
                return self._attempt(request, zygotes, stack)
            except ValueError as error:  # a function that cannot be called
                reason = str(error)
                break
            except Exception as error:  # whatever it is, this request is not worth more than the worker
                reason = f"{type(error).__name__}: {error}"
                _log.warning("%sa sandbox failed: %s", f"{UNSAFE}; " if self.mode == "unsafe" else "", reason)
                with self._lock:
                    self.retries += 1
                stack.pop_all()
                if zygote := zygotes.pop(request.profile, None):
                    zygote.close()
        if isinstance(request, JudgeRequest):
            return Judgement(outcome="ungradable", verdicts=[], feedback=reason)
        return RunResult(
            status=Status.SANDBOX_ERROR,
            exit_code=None,
            stdout="",
            stderr="",
            seconds=0.0,
            peak_memory_mb=0.0,
            feedback=reason,
        )

    def _attempt(self, request: RunRequest | JudgeRequest, zygotes: dict, stack: contextlib.ExitStack) -> Any:
        profile = self.profiles[request.profile]
        if request.profile not in zygotes:
            zygotes[request.profile] = self._start(profile.root)

        def start(language: str, code: str) -> judge.Program:
            box = zygotes[request.profile].take()
            stack.callback(_discard, box, zygotes, request.profile)
            return judge.Program(box, profile.languages[language], code, bounds=self._bounds, paths=profile.paths)

        handle: Callable = judge.judge if isinstance(request, JudgeRequest) else judge.run
        if self.mode == "unsafe":
            _log.warning("%s; %s, %d bytes", UNSAFE, request.language, len(request.code))
        return handle(request, start)


def _discard(box: Box, zygotes: dict[str, Zygote], profile: str) -> None:
    try:
        box.discard()
    except (OSError, SandboxError):  # then everything that it made goes
        if zygote := zygotes.pop(profile, None):
            zygote.close()


@dataclasses.dataclass(frozen=True, eq=False)
class _Job:
    request: RunRequest | JudgeRequest
    answer: "Future[Any]"
    size: int


def _size(request: RunRequest | JudgeRequest) -> int:
    """About how many bytes of text it holds."""
    size = 1000 + len(request.code) + sum(map(len, request.files.values()))
    if isinstance(request, RunRequest):
        return size + len(request.stdin)
    for test in request.tests:
        size += 200 + len(test.stdin) + len(test.expected if isinstance(test.expected, str) else str(test.expected))
        size += len(str(test.arguments)) if test.arguments else 0
    return size
