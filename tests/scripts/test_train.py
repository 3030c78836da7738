"""The command line: what is wrong is said in one line, at once, with the way out."""

import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

ROOT = pathlib.Path(__file__).parents[2]
CONFIG = "--config=configs/quickstart.py"
PUBLISHED = "--config=configs/rl_qwen25_1p5b_math.py"


ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}


def _train(*arguments):
    command = [sys.executable, "scripts/train.py", *arguments]
    return subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize(
    "arguments, told",
    [
        ([CONFIG, "--dry_run", "--config.rl.taus=0.1"], "Did you mean --config.rl.tau?"),
        ([CONFIG, "--dry_run", "--config.rl.tau=small"], "--config.rl.tau=small"),
        ([CONFIG, "--dry_run", "--config.rl.tau=-1"], "must be positive"),
        ([CONFIG, "--dry_run", "--config.model.size=huge"], "Choose one of tiny"),
        ([CONFIG], "--workdir"),
        ([CONFIG, "--workdir=runs/x", "--topology=v5e:2x4"], "--dry_run"),
        (["--config=configs/quikstart.py", "--dry_run"], "configs/quickstart.py"),
        (["--config", "configs/quikstart.py", "--dry_run"], "configs/quickstart.py"),
        (["--dry_run"], "configs/quickstart.py"),
        ([CONFIG, "--dryrun"], "dry_run"),
        ([CONFIG, "--workdir=runs/x", "--processes=2"], "--distributed, which is missing"),
        ([CONFIG, "--workdir=runs/x", "--distributed", "--processes=2"], "give all three"),
        ([CONFIG, "--dry_run", "surplus"], "surplus"),
        ([PUBLISHED, "--workdir=runs/x"], "Give --config.model.path=DIR"),
        ([PUBLISHED, "--dry_run", "--config.model.path=nowhere"], "There is no nowhere/config.json"),
    ],
)
def test_mistakes_are_told_in_one_line(arguments, told):
    result = _train(*arguments)
    assert result.returncode == 2
    [line] = result.stderr.strip().splitlines()
    assert line.startswith("Error: ") and told in line


@pytest.mark.parametrize("name, told", [("taus", "Did you mean 'tau'?"), ("zzz", "trainers/config.py has them all")])
def test_a_config_file_that_sets_what_there_is_not(name, told, tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "from kimi_jax.trainers.config import default_config\n\n\n"
        f"def get_config():\n    config = default_config()\n    config.rl.{name} = 0.1\n    return config\n"
    )
    result = _train(f"--config={file}", "--dry_run")
    assert result.returncode == 2
    [line] = result.stderr.strip().splitlines()
    assert line.startswith(f"Error: --config={file} sets '{name}', which there is not.") and told in line


def test_traceback_on_request():
    result = _train(CONFIG, "--dry_run", "--config.rl.tau=-1", "--traceback")
    assert result.returncode == 1
    assert "Traceback" in result.stderr and "check_config" in result.stderr


def test_ctrl_c_before_training_leaves_in_one_line(tmp_path):
    command = [sys.executable, "scripts/train.py", CONFIG, f"--workdir={tmp_path}/run"]
    with subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True) as process:
        while not (tmp_path / "run/config.json").exists():  # then problems are drawn
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors == "Left at once. What was saved is intact: the same command goes on from there.\n"


def test_ctrl_c_is_heard_in_callbacks_of_the_garbage_collector():
    """JAX has one. Python prints what is raised there, and goes on."""
    code = (
        "import gc, os, signal, sys; sys.path[:0] = ['scripts']; import train\n"
        "def run(*_, **__):\n"
        "    gc.callbacks.append(lambda *_: os.kill(os.getpid(), signal.SIGINT))\n"
        "    gc.collect()\n"
        "    print('still here')\n"
        "train.app.run = run\n"
        "train.main()"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (130, "") and result.stderr.startswith("Left at once.")


def test_dry_run_prints_the_plan_with_the_overrides():
    result = _train(CONFIG, "--dry_run", "--config.rl.problems=28", "--config.data.text_tasks=chain,")
    assert result.returncode == 0, result.stderr
    assert "28 problems × 8 = 224 responses" in result.stdout
