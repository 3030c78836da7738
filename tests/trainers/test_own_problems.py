"""A run on the user's own problems, judged by the user's own verifier."""

import json

import pytest

from kimi_jax.trainers import pipeline
from tests.trainers import miniature, riddles


def write(path, count, **changes):
    problem = lambda i: {"id": f"{path.stem} {i}", "task": "riddle", "prompt": f"{i}?", "answer": f"{i % 10}"}  # noqa: E731
    lines = [json.dumps(problem(i) | {"solution": f"it is {i}", **changes}) + "\n" for i in range(count)]
    path.write_text("".join(lines))
    return str(path)


@pytest.fixture
def config(tmp_path, monkeypatch):
    miniature.prepare(monkeypatch)
    config = miniature.get_config()
    changes = {
        "data.text_tasks": (),
        "data.image_tasks": (),
        "data.train_file": write(tmp_path / "train.jsonl", 13),
        "data.heldout_file": write(tmp_path / "heldout.jsonl", 5),
        "rewards.verifiers": (f"riddle={riddles.__name__}:verify",),
        "rewards.workers": 1,
        "sft.examples_per_kind": 53,  # more than data.train_per_kind, which is not about files
        "sft.steps": 2,
        "sft.eval_every": 2,
        "rl.iterations": 1,
    }
    config.update_from_flattened_dict(changes)
    return config


@pytest.mark.slow
def test_problems_of_a_file_and_a_verifier_of_a_module(config, tmp_path):
    summary = pipeline.run(config, tmp_path / "run")
    assert summary["rl"].keys() == {"text"} and summary["rl"]["text"]["n"] == 5
    records = [json.loads(line) for line in (tmp_path / "run" / "verdicts.jsonl").read_text().splitlines()]
    assert len(records) == 24 and {record["task"] for record in records} == {"riddle"}
    for record in records:
        assert (record["outcome"] == "correct") == (record["answer"] in record["response"])


@pytest.mark.slow
def test_a_verifier_that_fails_is_counted_and_never_a_zero(config, tmp_path, capfd):
    config.data.train_file = write(tmp_path / "train.jsonl", 13, answer="unknowable", solution="")
    config.sft.steps = 0  # nothing is solved, so nothing can be learned before
    pipeline.run(config, tmp_path / "run")
    row = json.loads((tmp_path / "run" / "metrics.jsonl").read_text())
    assert (row["ungradable"], row["ungradable_alarm"], row["groups_dropped"], row["updates"]) == (1.0, 1.0, 1.0, 0)
    assert row["reward"] is None
    assert "24 of 24 responses could not be graded" in (err := capfd.readouterr().err) and "nobody knows" in err


@pytest.mark.parametrize(
    "changes, told",
    [
        ({"data.heldout_file": None}, "belong together"),
        ({"data.text_tasks": ("chain",)}, "takes the place of tasks"),
        ({"data.train_file": None, "data.heldout_file": None}, "There are no problems"),
        ({"rewards.verifiers": ("riddle",)}, "write 'task=module:function'"),
        ({"rewards.verifiers": ("riddle=no.such:verify",)}, "verifiers: .*'no.such:verify'.*No module named 'no'"),
        ({"rewards.verifiers": ("riddle=json:verify",)}, "there is no 'json:verify'"),
        ({"rewards.verifiers": ()}, "Problem 'train 0': no task is called 'riddle'"),
        ({"rl.problems": 16}, "has 13 problems; there must be config.rl.problems=16"),
        ({"data.train_file": "nowhere.jsonl"}, "nowhere.jsonl"),
    ],
)
def test_what_cannot_work_is_refused_at_once(config, changes, told, tmp_path):
    config.update_from_flattened_dict(changes)
    with pytest.raises((ValueError, OSError), match=told):
        pipeline.run(config, tmp_path / "run")
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_solution_that_no_row_can_hold_is_named(config, tmp_path):
    config.data.train_file = write(tmp_path / "long.jsonl", 7, solution="and so on " * 20)
    with pytest.raises(ValueError, match=r"Problem 'long 0' has \d+ tokens with .*config.rows.tokens=64\. Raise"):
        pipeline.run(config, tmp_path / "run")
