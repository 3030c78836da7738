"""Merging checkpoints of two real runs: what comes out is measured, and begins another run; and what is refused."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest

from kimi_jax.tasks import get_task
from kimi_jax.tasks.base import make_problems, read_problems
from kimi_jax.trainers import long2short, origin, pipeline, setup, supervised
from kimi_jax.trainers.interrupt import StopRequest
from tests.trainers import miniature

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two runs of one tokenizer, the second of which began with the first."""
    root = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        miniature.prepare(patch)
        made = []
        for name, seed in (("long", 0), ("short", 1)):
            config = miniature.get_config()
            config.seed = seed
            config.update_from_flattened_dict({"rl.iterations": 0, "sft.steps": 2, "sft.eval_problems": 0})
            config.init = str(made[0].workdir) if made else None
            pipeline.prepare_workdir(config, root / name)
            made.append(setup.build(config, root / name))
            with StopRequest() as stop:
                supervised.train(made[-1], supervised.sft(made[-1]), stop)
        yield made


def params_of(here: setup.Setup, path) -> dict:
    return jax.device_get(origin.find(path).load(here.params_like))


def test_a_merged_run_is_measured_and_begins_another_one(runs, tmp_path):
    long, short = runs
    sources = [long.workdir, short.workdir / "checkpoints" / "sft" / "2"]
    done = long2short.merge(sources, tmp_path / "merged", weights=(0.25, 0.75), shard_bytes=10**9)
    assert done["sources"] == [str(run.workdir / "checkpoints/sft/2") for run in runs]
    a, b = (params_of(run, run.workdir) for run in runs)
    mean = lambda x, y: (0.25 * x.astype(np.float64) + 0.75 * y.astype(np.float64)).astype(np.float32)  # noqa: E731
    merged = params_of(long, tmp_path / "merged")
    jax.tree.map(np.testing.assert_array_equal, merged, jax.tree.map(mean, a, b))
    assert any((x != y).any() for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True))

    config = miniature.get_config()
    config.init = str(tmp_path / "merged")
    pipeline.prepare_workdir(config, tmp_path / "next")
    begun = jax.device_get(setup.build(config, tmp_path / "next").init_params())
    jax.tree.map(np.testing.assert_array_equal, begun, merged)

    found = long2short.evaluate(tmp_path / "merged")
    assert found["checkpoint"] == str(tmp_path / "merged/checkpoints/merged/0")
    (point,) = long2short.points(tmp_path / "merged")
    expected = pipeline.full_evaluation(
        dataclasses.replace(long, config=long2short.read_config(long.workdir)), jax.tree.map(jax.numpy.asarray, merged)
    )
    assert found["results"] == expected and set(expected) == {"text", "image"}
    assert point.name == "merged merged 0" and point.checkpoint == found["checkpoint"]
    assert point.tokens == pytest.approx(np.mean([expected[kind]["mean_tokens"] for kind in expected]))


def test_runs_that_cannot_be_averaged(runs, tmp_path):
    long, _ = runs

    def refused(told, change):
        other = tmp_path / "other"
        shutil.copytree(long.workdir, other)
        change(other)
        with pytest.raises(ValueError, match=told):
            long2short.merge([long.workdir, other], tmp_path / "out", weights=(0.5, 0.5), shard_bytes=10**9)
        shutil.rmtree(other)
        assert not list(tmp_path.iterdir())

    def rebuild(other):
        config = json.loads((other / "config.json").read_text())
        config["model"]["scalar_head"] = True
        (other / "config.json").write_text(json.dumps(config))

    refused("have different tokenizers", lambda other: (other / "tokenizer.model").write_bytes(b"another"))
    refused("different shape: scalar_head is False and True", rebuild)


def test_the_problems_of_a_run_survive_a_file(runs, tmp_path):
    train, heldout = long2short.problems_of(runs[0].workdir)
    assert [p.id for p in train] == [f"{p.task}/{p.id}" for p in runs[0].train]
    assert len(heldout) == len(runs[0].heldout)
    chosen = train[:4]
    lines = [json.dumps(long2short.record(problem, tmp_path)) + "\n" for problem in chosen]
    (tmp_path / "p.jsonl").write_text("".join(lines))
    for before, after in zip(chosen, read_problems(tmp_path / "p.jsonl"), strict=True):
        facts = lambda p: {k: v for k, v in dataclasses.asdict(p).items() if k != "images"}  # noqa: E731
        assert facts(after) == facts(before)
        for a, b in zip(after.images, before.images, strict=True):
            np.testing.assert_array_equal(a, b)
    assert any(problem.images for problem in chosen)


def test_two_tasks_that_draw_the_same_content_share_a_file(runs, tmp_path, monkeypatch):
    drawn = [make_problems(get_task(name), split="train", count=1, seed=3)[0] for name in ("countdown", "pips")]
    twins = [dataclasses.replace(drawn[0], task=task) for task in ("countdown", "countdown_image")]
    monkeypatch.setattr(setup, "make_problem_sets", lambda config: (twins, drawn))
    train, heldout = long2short.problems_of(runs[0].workdir)
    for name, problems in (("train", train), ("heldout", heldout)):
        lines = [json.dumps(long2short.record(problem, tmp_path)) + "\n" for problem in problems]
        (tmp_path / name).write_text("".join(lines))
        assert [p.task for p in read_problems(tmp_path / name)] == [p.task for p in problems]
    assert len(train) == len(heldout) == 2
