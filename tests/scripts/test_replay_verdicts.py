"""Verdicts of a run are judged again by what judged them. tests/trainers/test_rl.py replays those of a whole run."""

import json

import pytest

from kimi_jax.trainers import reward_models
from kimi_jax.trainers.config import default_config
from kimi_jax.types import Outcome, Verdict
from scripts import replay_verdicts

RECORD = {"step": 1, "group": 0, "task": "chain", "problem": "p", "prompt": "3+4=?", "answer": "7"}


@pytest.fixture
def workdir(tmp_path):
    records = [
        RECORD | {"serial": 11, "response": "Answer:7", "outcome": "correct"},
        RECORD | {"serial": 12, "response": "Answer:8", "outcome": "correct"},
        RECORD | {"serial": 13, "response": "Answer:9", "outcome": "wrong"},
    ]
    (tmp_path / "verdicts.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return tmp_path


def run(workdir, *flags, **rewards) -> int:
    config = default_config()
    config.rewards.update(rewards)
    (workdir / "config.json").write_text(config.to_json_best_effort())
    return replay_verdicts.main([f"--workdir={workdir}", *flags])


def test_by_the_verifiers(workdir, capsys):
    assert run(workdir, workers=1) == 1
    assert capsys.readouterr().out.startswith("step 1, serial 12: correct then, wrong now (8)\n")
    assert run(workdir, "--serial=11", workers=1) == 0


def test_by_the_reward_model_that_gave_them(workdir, monkeypatch, capsys):
    def load_judge(path, mesh, *, votes):
        assert (str(path), votes) == ("the/judge", 3)
        return lambda asked: [Verdict(Outcome.CORRECT if "9" in text else Outcome.UNGRADABLE) for _, text in asked]

    monkeypatch.setattr(reward_models, "load_judge", load_judge)
    assert run(workdir, "--serial=13", judge="the/judge", votes=3) == 1
    assert "serial 13: wrong then, correct now" in capsys.readouterr().out


def test_a_record_that_is_not_there_is_named(workdir, capsys):
    assert run(workdir, "--step=7") == 2
    assert "has no record of --step=7" in capsys.readouterr().err


def test_a_run_without_records_is_named(workdir, capsys):
    (workdir / "verdicts.jsonl").unlink()
    assert run(workdir) == 2
    assert "config.rewards.audit=True" in capsys.readouterr().err
