"""Programs that try to get out, to see, to take more than their share, or to stay. Each must end with its `status`.

A program that gets what it wants prints ESCAPED. CANARY stands for the path of a file of the host with the secret,
PORT and SOCKET for a port and an abstract socket on which the host listens. As a script: runs them all and prints a
JSON line; so they can be run as another user.
"""

import dataclasses
import json
import logging
import os
import pathlib
import platform
import re
import shlex
import socket
import sys
import tempfile

from kimi_jax.rewards.sandbox import seccomp
from kimi_jax.rewards.sandbox.api import RunRequest
from kimi_jax.rewards.sandbox.pool import LocalSandbox

SECRET = "the-secret-of-the-host"


@dataclasses.dataclass(frozen=True)
class Attack:
    name: str
    status: str
    code: str
    language: str = "python"
    said: str = ""  # what standard output or error must contain
    time_limit_s: float = 0.5
    memory_limit_mb: int = 96


def call(name: str, *arguments, error: str, table=None) -> Attack:
    """A bare system call that must fail with this error."""
    number = (table or seccomp._DENIED)[name][list(seccomp._AUDIT_ARCH).index(platform.machine())]
    code = f"""
import ctypes, errno
libc = ctypes.CDLL(None, use_errno=True)
result = libc.syscall({number}, {", ".join(f"ctypes.c_long({a})" for a in arguments) or "0"})
print("ESCAPED" if result >= 0 else errno.errorcode[ctypes.get_errno()])
"""
    return Attack(f"call_{name}", "ok", code, said=error)


def programs() -> list[Attack]:
    """Those of attacks.txt."""
    _, *pieces = re.split(r"(?m)^=== (.*)\n", pathlib.Path(__file__).with_suffix(".txt").read_text())
    attacks = []
    for header, code in zip(pieces[::2], pieces[1::2], strict=True):
        name, language, status, *options = shlex.split(header)
        options = dict(option.split("=", 1) for option in options)
        for limit, kind in (("time_limit_s", float), ("memory_limit_mb", int)):
            if limit in options:
                options[limit] = kind(options[limit])
        attacks.append(Attack(name, status, code, language, **options))
    return attacks


MISSING = seccomp._MISSING
ATTACKS = [
    *programs(),
    call("mount", 0, 0, 0, 32, 0, error="EPERM"),
    call("umount2", 0, 2, error="EPERM"),
    call("pivot_root", 0, 0, error="EPERM"),
    call("chroot", 0, error="EPERM"),
    call("unshare", 0x10000000, error="EPERM"),
    call("setns", 3, 0, error="EPERM"),
    call("ptrace", 16, 1, 0, 0, error="EPERM"),
    call("process_vm_readv", 1, 0, 0, 0, 0, 0, error="EPERM"),
    call("keyctl", 0, -3, 0, error="EPERM"),
    call("add_key", 0, 0, 0, 0, -3, error="EPERM"),
    call("bpf", 0, 0, 0, error="EPERM"),
    call("perf_event_open", 0, 0, -1, -1, 0, error="EPERM"),
    call("userfaultfd", 0, error="EPERM"),
    call("shmget", 0, 4096, 0o1600, error="EPERM"),
    call("reboot", 0, 0, 0, 0, error="EPERM"),
    call("init_module", 0, 0, 0, error="EPERM"),
    call("open_by_handle_at", -100, 0, 0, error="EPERM"),
    call("io_uring_setup", 4, 0, error="ENOSYS", table=MISSING),
    call("memfd_create", 0, 0, error="ENOSYS", table=MISSING),
    call("clone3", 0, 0, error="ENOSYS", table=MISSING),
]
if platform.machine() == "x86_64":
    code = """
#include <stdio.h>
int main() {
    long result;
    asm volatile("int $0x80" : "=a"(result) : "a"(20));
    puts(result == -38 ? "ENOSYS" : "ESCAPED");
}
"""
    ATTACKS.append(Attack("32_bit_calls", "ok", code, "cpp", said="ENOSYS"))


def run_all(attacks: list[Attack], **options) -> dict[str, dict]:
    """What became of each, by name."""
    with (
        tempfile.TemporaryDirectory() as directory,
        socket.create_server(("127.0.0.1", 0)) as listener,
        socket.socket(socket.AF_UNIX) as abstract,
    ):
        canary = pathlib.Path(directory, "canary")
        canary.write_text(SECRET)
        canary.chmod(0o644)
        os.chmod(directory, 0o755)
        name = f"kimi_jax_{os.getpid()}"
        abstract.bind(f"\0{name}")
        abstract.listen()
        places = {"CANARY": str(canary), "PORT": str(listener.getsockname()[1]), "SOCKET": name}
        os.environ["SECRET"] = SECRET
        with LocalSandbox(compile_time_s=2.0, compile_memory_mb=256, output_mb=1, **options) as sandbox:
            languages = sandbox.health()["profiles"]["default"]["languages"]
            futures = {}
            for attack in attacks:
                code = attack.code
                for place, actual in places.items():
                    code = code.replace(place, actual)
                limits = {"time_limit_s": attack.time_limit_s, "memory_limit_mb": attack.memory_limit_mb}
                if attack.language in languages:
                    request = RunRequest(language=attack.language, code=code, **limits)
                    futures[attack.name] = sandbox.submit(request)
            results = {name: future.result() for name, future in futures.items()}
            assert sandbox.retries == 0
        assert canary.read_text() == SECRET and os.listdir(directory) == ["canary"]
    shown = ("status", "exit_code", "feedback", "seconds", "peak_memory_mb")
    return {
        name: {key: getattr(result, key) for key in shown}
        | {"text": result.stdout[:2000] + result.stderr[-2000:] + result.feedback}
        for name, result in results.items()
    }


def complaints(attacks: list[Attack], results: dict[str, dict]) -> list[str]:
    """What is not as it should be."""
    found = []
    for attack in attacks:
        result = results.get(attack.name)
        if result is None:
            continue
        text = result["text"]
        if "ESCAPED" in text or SECRET in text:
            found.append(f"{attack.name} escaped: {text[-300:]}")
        if result["status"] != attack.status or attack.said not in text:
            found.append(f"{attack.name}: {result['status']}, not {attack.status} with {attack.said!r}: {text[-300:]}")
    return found


if __name__ == "__main__":
    logging.basicConfig()
    json.dump(run_all(ATTACKS), sys.stdout)
