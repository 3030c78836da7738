"""The command line: what is wrong is said in one line, at once, with the way out."""

import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]
CONFIG = "--config=configs/quickstart.py"
PUBLISHED = "--config=configs/rl_qwen25_1p5b_math.py"


def _train(*arguments):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "scripts/train.py", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)


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


def test_traceback_on_request():
    result = _train(CONFIG, "--dry_run", "--config.rl.tau=-1", "--traceback")
    assert result.returncode == 1
    assert "Traceback" in result.stderr and "check_config" in result.stderr


def test_dry_run_prints_the_plan_with_the_overrides():
    result = _train(CONFIG, "--dry_run", "--config.rl.problems=28", "--config.data.text_tasks=chain,")
    assert result.returncode == 0, result.stderr
    assert "28 problems × 8 = 224 responses" in result.stdout
