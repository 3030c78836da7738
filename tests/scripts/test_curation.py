"""The two scripts that ask a model, with a miniature run on disk: what they write, and what they refuse."""

import json
import os
import pathlib
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest

from kimi_jax.arrays import TrainState
from kimi_jax.data.tokenizer import Tokenizer
from kimi_jax.tasks.base import read_problems
from kimi_jax.trainers import answering, setup
from kimi_jax.training import sharding
from kimi_jax.training.checkpoint import Checkpointer
from kimi_jax.types import Problem
from tests.curation import lenient_judge
from tests.trainers import miniature, published

sys.path.append(str(pathlib.Path(__file__).parents[2] / "scripts"))  # where their common part lies beside them

import _curation  # noqa: E402
import curate_prompts  # noqa: E402
import make_sft_set  # noqa: E402

TEXT = "Compute 3+4. How many boxes? Answer: 5 6 7 8 9 0 1 2"
FLAGS = ["--max_tokens=11", "--rows=5", "--batch=3", "--workers=0"]


@pytest.fixture(scope="module", autouse=True)
def miniature_size():
    with pytest.MonkeyPatch.context() as patch:
        miniature.prepare(patch)
        yield


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A run with random parameters."""
    path = tmp_path_factory.mktemp("run")
    config = miniature.get_config()
    (path / "config.json").write_text(config.to_json_best_effort())
    tokenizer = Tokenizer.train([TEXT], path / "tokenizer.model", vocab_size=307)
    mesh = sharding.make_mesh(data=1, fsdp=1, tensor=1)
    policy = setup.make_policy(config, mesh, setup.model_config(config, tokenizer.vocab_size))
    params = jax.jit(policy.init)(jax.random.key(0))
    with Checkpointer(path / "checkpoints" / "sft", keep_last=1, keep_best=0, best_metric=None) as checkpoints:
        checkpoints.save(7, TrainState(params, {}, jnp.asarray(7)), {}, wait=True)
    return path


@pytest.fixture(scope="module")
def answerer(workdir):
    return answering.load(
        model=None, checkpoint=workdir, dtype=None, rows=5, max_tokens=11, pages=None, tensor=1, seed=0
    )


@pytest.fixture
def files(tmp_path):
    """Nine good problems, one with an image; a duplicate; a multiple choice; one of the evaluation set."""
    folder = tmp_path / "data"
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    PIL.Image.fromarray(pixels).save(folder / "boxes.png")

    def record(id_, prompt, answer, **more):
        return {"id": id_, "task": "exact", "prompt": prompt, "answer": answer, **more}

    records = [record(f"good {i}", f"Compute {i}+11.", str(i + 11)) for i in range(2, 10)]
    records[0]["tags"] = ["sums", "easy"]
    records += [
        record("image", "How many boxes? <image> Count.", "31", images=["boxes.png"]),
        record("again", "What is 3+11?", "14"),
        record("choice", "Which of the following is 7?", "7"),
        record("leaked", "What is 12+13?", "25"),
    ]
    (folder / "raw.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    (folder / "test.jsonl").write_text(json.dumps(record("test", "Compute 12+13.", "25")) + "\n")
    return folder


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def stop(*args, **kwargs):
    raise KeyboardInterrupt


def curate(workdir, files, *more):
    given = [f"--problems={files / 'raw.jsonl'}", f"--evaluation={files / 'test.jsonl'}", f"--checkpoint={workdir}"]
    return curate_prompts.main([*given, f"--out={files.parent / 'out'}", "--samples=3", "--guesses=2", *FLAGS, *more])


def test_answers_depend_on_serials_alone(answerer):
    problems = [Problem(f"p{i}", "exact", f"Compute {i}+3.", "5") for i in range(3)]
    ask = lambda problems, serials, **kw: answerer.generate(  # noqa: E731
        problems, serials, **{"temperature": 1.0, "prefix": "", "budget": None} | kw
    )
    together = ask(problems, [[5, 7], [11, 13, 17], [19]])
    assert [len(own) for own in together] == [2, 3, 1]
    assert ask([problems[1]], [[17, 11]]) == [[together[1][2], together[1][0]]]
    assert all(1 <= answer.tokens <= 11 for own in together for answer in own)
    begun = ask(problems, [[5], [11], [19]], prefix="Answer:", budget=2)
    assert all(answer.tokens <= 2 and "Answer:Answer:" not in answer.text for (answer,) in begun)
    assert not answerer.instructed and answerer.identity.startswith("/")


def test_curation(workdir, files, capsys):
    assert curate(workdir, files) == 0
    out = files.parent / "out"
    kept = read_problems(out / "curated.jsonl")  # images are found from there
    assert [problem.id for problem in kept] == [f"good {i}" for i in range(2, 10)] + ["image"]
    assert kept[-1].images[0].shape == (8, 8, 3) and {problem.difficulty for problem in kept} == {10}
    reasons = {row["id"]: row["reason"] for row in read(out / "decisions.jsonl") if row["reason"]}
    assert reasons == {"again": "duplicate", "choice": "multiple_choice", "leaked": "contaminated"}
    summary = json.loads((out / "report.json").read_text())
    assert summary["kept"] == 9 and summary["domains"]["kept"]["sums"] == 1 and summary["settings"]["samples"] == 3
    assert "9 of 12 problems kept" in capsys.readouterr().out and "9 of 12" in (out / "report.md").read_text()

    # Killed while it asked: nothing that looks complete; then only the rest is asked, and all comes out the same.
    finished = {path.name: path.read_bytes() for path in out.iterdir()}
    (out / "samples.jsonl").write_bytes(finished["samples.jsonl"][:1000])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(answering, "generate", stop)
        assert curate(workdir, files) == 130
    assert {path.name for path in out.iterdir()} == {"samples.jsonl", "guesses.jsonl"}
    assert curate(workdir, files) == 0
    again = {path.name: path.read_bytes() for path in out.iterdir()}
    assert sorted(again.pop("samples.jsonl").splitlines()) == sorted(finished.pop("samples.jsonl").splitlines())
    assert again == finished


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--similarity=2"], "similarity=2.0 must lie in"),
        (["--batch=0"], "--batch=0 must be at least 1"),
        (["--system=Hello"], "--system belongs to --model"),
        (["--verifier=exact"], "write 'task=module:function'"),
        (["--verifier=exact=tests.trainers.riddles:nothing"], "nothing"),
        (["--checkpoint=nowhere"], "--checkpoint='.*nowhere' holds no complete checkpoint"),
        (["--evaluation=nowhere.jsonl"], "nowhere.jsonl"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_asked(workdir, files, flags, told, capsys):
    assert curate(workdir, files, *flags) == 2
    assert re.search(told, capsys.readouterr().err)
    assert not (files.parent / "out").exists()


def test_a_judge_that_fails_before_work_starts(workdir, files, capsys):
    lines = (files / "raw.jsonl").read_text().splitlines()
    lines = [json.dumps(json.loads(line) | {"answer": "unknowable"}) for line in lines[:3]]
    (files / "raw.jsonl").write_text("\n".join(lines))
    assert curate(workdir, files, "--verifier=exact=tests.trainers.riddles:verify") == 2
    assert "cannot grade even the reference answers" in capsys.readouterr().err
    assert not (files.parent / "out").exists()


def test_tags_must_be_texts(workdir, files, capsys):
    record = json.loads((files / "raw.jsonl").read_text().splitlines()[0])
    (files / "raw.jsonl").write_text(json.dumps(record | {"tags": "sums"}))
    assert curate(workdir, files) == 2
    assert "raw.jsonl, line 1: problem record 'good 2': 'tags' must be a list of texts" in capsys.readouterr().err


def sft_set(workdir, files, *flags):
    given = ["expand", f"--problems={files / 'raw.jsonl'}", f"--checkpoint={workdir}", f"--out={files.parent / 'set'}"]
    return make_sft_set.main([*given, *FLAGS, *flags])


def test_expansion(workdir, files):
    judge = f"--verifier=exact={lenient_judge.__name__}:verify"
    assert sft_set(workdir, files, judge, "--samples=17", "--keep=2", "--seed=3", "--max_tokens=23", "--rows=61") == 0
    out = files.parent / "set"
    (files / "bare.jsonl").write_text((files / "raw.jsonl").read_text().replace(', "tags": ["sums", "easy"]', ""))
    problems = {problem.id: problem for problem in read_problems(files / "bare.jsonl")}
    examples, provenance = read_problems(out / "examples.jsonl"), read(out / "provenance.jsonl")
    assert len(examples) == len(provenance) > 5
    for example, row in zip(examples, provenance, strict=True):
        problem = problems[row["problem"]]
        assert (example.prompt, example.answer) == (problem.prompt, problem.answer)
        assert example.id == row["id"] and row["seed"] == 3 and row["template"] == "plain" and row["model"]
        assert lenient_judge.verify(problem, example.solution).outcome == "correct" == row["verdict"]
        assert len(example.images) == len(problem.images)
    # What is written can be written again from what is kept of it.
    row = provenance[0]
    (again,) = answering.load(
        model=None, checkpoint=workdir, dtype=None, rows=5, max_tokens=23, pages=None, tensor=1, seed=row["seed"]
    ).generate([problems[row["problem"]]], [[row["serial"]]], temperature=row["temperature"], prefix="", budget=None)
    assert again[0].text == examples[0].solution and again[0].tokens == row["tokens"]
    report = json.loads((out / "report.json").read_text())
    assert report["examples"] == len(examples) and sum(report["answers"]["plain"].values()) == 17 * 12


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--templates=planning"], "knows no instructions"),
        (["--templates=plans"], "--templates has 'plans'"),
        (["--prefer=merit"], "needs a reward model"),
        (["--temperature=0"], "equal answers"),
        (["--keep=0"], "--keep=0"),
        (["--judge=nowhere"], "--judge='nowhere' must be the workdir of a reward model"),
        (["--judge=rm", "--verifier=exact=own:verify"], "--judge=rm judges instead of --verifier=exact=own:verify"),
    ],
)
def test_sets_that_cannot_be_made(workdir, files, flags, told, capsys):
    assert sft_set(workdir, files, *flags) == 2
    assert told in capsys.readouterr().err
    assert not (files.parent / "set").exists()


@pytest.mark.slow
def test_a_warmup_set_of_a_published_model(files, tmp_path):
    model = published.write("qwen2.5-vl", tmp_path / "model")
    lines = (files / "raw.jsonl").read_text().splitlines()
    (files / "raw.jsonl").write_text("\n".join([lines[0], lines[8]]))  # one has tags, the other an image
    given = [f"--problems={files / 'raw.jsonl'}", f"--model={model}", f"--out={tmp_path / 'set'}", *FLAGS]
    flags = ["--templates=planning,all", "--samples=41", "--keep=3", "--rows=41", "--prefer=lengths"]
    judge = f"--verifier=exact={lenient_judge.__name__}:verify"
    assert make_sft_set.main(["warmup", *given, *flags, judge]) == 0
    examples, provenance = read_problems(tmp_path / "set" / "examples.jsonl"), read(tmp_path / "set/provenance.jsonl")
    assert {example.prompt for example in examples} <= {"Compute 2+11.", "How many boxes? <image> Count."}
    assert {row["template"] for row in provenance} <= {"planning", "all"} and "Think" not in examples[0].prompt
    assert all(len(example.images) == example.prompt.count("<image>") for example in examples)
    assert json.loads((tmp_path / "set/report.json").read_text())["settings"]["templates"] == ["planning", "all"]

    # The same model guesses, as it is told to.
    out = tmp_path / "out"
    given[2] = f"--out={out}"
    assert curate_prompts.main([*given, "--samples=2", "--guesses=3"]) == 0
    assert all(answer["text"].startswith("Answer:") for row in read(out / "guesses.jsonl") for answer in row["answers"])


def test_two_processes_that_write_the_same_file(tmp_path, monkeypatch):
    """As steps of scripts/climb.py do that share samples: the second is quicker."""
    path, sync = tmp_path / "heldout.jsonl", os.fsync
    other = f"import pathlib, _curation; _curation.write(pathlib.Path({str(path)!r}), 'theirs')"

    def overtaken(descriptor):
        sync(descriptor)
        subprocess.run([sys.executable, "-c", other], cwd=pathlib.Path(_curation.__file__).parent, check=True)

    monkeypatch.setattr(os, "fsync", overtaken)
    monkeypatch.setenv("PYTHONPATH", str(pathlib.Path(__file__).parents[2]))
    _curation.write(path, "ours, which is longer")
    assert path.read_text() == "ours, which is longer" and list(tmp_path.iterdir()) == [path]
