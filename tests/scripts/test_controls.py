"""The controls: their arithmetic by hand and by brute force, and both of them on a run in miniature."""

import dataclasses
import json
import shutil
import types

import numpy as np
import pytest

from kimi_jax.tasks import TASKS
from kimi_jax.tasks.base import make_problems
from kimi_jax.trainers import pipeline
from kimi_jax.training.checkpoint import Checkpointer
from scripts import controls
from tests.trainers import miniature


def test_everyone_gets_the_image_of_another():
    problems = [
        *make_problems(TASKS["pips"], split="heldout", count=41, seed=0),
        *make_problems(TASKS["scene_count"], split="heldout", count=13, seed=0),
    ]
    alone = dataclasses.replace(problems[0], images=(np.zeros((8, 88, 3), np.uint8),))
    own, others = controls.swapped([alone, *problems])
    assert sorted(p.id for p in own) == sorted(p.id for p in problems)
    for before, after in zip(own, others, strict=True):
        same = (before.id, before.task, before.prompt, before.answer)
        assert (after.id, after.task, after.prompt, after.answer) == same
        assert before.images[0] is not after.images[0]
        [owner] = [p for p in own if p.images[0] is after.images[0]]
        assert owner.task == after.task and owner.images[0].shape == before.images[0].shape
    assert {id(p.images[0]) for p in others} == {id(p.images[0]) for p in own}  # none is lost, so none shown twice


def test_the_best_constant_guess():
    pips = make_problems(TASKS["pips"], split="heldout", count=2, seed=0)
    assert [p.images[0].shape[1] for p in pips] == [16, 24]
    narrow, wide = pips
    give = lambda problem, answers: [dataclasses.replace(problem, answer=a) for a in answers]  # noqa: E731
    problems = give(narrow, "7789") + give(wide, "555778")
    assert controls.constant_guess(problems) == (2 + 3) / 10  # 7 for the narrow ones, 5 for the wide ones
    scenes = [
        dataclasses.replace(narrow, task="scene_count", prompt=f"How many {asked}? <image>", answer=answer)
        for asked, answer in (("crosses", "1"), ("circles", "1"), ("red shapes", "2"), ("blue shapes", "3"))
    ]
    assert controls.constant_guess(scenes) == (2 + 1) / 4  # two forms of question


def test_half_a_chain_of_thought():
    letters = types.SimpleNamespace(encode=list, decode="".join)
    half = lambda text, share=0.5: controls.shortened(letters, text, share)  # noqa: E731
    assert half("abcd efgh Answer: 12") == "abcd Answer:"  # 4.5 letters, to even
    assert half("abcdef Answer: 1 Answer: 2") == "abc Answer:"
    assert half("no answer", 1.0) == "no answer Answer:"
    assert half("abc Answer: 1", 0.0) == half("Answer: 1") == half("") == "Answer:"


@pytest.mark.parametrize(
    "begun",
    [
        ["checkpoints/sft/7/x", "tokenizer.model"],
        ["checkpoints/dpo/7/x", "tokenizer.model"],
        ["tokenizer.model"],  # with config.init
        ["checkpoints/sft/7/x", "hf/config.json"],  # with config.model.path
    ],
)
def test_a_control_begins_with_what_rl_began_with(begun, tmp_path):
    for file in (*begun, "eval_sft.json", "checkpoints/rl/5/x", "summary.json", "metrics.jsonl"):
        (tmp_path / "run" / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "run" / file).write_text(file)
    target = controls._after_sft(tmp_path / "run", "faulty")
    there = {str(path.relative_to(target)): path.read_text() for path in target.rglob("*") if path.is_file()}
    assert there == {file: file for file in (*begun, "eval_sft.json")} and target.name == "run-faulty"


@pytest.fixture
def finished(tmp_path, monkeypatch):
    miniature.prepare(monkeypatch)
    config = miniature.get_config()
    config.rl.permute_advantages = False
    config.rl.iterations = 2
    pipeline.run(config, tmp_path / "run")
    return tmp_path / "run"


@pytest.mark.slow
def test_both_controls_on_a_run_in_miniature(finished, capsys):
    flag = f"--workdir={finished}"
    before = {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}
    assert controls.main([flag, "permuted"]) == 0
    target = finished.with_name("run-permuted")
    own, other = (json.loads((path / "summary.json").read_text()) for path in (finished, target))
    assert own["sft"] == other["sft"]
    assert json.loads((target / "config.json").read_text())["rl"]["permute_advantages"]
    assert (target / "sft_metrics.jsonl").exists() is False  # SFT was not repeated
    first = [json.loads((path / "metrics.jsonl").read_text().splitlines()[0]) for path in (finished, target)]
    assert first[0]["accuracy"] == first[1]["accuracy"] and first[0]["grad_norm"] != first[1]["grad_norm"]
    assert controls.main([f"--workdir={target}", "permuted"]) == 2
    assert "such a control already" in capsys.readouterr().err

    assert controls.main([flag, "swapped_images"]) == 0
    row = json.loads((finished / "swapped_images.json").read_text())["pips"]
    assert 0 < row["n"] <= 11 and all(0 <= share <= 1 for name, share in row.items() if name != "n")
    assert all(path.read_bytes() == data for path, data in before.items())  # the run is as it was

    assert controls.main([flag, "faulty"]) == 0
    drill = json.loads((finished.with_name("run-faulty") / "faulty.json").read_text())
    assert drill["run"]["rl"] == own["rl"] and drill["faulty"]["rl"].keys() == own["rl"].keys()
    assert drill["run"]["missed_deadlines"] == drill["run"]["verifier_crashes"] == drill["run"]["ungradable"] == 0
    records = [json.loads(line) for line in (finished.with_name("run-faulty") / "verdicts.jsonl").open()]
    ungradable = [record["outcome"] == "ungradable" for record in records]
    assert drill["faulty"]["ungradable"] == pytest.approx(np.mean(ungradable))
    assert drill["faulty"]["missed_deadlines"] + drill["faulty"]["verifier_crashes"] == sum(ungradable)
    with Checkpointer.reader(target / "checkpoints" / "rl") as checkpoints:
        assert checkpoints.latest_step() == 2


def test_a_run_that_is_not_finished_is_refused(tmp_path, capsys):
    shutil.copy(__file__, tmp_path / "config.json")
    for control in controls.CONTROLS:
        assert controls.main([f"--workdir={tmp_path}", control]) == 2
        out, err = capsys.readouterr()
        assert out == "" and err.startswith("Error: ") and "holds no finished run" in err and err.count("\n") == 1
