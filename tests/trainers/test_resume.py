"""Killed at any moment and started again, a run ends as if nothing had happened, bit for bit."""

import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from kimi_jax.training.checkpoint import Checkpointer
from tests.trainers import miniature

pytestmark = pytest.mark.slow

ROOT = pathlib.Path(__file__).parents[2]
QUICK_COMPILE = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """One device, and programs that only the first run compiles."""
    flags = os.environ["XLA_FLAGS"].replace("--xla_force_host_platform_device_count=8", "")
    return os.environ | {
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"{flags} {QUICK_COMPILE}".strip(),
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path_factory.mktemp("cache")),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }


@pytest.fixture(scope="module")
def reference(environment, tmp_path_factory):
    """What a run comes to that nobody disturbs."""
    workdir = tmp_path_factory.mktemp("reference")
    assert finish(workdir, environment) == 0, log(workdir)
    return result(workdir)


@pytest.fixture
def workdir(tmp_path):
    return tmp_path / "run"


def begin(workdir: pathlib.Path, environment) -> subprocess.Popen:
    command = [sys.executable, "scripts/train.py", "--config=tests/trainers/miniature.py", f"--workdir={workdir}"]
    workdir.mkdir(exist_ok=True)
    with open(workdir / "log.txt", "a") as out:
        return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=out, stderr=subprocess.STDOUT)


def finish(workdir: pathlib.Path, environment) -> int:
    return begin(workdir, environment).wait(timeout=300)


def log(workdir: pathlib.Path) -> str:
    return (workdir / "log.txt").read_text()[-9000:]


def send(number: int, process: subprocess.Popen, workdir: pathlib.Path, moment) -> int:
    """The signal, as soon as it is the moment. Returns the exit status."""
    try:
        while not moment(workdir):
            assert process.poll() is None, f"the run ended before the moment came:\n{log(workdir)}"
            time.sleep(0.001)
    finally:
        process.send_signal(number)
    return process.wait(timeout=300)


def result(workdir: pathlib.Path) -> dict:
    """All that must not depend on what happened on the way."""
    found: dict = {}
    for stage in ("sft", "rl"):
        with Checkpointer.reader(workdir / "checkpoints" / stage) as checkpoints:
            step = found[f"latest {stage}"] = checkpoints.latest_step()
            described = checkpoints._read_record(step)["arrays"]
            shapes = {path: re.fullmatch(r"(\w+)\[([\d,]*)\]", text).groups() for path, text in described.items()}
            like = {p: np.empty([int(n) for n in dims.split(",") if n], dtype) for p, (dtype, dims) in shapes.items()}
            _, arrays, found[f"meta of {stage}"] = checkpoints.restore(like)
        found |= {f"{stage} {path}": (shapes[path], array.tobytes()) for path, array in arrays.items()}
    for name in ("sft_metrics.jsonl", "metrics.jsonl"):
        rows = [json.loads(line) for line in (workdir / name).read_text().splitlines()]
        found[name] = [{k: v for k, v in row.items() if not is_timing(k)} for row in rows]
    summary = json.loads((workdir / "summary.json").read_text())
    return found | {stage: summary[stage] for stage in ("sft", "rl")}


def is_timing(name: str) -> bool:
    return name.startswith(("seconds", "tokens_per_second"))


def differences(a: dict, b: dict) -> list[str]:
    return [name for name in sorted({*a, *b}) if a.get(name) != b.get(name)]


def lines(path: pathlib.Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def during_sft(workdir):
    """After the first checkpoint, before the last."""
    return (workdir / "checkpoints/sft/4").exists() and not (workdir / "checkpoints/sft/12").exists()


def between_rl_saves(workdir):
    """The metrics of iteration 3 are there; its weights are lost."""
    return 3 <= lines(workdir / "metrics.jsonl") < 10


def inside_a_save(workdir):
    return any((workdir / "checkpoints/rl").glob("*.orbax-checkpoint-tmp*"))


def test_the_reference_moves_in_every_iteration(reference):
    """Else bit-exactness would be no feat."""
    assert (reference["latest sft"], reference["latest rl"]) == (12, 10)
    assert [row["step"] for row in reference["sft_metrics.jsonl"]] == [3, 6, 9, 12]
    assert [row["step"] for row in reference["metrics.jsonl"]] == [*range(1, 11)]
    assert all(row["grad_norm"] > 1e-3 and row["updates"] == 2 for row in reference["metrics.jsonl"])
    parameters = [name.removeprefix("sft ") for name in reference if name.startswith("sft params/")]
    assert len(parameters) > 10
    assert all(reference[f"sft {name}"] != reference[f"rl state/{name}"] for name in parameters)


def test_killed_three_times_and_resumed(reference, environment, workdir):
    seconds = [0.0]
    for moment in (during_sft, between_rl_saves, inside_a_save):
        while True:
            assert send(signal.SIGKILL, begin(workdir, environment), workdir, moment) == -signal.SIGKILL
            if moment(workdir):  # else the save was complete before the signal arrived: try the next one
                break
        seconds.append(json.loads((workdir / "seconds.json").read_text()))
        assert not (workdir / "summary.json").exists()
    assert finish(workdir, environment) == 0, log(workdir)
    assert differences(result(workdir), reference) == []
    seconds.append(json.loads((workdir / "summary.json").read_text())["seconds"])
    assert sorted(set(seconds)) == seconds  # every attempt adds to them


def test_stopped_twice_by_ctrl_c_and_resumed(reference, environment, workdir):
    for moment in (during_sft, between_rl_saves):
        assert send(signal.SIGINT, begin(workdir, environment), workdir, moment) == 0
        assert not (workdir / "summary.json").exists()
    assert log(workdir).count("Stopping: finishing this step and saving") == 2
    assert re.search(r"SFT stopped and saved at step \d+ of 12\. The same command resumes", log(workdir))
    assert re.search(r"RL stopped and saved at iteration \d+ of 10\. The same command resumes", log(workdir))
    assert finish(workdir, environment) == 0, log(workdir)
    assert differences(result(workdir), reference) == []


def test_a_difference_would_be_found(reference):
    """The comparison itself: one bit of one weight, one digit of one metric."""
    name = next(name for name in reference if name.startswith("rl state/params"))
    shape, data = reference[name]
    changed = reference | {name: (shape, bytes([data[0] ^ 1]) + data[1:])}
    rows = reference["metrics.jsonl"]
    changed["metrics.jsonl"] = [*rows[:-1], rows[-1] | {"kl": np.nextafter(rows[-1]["kl"], 1)}]
    assert differences(changed, reference) == ["metrics.jsonl", name]
    assert miniature.get_config().rl.checkpoint_every == 2  # which the moments above count on
