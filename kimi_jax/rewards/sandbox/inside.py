"""Process 1 of a sandbox: it sets the last walls, starts programs, watches them and reports how they ended.

It has the same user as the programs, who yet cannot touch it: it is process 1, which no signal from inside ends, and
not dumpable, so that its memory and descriptors stay its own. It keeps the rights over its own namespaces, which it
needs to give every run a fresh scratch space; programs lose all rights. Process 1 of nothing (`isolated=False`) does
the same without walls.

    /box   sources, and what the compiler made of them; read-only while programs run
    /tmp   working directory, fresh for each run; both a tmpfs of fixed size

This file and what it imports need the standard library alone.
"""

import contextlib
import os
import resource
import select
import signal
import socket
import time
from typing import NamedTuple

from kimi_jax.rewards.sandbox import frames, kernel

USER = 1000
_POLL_S = 0.01  # how long a program may exceed what only polling can limit
_MAX_INODES = 16384
_CHUNK = 1 << 16
_HARD = {name: resource.getrlimit(name)[1] for name in range(resource.RLIMIT_CPU, resource.RLIMIT_MSGQUEUE + 1)}
_PAGE = os.sysconf("SC_PAGE_SIZE")
_GRACE = 2  # how many more of its wall-clock limits a program gets when it waited for a processor


def reset_signals() -> None:
    """Undoes what Python does with them, for the programs, who inherit what is ignored and could call a handler."""
    for number in (signal.SIGINT, signal.SIGPIPE, signal.SIGXFSZ):
        signal.signal(number, signal.SIG_DFL)


def main(conn: socket.socket, *, isolated: bool, scratch_mb: int, program_filter: kernel.Filter) -> None:
    """Obeys orders from `conn` until it ends."""
    if isolated:
        kernel.die_with_parent()
        kernel.mount("proc", "/proc", "proc", kernel.NOSUID | kernel.NODEV | kernel.NOEXEC, "subset=pid")
        kernel.set_dumpable(False)
    space = _Space(isolated=isolated, scratch_mb=scratch_mb, program_filter=program_filter)
    with contextlib.suppress(EOFError, OSError):
        frames.send(conn, {"ready": True})
        while True:
            order, blobs = frames.receive(conn)
            if order["op"] == "write":
                _write_files(space.box, order["names"], blobs)
            elif order["op"] == "find":
                frames.send(conn, {"found": [_find(name, order["path"]) for name in order["names"]]})
            elif order["op"] == "run":
                report, output = _run(conn, space, _Limits(**order["limits"]), order, blobs)
                frames.send(conn, report, output)
    space.close()
    os._exit(0)


class _Space:
    """The directories of a sandbox."""

    def __init__(self, *, isolated: bool, scratch_mb: int, program_filter: kernel.Filter):
        self.isolated = isolated
        self.filter = program_filter
        self._options = f"size={scratch_mb}m,nr_inodes={_MAX_INODES},mode=700"
        self._base = ""
        if not isolated:
            import tempfile  # heavy, and the weight of this process is the price of each copy

            self._base = tempfile.mkdtemp(prefix="unsafe_sandbox_")
        self.box, self.tmp = f"{self._base}/box", f"{self._base}/tmp"
        self._used = False
        for directory in (self.box, self.tmp):
            self._mount(directory)

    def _mount(self, directory: str) -> None:
        if self.isolated:
            kernel.mount("tmpfs", directory, "tmpfs", kernel.NOSUID | kernel.NODEV, self._options)
        else:
            os.mkdir(directory)

    def prepare(self, *, sealed: bool) -> None:
        """Before each run: an empty /tmp, and a /box that can no longer be written if `sealed`."""
        if self._used:
            if self.isolated:
                kernel.unmount(self.tmp)
            else:
                _remove(self.tmp)
            self._mount(self.tmp)
        self._used = True
        if sealed and self.isolated:
            flags = kernel.REMOUNT | kernel.BIND | kernel.RDONLY | kernel.NOSUID | kernel.NODEV
            kernel.mount("none", self.box, flags=flags)

    def translate(self, word: str) -> str:
        """A word of a command, with the paths as they are here."""
        if self.isolated:
            return word
        return self.tmp + word.removeprefix("/tmp") if word.startswith("/tmp/") else word.replace("/box", self.box)

    def close(self) -> None:
        if not self.isolated:
            _remove(self._base)


def _remove(directory: str) -> None:
    import shutil

    shutil.rmtree(directory, ignore_errors=True)


def _read(path: str) -> bytes:
    fd = os.open(path, os.O_RDONLY)
    try:
        return os.read(fd, 1 << 16)
    finally:
        os.close(fd)


def _write_files(directory: str, names: list[str], contents: list[bytes]) -> None:
    for name, content in zip(names, contents, strict=True):
        path = f"{directory}/{name}"
        if "/" in name:
            os.makedirs(os.path.dirname(path), exist_ok=True)
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        try:
            rest = memoryview(content)
            while rest:
                rest = rest[os.write(fd, rest) :]
        finally:
            os.close(fd)


def _find(name: str, path: str) -> str | None:
    for directory in path.split(":"):
        candidate = f"{directory}/{name}"
        if os.path.isfile(candidate) and os.access(candidate, os.X_OK):
            return candidate
    return None


class _Limits(NamedTuple):
    cpu_s: float  # of all processes together
    wall_s: float
    memory_mb: int  # of all processes together, resident
    output_bytes: int  # standard output and error together
    file_mb: int
    processes: int  # threads count


# --- one run ----------------------------------------------------------------------------------------------------------


def _run(
    conn: socket.socket, space: _Space, limits: _Limits, order: dict, blobs: list[bytes]
) -> tuple[dict, list[bytes]]:
    """Starts the program, feeds it, and ends it with all that it started. Returns a report, and both outputs.

    The verdict of the report is "" or the limit that ended the run: time, memory, output, or "start" if it could not
    be started.
    """
    space.prepare(sealed=order["sealed"])
    stdin, *files = blobs
    _write_files(space.tmp, order["names"], files)
    argv = [space.translate(word) for word in order["argv"]]
    directory = space.box if order["in_box"] else space.tmp
    pipes = [os.pipe() for _ in range(4)]  # of each the end to read, the end to write
    (in_r, in_w), (out_r, out_w), (err_r, err_w), (fail_r, fail_w) = pipes
    resources = _resources(limits)
    begin = time.monotonic()
    pid = os.fork()
    if pid == 0:
        _become(argv, order["env"], directory, (in_r, out_w, err_w), fail_w, resources, space)
    for fd in (in_r, out_w, err_w, fail_w):
        os.close(fd)
    watch = _Watch(pid, limits, isolated=space.isolated)
    try:
        outputs = watch.feed_and_read(conn, stdin, in_w, (out_r, err_r))
        failure = os.read(fail_r, 4096).decode()  # all of its writers are gone
    finally:
        for fd in (out_r, err_r, fail_r):
            os.close(fd)
    report = {
        "verdict": "start" if failure else watch.verdict(),
        "exit_code": os.waitstatus_to_exitcode(watch.status),
        "cpu_s": watch.cpu_s,
        "wall_s": time.monotonic() - begin,
        "memory_mb": watch.peak / 2**20,
        "error": failure,
    }
    return report, outputs


def _become(
    argv: list[str], env: dict, directory: str, stdio: tuple, fail_w: int, resources: dict[int, int], space: _Space
) -> None:
    """In the new process: takes on all restrictions and becomes the program. Does not return.

    All that can be computed has been: each page that this touches is copied first.
    """
    try:
        os.setsid()
        for target, fd in enumerate(stdio):
            os.dup2(fd, target)
        os.chdir(directory)
        for name, value in resources.items():
            resource.setrlimit(name, (value, value))
        if space.isolated:
            kernel.restrict(space.filter)
        else:
            reset_signals()
        os.execve(argv[0], argv, env)
    except BaseException as error:
        os.write(fail_w, f"{type(error).__name__}: {error}".encode()[:4096])
    finally:
        os._exit(127)


def _resources(limits: _Limits) -> dict[int, int]:
    """What the kernel limits, for each process."""
    memory = limits.memory_mb << 20
    wanted = {
        resource.RLIMIT_CPU: int(limits.cpu_s) + 2,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_FSIZE: limits.file_mb << 20,
        resource.RLIMIT_NOFILE: 256,
        resource.RLIMIT_MEMLOCK: 1 << 16,
        resource.RLIMIT_MSGQUEUE: 0,
        resource.RLIMIT_SIGPENDING: 1024,
        resource.RLIMIT_STACK: min(memory, 256 << 20),
        # Of what is promised rather than used. For requests beyond all bounds; the watch does the rest.
        resource.RLIMIT_DATA: 4 * memory + (1 << 30),
        # Counted for each user of each user namespace (Linux 5.14), and so for each sandbox.
        resource.RLIMIT_NPROC: limits.processes,
    }
    return {name: value if _HARD[name] < 0 else min(value, _HARD[name]) for name, value in wanted.items()}


class _Watch:
    """What is known of a running program and of all processes that it started."""

    def __init__(self, pid: int, limits: _Limits, *, isolated: bool):
        self.pid, self.limits, self.isolated = pid, limits, isolated
        self.status: int | None = None  # of the first process, once it has ended
        self.peak = 0  # bytes
        self.cpu_s = 0.0
        self._reaped_s = 0.0
        self._broken = ""  # the limit that was exceeded
        self._begin = time.monotonic()

    def verdict(self) -> str:
        if not self._broken and self.cpu_s > self.limits.cpu_s:
            return "time"
        if not self._broken and self.peak > self.limits.memory_mb << 20:
            return "memory"
        return self._broken

    def feed_and_read(self, conn: socket.socket, stdin: bytes, in_w: int, outs: tuple[int, int]) -> list[bytes]:
        """Until the first process has ended or a limit is exceeded; then kills what is left."""
        poll = select.poll()
        for fd in (in_w, *outs):
            os.set_blocking(fd, False)
            poll.register(fd, select.POLLOUT if fd == in_w else select.POLLIN)
        poll.register(conn, 0)  # its end is reported in any case
        pidfd = os.pidfd_open(self.pid)
        poll.register(pidfd, select.POLLIN)
        unsent = memoryview(stdin)
        chunks: dict[int, list[bytes]] = {fd: [] for fd in outs}
        left = self.limits.output_bytes
        next_check = self._begin + _POLL_S
        writing = True
        while self.status is None and not self._broken:
            events = poll.poll(max(0, next_check - time.monotonic()) * 1000)
            for fd, event in events:
                if fd == pidfd:
                    self._reap(block=False)
                elif fd == in_w:
                    unsent = unsent[_write_some(fd, unsent) :] if event & select.POLLOUT else unsent[:0]
                elif fd in chunks:
                    left -= self._read_some(fd, chunks[fd], left, poll)
                else:
                    self._kill()
                    raise EOFError("nobody waits for the outcome any more")
            if writing and not unsent:
                writing = False
                poll.unregister(in_w)
                os.close(in_w)
            if time.monotonic() >= next_check:
                self._check()
                next_check = time.monotonic() + _POLL_S
        if writing:
            os.close(in_w)
        self._kill()
        os.close(pidfd)
        if not self._broken:
            for fd in outs:  # what still lies in the pipes
                while count := self._read_some(fd, chunks[fd], left, None):
                    left -= count
        return [b"".join(chunks[fd]) for fd in outs]

    def _read_some(self, fd: int, chunks: list[bytes], left: int, poll: "select.poll | None") -> int:
        try:
            chunk = os.read(fd, _CHUNK)
        except BlockingIOError:
            return 0
        if not chunk and poll:
            poll.unregister(fd)
        if len(chunk) > left:
            self._broken = self._broken or "output"
        chunks.append(chunk[:left])
        return min(len(chunk), left)

    def _reap(self, *, block: bool) -> None:
        """Takes note of every process that has ended."""
        while True:
            try:
                pid, status, usage = os.wait4(-1, 0 if block else os.WNOHANG)
            except ChildProcessError:
                return
            if not pid:
                return
            self._reaped_s += usage.ru_utime + usage.ru_stime
            self.cpu_s = max(self.cpu_s, self._reaped_s)
            if pid == self.pid:
                self.status = status
                self.peak = max(self.peak, usage.ru_maxrss << 10)

    def _kill(self) -> None:
        if os.getpid() == 1:
            with contextlib.suppress(ProcessLookupError):
                os.kill(-1, signal.SIGKILL)  # everything in the pid namespace but process 1
        else:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)
        self._reap(block=True)

    def _check(self) -> None:
        """The limits that the kernel does not keep."""
        self._reap(block=False)
        pids = [self.pid]
        if self.isolated:
            pids = [int(name) for name in os.listdir("/proc") if name.isdigit() and name != "1"]
        cpu, resident = self._reaped_s, 0
        for pid in pids:
            with contextlib.suppress(OSError):  # it has just ended
                cpu += time.clock_gettime(~pid << 3 | 2)  # the clock of a process; /proc counts in hundredths
                resident += int(_read(f"/proc/{pid}/statm").split()[1]) * _PAGE
        if resident > self.limits.memory_mb << 20 and len(pids) > 1:
            resident = sum(_proportional_bytes(pid) for pid in pids)  # counts what they share once
        self.cpu_s = max(self.cpu_s, cpu)
        self.peak = max(self.peak, resident)
        wall = time.monotonic() - self._begin
        wall -= min(self._delay_s(), _GRACE * self.limits.wall_s)
        if self.cpu_s > self.limits.cpu_s or wall > self.limits.wall_s:
            self._broken = self._broken or "time"
        elif resident > self.limits.memory_mb << 20:
            self._broken = self._broken or "memory"
        elif len(pids) > self.limits.processes:  # for kernels whose own count is not per sandbox
            self._broken = self._broken or "processes"

    def _delay_s(self) -> float:
        """How long the program was ready and had no processor: the fault of the machine, not of the program."""
        try:
            return int(_read(f"/proc/{self.pid}/schedstat").split()[1]) * 1e-9
        except (OSError, IndexError):
            return 0.0


def _proportional_bytes(pid: int) -> int:
    try:
        for line in _read(f"/proc/{pid}/smaps_rollup").splitlines():
            if line.startswith(b"Pss:"):
                return int(line.split()[1]) << 10
    except OSError:  # it has just ended
        pass
    return 0


def _write_some(fd: int, data: memoryview) -> int:
    """How many bytes need not be sent any more: all, if nobody reads them."""
    try:
        return os.write(fd, data[:_CHUNK])
    except BlockingIOError:
        return 0
    except BrokenPipeError:
        return len(data)
