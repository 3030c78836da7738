"""Sandboxes as the service sees them: which walls this machine has, and one object per zygote and per sandbox."""

import collections
import contextlib
import dataclasses
import json
import pathlib
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence

from kimi_jax.rewards.sandbox import cgroups, frames, seccomp

SEARCH_PATH = "/usr/local/bin:/usr/bin:/bin"
SCRATCH_MB = 128
_START_S = 20.0  # a zygote that is not ready by then never will be
_PATIENCE_S = 20.0  # how much longer than all that a program may take a sandbox may need
_WALL_FACTOR, _WALL_EXTRA_S = 2.0, 1.0
_OWN_MB, _OWN_PROCESSES = 96, 16  # of a zygote and its idle sandboxes, which are in the same control group
_ENVIRONMENT = {
    "PATH": SEARCH_PATH,
    "HOME": "/tmp",
    "LANG": "C.UTF-8",
    "LC_ALL": "C.UTF-8",
    "TZ": "UTC",
    "PYTHONHASHSEED": "0",
    "PYTHONDONTWRITEBYTECODE": "1",
}


class SandboxError(Exception):
    """A sandbox, rather than the program in it, has failed."""


class NoIsolation(RuntimeError):
    """This machine cannot isolate programs, and so none are run."""


@dataclasses.dataclass(frozen=True)
class Limits:
    """Of one run, for all of its processes together. A sleeping program has `wall_s`."""

    cpu_s: float
    memory_mb: int
    output_bytes: int
    processes: int = 64

    @property
    def wall_s(self) -> float:
        return _WALL_FACTOR * self.cpu_s + _WALL_EXTRA_S


@dataclasses.dataclass(frozen=True)
class Ending:
    """How a run ended."""

    verdict: str  # "", "start" or the limit that was exceeded: "time", "memory", "output" or "processes"
    exit_code: int
    cpu_s: float
    wall_s: float
    memory_mb: float
    error: str  # why it could not start
    stdout: bytes = b""
    stderr: bytes = b""


class Zygote:
    """A process that makes sandboxes, one of which is always ready. Used by one thread, one sandbox after the other."""

    def __init__(self, root: str = "/", *, isolated: bool = True, group: cgroups.ControlGroup | None = None):
        """Raises NoIsolation if the namespaces cannot be made, and says which call failed."""
        self.isolated, self.group = isolated, group
        self._serial = 0
        self._ready: collections.deque[Box] = collections.deque()
        self._conn, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            with theirs:
                self._process = _start(theirs)
            if group:
                group.join(self._process.pid)
            self._conn.settimeout(_START_S)
            bpf = seccomp.build().hex() if isolated else ""
            settings = {"isolated": isolated, "root": root, "scratch_mb": SCRATCH_MB, "bpf": bpf}
            self._conn.send(json.dumps(settings).encode())
            answer = self._conn.recv(10_000).decode()
            if answer != "ready":
                raise NoIsolation(answer.removeprefix("failed ") or "the zygote died while it started")
        except (OSError, NoIsolation) as error:
            self.close()
            raise NoIsolation(f"cannot make namespaces for {root}: {error}") from error
        self._prepare()

    def take(self) -> "Box":
        """A sandbox that nobody has used. The next one is prepared meanwhile."""
        box = self._ready.popleft() if self._ready else self._spawn()
        try:
            box.wait()
            self._prepare()
        except (OSError, EOFError, ValueError) as error:
            box.discard()
            raise SandboxError(f"a sandbox did not start: {error or type(error).__name__}") from error
        return box

    def _prepare(self) -> None:
        if not self._ready:
            self._ready.append(self._spawn())

    def _spawn(self) -> "Box":
        self._serial += 1
        ours, theirs = socket.socketpair()
        with theirs:
            socket.send_fds(self._conn, [f"spawn {self._serial}".encode()], [theirs.fileno()])
        return Box(self, self._serial, ours)

    def discard(self, serial: int) -> None:
        """Kills all that runs in a sandbox, and waits until it is gone: till then its scratch space is in memory, and
        on the account of the control group that the next one shares."""
        self._conn.settimeout(_START_S)
        self._conn.send(f"kill {serial}".encode())
        while (answer := self._conn.recv(10_000)) != f"gone {serial}".encode():
            if not answer or answer.startswith(b"failed"):
                raise SandboxError(f"the zygote failed: {answer.decode()[7:] or 'it has died'}")

    def close(self) -> None:
        """Ends the zygote, and with it whatever runs in its sandboxes."""
        self._conn.close()
        for box in self._ready:
            box.conn.close()
        self._ready.clear()
        with contextlib.suppress(AttributeError):  # it did not start
            try:
                self._process.wait(timeout=5)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        if self.group:
            self.group.close()


class Box:
    """One sandbox, for one submission. Raises SandboxError whenever it is not the program that has failed."""

    def __init__(self, zygote: Zygote, serial: int, conn: socket.socket):
        self._zygote, self._serial, self.conn = zygote, serial, conn

    def wait(self) -> None:
        """Until it is ready."""
        frames.receive(self.conn, max_bytes=0, deadline=time.monotonic() + _PATIENCE_S)

    def find(self, names: Sequence[str]) -> dict[str, str]:
        """Those of these programs that exist in here, with their paths."""
        header, _ = self._ask({"op": "find", "names": list(names), "path": SEARCH_PATH}, (), patience_s=_PATIENCE_S)
        return {name: path for name, path in zip(names, header["found"], strict=True) if path}

    def write(self, files: Mapping[str, bytes]) -> None:
        """Files for /box, before it is sealed."""
        self._tell({"op": "write", "names": list(files)}, list(files.values()))

    def run(
        self,
        argv: Sequence[str],
        *,
        stdin: bytes,
        files: Mapping[str, bytes],
        limits: Limits,
        in_box: bool = False,
        environment: Mapping[str, str] | None = None,
    ) -> Ending:
        """Runs a program in an empty /tmp with these files, and /box sealed; or else in /box, which it may write."""
        group = self._zygote.group
        if group:
            group.limit(memory_mb=limits.memory_mb * 5 // 4 + _OWN_MB, processes=limits.processes + _OWN_PROCESSES)
            kills = group.kills()
        order = {
            "op": "run",
            "argv": list(argv),
            "env": _ENVIRONMENT | dict(environment or {}),
            "names": list(files),
            "sealed": not in_box,
            "in_box": in_box,
            "limits": dataclasses.asdict(limits) | {"wall_s": limits.wall_s, "file_mb": SCRATCH_MB},
        }
        header, (stdout, stderr) = self._ask(
            order, [stdin, *files.values()], max_bytes=limits.output_bytes, patience_s=3 * limits.wall_s + _PATIENCE_S
        )
        if group and not header["verdict"] and header["exit_code"] and group.kills() > kills:
            header["verdict"] = "memory"
        return Ending(**header, stdout=stdout, stderr=stderr)

    def discard(self) -> None:
        self.conn.close()
        self._zygote.discard(self._serial)

    def _tell(self, header: dict, blobs: Sequence[bytes]) -> None:
        try:
            self.conn.settimeout(_PATIENCE_S)
            frames.send(self.conn, header, blobs)
        except OSError as error:
            raise SandboxError(f"the sandbox takes no orders: {error}") from error

    def _ask(
        self, header: dict, blobs: Sequence[bytes], *, patience_s: float, max_bytes: int = 0
    ) -> tuple[dict, list[bytes]]:
        self._tell(header, blobs)
        try:
            return frames.receive(self.conn, max_bytes=max_bytes, deadline=time.monotonic() + patience_s)
        except (OSError, EOFError, ValueError) as error:
            raise SandboxError(f"no report from the sandbox: {error or type(error).__name__}") from error


def _start(conn: socket.socket) -> subprocess.Popen:
    """A new interpreter without site-packages, which would only make it larger."""
    source = pathlib.Path(__file__).resolve().parents[3]
    code = (
        f"import sys; sys.path.insert(0, {str(source)!r}); "
        f"from kimi_jax.rewards.sandbox import zygote; zygote.main({conn.fileno()})"
    )
    return subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", code],
        stdin=subprocess.DEVNULL,
        stdout=2,
        env={},
        pass_fds=[conn.fileno()],
        start_new_session=True,  # out of reach of Ctrl-C
        cwd="/",
    )
