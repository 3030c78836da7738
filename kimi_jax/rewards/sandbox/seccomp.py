"""The filter of system calls under which untrusted programs run, as a BPF program.

Namespaces already make most of these calls harmless; the filter keeps programs away from the code of the kernel that
would have to get it right. Denied calls fail with EPERM, and those whose absence programs know how to deal with fail
with ENOSYS; nothing is killed for trying. So does every call that is newer than the list.
"""

import errno
import platform
import struct

_AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_NEWEST = 462  # mseal, Linux 6.10

# name: (x86_64, aarch64); None: the machine has no such call. From 424 on, the numbers are the same everywhere.
_DENIED: dict[str, tuple[int | None, int | None]] = {
    # other file systems and roots
    "mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41), "chroot": (161, 51), "open_tree": (428, 428),
    "move_mount": (429, 429), "fsopen": (430, 430), "fsconfig": (431, 431), "fsmount": (432, 432),
    "fspick": (433, 433), "mount_setattr": (442, 442), "name_to_handle_at": (303, 264),
    "open_by_handle_at": (304, 265), "quotactl": (179, 60), "quotactl_fd": (443, 443), "swapon": (167, 224),
    "swapoff": (168, 225), "fanotify_init": (300, 262), "fanotify_mark": (301, 263), "statmount": (457, 457),
    "listmount": (458, 458), "ustat": (136, None), "sysfs": (139, None), "lookup_dcookie": (212, 18),
    # other namespaces
    "unshare": (272, 97), "setns": (308, 268), "sethostname": (170, 161), "setdomainname": (171, 162),
    # other processes
    "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "kcmp": (312, 272),
    "pidfd_getfd": (438, 438), "process_madvise": (440, 440), "process_mrelease": (448, 448),
    "move_pages": (279, 239), "migrate_pages": (256, 238), "setpriority": (141, 140),
    # memory that belongs to no process, and so to nobody's account
    "shmget": (29, 194), "shmat": (30, 196), "msgget": (68, 186), "semget": (64, 190), "mq_open": (240, 180),
    "keyctl": (250, 219), "add_key": (248, 217), "request_key": (249, 218),
    # large and often broken
    "bpf": (321, 280), "perf_event_open": (298, 241), "userfaultfd": (323, 282), "vmsplice": (278, 75),
    "modify_ldt": (154, None), "personality": (135, 92),
    # the machine itself
    "kexec_load": (246, 104), "kexec_file_load": (320, 294), "init_module": (175, 105), "finit_module": (313, 273),
    "delete_module": (176, 106), "reboot": (169, 142), "acct": (163, 89), "syslog": (103, 116), "iopl": (172, None),
    "ioperm": (173, None), "vhangup": (153, 58), "settimeofday": (164, 170), "clock_settime": (227, 112),
    "adjtimex": (159, 171), "clock_adjtime": (305, 266), "nfsservctl": (180, 42), "_sysctl": (156, None),
    "uselib": (134, None),
}  # fmt: skip
_MISSING: dict[str, tuple[int | None, int | None]] = {
    "clone3": (435, 435),  # its flags are in memory, where a filter cannot look; libraries fall back on clone
    "io_uring_setup": (425, 425), "io_uring_enter": (426, 426), "io_uring_register": (427, 427),
    "memfd_create": (319, 279), "memfd_secret": (447, 447),  # files outside the scratch space and its limit
}  # fmt: skip
# The first argument is a process, 0 being the caller; for others, the calls say that they succeeded and do nothing.
# Runtimes name their own threads in this way, and some do not expect to be refused.
_ON_ITSELF_ONLY: dict[str, tuple[int, int]] = {
    "sched_setscheduler": (144, 119), "sched_setparam": (142, 118), "sched_setattr": (314, 274),
    "sched_setaffinity": (203, 122),
}  # fmt: skip
_LIMITS = (302, 261)  # prlimit64, refused for others
_CLONE, _IOCTL, _SOCKETS = (56, 220), (16, 29), ((41, 198), (53, 199))
_NEW_NAMESPACES = 0x7E020000  # the flags of clone that make namespaces
_AF_UNIX = 1
_PUSH_INPUT = (0x5412, 0x541C)  # TIOCSTI, TIOCLINUX: typing into someone else's terminal

_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN, _JUMP = 0x20, 0x15, 0x35, 0x45, 0x06, 0x05
_NUMBER, _ARCH, _ARGUMENTS = 0, 4, 16  # offsets in struct seccomp_data
_ALLOW = 0x7FFF0000


def _fail(error: int) -> int:
    return 0x00050000 | error


_Instruction = tuple[int, int, int, int]  # operation, jump if true, jump if false, operand


def build(machine: str | None = None) -> bytes:
    """The filter for `machine`, by default this one, as an array of struct sock_filter."""
    machine = machine or platform.machine()
    column = list(_AUDIT_ARCH).index(machine)
    missing = (_RETURN, 0, 0, _fail(errno.ENOSYS))
    code = [
        (_LOAD, 0, 0, _ARCH),
        (_EQUAL, 1, 0, _AUDIT_ARCH[machine]),
        missing,  # the calls of 32-bit programs have other numbers
        (_LOAD, 0, 0, _NUMBER),
        (_AT_LEAST, 0, 1, _NEWEST + 1),
        missing,  # also those of the x32 ABI, which start at 2**30
        *_search(sorted(_rules(column).items())),
    ]
    return b"".join(struct.pack("<HBBI", *instruction) for instruction in code)


def _rules(column: int) -> dict[int, list[_Instruction]]:
    """What to do with the calls that are not simply allowed, by number."""

    def argument(index: int) -> _Instruction:
        return (_LOAD, 0, 0, _ARGUMENTS + 8 * index)  # the lower half; both machines are little-endian

    def end(error: int) -> _Instruction:
        return (_RETURN, 0, 0, _fail(error))

    allow = (_RETURN, 0, 0, _ALLOW)
    rules: dict[int, list[_Instruction]] = {}
    for table, error in ((_DENIED, errno.EPERM), (_MISSING, errno.ENOSYS)):
        rules |= {numbers[column]: [end(error)] for numbers in table.values() if numbers[column] is not None}
    rules[_CLONE[column]] = [argument(0), (_ANY_BIT, 0, 1, _NEW_NAMESPACES), end(errno.EPERM), allow]
    on_itself = {numbers[column]: 0 for numbers in _ON_ITSELF_ONLY.values()} | {_LIMITS[column]: errno.EPERM}
    rules |= {number: [argument(0), (_EQUAL, 1, 0, 0), end(error), allow] for number, error in on_itself.items()}
    for numbers in _SOCKETS:
        rules[numbers[column]] = [argument(0), (_EQUAL, 1, 0, _AF_UNIX), end(errno.EAFNOSUPPORT), allow]
    first, second = _PUSH_INPUT
    typing = [argument(1), (_EQUAL, 1, 0, first), (_EQUAL, 0, 1, second), end(errno.EPERM), allow]
    return rules | {_IOCTL[column]: typing}


def _search(rules: list[tuple[int, list[_Instruction]]]) -> list[_Instruction]:
    """A binary search: the kernel walks through the filter once for every number when it is installed."""
    if not rules:
        return [(_RETURN, 0, 0, _ALLOW)]
    if len(rules) == 1:
        ((number, body),) = rules
        return [(_EQUAL, 0, len(body), number), *body, (_RETURN, 0, 0, _ALLOW)]
    middle = len(rules) // 2
    below, above = _search(rules[:middle]), _search(rules[middle:])
    return [(_AT_LEAST, 0, 1, rules[middle][0]), (_JUMP, 0, 0, len(below)), *below, *above]
