"""Judging in worker processes, so that responses are judged while others are still being written.

A judge may be slow, hang or crash, and none of it may reach the trainer. So it runs in processes that can be killed,
and a response whose judge was killed is UNGRADABLE: a failed verifier says nothing about a response. Workers
(`rewards.workers`) import the judge, no JAX, and see no accelerator. Verdicts depend on the judge alone and not on
timing, except where a deadline is missed, which is counted.

    with VerifierPool(tasks.verify, workers=2, deadline_s=5.0) as pool:
        tickets = [pool.submit(problem, text) for text in texts]  # returns at once
        ...  # decode on
        verdicts = pool.verdicts(tickets)  # in the order of the tickets

A judgement that hangs costs its own deadline and nobody else's time: while it has taken ten times as long as others
take, a spare worker stands in for the one that it occupies. One thread owns the workers and watches their deadlines.
Signal handlers would need the main thread, which is decoding.
"""

import collections
import contextlib
import dataclasses
import functools
import math
import pickle
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from multiprocessing import connection
from typing import Any

from kimi_jax.rewards.workers import Template, TemplateLost, Worker, answer
from kimi_jax.types import Outcome, Problem, Verdict

Judge = Callable[[Problem, str], Verdict]

_START_S = 60.0  # a template that has not imported the function by then has failed to start
_MAX_FAILED_STARTS = 3  # in a row; then it is not bad luck
_SPARES = 8  # per worker, at most
_SLOW = 10.0  # times the mean duration of a call: then its worker is stood in for ...
_SLOW_S = 0.05  # ... but not before, which may be the scheduling of the machine


class WorkerPool:
    """A queue of calls before `workers` processes, each of which does one at a time.

    Workers start in the background, from the constructor on; calls wait for them. They are copies of one interpreter,
    in which the module of the function was imported anew, without what the program changed in it since: connections
    and threads belong into the function, not beside it.

    Args:
        function: at the top level of a module.
        failed: what a ticket gives in place of what the function returns, when there is no such thing, from the reason.
        workers: how many processes; up to eight times as many more exist while calls are hung. 0 calls the function in
            this process, within `call`, and keeps no deadline.
        deadline_s: seconds for one call, from when a worker begins with it; then that worker is killed and replaced.

    Attributes:
        missed_deadlines: how many calls the deadline has ended.
        crashes: how many workers died of something else (a segmentation fault, memory, `os._exit`).

    Raises:
        ValueError: `workers` or `deadline_s` is out of range, or `function` cannot be imported by another process.
    """

    def __init__(self, function: Callable, *, failed: Callable[[str], Any], workers: int, deadline_s: float):
        if workers < 0:
            raise ValueError(f"workers is {workers}; give a number of processes, or 0 to judge in this one")
        if not 0 < deadline_s < math.inf:
            raise ValueError(f"deadline_s is {deadline_s}; give a positive number of seconds")
        self.missed_deadlines = 0
        self.crashes = 0
        self._function, self._failed = function, failed
        self._deadline_s = deadline_s
        self._num_workers = workers
        self._busy: dict[Worker, _Job] = {}
        self._idle: list[Worker] = []
        self._mean_s, self._answers = deadline_s / 100, 1  # of calls that were answered; a guess counts as the first
        self._closed = ""  # why
        self._lock = threading.Lock()  # so that no job enters the queue after it was emptied for the last time
        self._queue: collections.deque[_Job] = collections.deque()
        if workers:
            self._pickled = _pickled(function)
            self._failed_starts = 0
            self._bell, self._bell_rope = connection.Pipe(duplex=False)  # wakes the thread when the queue has grown
            self._rung = False  # is a message in it already?
            self._thread = threading.Thread(target=self._run, name="worker-pool", daemon=True)
            self._thread.start()

    def call(self, *arguments: Any) -> "Future[Any]":
        """Queues one call; returns its ticket. Raises RuntimeError if the pool is closed or broken."""
        job = _Job(pickle.dumps(arguments), Future())
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
            self._settle(job, *pickle.loads(answer(self._function, job.payload)))
        return job.ticket

    def close(self) -> None:
        """Kills the workers at once. A ticket that is still open raises RuntimeError when its result is asked for."""
        with self._lock:
            self._closed = self._closed or "this pool is closed; submit and collect within its `with` block"
        if self._num_workers:
            if self._thread.is_alive():
                self._bell_rope.send_bytes(b"!")
            self._thread.join()
            self._bell.close()
            self._bell_rope.close()

    def __enter__(self):
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def _settle(self, job: "_Job", returned: bool, value: Any) -> None:
        job.ticket.set_result(value if returned else self._failed(value))

    # --- the rest runs in the pool's own thread -----------------------------------------------------------------------

    def _run(self) -> None:
        closed, self._template = "the pool failed", None
        try:
            self._template = self._new_template()
            while not self._closed:
                self._step()
        except Exception as error:
            closed = f"the pool failed: {error}"
        finally:
            with self._lock:
                self._closed = self._closed or closed
            if self._template:
                with contextlib.suppress(TemplateLost):
                    for worker in (*self._busy, *self._idle):
                        self._template.bury(worker)
                self._template.close()
            for job in (*self._busy.values(), *self._queue):
                job.ticket.set_exception(RuntimeError(self._closed))

    def _new_template(self) -> Template:
        self._start_due = time.monotonic() + _START_S
        return Template(self._pickled)

    def _step(self) -> None:
        """Hands out jobs, waits for something to happen, and deals with it."""
        try:
            if self._template.ready:
                self._staff()
            workers = [*self._busy, *self._idle]
            readable = connection.wait(
                [self._bell, self._template.conn, *(worker.conn for worker in workers)], self._patience()
            )
            if self._bell in readable:
                self._bell.recv_bytes()
                self._rung = False  # before the queue is looked at
            now = time.monotonic()
            for worker in workers:
                if worker.conn in readable:  # first: an answer in time counts, however late this thread comes to read
                    self._hear(worker)
                elif worker in self._busy and self._busy[worker].begun + self._deadline_s <= now:
                    self._lose(worker, missed_deadline=True)
            if self._template.conn in readable:
                if message := self._template.hear():
                    raise RuntimeError(f"a worker cannot import the judge: {message}")
                self._failed_starts = 0
            elif not self._template.ready and self._start_due <= now:
                raise TemplateLost
        except TemplateLost:
            self._replace_template()

    def _staff(self) -> None:
        """As many workers as there should be, and a job for each of them that is idle."""
        now = time.monotonic()
        slow = sum(job.begun + self._slow_s <= now for job in self._busy.values())
        wanted = self._num_workers + min(slow, _SPARES * self._num_workers)
        while len(self._busy) + len(self._idle) < (wanted if self._queue else self._num_workers):
            self._idle.append(self._template.spawn())
        while self._idle and self._queue:
            job, worker = self._queue.popleft(), self._idle.pop()
            job.begun = time.monotonic()
            self._busy[worker] = job
            worker.ask(job.payload)
        while self._idle and len(self._busy) + len(self._idle) > wanted:  # a spare is one too many
            self._template.bury(self._idle.pop())

    @property
    def _slow_s(self) -> float:
        return max(_SLOW * self._mean_s, _SLOW_S)

    def _patience(self) -> float | None:
        """Seconds until something has to be done, whatever happens meanwhile; None: nothing has."""
        now = time.monotonic()
        dues = [job.begun + self._deadline_s for job in self._busy.values()]
        if self._queue:
            dues += [due for job in self._busy.values() if (due := job.begun + self._slow_s) > now]
        if not self._template.ready:
            dues.append(self._start_due)
        return max(0.0, min(dues) - now) if dues else None

    def _hear(self, worker: Worker) -> None:
        try:
            returned, value = worker.read()
        except EOFError:
            self._lose(worker, missed_deadline=False)
            return
        job = self._busy.pop(worker)
        self._idle.append(worker)
        self._answers += 1
        self._mean_s += (time.monotonic() - job.begun - self._mean_s) / self._answers
        self._settle(job, returned, value)

    def _lose(self, worker: Worker, *, missed_deadline: bool) -> None:
        """Buries a worker. There is no answer to the job that it was at."""
        ending = self._template.bury(worker)
        if missed_deadline:
            self.missed_deadlines += 1
            reason = f"deadline of {self._deadline_s:g} s"
        else:
            self.crashes += 1
            reason = f"the judging process {ending}"
        if worker in self._busy:
            self._settle(self._busy.pop(worker), False, reason)
        else:
            self._idle.remove(worker)

    def _replace_template(self) -> None:
        ending = self._template.close()
        if not self._template.ready:
            self._failed_starts += 1
            if self._failed_starts == _MAX_FAILED_STARTS:
                raise RuntimeError(
                    f"{_MAX_FAILED_STARTS} workers in a row did not start; the last one {ending}. What they wrote to "
                    f"stderr may say why; import the judge in a new interpreter to see it, or judge with workers=0"
                )
        for job in self._busy.values():
            self.crashes += 1
            self._settle(job, False, f"the judging process was lost with its template, which {ending}")
        for worker in (*self._busy, *self._idle):
            worker.conn.close()
        self._busy, self._idle = {}, []
        self._template = self._new_template()


class VerifierPool(WorkerPool):
    """Workers that call `judge(problem, text)`. The problems that it sees have no images."""

    def __init__(self, judge: Judge, *, workers: int, deadline_s: float):
        ungradable = functools.partial(Verdict, Outcome.UNGRADABLE)
        super().__init__(functools.partial(_verdict, judge), failed=ungradable, workers=workers, deadline_s=deadline_s)

    def submit(self, problem: Problem, text: str) -> "Future[Verdict]":
        """Queues one response to be judged; returns its ticket. Raises RuntimeError if the pool is closed or broken."""
        if problem.images:  # the bulk of it, and nothing that an answer is compared with
            problem = dataclasses.replace(problem, images=())
        return self.call(problem, text)

    def verdicts(self, tickets: "Iterable[Future[Verdict]]") -> list[Verdict]:
        """Waits for the verdicts of these tickets, and returns them in the same order.

        Raises:
            RuntimeError: workers cannot start (with the reason), or the pool was closed before all were judged.
        """
        return [ticket.result() for ticket in tickets]


@dataclasses.dataclass(eq=False)
class _Job:
    payload: bytes  # the pickled arguments: what cannot be pickled fails in `call`, not in the thread
    ticket: "Future[Any]"
    begun: float = math.inf  # when a worker got it, on the monotonic clock


def _verdict(judge: Judge, problem: Problem, text: str) -> Verdict:
    verdict = judge(problem, text)
    if not isinstance(verdict, Verdict):
        raise TypeError(f"the judge returned {verdict!r:.80}, not a Verdict")
    return verdict


def _pickled(function: Callable) -> bytes:
    """The name of the function, pickled."""
    remedy = "define it at the top level of a module that can be imported, or judge in this process with workers=0"
    try:
        pickled = pickle.dumps(function)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise ValueError(f"workers cannot import the judge {function!r} ({error}); {remedy}") from error
    if b"__main__" in pickled:
        raise ValueError(f"workers cannot import the judge {function!r} from the running script or notebook; {remedy}")
    return pickled
