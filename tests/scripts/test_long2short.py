"""The command line: what is written, what is refused, and that nothing half-made looks whole."""

import argparse
import dataclasses
import json
import pathlib
import re
import sys
import types

import numpy as np
import pytest

from kimi_jax.curation.asking import Answer
from kimi_jax.long2short.choosing import read_pairs
from kimi_jax.models.hf.shards import read_directory
from kimi_jax.tasks import TASKS, get_task
from kimi_jax.tasks.base import make_problems, read_problems
from kimi_jax.trainers import long2short as runs
from kimi_jax.types import StopReason
from tests.models.hf.published import QWEN2, write_random

sys.path.append(str(pathlib.Path(__file__).parents[2] / "scripts"))  # where a part of it lies beside it

import long2short  # noqa: E402


def run(capsys, *arguments):
    """(status, result, stderr)"""
    status = long2short.main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    return status, json.loads(out) if status == 0 else None, err


# --- merge ------------------------------------------------------------------------------------------------------------


def test_merge(tmp_path, capsys):
    a, b = (write_random(QWEN2, tmp_path / f"{seed}", dtype="BF16", seed=seed) for seed in (1, 2))
    (tmp_path / "import").mkdir()
    b.rename(tmp_path / "import" / "hf")  # what scripts/import_weights.py writes
    b = tmp_path / "import"
    status, done, _ = run(capsys, "merge", f"--out={tmp_path / 'out'}", a, b)
    assert status == 0 and done["weights"] == [0.5, 0.5] and done["out"] == str(tmp_path / "out")
    status, _, _ = run(capsys, "merge", f"--out={tmp_path / 'most'}", a, b, "--weights=0.9,0.1", "--shard_gb=1e-5")
    assert status == 0 and len(list((tmp_path / "most").glob("*.safetensors"))) > 3
    one, two = (read_directory(source) for source in (a, b / "hf"))
    for directory, weights in (("out", (0.5, 0.5)), ("most", (0.9, 0.1))):
        for name, entry in read_directory(tmp_path / directory).items():
            values = [entries[name].read().astype(np.float64) for entries in (one, two)]
            expected = weights[0] * values[0] + weights[1] * values[1]
            np.testing.assert_array_equal(entry.read(), expected.astype(entry.read().dtype))


def test_merges_that_are_refused(tmp_path, capsys):
    a = write_random(QWEN2, tmp_path / "a", dtype="BF16")
    (tmp_path / "run" / "checkpoints" / "rl" / "3").mkdir(parents=True)
    out = f"--out={tmp_path / 'out'}"
    for arguments, told in (
        ([a, tmp_path / "run"], "Export the run first: python scripts/export_weights.py"),
        ([a, tmp_path / "nowhere"], "is a model and .*nowhere a run"),
        ([a], "two models at least"),
        ([a, a, "--weights=1,1"], "must be finite and sum to 1, but sum to 2"),
        ([tmp_path / "nowhere", tmp_path / "run"], "holds no complete checkpoint"),
    ):
        status, _, err = run(capsys, "merge", out, *arguments)
        assert status == 2 and re.search(told, err), err
    assert not (tmp_path / "out").exists()


# --- shortest, dpo-pairs ----------------------------------------------------------------------------------------------


@pytest.fixture
def answered(tmp_path, monkeypatch):
    """(flags, how often the model was asked): a model that is right two times in three, at many lengths."""
    problems = make_problems(get_task("chain"), split="train", count=7, seed=0)
    problems += make_problems(get_task("pips"), split="train", count=3, seed=0)
    (tmp_path / "in").mkdir()
    records = [runs.record(problem, tmp_path / "in") for problem in problems]
    (tmp_path / "in" / "p.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    by_prompt = {(p.prompt, sum(image.sum() for image in p.images)): p for p in problems}
    asked = []

    def generate(problems, serials, *, temperature, prefix, budget):
        def answer(problem, serial):
            asked.append(serial)
            tokens, right = 5 + serial % 31, serial % 3
            known = by_prompt[problem.prompt, sum(image.sum() for image in problem.images)]
            stop = StopReason.LENGTH if serial % 7 == 0 else StopReason.END
            return Answer("thinking " * tokens + f"Answer: {known.answer if right else 'no'}", tokens, stop)

        return [[answer(p, s) for s in own] for p, own in zip(problems, serials, strict=True)]

    answerer = types.SimpleNamespace(identity="a model/7", generate=generate)
    monkeypatch.setattr(long2short._curation, "load_answerer", lambda args: answerer)
    flags = [f"--problems={tmp_path / 'in' / 'p.jsonl'}", f"--out={tmp_path / 'out'}", "--model=m", "--workers=0"]
    return flags, asked


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_shortest_answers_and_pairs_from_the_same_samples(answered, tmp_path, capsys):
    flags, asked = answered
    out = tmp_path / "out"
    status, result, _ = run(capsys, "shortest", *flags)
    assert status == 0 and len(asked) == 80 == sum(result["answers"].values())
    examples, provenance = read_problems(out / "examples.jsonl"), lines(out / "examples_provenance.jsonl")
    assert [p.id for p in examples] == [p["id"] for p in provenance] and result["examples"] == len(examples) > 7
    assert sum(bool(p.images) for p in examples) == 3 and len(lines(out / "samples.jsonl")) == 10
    for problem, facts in zip(examples, provenance, strict=True):
        serials = [s for s in asked if 5 + s % 31 in facts["lengths"]]
        assert facts["n"] == len(facts["lengths"]) == 8 and facts["model"] == "a model/7" and facts["serial"] in serials
        right = [n for n, verdict in zip(facts["lengths"], facts["verdicts"], strict=True) if verdict == "correct"]
        assert facts["tokens"] in right and problem.solution.count("thinking") == facts["tokens"]
        assert get_task(problem.task).verify(problem, problem.solution).outcome == "correct"

    status, result, _ = run(capsys, "dpo-pairs", *flags)
    assert status == 0 and len(asked) == 80  # nothing was sampled again
    pairs, facts = read_pairs(out / "pairs.jsonl"), lines(out / "pairs_provenance.jsonl")
    assert result["pairs"] == len(pairs) == len(facts) and set(result["because"]) == {"wrong", "long"}
    chosen = {problem.id: problem.solution for problem in examples}
    for pair, fact in zip(pairs, facts, strict=True):
        assert pair.chosen == chosen[pair.problem.id] and pair.rejected != pair.chosen
        longer = pair.rejected.count("thinking") / pair.chosen.count("thinking")
        assert longer > (1.5 if fact["because"] == "long" else 1)
        assert ("Answer: no" in pair.rejected) == (fact["because"] == "wrong")
        assert pair.rejected_ends == bool(fact["rejected_serial"] % 7)


def test_answers_are_abridged_as_their_task_does_it(answered, tmp_path, monkeypatch, capsys):
    flags, asked = answered
    status, _, told = run(capsys, "abridge", *flags)
    assert status == 2 and not asked
    assert "how to abridge answers to problems of chain, pips: of the tasks here, those of countdown, count" in told

    for name in ("chain", "pips"):
        shorter = dataclasses.replace(TASKS[name], abridge=lambda text: text.replace("thinking ", "t "))
        monkeypatch.setitem(TASKS, name, shorter)
    status, result, _ = run(capsys, "abridge", *flags)
    out = tmp_path / "out"
    records, provenance = read_problems(out / "abridged.jsonl"), lines(out / "abridged_provenance.jsonl")
    assert status == 0 and len(asked) == 80 and result["abridged"] == len(records) == len(provenance) > 30
    assert result["problems_used"] == len({record.id.partition("#")[0] for record in records}) <= 10
    for record, facts in zip(records, provenance, strict=True):
        assert record.id == facts["id"] and facts["verdict"] == "correct"
        assert record.solution == facts["text"].replace("thinking ", "t ") != facts["text"]
        assert bool(record.images) == (record.task == "pips")


def test_another_number_of_answers_asks_again(answered, tmp_path, capsys):
    flags, asked = answered
    run(capsys, "shortest", *flags, "--limit=2")
    assert len(asked) == 16
    run(capsys, "shortest", *flags, "--limit=3", "--n=5")
    assert len(asked) == 16 + 15
    run(capsys, "shortest", *flags, "--limit=2", "--n=5", "--seed=1")
    assert len(asked) == 31 + 10


def test_what_was_made_before_does_not_outlive_a_run_that_fails(answered, tmp_path, capsys, monkeypatch):
    flags, _ = answered
    assert run(capsys, "shortest", *flags)[0] == 0
    always_wrong = lambda problems, serials, **_: [  # noqa: E731
        [Answer("Answer: no", 3, StopReason.END) for _ in own] for own in serials
    ]
    answerer = types.SimpleNamespace(identity="another", generate=always_wrong)
    monkeypatch.setattr(long2short._curation, "load_answerer", lambda args: answerer)
    status, _, err = run(capsys, "shortest", *flags)
    assert status == 2 and "None of 10 problems has a correct answer" in err
    assert not (tmp_path / "out" / "examples.jsonl").exists()


@pytest.mark.parametrize(
    "flags, told",
    [
        (["--n=0"], "--n=0"),
        (["--temperature=0"], "8 equal answers"),
        (["--limit=0"], "--limit=0"),
    ],
)
def test_flags_that_cannot_be(answered, capsys, flags, told):
    status, _, err = run(capsys, "shortest", *answered[0], *flags)
    assert status == 2 and told in err and not answered[1]


def test_a_model_needs_problems(tmp_path):
    args = long2short.parse(["dpo-pairs", "--model=m", f"--out={tmp_path}"])
    assert isinstance(args, argparse.Namespace)
    with pytest.raises(ValueError, match="--problems=FILE is missing"):
        long2short.dpo_pairs(args)


# --- select -----------------------------------------------------------------------------------------------------------


def result(accuracy, tokens, n=10):
    return {"accuracy": accuracy, "greedy_accuracy": 0.0, "mean_tokens": tokens, "n": n}


def test_select(tmp_path, capsys):
    long, merged, empty = (tmp_path / name for name in ("long", "merged", "empty"))
    for path in ("long/checkpoints/sft/400", "long/checkpoints/rl/40", "long/checkpoints/rl/20"):
        (tmp_path / path).mkdir(parents=True)
    (merged / "checkpoints" / "merged" / "0").mkdir(parents=True)
    empty.mkdir()
    summary = {"sft": {"text": result(0.4, 50), "image": result(0.6, 70, 30)}, "rl": {"text": result(0.9, 200)}}
    (long / "summary.json").write_text(json.dumps(summary))
    rows = [
        {"step": step, "eval_text_accuracy": accuracy, "eval_text_tokens": tokens}
        for step, accuracy, tokens in ((10, 0.95, 90.0), (20, 0.89, 100.0), (40, 0.1, 1.0))
    ]
    (long / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [{"step": 1}, *rows]))
    evaluation = {"checkpoint": str(merged / "checkpoints/merged/0"), "results": {"text": result(0.7, 80)}}
    (merged / "evaluations.jsonl").write_text(json.dumps(evaluation) + "\n")

    status, found, _ = run(capsys, "select", f"--out={tmp_path / 'f.png'}", long, merged)
    assert status == 0 and found["points"] == 5 and (tmp_path / "f.png").stat().st_size > 5_000
    assert found["init"] == str(long / "checkpoints/rl/20")
    assert [p["name"] for p in found["frontier"]] == ["long sft 400", "merged merged 0", "long rl 10"]
    assert found["frontier"][0]["accuracy"] == pytest.approx(0.55) and found["frontier"][0]["tokens"] == 65
    status, found, _ = run(capsys, "select", f"--out={tmp_path / 'f.png'}", long, merged, "--tolerance=0.25")
    assert found["init"] == str(merged / "checkpoints/merged/0")
    # A checkpoint that looked good on the few problems of its run is measured again, and again.
    for accuracy in (0.95, 0.6):
        measured = {"checkpoint": str(long / "checkpoints/rl/20"), "results": {"text": result(accuracy, 100)}}
        with open(long / "evaluations.jsonl", "a") as file:
            file.write(json.dumps(measured) + "\n")
    status, found, _ = run(capsys, "select", f"--out={tmp_path / 'f.png'}", long, merged)
    assert status == 0 and found["points"] == 5 and found["init"] == str(long / "checkpoints/rl/40")
    status, _, err = run(capsys, "select", f"--out={tmp_path / 'g.png'}", long, empty)
    assert status == 2 and "no measurements on held-out problems" in err and "evaluate" in err
    assert not (tmp_path / "g.png").exists()
