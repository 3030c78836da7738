"""Bookkeeping of the job that needs no training."""

import json
import os
import signal
import time

import pytest

from kimi_jax.trainers import pipeline, rl, supervised
from kimi_jax.trainers.interrupt import Interrupted
from tests.trainers import miniature


def test_an_attempt_that_is_killed_counts(tmp_path):
    """SIGKILL lets nothing more be written: what is on disk while the attempt runs has to do."""
    path = tmp_path / "seconds.json"
    with pipeline._Clock(path, time.time() - 17):
        left_behind: list[str] = []
        deadline = time.time() + 30
        while len(set(left_behind)) < 2 and time.time() < deadline:  # noted again and again
            time.sleep(0.01)
            if path.exists():
                left_behind.append(path.read_text())
        assert 17 <= json.loads(left_behind[0]) < json.loads(left_behind[-1])
    path.write_text(left_behind[-1])
    assert pipeline._Clock(path, time.time() - 5).seconds() >= 17 + 5


def test_ctrl_c_during_the_evaluation_after_sft_waits_for_no_iteration_of_rl(tmp_path, monkeypatch):
    def evaluation(setup, params):
        os.kill(os.getpid(), signal.SIGINT)
        return {"text": {"accuracy": 0.5}}

    def refuse(*args):
        raise AssertionError("RL began")

    miniature.prepare(monkeypatch)
    monkeypatch.setattr(supervised, "train", lambda *args: {})
    monkeypatch.setattr(pipeline, "full_evaluation", evaluation)
    monkeypatch.setattr(rl, "train", refuse)
    with pytest.raises(Interrupted, match="before RL"):
        pipeline.run(miniature.get_config(), tmp_path)
    assert json.loads((tmp_path / "eval_sft.json").read_text()) == {"text": {"accuracy": 0.5}}
