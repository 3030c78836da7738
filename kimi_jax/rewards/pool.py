"""Judging in worker processes, so that responses are judged while others are still being written.

A judge may be slow, hang or crash, and none of it may reach the trainer. So it runs in processes that can be killed,
and a response whose judge was killed is UNGRADABLE: a failed verifier says nothing about a response. Workers are fresh
interpreters that import the judge, no JAX, and see no accelerator. Verdicts depend on the judge alone and not on
timing, except where a deadline is missed, which is counted.

    with VerifierPool(tasks.verify, workers=2, deadline_s=5.0) as pool:
        tickets = [pool.submit(problem, text) for text in texts]  # returns at once
        ...  # decode on
        verdicts = pool.verdicts(tickets)  # in the order of the tickets

One thread owns the workers and watches their deadlines. Signal handlers would need the main thread, which is decoding.
"""

import collections
import contextlib
import ctypes
import dataclasses
import math
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from multiprocessing import connection

from kimi_jax.types import Outcome, Problem, Verdict

Judge = Callable[[Problem, str], Verdict]

_MAX_JOBS_PER_MESSAGE = 16  # a round trip costs about as much as a short answer takes to judge
_START_S = 60.0  # an interpreter that has not imported the judge by then has failed to start
_MAX_FAILED_STARTS = 3  # in a row; then it is not bad luck
_WORKER_ENVIRONMENT = {
    "CUDA_VISIBLE_DEVICES": "",
    "ROCR_VISIBLE_DEVICES": "",
    "TPU_VISIBLE_CHIPS": "",
    "JAX_PLATFORMS": "cpu",
    "OMP_NUM_THREADS": "1",  # parallel over responses, not within one
    "OPENBLAS_NUM_THREADS": "1",
    "PYTHONHASHSEED": "0",  # a verdict must not depend on the order of a set
}


class VerifierPool:
    """A queue of responses before `workers` processes, each of which calls `judge(problem, text)` on one at a time.

    Workers start in the background, from the constructor on; responses wait for them.

    Args:
        judge: a function at the top level of a module. Each worker imports that module anew, without what the program
            changed in it since. The problems that it sees have no images.
        workers: how many processes. 0 judges in this process, within `submit`, and keeps no deadline.
        deadline_s: seconds for one judgement, from when a worker begins with it; then that worker is killed and
            replaced.

    Attributes:
        missed_deadlines: how many judgements the deadline has ended.
        crashes: how many workers died of something else (a segmentation fault, memory, `os._exit`).

    Raises:
        ValueError: `workers` or `deadline_s` is out of range, or `judge` cannot be imported by another process.
    """

    def __init__(self, judge: Judge, *, workers: int, deadline_s: float):
        if workers < 0:
            raise ValueError(f"workers is {workers}; give a number of processes, or 0 to judge in this one")
        if not 0 < deadline_s < math.inf:
            raise ValueError(f"deadline_s is {deadline_s}; give a positive number of seconds")
        self.missed_deadlines = 0
        self.crashes = 0
        self._judge = judge
        self._deadline_s = deadline_s
        self._num_workers = workers
        self._closed = ""  # why
        self._lock = threading.Lock()  # so that no job enters the queue after it was emptied for the last time
        self._queue: collections.deque[_Job] = collections.deque()
        self._failed_starts = 0
        if workers:
            self._pickled_judge = _pickled(judge)
            self._bell, self._bell_rope = connection.Pipe(duplex=False)  # wakes the thread when the queue has grown
            self._rung = False  # is a message in it already?
            self._thread = threading.Thread(target=self._run, name="verifier-pool", daemon=True)
            self._thread.start()

    def submit(self, problem: Problem, text: str) -> "Future[Verdict]":
        """Queues one response to be judged; returns its ticket. Raises RuntimeError if the pool is closed or broken."""
        if problem.images:  # the bulk of it, and nothing that an answer is compared with
            problem = dataclasses.replace(problem, images=())
        job = _Job(pickle.dumps((problem, text)), Future())
        job.ticket.set_running_or_notify_cancel()  # from now on it cannot be cancelled
        with self._lock:
            if self._closed:
                raise RuntimeError(self._closed)
            if self._num_workers:
                self._queue.append(job)
                if not self._rung:
                    self._rung = True
                    self._bell_rope.send_bytes(b"!")
        if not self._num_workers:
            job.ticket.set_result(_verdict(self._judge, job.payload))
        return job.ticket

    def verdicts(self, tickets: "Iterable[Future[Verdict]]") -> list[Verdict]:
        """Waits for the verdicts of these tickets, and returns them in the same order.

        Raises:
            RuntimeError: workers cannot start (with the reason), or the pool was closed before all were judged.
        """
        return [ticket.result() for ticket in tickets]

    def close(self) -> None:
        """Kills the workers at once. A ticket that is still open raises RuntimeError when its verdict is asked for."""
        with self._lock:
            self._closed = self._closed or "this VerifierPool is closed; submit and collect within its `with` block"
        if self._num_workers:
            if self._thread.is_alive():
                self._bell_rope.send_bytes(b"!")
            self._thread.join()
            self._bell.close()
            self._bell_rope.close()

    def __enter__(self) -> "VerifierPool":
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    # --- the rest runs in the pool's own thread -----------------------------------------------------------------------

    def _run(self) -> None:
        workers: list[_Worker] = []
        closed = "the VerifierPool failed"
        try:
            for _ in range(self._num_workers):
                workers.append(self._start())
            while not self._closed:
                self._step(workers)
        except Exception as error:
            closed = f"the VerifierPool failed: {error}"
        finally:
            with self._lock:
                self._closed = self._closed or closed
            for worker in workers:
                worker.kill()
            for job in [*(job for worker in workers for job in worker.jobs), *self._queue]:
                job.ticket.set_exception(RuntimeError(self._closed))

    def _step(self, workers: "list[_Worker]") -> None:
        """Hands out jobs, waits for something to happen, and deals with it."""
        for worker in workers:
            if worker.ready and not worker.jobs and self._queue:
                self._hand_out(worker)
        due = min(worker.due for worker in workers)
        timeout = None if due == math.inf else max(0.0, due - time.monotonic())
        readable = connection.wait([self._bell, *(worker.conn for worker in workers)], timeout)
        if self._bell in readable:
            self._bell.recv_bytes()
            self._rung = False  # before the queue is looked at
        now = time.monotonic()
        for i, worker in enumerate(workers):
            if worker.conn in readable:  # first: an answer in time counts, however late this thread comes to read it
                if not self._hear(worker):
                    workers[i] = self._replace(worker, missed_deadline=False)
            elif worker.due <= now:
                workers[i] = self._replace(worker, missed_deadline=True)

    def _start(self) -> "_Worker":
        return _Worker.start(self._pickled_judge, due=time.monotonic() + _START_S)

    def _hand_out(self, worker: "_Worker") -> None:
        """A few jobs in one message, fewer towards the end of the queue. Their worker is idle, so that it will read."""
        size = max(1, min(_MAX_JOBS_PER_MESSAGE, len(self._queue) // (2 * self._num_workers)))
        worker.jobs.extend(self._queue.popleft() for _ in range(size))
        worker.due = time.monotonic() + self._deadline_s
        with contextlib.suppress(OSError):  # it has just died; the next wait will tell
            worker.conn.send([job.payload for job in worker.jobs])

    def _hear(self, worker: "_Worker") -> bool:
        """Takes one message. Returns False if there is none because the worker has died."""
        try:
            message = worker.conn.recv()
        except (EOFError, OSError):
            return False
        if worker.ready:
            worker.jobs.popleft().ticket.set_result(message)
        elif message:
            raise RuntimeError(f"a worker cannot import the judge: {message}")
        worker.ready = True
        self._failed_starts = 0
        # The clock of the next job of the message starts with the answer to the one before it.
        worker.due = time.monotonic() + self._deadline_s if worker.jobs else math.inf
        return True

    def _replace(self, worker: "_Worker", *, missed_deadline: bool) -> "_Worker":
        """Kills a worker. The job that it was at is ungradable, and those that it had not begun are queued again."""
        ending = worker.kill()
        if not worker.ready:
            self._failed_starts += 1
            if self._failed_starts == _MAX_FAILED_STARTS:
                raise RuntimeError(
                    f"{_MAX_FAILED_STARTS} workers in a row did not start; the last one {ending}. What they wrote to "
                    f"stderr may say why; import the judge in a new interpreter to see it, or judge with workers=0"
                )
        elif missed_deadline:
            self.missed_deadlines += 1
            ending = f"deadline of {self._deadline_s:g} s"
        else:
            self.crashes += 1
            ending = f"the judging process {ending}"
        if worker.jobs:
            worker.jobs.popleft().ticket.set_result(Verdict(Outcome.UNGRADABLE, ending))
            self._queue.extendleft(reversed(worker.jobs))
        return self._start()


@dataclasses.dataclass(frozen=True, eq=False)
class _Job:
    payload: bytes  # the pickled (problem, text): what cannot be pickled fails in `submit`, not in the thread
    ticket: "Future[Verdict]"


@dataclasses.dataclass(eq=False)
class _Worker:
    """A process, as the pool sees it."""

    process: subprocess.Popen
    conn: connection.Connection
    due: float  # when patience ends, on the monotonic clock; inf while it has nothing to do
    ready: bool = False  # has imported the judge
    jobs: collections.deque[_Job] = dataclasses.field(default_factory=collections.deque)  # it is at the first

    @classmethod
    def start(cls, pickled_judge: bytes, *, due: float) -> "_Worker":
        """A new interpreter, not a fork of this one, whose JAX has threads; nor does it run the main script again."""
        ours, theirs = connection.Pipe()
        with theirs:
            path = [str(entry) for entry in sys.path]
            code = (
                f"import sys; sys.path[:] = {path}; from kimi_jax.rewards.pool import _serve; _serve({theirs.fileno()})"
            )
            process = subprocess.Popen(
                [sys.executable, "-c", code],
                stdin=subprocess.DEVNULL,
                stdout=2,  # what a judge prints is not the program's output
                env=os.environ | _WORKER_ENVIRONMENT,
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # out of reach of Ctrl-C, and killed together with what the judge started
            )
        with contextlib.suppress(OSError):  # it has died already
            ours.send_bytes(pickled_judge)
        return cls(process, ours, due)

    def kill(self) -> str:
        """Ends the process, if it has not ended by itself, and says how it did."""
        with contextlib.suppress(ProcessLookupError, PermissionError):  # gone already
            os.killpg(self.process.pid, signal.SIGKILL)
        self.conn.close()
        status = self.process.wait()
        return f"died of {signal.Signals(-status).name}" if status < 0 else f"exited with status {status}"


def _pickled(judge: Judge) -> bytes:
    """The name of the judge, pickled."""
    remedy = "define it at the top level of a module that can be imported, or judge in this process with workers=0"
    try:
        pickled = pickle.dumps(judge)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise ValueError(f"workers cannot import the judge {judge!r} ({error}); {remedy}") from error
    if b"__main__" in pickled:
        raise ValueError(f"workers cannot import the judge {judge!r} from the running script or notebook; {remedy}")
    return pickled


def _verdict(judge: Judge, payload: bytes) -> Verdict:
    try:
        verdict = judge(*pickle.loads(payload))
        if not isinstance(verdict, Verdict):
            raise TypeError(f"the judge returned {verdict!r:.80}, not a Verdict")
        return verdict
    except (Exception, SystemExit) as error:
        return Verdict(Outcome.UNGRADABLE, f"{type(error).__name__}: {error}")


# --- in the worker ----------------------------------------------------------------------------------------------------


def _serve(fd: int) -> None:
    """What a worker does until its pool is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform == "linux":
        # Die with the thread that started this process, even in a loop that never comes back to read the connection.
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # 1: PR_SET_PDEATHSIG
    conn = connection.Connection(fd)
    with contextlib.suppress(EOFError, OSError):  # the pool is gone
        pickled_judge = conn.recv_bytes()
        try:
            judge = pickle.loads(pickled_judge)
        except Exception as error:
            conn.send(f"{type(error).__name__}: {error}")
            return
        conn.send("")
        while True:
            for payload in conn.recv():
                conn.send(_verdict(judge, payload))
