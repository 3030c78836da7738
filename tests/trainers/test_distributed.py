"""Two processes with one device each, joined by jax.distributed, against one process: the same job."""

import json
import pathlib
import socket
import subprocess
import sys

import numpy as np

from kimi_jax.training.checkpoint import Checkpointer
from tests.helpers import one_device

ROOT = pathlib.Path(__file__).parents[2]
SHORT = [
    "--config.sft.steps=2",
    "--config.sft.checkpoint_every=2",
    "--config.rl.iterations=2",
    "--config.rl.segment_tokens=17",  # most responses go on in the second iteration, from the replay buffer
    *(f"--config.{stage}.optimizer.name=sgd" for stage in ("sft", "rl")),  # a fresh Adam amplifies rounding
]
TIMINGS = ("seconds", "tokens_per_second")


def start(workdir: pathlib.Path, *arguments: str) -> subprocess.Popen:
    command = [sys.executable, ROOT / "scripts" / "train.py", "--config=tests/trainers/miniature.py"]
    return subprocess.Popen(
        [*command, f"--workdir={workdir}", *SHORT, *arguments],
        cwd=ROOT,
        env=one_device(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process: subprocess.Popen) -> str:
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output
    return output


def test_two_processes_agree_with_one(tmp_path):
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = s.getsockname()[1]
    joined = ["--distributed", f"--coordinator=localhost:{port}", "--processes=2"]
    alone = start(tmp_path / "one")
    both = [start(tmp_path / "two", *joined, f"--process={i}") for i in range(2)]
    finish(alone)
    first, second = map(finish, both)
    assert "sampled accuracy" in first and "sampled accuracy" not in second  # one of them speaks

    metrics = [
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("one", "two")
    ]
    assert [len(m) for m in metrics] == [2, 2] and metrics[0][1]["groups"] > 0 and metrics[0][0]["buffer_groups"] > 0
    for one, two in zip(*metrics, strict=True):
        for name in one:
            if not name.startswith(TIMINGS):
                np.testing.assert_allclose(_number(two[name]), _number(one[name]), rtol=1e-3, atol=1e-5, err_msg=name)
    for stage, step in (("sft", 2), ("rl", 2)):
        one, two = (_arrays(tmp_path / name / "checkpoints" / stage, step) for name in ("one", "two"))
        assert one.keys() == two.keys()
        for path in one:
            exact = path.startswith("buffer/") and not path.endswith("logprobs")  # tokens among them
            np.testing.assert_allclose(two[path], one[path], rtol=0, atol=0 if exact else 1e-5, err_msg=path)


def _number(value):
    return np.nan if value is None else value


def _arrays(directory: pathlib.Path, step: int) -> dict[str, np.ndarray]:
    with Checkpointer.reader(directory) as checkpoints:
        described = checkpoints._read_record(step)["arrays"]
        like = {}
        for path, text in described.items():
            dtype, _, shape = text.rstrip("]").partition("[")
            like[path] = np.zeros([int(n) for n in shape.split(",") if n], dtype)
        return checkpoints.restore(like, step)[1]
