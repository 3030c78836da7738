"""On a made-up tree of directories, for both versions. On the real one, the attacks are the test."""

import os

import pytest

from kimi_jax.rewards.sandbox.cgroups import ControlGroup, find


@pytest.fixture(params=[1, 2])
def tree(request, tmp_path):
    """(version, root, file with the own groups, directories below which groups can be made)"""
    own = tmp_path / "own"
    if request.param == 1:
        own.write_text("5:memory:/a/b\n4:pids:/\n1:name=systemd:/x\n0::/\n")
        directories = {"memory": tmp_path / "memory/a/b", "pids": tmp_path / "pids"}
    else:
        own.write_text("0::/a/service\n")
        directories = dict.fromkeys(["memory", "pids"], tmp_path / "a")
        (tmp_path / "a/service").mkdir(parents=True)
    for directory in directories.values():
        directory.mkdir(parents=True, exist_ok=True)
    if request.param == 2:
        (tmp_path / "a/cgroup.subtree_control").write_text("cpu memory pids\n")
    return request.param, str(tmp_path), str(own), directories


def test_groups_are_made_where_they_can_be(tree):
    version, root, own, directories = tree
    stale = [d / "kimi_jax_sandbox_99999999_0" for d in set(directories.values())]
    foreign = [d / f"kimi_jax_sandbox_{os.getppid()}_0" for d in set(directories.values())]
    for directory in stale + foreign:
        directory.mkdir()
    assert find(root, own) == (directories, version)
    assert not any(d.exists() for d in stale) and all(d.exists() for d in foreign)


def test_limits_are_written_and_kills_are_read(tree):
    version, _, _, directories = tree
    first, second = (ControlGroup(directories, version=version) for _ in range(2))
    made = [p.name for p in directories["memory"].iterdir() if str(os.getpid()) in p.name]
    made.sort(key=lambda name: int(name.rpartition("_")[2]))  # the one with number 10 was made after that with 9
    assert len(made) == 2
    directory = directories["memory"] / made[0]
    first.limit(memory_mb=3, processes=7)
    first.join(41)
    name = {1: "memory.limit_in_bytes", 2: "memory.max"}[version]
    assert (directory / name).read_text() == str(3 << 20)
    assert (directories["pids"] / made[0] / "pids.max").read_text() == "7"
    assert (
        (directory / "cgroup.procs").read_text() == (directories["pids"] / made[0] / "cgroup.procs").read_text() == "41"
    )
    name = {1: "memory.oom_control", 2: "memory.events"}[version]
    (directory / name).write_text("oom_kill_disable 0\nunder_oom 0\noom_kill 5\n")
    assert first.kills() == 5
    second.close()
    assert not (directories["memory"] / made[1]).exists()


def test_nowhere_is_an_answer(tree, tmp_path):
    version, root, own, directories = tree
    (tmp_path / "other").write_text("2:cpu:/\n")
    assert find(root, str(tmp_path / "other")) == find(root, str(tmp_path / "absent")) == ({}, 0)
    if version == 2:
        (tmp_path / "a/cgroup.subtree_control").write_text("cpu pids\n")
        assert find(root, own) == ({}, 0)
