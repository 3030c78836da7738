"""The oracles: an interpreter of BPF, and the numbers in the headers of the kernel."""

import errno
import pathlib
import re
import struct

import pytest

from kimi_jax.rewards.sandbox import seccomp

ALLOW = "allow"
HEADERS = {
    "x86_64": ("/usr/include/x86_64-linux-gnu/asm/unistd_64.h", "/usr/include/asm/unistd_64.h"),
    "aarch64": ("/usr/include/asm-generic/unistd.h",),
}


def verdict(bpf: bytes, arch: int, number: int, *arguments: int) -> str | int:
    """What the filter says of a call: "allow" or an errno."""
    data = struct.pack("<iIQ6Q", number, arch, 0, *(list(arguments) + [0] * 6)[:6])
    program = list(struct.iter_unpack("<HBBI", bpf))
    register, at = 0, 0
    while True:
        operation, if_true, if_false, k = program[at]
        at += 1
        if operation == 0x20:
            (register,) = struct.unpack_from("<I", data, k)
        elif operation == 0x06:
            return ALLOW if k == 0x7FFF0000 else k & 0xFFFF if k >> 16 == 5 else f"surprise {k:x}"
        elif operation == 0x05:
            at += k
        else:
            holds = {0x15: register == k, 0x35: register >= k, 0x45: bool(register & k)}[operation]
            at += if_true if holds else if_false


@pytest.fixture(params=["x86_64", "aarch64"])
def machine(request):
    return request.param


def test_denied_calls_fail_and_others_pass(machine):
    bpf, arch = seccomp.build(machine), seccomp._AUDIT_ARCH[machine]
    column = list(seccomp._AUDIT_ARCH).index(machine)
    expected = {n[column]: errno.EPERM for n in seccomp._DENIED.values()}
    expected |= {n[column]: errno.ENOSYS for n in seccomp._MISSING.values()}
    special = {n[column] for n in (seccomp._CLONE, seccomp._IOCTL, *seccomp._SOCKETS)}
    assert len(expected) > 60
    for number in range(seccomp._NEWEST + 1):
        if number not in special:
            assert verdict(bpf, arch, number) == expected.get(number, ALLOW), number
    for number in (seccomp._NEWEST + 1, 1000, 1 << 30 | 1):
        assert verdict(bpf, arch, number) == errno.ENOSYS


def test_calls_of_another_architecture_fail(machine):
    assert verdict(seccomp.build(machine), 0x40000003, 20) == errno.ENOSYS


def test_arguments_are_looked_at(machine):
    bpf, arch = seccomp.build(machine), seccomp._AUDIT_ARCH[machine]
    column = list(seccomp._AUDIT_ARCH).index(machine)
    clone, ioctl, limits = seccomp._CLONE[column], seccomp._IOCTL[column], seccomp._LIMITS[column]
    thread, sigchld = 0x3D0F00, 17
    assert verdict(bpf, arch, clone, thread) == verdict(bpf, arch, clone, sigchld) == ALLOW
    for bit in (0x00020000, 0x02000000, 0x04000000, 0x08000000, 0x10000000, 0x20000000, 0x40000000):
        assert verdict(bpf, arch, clone, bit | sigchld) == errno.EPERM
    for call in seccomp._SOCKETS:
        assert verdict(bpf, arch, call[column], 1) == ALLOW
        for family in (0, 2, 10, 16, 17, 38, 40):
            assert verdict(bpf, arch, call[column], family) == errno.EAFNOSUPPORT
    assert verdict(bpf, arch, limits, 0) == ALLOW
    assert verdict(bpf, arch, limits, 1) == verdict(bpf, arch, limits, 7) == errno.EPERM
    for call in seccomp._ON_ITSELF_ONLY.values():
        assert (verdict(bpf, arch, call[column], 0), verdict(bpf, arch, call[column], 1)) == (ALLOW, 0)
    assert verdict(bpf, arch, ioctl, 0, 0x5401) == ALLOW
    assert verdict(bpf, arch, ioctl, 0, 0x5412) == verdict(bpf, arch, ioctl, 0, 0x541C) == errno.EPERM


def test_numbers_are_those_of_the_kernel(machine):
    path = next((p for p in map(pathlib.Path, HEADERS[machine]) if p.exists()), None)
    if path is None:
        pytest.skip("no headers of the kernel here")
    text = re.sub(r"__NR3264_", "__NR_", path.read_text())
    numbers = {name: int(n) for name, n in re.findall(r"#define __NR_(\w+)\s+(\d+)", text)}
    column = list(seccomp._AUDIT_ARCH).index(machine)
    named = {"clone": seccomp._CLONE, "ioctl": seccomp._IOCTL, "socket": seccomp._SOCKETS[0]}
    tables = seccomp._DENIED | seccomp._MISSING | seccomp._ON_ITSELF_ONLY | named | {"socketpair": seccomp._SOCKETS[1]}
    tables["prlimit64"] = seccomp._LIMITS
    too_new = {"statmount", "listmount"}  # for headers of 2023
    for name, both in tables.items():
        if name not in too_new or name in numbers:
            assert numbers.get(name) == both[column], name
