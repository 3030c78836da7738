"""Each objective of RL through the loop itself: found by name, on equal batches, with the metrics that reports read."""

import json

import jax
import numpy as np
import pytest

from kimi_jax.trainers import objectives, pipeline, rl, setup
from kimi_jax.trainers.config import OBJECTIVES, check_config, default_config
from kimi_jax.trainers.interrupt import StopRequest
from kimi_jax.types import Outcome, Problem, Prompt, RolloutGroup, Verdict
from tests.trainers import miniature


def named(name: str, **changes) -> objectives.Objective:
    config = default_config()
    config.rl.objective = name
    config.rl.update(changes)
    check_config(config)
    return objectives.find(config.rl)


def test_every_name_has_an_objective():
    assert set(OBJECTIVES) == set(objectives._OBJECTIVES)
    assert {name for name in OBJECTIVES if named(name).hyper} == {"mirror_descent", "grpo"}
    assert named("grpo", grpo={"clip": 0.3, "beta": 0.0}).hyper == {"clip": np.float32(0.3), "beta": 0.0}


@pytest.mark.parametrize(
    "path, value, near", [("objective", "gpro", "grpo"), ("baseline", "means", "mean"), ("form", "tokens", "token")]
)
def test_unknown_names_are_refused_with_the_nearest(path, value, near):
    config = default_config()
    config.rl[path] = value
    with pytest.raises(ValueError, match=f"config.rl.{path}='{value}' is none of .*Did you mean '{near}'"):
        check_config(config)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_advantages_leave_out_what_is_ungradable(name):
    outcomes = [Outcome.CORRECT, Outcome.UNGRADABLE, Outcome.WRONG, Outcome.CORRECT, Outcome.WRONG]
    rewards = np.array([1.0, np.nan, 0.25, 1.5, -0.25])
    problem, prompt = Problem("p", "none", "", "1"), Prompt(np.zeros(1, np.int32))
    group = RolloutGroup(problem, prompt, (), tuple(map(Verdict, outcomes)))
    found = rl._advantages(named(name), group, rewards)
    expected = {
        "mirror_descent": [0.375, -0.375, 0.875, -0.875],
        "reinforce": [1.0, 0.25, 1.5, -0.25],
        "rloo": [0.5, -0.5, 7 / 6, -7 / 6],
        "rest": [0.0, 0.0, 4.0, 0.0],
        "grpo": np.array([0.375, -0.375, 0.875, -0.875]) / np.sqrt((0.375**2 + 0.875**2) / 2),
    }[name]
    np.testing.assert_allclose(found, np.insert(expected, 1, np.nan), rtol=1e-5)
    alone = rl._advantages(named(name), group, np.where(np.arange(5) == 2, rewards, np.nan))
    assert np.isnan(alone).all()


@pytest.mark.slow
def test_every_objective_runs_on_the_same_responses_with_the_same_metrics(tmp_path, monkeypatch):
    def odd(problem, text):
        return Verdict(Outcome.CORRECT if sum(text.encode()) % 2 else Outcome.WRONG)

    miniature.prepare(monkeypatch)
    monkeypatch.setattr(setup.Setup, "verify", staticmethod(odd))
    first, after = {}, {}
    for name in OBJECTIVES:
        config = miniature.get_config()
        config.update_from_flattened_dict(
            {"rl.objective": name, "rl.iterations": 1, "rl.reset_optimizer": True, "rewards.workers": 0}
        )
        pipeline.prepare_workdir(config, tmp_path / name)
        here = setup.build(config, tmp_path / name)
        with StopRequest() as stop:
            params = rl.train(here, here.init_params(), stop)
        after[name] = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(jax.device_get(params))])
        (first[name],) = map(json.loads, (tmp_path / name / "metrics.jsonl").read_text().splitlines())
    base = first["mirror_descent"]
    for name, row in first.items():
        assert row.keys() - base.keys() == ({"clipped"} if name == "grpo" else set()) and base.keys() <= row.keys()
        for same in ("reward", "accuracy", "response_length", "groups", "updates"):
            assert row[same] == base[same], (name, same)
        assert np.isfinite(after[name]).all() and row["first_log_ratio"] == 0.0
    assert 0 < base["accuracy"] < 1 and 0 <= first["grpo"]["clipped"] < 1
    values = [after[name] for name in OBJECTIVES]
    assert all((a != b).any() for i, a in enumerate(values) for b in values[:i])
