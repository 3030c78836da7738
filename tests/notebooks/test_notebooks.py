"""The notebooks run from top to bottom, with tiny values in the cell that is tagged "parameters"."""

import pathlib
import re

import nbformat
import pytest
from nbclient import NotebookClient

from tests.helpers import one_device

ROOT = pathlib.Path(__file__).parents[2]
TINY = {
    "01_quickstart": {"PROBLEMS": 30, "SFT_STEPS": 3, "RL_ITERATIONS": 2, "RL_PROBLEMS": 8, "SLOTS": 16},
    "02_rollouts": {
        "SEED": 5,
        "SLOTS": 4,
        "PROBLEMS": 5,
        "K": 2,
        "MEDIAN": 6,
        "MAX_TOKENS": 24,
        "ITERATIONS": 3,
        "SEGMENT": 8,
    },
    "03_rewards": {"K": 5, "JUDGEMENTS": 41, "DEADLINE_S": 0.5},
    # So few problems that some of them are known by heart soon: without a right answer there is nothing to shorten.
    "04_long2short": {"PROBLEMS": 5, "SFT_STEPS": 61, "ASKED": 5, "SHORT_STEPS": 2, "RL_ITERATIONS": 1, "SLOTS": 16},
}
PRINTED = {
    "01_quickstart": ["sampled accuracy"],
    "02_rollouts": [f"{n} of {n} responses are the same" for n in (12, 4, 10)],
    "03_rewards": ["2 tests passed", "'ungradable'", "time_limit", "Verdict(outcome=<Outcome.CORRECT"],
    "04_long2short": ["problems have a right answer", "'weights': [0.5, 0.5]", "length reward  "],
}


def test_every_notebook_is_run():
    assert sorted(TINY) == sorted(path.stem for path in (ROOT / "notebooks").glob("*.ipynb"))


@pytest.mark.slow
@pytest.mark.parametrize("name", TINY)
def test_notebook_runs(name, tmp_path, monkeypatch):
    for variable, value in one_device().items():
        monkeypatch.setenv(variable, value)
    notebook = nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4)
    [parameters] = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ())]
    assert re.findall(r"^(\w+) =", parameters.source, re.MULTILINE) == list(TINY[name])
    parameters.source = "\n".join(f"{parameter} = {value}" for parameter, value in TINY[name].items())
    # An error in a cell is an error here. Programs of the sandbox may print theirs.
    NotebookClient(notebook, kernel_name="python3", timeout=300, resources={"metadata": {"path": tmp_path}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    text = "\n".join(output.get("text", "") for output in outputs)
    assert all(line in text for line in PRINTED[name])


@pytest.mark.parametrize("name", TINY)
def test_notebook_is_stored_without_outputs(name):
    """So that a diff shows what was changed."""
    notebook = nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4)
    assert all(not cell.outputs and cell.execution_count is None for cell in notebook.cells if cell.cell_type == "code")
