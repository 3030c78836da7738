"""Hostile programs. The oracles: how each ended, and the machine, which must be as it was before."""

import contextlib
import json
import os
import pathlib
import shutil
import subprocess
import sys
import time

import pytest

from kimi_jax.rewards.sandbox.isolation import NoIsolation
from kimi_jax.rewards.sandbox.pool import LocalSandbox

HERE = pathlib.Path(__file__).parent
ROOT = HERE.parents[2]
sys.path.append(str(HERE))
import attacks  # noqa: E402

NOBODY = 65534


@pytest.fixture(scope="module", autouse=True)
def isolation():
    try:
        LocalSandbox(workers=1).close()
    except NoIsolation as error:
        pytest.skip(str(error))


def state_of_the_machine() -> dict:
    """What a program may have left."""
    users = {}
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            users[pid] = (os.stat(f"/proc/{pid}").st_uid, pathlib.Path(f"/proc/{pid}/stat").read_text())
        except OSError:
            continue
    mine = {str(os.getpid())}  # and of all that descend from this process
    while more := {p for p, (_, stat) in users.items() if stat.rpartition(")")[2].split()[1] in mine} - mine:
        mine |= more
    groups = [*pathlib.Path("/sys/fs/cgroup").glob("*/"), pathlib.Path("/sys/fs/cgroup")]
    return {
        "processes": mine,
        "mounts": pathlib.Path("/proc/self/mountinfo").read_text(),
        "groups": sorted(str(g) for base in groups for g in base.glob(f"**/kimi_jax_sandbox_{os.getpid()}_*")),
        "shared memory": sorted(os.listdir("/dev/shm")),
        "segments": pathlib.Path("/proc/sysvipc/shm").read_text(),
        "files": {place: sorted(os.listdir(place)) for place in (".", "/", "/etc", "/dev", "/usr", "/usr/bin")},
    }


def passing() -> set[str]:
    """Processes of nobody, by number, and scratch directories: other tests may have some meanwhile."""
    found = {name for name in os.listdir("/tmp") if "sandbox" in name}
    for pid in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):  # it has just ended
            found |= {pid} if os.stat(f"/proc/{pid}").st_uid == NOBODY else set()
    return found


def check_that_nothing_is_left(before: set[str]) -> None:
    """What other tests have comes to an end; what an attack has left behind does not."""
    new, patience = passing() - before, time.monotonic() + 60
    while (new := new & passing()) and time.monotonic() < patience:
        time.sleep(0.2)
    assert not new


def test_there_are_enough_of_them():
    names = [attack.name for attack in attacks.ATTACKS]
    assert len(set(names)) == len(names) >= 40


def test_all_are_contained():
    before, others = state_of_the_machine(), passing()
    results = attacks.run_all(attacks.ATTACKS)
    assert len(results) >= 40
    assert not attacks.complaints(attacks.ATTACKS, results)
    assert state_of_the_machine() == before
    check_that_nothing_is_left(others)


def test_all_are_contained_without_rights_too():
    """As nobody, who can make no control groups."""
    if os.getuid() != 0 or not shutil.which("setpriv"):
        pytest.skip("only root can become another user, with setpriv")
    candidates = [sys.executable, "/usr/bin/python3"]
    check = (
        "import subprocess, sys; sys.path.insert(0, sys.argv[1]); import kimi_jax; assert sys.version_info >= (3, 11); "
        "subprocess.run([sys.executable, '-c', ''], check=True)"
    )
    as_nobody = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"]
    trials = {p: subprocess.run([*as_nobody, p, "-c", check, ROOT], capture_output=True) for p in candidates}
    usable = [python for python, trial in trials.items() if trial.returncode == 0]
    if not usable:
        pytest.skip("nobody has a Python 3.11 here that can read this repository")
    before, others = state_of_the_machine(), passing()
    environment = {"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1", "PATH": os.environ["PATH"]}
    command = [*as_nobody, usable[0], str(HERE / "attacks.py")]
    run = subprocess.run(command, env=environment, cwd="/", capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    results = json.loads(run.stdout)
    assert len(results) >= 40
    assert not attacks.complaints(attacks.ATTACKS, results)
    assert state_of_the_machine() == before
    check_that_nothing_is_left(others)


def test_polling_alone_contains_those_that_control_groups_would(monkeypatch):
    if os.getuid() != 0:
        pytest.skip("without root there are no control groups in the other tests either")
    monkeypatch.setattr("kimi_jax.rewards.sandbox.cgroups.find", lambda: ({}, 0))
    greedy = [a for a in attacks.ATTACKS if a.name.startswith(("memory_", "fork_and", "thread"))]
    assert len(greedy) > 5
    assert not attacks.complaints(greedy, attacks.run_all(greedy))
