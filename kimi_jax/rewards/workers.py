"""Processes that can be lost: copies of an interpreter that has imported what they are to do.

    this process ── template ──┬── worker
                               └── worker ...

The template is a fresh interpreter, not a copy of this process, whose JAX has threads. It imports the function once and
then makes workers, each with `fork`: a few milliseconds, where a new interpreter with its imports takes a quarter of a
second of a processor, which a judge that crashes in one of a hundred judgements would cost again and again.
"""

import contextlib
import ctypes
import dataclasses
import gc
import os
import pickle
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Callable
from multiprocessing import connection, reduction
from typing import Any

_ENVIRONMENT = {
    "CUDA_VISIBLE_DEVICES": "",
    "ROCR_VISIBLE_DEVICES": "",
    "TPU_VISIBLE_CHIPS": "",
    "JAX_PLATFORMS": "cpu",
    "OMP_NUM_THREADS": "1",  # parallel over responses, not within one
    "OPENBLAS_NUM_THREADS": "1",
    "PYTHONHASHSEED": "0",  # a verdict must not depend on the order of a set
}


_STUCK_S = 10.0  # a worker that takes or sends nothing for so long in the middle of a message will never
_LOST_S = 60.0  # a template that does not answer for so long is as good as dead


class TemplateLost(Exception):
    """The template has died, and its workers with it."""


@dataclasses.dataclass(frozen=True, eq=False)
class Worker:
    pid: int
    conn: connection.Connection

    def ask(self, payload: bytes) -> None:
        """payload: the pickled arguments of a call. Its answer is what `read` returns once `conn` is readable."""
        with contextlib.suppress(
            OSError
        ):  # it has just died, which reading will tell, or is stuck: the deadline ends it
            self.conn.send_bytes(payload)

    def read(self) -> tuple[bool, Any]:
        """(True, what the function returned) or (False, why it did not). Raises EOFError if the worker has died."""
        try:
            answer = self.conn.recv_bytes()
        except OSError as error:
            raise EOFError from error
        try:
            return pickle.loads(answer)
        except Exception as error:
            return False, f"what was returned cannot be read: {type(error).__name__}: {error}"


class Template:
    """The process that makes workers. Used by one thread, with whose end it ends.

    Attributes:
        conn: readable when the template is ready, which `hear` then says; and when it has died.
        ready: whether `spawn` may be called.
    """

    def __init__(self, pickled_function: bytes):
        self.ready = False
        self.conn, theirs = connection.Pipe()
        with theirs:
            path = [str(entry) for entry in sys.path]
            code = f"import sys; sys.path[:] = {path}; from kimi_jax.rewards import workers; "
            self._process = subprocess.Popen(
                [sys.executable, "-c", f"{code} workers.be_template({theirs.fileno()})"],
                stdin=subprocess.DEVNULL,
                stdout=2,  # what a judge prints is not the program's output
                env=os.environ | _ENVIRONMENT,
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # out of reach of Ctrl-C
            )
        with contextlib.suppress(OSError):  # it has died already
            self.conn.send_bytes(pickled_function)

    def hear(self) -> str:
        """After `conn` has become readable: "", and it is ready; or why it cannot be. Raises TemplateLost."""
        message = self._receive()
        self.ready = not message
        return message

    def spawn(self) -> Worker:
        """A new worker. Raises TemplateLost."""
        ours, theirs = connection.Pipe()
        _bound_waits(ours)
        with theirs:
            self._send("spawn")
            with contextlib.suppress(OSError):
                reduction.send_handle(self.conn, theirs.fileno(), self._process.pid)
        return Worker(self._receive(), ours)

    def bury(self, worker: Worker) -> str:
        """Ends a worker and what it started, if it has not ended by itself; says how it did. Raises TemplateLost."""
        worker.conn.close()
        self._send(worker.pid)
        status = self._receive()
        return _ending(status)

    def close(self) -> str:
        """Ends the template, and on Linux its workers; says how it ended if it had before."""
        self.conn.close()
        if self._process.returncode is None:  # not closed before
            with contextlib.suppress(ProcessLookupError, PermissionError):  # gone already
                os.killpg(self._process.pid, signal.SIGKILL)
        return _ending(self._process.wait())

    def _send(self, order: Any) -> None:
        with contextlib.suppress(OSError):  # receiving will tell
            self.conn.send(order)

    def _receive(self) -> Any:
        try:
            if not self.conn.poll(_LOST_S):
                raise TemplateLost
            return self.conn.recv()
        except (EOFError, OSError) as error:
            raise TemplateLost from error


def _bound_waits(conn: connection.Connection) -> None:
    """Sending and receiving raise BlockingIOError where the other side is stuck, say, stopped by a signal."""
    with socket.socket(fileno=os.dup(conn.fileno())) as handle:
        for option in (socket.SO_SNDTIMEO, socket.SO_RCVTIMEO):
            handle.setsockopt(socket.SOL_SOCKET, option, struct.pack("ll", *divmod(int(_STUCK_S * 1e6), 10**6)))


def _ending(status: int) -> str:
    return f"died of {signal.Signals(-status).name}" if status < 0 else f"exited with status {status}"


# --- over there -------------------------------------------------------------------------------------------------------


def be_template(fd: int) -> None:
    """What a template does until this process is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _die_with_parent()
    conn = connection.Connection(fd)
    os.set_inheritable(fd, False)
    with contextlib.suppress(EOFError, OSError):  # there is nobody left to work for
        pickled_function = conn.recv_bytes()
        try:
            function = pickle.loads(pickled_function)
        except Exception as error:
            conn.send(f"{type(error).__name__}: {error}")
            return
        sys.stdout.flush()  # or every worker would write it once more
        gc.freeze()  # a collection would touch, and so copy, what the copies share
        conn.send("")
        while True:
            order = conn.recv()
            if order == "spawn":
                conn.send(_spawn(conn, function))
            else:
                for kill in (os.killpg, os.kill):  # it may not have its own group yet
                    with contextlib.suppress(ProcessLookupError, PermissionError):
                        kill(order, signal.SIGKILL)
                conn.send(os.waitstatus_to_exitcode(os.waitpid(order, 0)[1]))


def _spawn(conn: connection.Connection, function: Callable) -> int:
    fd = reduction.recv_handle(conn)
    template = os.getpid()
    pid = os.fork()
    if pid:
        os.close(fd)
        return pid
    try:
        conn.close()
        os.set_inheritable(fd, False)  # what a judge starts must not keep it open
        os.setsid()  # so that it is killed together with what it starts
        _die_with_parent()
        if os.getppid() == template:
            _serve(connection.Connection(fd), function)
    finally:
        os._exit(1)


def _serve(conn: connection.Connection, function: Callable) -> None:
    with contextlib.suppress(EOFError, OSError):
        while True:
            conn.send_bytes(answer(function, conn.recv_bytes()))


def answer(function: Callable, payload: bytes) -> bytes:
    """The pickled answer of a call whose pickled arguments are `payload`: see `Worker.read`."""
    try:
        return pickle.dumps((True, function(*pickle.loads(payload))))
    except (Exception, SystemExit) as error:
        return pickle.dumps((False, f"{type(error).__name__}: {error}"))


def _die_with_parent() -> None:
    """On Linux, with the thread that started this process, even in a loop that never comes back to read."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # 1: PR_SET_PDEATHSIG
