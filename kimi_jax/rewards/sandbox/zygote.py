"""The process from which sandboxes are made: small, and already inside namespaces that show nothing of the machine.

    service ── launcher ── zygote ──┬── sandbox (process 1 of its pid namespace, `inside.py`) ── programs
               leaves its           └── sandbox ...
               user behind          process 1 of a pid namespace

The launcher gives up root if it has it, enters new namespaces, and starts the zygote there, which builds a root from
read-only pieces of a file system. Each sandbox is a copy of the zygote in further namespaces, which costs a few
milliseconds where starting from nothing costs ten. When the service dies, the zygote reads the end of its connection
and ends, and the kernel ends all that it contains.

This file and what it imports need the standard library alone.
"""

import contextlib
import gc
import json
import os
import signal
import socket
import sys

from kimi_jax.rewards.sandbox import inside, kernel

NOBODY = 65534
_FROM_THE_MACHINE = ("usr", "bin", "lib", "lib32", "lib64", "libx32", "sbin")
_FROM_ITS_ETC = ("alternatives", "ld.so", "java", "php", "mono", "dotnet")  # beginnings of names
_NOT_FROM_AN_IMAGE = ("proc", "sys", "dev", "tmp", "box", "run", "root", "home", "mnt", "media", "boot", "lost+found")
_DEVICES = ("null", "zero", "full", "random", "urandom")
_NEW_ROOT = "/tmp"  # any directory does
# The other namespaces belong to the zygote, whose sandboxes run one after the other, and hold nothing that one could
# leave to the next: sockets end with their processes, and the filter denies System V objects and message queues. A new
# user namespace for each would cost more than all the rest.
_FOR_EACH_SANDBOX = kernel.NEW_PID | kernel.NEW_NS


def main(fd: int) -> None:
    """What the launcher does: `fd` is its end of a connection of packets, on which the first is its settings."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    conn = socket.socket(fileno=fd)
    conn.set_inheritable(False)
    settings = json.loads(conn.recv(1 << 20))
    try:
        _write("/proc/self/oom_score_adj", b"1000")  # if memory runs out, it should hit the largest process in here
        if settings["isolated"]:
            _enter_namespaces()
            child = os.fork()  # into the new pid namespace
            if child:
                conn.close()
                os._exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) % 256)
            kernel.die_with_parent()
            inside.reset_signals()  # process 1 of a pid namespace is safe from them without handlers
            kernel.set_hostname("sandbox")
            _build_root(settings["root"])
        conn.send(b"ready")
    except OSError as error:
        conn.send(f"failed {error}".encode())
        os._exit(1)
    with contextlib.suppress(ConnectionError):  # the service died between a question and its answer
        _serve(conn, settings)
    os._exit(0)


def _enter_namespaces() -> None:
    if os.getuid() == 0:
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
    uid, gid = os.getuid(), os.getgid()
    kernel.set_dumpable(True)  # else the files in /proc/self belong to root
    kernel.unshare(kernel.NEW_ALL)
    kernel.write_maps(uid, gid, as_uid=inside.USER)


def _build_root(source: str) -> None:
    """Makes / a tmpfs, read-only, with the directories of `source` bound into it, read-only."""
    kernel.mount("none", "/", flags=kernel.REC | kernel.PRIVATE)
    os.chdir(source)  # from here on relative: what is mounted next may hide it
    new = _NEW_ROOT
    kernel.mount("tmpfs", new, "tmpfs", kernel.NOSUID | kernel.NODEV, "size=16m,nr_inodes=4k,mode=755")
    if source == "/":
        names = [name for name in _FROM_THE_MACHINE if os.path.lexists(name)]
    else:
        names = sorted(set(os.listdir()) - set(_NOT_FROM_AN_IMAGE))
    for name in names:
        _bring(name, f"{new}/{name}")
    if source == "/":
        _write_etc(f"{new}/etc")
    for name in ("proc", "dev", "tmp", "box"):
        os.mkdir(f"{new}/{name}")
    for name in _DEVICES:
        _write(f"{new}/dev/{name}", b"")
        kernel.mount(f"/dev/{name}", f"{new}/dev/{name}", flags=kernel.BIND)
    for name, target in (("fd", "fd"), ("stdin", "fd/0"), ("stdout", "fd/1"), ("stderr", "fd/2")):
        os.symlink(f"/proc/self/{target}", f"{new}/dev/{name}")
    os.symlink("/tmp", f"{new}/dev/shm")
    kernel.mount("proc", f"{new}/proc", "proc", kernel.NOSUID | kernel.NODEV | kernel.NOEXEC)
    kernel.make_root(new)
    kernel.mount("none", "/", flags=kernel.REMOUNT | kernel.BIND | kernel.RDONLY | kernel.NOSUID | kernel.NODEV)


def _bring(name: str, target: str) -> None:
    """An entry of the working directory: a link is copied, and so is a file; a directory is bound, read-only."""
    if os.path.islink(name):
        os.symlink(os.readlink(name), target)
    elif os.path.isdir(name):
        os.mkdir(target)
        kernel.mount(name, target, flags=kernel.BIND | kernel.REC)
        kernel.make_read_only(target)
    elif os.path.isfile(name):
        with contextlib.suppress(PermissionError), open(name, "rb") as file:
            _write(target, file.read())


def _write_etc(etc: str) -> None:
    """What libraries and languages look for in /etc, and no more."""
    os.mkdir(etc)
    for name in sorted(os.listdir("etc")) if os.path.isdir("etc") else ():
        if name.startswith(_FROM_ITS_ETC):
            _bring(f"etc/{name}", f"{etc}/{name}")
    _write(f"{etc}/passwd", f"user:x:{inside.USER}:{inside.USER}::/tmp:/bin/sh\n".encode())
    _write(f"{etc}/group", f"user:x:{inside.USER}:\n".encode())


def _write(path: str, content: bytes) -> None:
    with open(path, "wb") as file:
        file.write(content)


# --- the zygote -------------------------------------------------------------------------------------------------------


def _serve(conn: socket.socket, settings: dict) -> None:
    """Packets: "spawn N" with a descriptor, "kill N"; answers: "gone N", "failed WHY"."""
    gc.collect()
    gc.freeze()
    gc.disable()  # a collection would touch, and so copy, what the copies share
    program_filter = kernel.make_filter(bytes.fromhex(settings["bpf"]))
    living: dict[str, int] = {}
    while True:
        packet, fds, _, _ = socket.recv_fds(conn, 100, 1)
        if not packet:  # the service is gone
            if not settings["isolated"]:
                for pid in living.values():  # they know it too
                    os.waitpid(pid, 0)
            os._exit(0)  # and now everything in here
        order, number = packet.decode().split()
        if order == "spawn":
            os.set_inheritable(fds[0], False)  # a received one is, and would go on to the programs
            try:
                living[number] = _spawn(conn, fds[0], settings, program_filter)
            except OSError as error:
                conn.send(f"failed {error}".encode())
            os.close(fds[0])  # where there is no sandbox behind it, the service reads an end
        elif number in living:
            pid = living.pop(number)
            if settings["isolated"]:  # else it still has to tidy up
                os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)  # returns when everything in its pid namespace has ended
            conn.send(f"gone {number}".encode())


def _spawn(conn: socket.socket, fd: int, settings: dict, program_filter: kernel.Filter) -> int:
    pid = kernel.clone(_FOR_EACH_SANDBOX) if settings["isolated"] else os.fork()
    if pid == 0:
        try:
            conn.close()
            isolated, scratch_mb = settings["isolated"], settings["scratch_mb"]
            box = socket.socket(fileno=fd)
            inside.main(box, isolated=isolated, scratch_mb=scratch_mb, program_filter=program_filter)
        except BaseException as error:
            print(f"sandbox: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
        finally:
            os._exit(1)
    return pid
