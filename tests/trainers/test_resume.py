"""Killed at any moment and started again, a run ends as if nothing had happened, bit for bit."""

import contextlib
import functools
import json
import pathlib
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from kimi_jax.training.checkpoint import Checkpointer
from tests.helpers import one_device
from tests.trainers import miniature

pytestmark = pytest.mark.slow

ROOT = pathlib.Path(__file__).parents[2]
SETTINGS = {  # partial rollouts with all that they have to remember, and steps enough for five disturbances
    "sft.steps": 20,
    "rl.iterations": 12,
    "rl.segment_tokens": 7,
    "rl.max_segment_lag": 2,
    "rl.max_age": 3,
    "rl.oversubscribe": 0.5,
    "rewards.weights.repetition": 0.25,
    "rewards.workers": 1,
    "sampling.repetition.window": 5,
    "sampling.repetition.min_tokens": 1,
}


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """One device, and programs that only the first run compiles.

    A directory of its own for them: killing a process may leave one half written, which no other run should find.
    """
    return one_device() | {
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path_factory.mktemp("cache")),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }


@pytest.fixture(scope="module")
def reference(environment, tmp_path_factory):
    """What a run comes to that nobody disturbs."""
    workdir = tmp_path_factory.mktemp("reference")
    assert finish(workdir, environment) == 0, log(workdir)
    return result(workdir)


def begin(workdir: pathlib.Path, environment) -> subprocess.Popen:
    command = [sys.executable, "scripts/train.py", "--config=tests/trainers/miniature.py", f"--workdir={workdir}"]
    command += [f"--config.{name}={value}" for name, value in SETTINGS.items()]
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


def early_in_sft(workdir):
    return (workdir / "checkpoints/sft/4").exists() and lines(workdir / "sft_metrics.jsonl") < 4


def late_in_sft(workdir):
    return (workdir / "checkpoints/sft/16").exists() and not (workdir / "checkpoints/sft/20").exists()


def early_in_rl(workdir):
    return 2 <= lines(workdir / "metrics.jsonl") < 7


def between_rl_saves(workdir):
    """The metrics of iteration 7 are there; its weights, and what it left in the replay buffer, are lost."""
    return 7 <= lines(workdir / "metrics.jsonl") < 12


def unfinished_saves(workdir) -> set:
    found = set()
    for path in (workdir / "checkpoints/rl").glob("*.orbax-checkpoint-tmp*"):
        with contextlib.suppress(FileNotFoundError):  # finished meanwhile
            found.add((path.name, path.stat().st_ino))
    return found


def inside_a_save(workdir, debris=frozenset()):
    """debris: of saves that were killed before."""
    return bool(unfinished_saves(workdir) - debris)


def test_the_reference_moves_in_every_iteration_with_a_complete_group(reference):
    """Else bit-exactness would be no feat. Without one, nothing moves and nothing was measured; the run goes on."""
    assert (reference["latest sft"], reference["latest rl"]) == (20, 12)
    assert [row["step"] for row in reference["sft_metrics.jsonl"]] == [3, 6, 9, 12, 15, 18, 20]
    rows = reference["metrics.jsonl"]
    assert [row["step"] for row in rows] == [*range(1, 13)]
    assert rows[0]["groups"] == 0 and sum(row["groups"] == 0 for row in rows) < 4
    for row in rows:
        assert row["updates"] == min(row["groups"], 2) and ((row["grad_norm"] or 0) > 1e-3) == (row["groups"] > 0)
        assert row.keys() == rows[0].keys()
        for name in ("accuracy", "accuracy_text", "accuracy_image", "reward", "response_length", "tokens_masked"):
            assert row["groups"] or row[name] is None, name
    for name in ("buffer_responses", "staleness", "tokens_masked", "responses_masked", "repetitive", "truncated"):
        assert any(row[name] for row in rows), name
    assert any(reference[f"rl buffer/{name}"][0][1] != "0" for name in ("tokens", "serial", "born"))
    parameters = [name.removeprefix("sft ") for name in reference if name.startswith("sft params/")]
    assert len(parameters) > 10
    assert all(reference[f"sft {name}"] != reference[f"rl state/{name}"] for name in parameters)


def test_disturbed_five_times_and_resumed(reference, environment, tmp_path):
    workdir, seconds = tmp_path / "run", [0.0]
    for number, moment in (
        (signal.SIGINT, early_in_sft),
        (signal.SIGKILL, late_in_sft),
        (signal.SIGINT, early_in_rl),
        (signal.SIGKILL, between_rl_saves),
        (signal.SIGKILL, inside_a_save),
    ):
        if moment == inside_a_save:
            moment = functools.partial(inside_a_save, debris=frozenset(unfinished_saves(workdir)))
        status = send(number, begin(workdir, environment), workdir, moment)
        while isinstance(moment, functools.partial) and not moment(workdir):  # the save was quicker than the signal
            status = send(number, begin(workdir, environment), workdir, moment)
        assert status == (0 if number == signal.SIGINT else -number), log(workdir)
        seconds.append(json.loads((workdir / "seconds.json").read_text()))
        assert not (workdir / "summary.json").exists()
    assert log(workdir).count("Stopping: finishing this step and saving") == 2
    assert re.search(r"SFT stopped and saved at step \d+ of 20\. The same command resumes", log(workdir))
    assert re.search(r"RL stopped and saved at iteration \d+ of 12\. The same command resumes", log(workdir))
    assert finish(workdir, environment) == 0, log(workdir)
    assert differences(result(workdir), reference) == []
    seconds.append(json.loads((workdir / "summary.json").read_text())["seconds"])
    assert sorted(set(seconds)) == seconds  # every attempt adds to them


def test_a_difference_would_be_found(reference):
    """The comparison itself: one bit of one weight, one digit of one metric, one token in the replay buffer."""
    changed = dict(reference)
    names = [next(name for name in reference if name.startswith("rl state/params")), "rl buffer/tokens"]
    for name in names:
        shape, data = reference[name]
        changed[name] = (shape, bytes([data[0] ^ 1]) + data[1:])
    rows = reference["metrics.jsonl"]
    changed["metrics.jsonl"] = [*rows[:-1], rows[-1] | {"kl": np.nextafter(rows[-1]["kl"], 1)}]
    assert differences(changed, reference) == sorted(["metrics.jsonl", *names])
    assert miniature.get_config().rl.checkpoint_every == 2  # which the moments above count on
