import os
import signal

from kimi_jax.trainers.interrupt import StopRequest
from kimi_jax.training import distributed


def test_several_processes_ask_only_now_and_then(monkeypatch):
    waits = []
    monkeypatch.setattr(distributed, "agreed", lambda heard: waits.append(heard) or heard)
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.requested_at(1)  # alone: at once
        monkeypatch.setattr(distributed, "alone", lambda: False)
        assert [step for step in range(1, 97) if stop.requested_at(step)] == [32, 64, 96]
    assert len(waits) == 4
