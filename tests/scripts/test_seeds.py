"""Which runs are started, and the table against numbers worked out by hand."""

import json
import os
import pathlib
import signal
import subprocess

import pytest

from scripts import seeds


def summary(sft, rl, *, greedy=0.5, tokens=(20.0, 23.0)):
    scores = lambda accuracy, length: {  # noqa: E731
        "text": {"accuracy": accuracy, "greedy_accuracy": greedy, "mean_tokens": length, "n": 7}
    }
    return {"seconds": 90.0, "sft": scores(sft, tokens[0]), "rl": scores(rl, tokens[1])}


@pytest.fixture
def started(monkeypatch):
    """The commands; each run succeeds but the one of seed 5, which is stopped."""
    commands = []

    def run(command):
        commands.append(command)
        workdir = pathlib.Path(next(a for a in command if a.startswith("--workdir=")).removeprefix("--workdir="))
        if "--config.seed=5" not in command:
            workdir.mkdir(parents=True)
            (workdir / "summary.json").write_text(json.dumps(summary(0.5, 0.625)))
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, "run", run)
    return commands


def test_seeds_that_are_done_are_not_run_again(tmp_path, started, capsys):
    (tmp_path / "seed-3").mkdir()
    (tmp_path / "seed-3" / "summary.json").write_text(json.dumps(summary(0.25, 0.75)))
    arguments = ["--config=c.py", f"--workdir={tmp_path}", "--seeds=3,4", "--config.rl.tau=0.1"]
    assert seeds.main(arguments) == 0
    [command] = started
    assert command[1].endswith("scripts/train.py")
    given = ["--config=c.py", f"--workdir={tmp_path}/seed-4", "--config.seed=4", "--config.rl.tau=0.1"]
    assert command[2:] == given
    # means of 25 and 50, of 75 and 62.5; gains 50 and 12.5
    out = capsys.readouterr().out
    assert "| text, pass@1 | 37.5% | 68.8% | +31.2 (+12.5 to +50.0) |" in out
    assert "| text, greedy | 50.0% | 50.0% | +0.0 (+0.0 to +0.0) |" in out
    assert "| text, mean tokens | 20.0 | 23.0 | +3.0 (+3.0 to +3.0) |" in out
    assert "Seeds 3, 4; 1.5 minutes each" in out
    written = json.loads((tmp_path / "seeds.json").read_text())
    assert written["seeds"] == [3, 4] and written["rows"][0]["gains"] == [50.0, 12.5]
    assert seeds.main(arguments) == 0 and len(started) == 1


def test_ctrl_c_in_the_last_iteration_of_a_seed_stops_the_rest(tmp_path, started, monkeypatch):
    run = subprocess.run
    monkeypatch.setattr(subprocess, "run", lambda command: (os.kill(os.getpid(), signal.SIGINT), run(command))[1])
    assert seeds.main(["--config=c.py", f"--workdir={tmp_path}", "--seeds=3,4"]) == 0
    assert len(started) == 1 and (tmp_path / "seed-3" / "summary.json").exists()


def test_a_stopped_seed_stops_the_rest(tmp_path, started):
    assert seeds.main(["--config=c.py", f"--workdir={tmp_path}", "--seeds=5,6"]) == 0
    assert len(started) == 1 and not (tmp_path / "seeds.json").exists()


@pytest.mark.parametrize("flag", ["--config.seed=3", "--sedes=1", "surplus", "--config.rl.tau"])
def test_flags_that_would_be_ignored_are_refused(flag, tmp_path, started, capsys):
    with pytest.raises(SystemExit) as status:
        seeds.main(["--config=c.py", f"--workdir={tmp_path}", flag])
    assert status.value.code == 2 and not started
    assert flag.split("=")[0] in capsys.readouterr().err
