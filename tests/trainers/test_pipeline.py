"""Bookkeeping of the job that needs no training."""

import json
import time

from kimi_jax.trainers import pipeline


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
