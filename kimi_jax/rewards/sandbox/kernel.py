"""The calls of the Linux kernel that isolate a process and that Python's library does not have. Used by one thread."""

import ctypes
import os
import platform
import signal

# The lock of the interpreter is kept during a call, so that a process made by `clone` finds it held, as after a fork.
_libc = ctypes.PyDLL(None, use_errno=True)

NEW_NS, NEW_CGROUP, NEW_UTS, NEW_IPC = 0x00020000, 0x02000000, 0x04000000, 0x08000000
NEW_USER, NEW_PID, NEW_NET = 0x10000000, 0x20000000, 0x40000000
NEW_ALL = NEW_NS | NEW_CGROUP | NEW_UTS | NEW_IPC | NEW_USER | NEW_PID | NEW_NET

RDONLY, NOSUID, NODEV, NOEXEC, REMOUNT, NOATIME, BIND, REC, PRIVATE = 1, 2, 4, 8, 32, 1024, 4096, 16384, 1 << 18
DETACH = 2

_SET_PDEATHSIG, _SET_DUMPABLE, _SET_SECCOMP, _SET_NO_NEW_PRIVS = 1, 4, 22, 38
# (clone, pivot_root); `mount_setattr` has one number everywhere
_NUMBERS = {"x86_64": (56, 155), "aarch64": (220, 41)}
_MOUNT_SETATTR = 442


def supported() -> str:
    """Why this module does not know the machine; empty if it does."""
    if platform.system() != "Linux":
        return f"{platform.system()} has no namespaces; sandboxes need Linux"
    if platform.machine() not in _NUMBERS:
        return f"the system calls of {platform.machine()} are not in the table; known: {', '.join(_NUMBERS)}"
    return ""


def _call(name: str, *arguments) -> int:
    result = getattr(_libc, name)(*arguments)
    if result < 0:
        error = ctypes.get_errno()
        raise OSError(error, f"{name}{arguments[:3]}: {os.strerror(error)}")
    return result


def _syscall(number: int, *arguments) -> int:
    converted = [ctypes.c_long(value) if isinstance(value, int) else value for value in arguments]
    return _call("syscall", ctypes.c_long(number), *converted)


def unshare(flags: int) -> None:
    _call("unshare", flags)


def clone(flags: int) -> int:
    """Forks into new namespaces; the child is process 1 of a new pid namespace. Returns 0 in the child."""
    ctypes.pythonapi.PyOS_BeforeFork()
    try:
        pid = _syscall(_NUMBERS[platform.machine()][0], flags | signal.SIGCHLD, 0, 0, 0, 0)
    except OSError:
        ctypes.pythonapi.PyOS_AfterFork_Parent()
        raise
    if pid:
        ctypes.pythonapi.PyOS_AfterFork_Parent()
    else:
        ctypes.pythonapi.PyOS_AfterFork_Child()
    return pid


def write_maps(uid: int, gid: int, *, as_uid: int) -> None:
    """In a new user namespace: the one user and group there, `as_uid`, are these of the namespace around it."""
    for name, content in (("setgroups", "deny"), ("uid_map", f"{as_uid} {uid} 1"), ("gid_map", f"{as_uid} {gid} 1")):
        fd = os.open(f"/proc/self/{name}", os.O_WRONLY)
        try:
            os.write(fd, content.encode())
        finally:
            os.close(fd)


def mount(source: str, target: str, kind: str = "", flags: int = 0, options: str = "") -> None:
    _call("mount", source.encode(), target.encode(), kind.encode() or None, ctypes.c_ulong(flags), options.encode())


def unmount(target: str) -> None:
    """Now for everyone who comes, later for those who are inside."""
    _call("umount2", target.encode(), DETACH)


class _MountAttr(ctypes.Structure):
    _fields_ = [(name, ctypes.c_uint64) for name in ("attr_set", "attr_clr", "propagation", "userns_fd")]


def make_read_only(target: str) -> None:
    """The mount and all below it: nothing can be written, no program there gains rights, device nodes are dead."""
    attr = _MountAttr(RDONLY | NOSUID | NODEV, 0, 0, 0)
    at_fdcwd, recursive = -100, 0x8000
    _syscall(_MOUNT_SETATTR, at_fdcwd, target.encode(), recursive, ctypes.byref(attr), ctypes.sizeof(attr))


def make_root(directory: str) -> None:
    """`directory`, which must be a mount, becomes /; what was / is out of reach."""
    os.chdir(directory)
    _syscall(_NUMBERS[platform.machine()][1], b".", b".")  # the old root is now mounted over the new one
    unmount(".")
    os.chdir("/")


def set_hostname(name: str) -> None:
    _call("sethostname", name.encode(), len(name))


def die_with_parent() -> None:
    _call("prctl", _SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def set_dumpable(dumpable: bool) -> None:
    """Whether processes of the same user may look into this one, through /proc or a debugger."""
    _call("prctl", _SET_DUMPABLE, int(dumpable), 0, 0, 0)


class Filter(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("filter", ctypes.c_char_p)]


def make_filter(bpf: bytes) -> Filter:
    """What `restrict` takes."""
    return Filter(len(bpf) // 8, bpf)


def restrict(program: Filter) -> None:
    """From now on this process and all that it starts gain no rights from any file and pass the filter."""
    _call("prctl", _SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    _call("prctl", _SET_SECCOMP, 2, ctypes.byref(program), 0, 0)
