"""A control group per zygote, where this process may make some: a wall behind the limits that are polled.

Groups also count what polling cannot see (buffers of sockets and pipes, the scratch space), act at once, and hold even
if the process that polls does not get to run. Version 1 and 2. Groups are made below the own group of this process, so
that a limit around the service goes on to hold; in version 2, where a divided group has no processes, beside it.
"""

import contextlib
import itertools
import os
import pathlib
import time

_PREFIX = "kimi_jax_sandbox_"
_PATIENCE = 200  # hundredths of a second
_serial = itertools.count()


class ControlGroup:
    """Directories of one group. `join` a process and all that it starts later; `close` once they have ended."""

    def __init__(self, parents: dict[str, pathlib.Path], *, version: int):
        self._version = version
        self._directories: dict[str, pathlib.Path] = {}
        name = f"{_PREFIX}{os.getpid()}_{next(_serial)}"
        for controller, parent in parents.items():
            directory = parent / name
            directory.mkdir(exist_ok=version == 2)  # there, one directory has all controllers
            self._directories[controller] = directory

    def join(self, pid: int) -> None:
        for directory in self._directories.values():
            (directory / "cgroup.procs").write_text(str(pid))

    def limit(self, *, memory_mb: int, processes: int) -> None:
        memory = "memory.max" if self._version == 2 else "memory.limit_in_bytes"
        for controller, name, value in (("memory", memory, memory_mb << 20), ("pids", "pids.max", processes)):
            with contextlib.suppress(OSError):  # less than what is in use just now: polling will do
                (self._directories[controller] / name).write_text(str(value))

    def kills(self) -> int:
        """How many processes have been killed for memory so far."""
        name = "memory.events" if self._version == 2 else "memory.oom_control"
        for line in (self._directories["memory"] / name).read_text().splitlines():
            if line.startswith("oom_kill "):
                return int(line.split()[1])
        return 0

    def close(self) -> None:
        for directory in self._directories.values():
            for _ in range(_PATIENCE):
                try:
                    directory.rmdir()
                except FileNotFoundError:  # one directory for both
                    break
                except OSError:  # what was killed is not gone yet
                    time.sleep(0.01)
                else:
                    break


def find(root: str = "/sys/fs/cgroup", own: str = "/proc/self/cgroup") -> tuple[dict[str, pathlib.Path], int]:
    """The directories below which groups can be made, for "memory" and "pids", and the version; ({}, 0): nowhere."""
    try:
        lines = [line.split(":", 2) for line in pathlib.Path(own).read_text().splitlines()]
    except OSError:
        return {}, 0
    paths = {controller: path for _, controllers, path in lines for controller in controllers.split(",")}
    both: list[str] = [name for name in ("memory", "pids") if name in paths]
    version1 = {name: pathlib.Path(root, name, paths[name].lstrip("/")) for name in both}
    if len(version1) == 2 and all(_usable(path) for path in version1.values()):
        return version1, 1
    if "" in paths:
        around = pathlib.Path(root, paths[""].lstrip("/")).parent
        with contextlib.suppress(OSError):
            enabled = (around / "cgroup.subtree_control").read_text().split()
            if {"memory", "pids"} <= set(enabled) and _usable(around):
                return {"memory": around, "pids": around}, 2
    return {}, 0


def remove_stale(parent: pathlib.Path) -> None:
    """Removes the groups of services that were killed, once their sandboxes have ended."""
    for stale in parent.glob(f"{_PREFIX}*"):
        if not pathlib.Path(f"/proc/{stale.name.removeprefix(_PREFIX).split('_')[0]}").exists():
            with contextlib.suppress(OSError):
                stale.rmdir()


def _usable(parent: pathlib.Path) -> bool:
    """Whether a group can be made there."""
    with contextlib.suppress(OSError):
        remove_stale(parent)
        attempt = parent / f"{_PREFIX}{os.getpid()}_probe"
        attempt.mkdir()
        attempt.rmdir()
        return True
    return False
