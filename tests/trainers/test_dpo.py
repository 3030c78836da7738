"""DPO as a stage: its reference is the policy that it begins with, pair by pair; it learns, stops, and goes on."""

import json
import pathlib
import re

import jax
import numpy as np
import pytest

from kimi_jax.trainers import dpo, pipeline, setup, supervised
from kimi_jax.trainers.config import check_config
from kimi_jax.trainers.interrupt import Interrupted, StopRequest
from tests.trainers import miniature

pytestmark = pytest.mark.slow
STEPS = 7


def write_pairs(path: pathlib.Path, train) -> pathlib.Path:
    """Eleven pairs: the answer is preferred to a wrong, longer and sometimes cut way of talking."""
    records = []
    for i, problem in enumerate(train[:22:2]):
        record = {name: getattr(problem, name) for name in ("id", "task", "prompt", "answer")}
        sides = {"chosen": f"Answer: {problem.answer}", "rejected": f"{i} " * (3 + i % 3) + "Answer: no"}
        records.append(record | sides | ({"rejected_ends": False} if i % 3 == 1 else {}))
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """(workdir of a run, a file of pairs)"""
    root = tmp_path_factory.mktemp("start")
    with pytest.MonkeyPatch.context() as patch:
        miniature.prepare(patch)
        config = miniature.get_config()
        config.update_from_flattened_dict({"rl.iterations": 0, "sft.steps": 4, "sft.eval_problems": 0})
        pipeline.prepare_workdir(config, root / "run")
        here = setup.build(config, root / "run")
        with StopRequest() as stop:
            supervised.train(here, supervised.sft(here), stop)
        yield root / "run", write_pairs(root / "pairs.jsonl", here.train)


def config_of(start, **changes):
    config = miniature.get_config()
    config.init, config.dpo.pairs = map(str, start)
    config.update_from_flattened_dict(
        {"rl.iterations": 0, "sft.steps": STEPS, "sft.rows": 4, "sft.micro_rows": 2, "sft.eval_every": 1} | changes
    )
    config.update_from_flattened_dict({"sft.eval_problems": 0, "sft.checkpoint_every": 2})
    check_config(config)
    return config


@pytest.fixture
def here(start, tmp_path, monkeypatch):
    miniature.prepare(monkeypatch)
    config = config_of(start)
    pipeline.prepare_workdir(config, tmp_path / "dpo")
    return setup.build(config, tmp_path / "dpo")


def test_batches_hold_whole_pairs_with_the_log_probs_of_the_start(here):
    pairs = [dpo.encode(here, pair) for pair in dpo.read_pairs(here.config.dpo.pairs)]
    params = here.init_params()
    chunk = here.config.rows.logits_chunk
    score = jax.jit(lambda rows: here.policy.logprobs(params, rows, temperature=1.0, logits_chunk=chunk)[0])
    alone = {}  # the log-probs of each side, in a row of its own
    for sides in pairs:
        for example in sides:
            rows = dpo._packed(here, [example], [[0]], 1)
            alone[example.tokens.tobytes()] = np.asarray(score(rows))[0][rows.loss_mask[0]]
    expected = {(chosen.tokens.tobytes(), rejected.tokens.tobytes()) for chosen, rejected in pairs}
    stage, found = dpo.stage(here), []
    for i in range(5):
        batch = stage.batches[i]
        assert batch.rows.tokens.shape == batch.reference_logprobs.shape == (4, 64)
        assert stage.weight(batch) == 1 / dpo.num_pairs(batch.rows)
        for row in range(4):
            segments = batch.rows.segments[row]
            sides = []
            for segment in range(1, segments.max() + 1):
                mine = segments == segment
                sides.append(batch.rows.tokens[row, mine].tobytes())
                reference = batch.reference_logprobs[row, mine & batch.rows.loss_mask[row]]
                np.testing.assert_allclose(reference, alone[sides[-1]], atol=1e-5)
            found += zip(sides[::2], sides[1::2], strict=True)
    assert set(found) == expected and len(found) >= 11
    ends = [example.tokens[-1] == here.chat.end_ids[0] for sides in pairs for example in sides]
    assert ends == [end for i in range(11) for end in (True, i % 3 != 1)]


def test_the_start_reads_no_more_rows_than_are_trained_on(start, tmp_path, monkeypatch):
    miniature.prepare(monkeypatch)
    found, whole = [], dpo._reference
    monkeypatch.setattr(dpo, "_reference", lambda *args: found.append(args[2]) or whole(*args))
    for steps, rows, expected in ((1, 2, 2), (7, 4, None)):
        config = config_of(start, **{"sft.steps": steps, "sft.rows": rows, "sft.micro_rows": rows})
        pipeline.prepare_workdir(config, tmp_path / str(steps))
        here = setup.build(config, tmp_path / str(steps))
        stage = dpo.stage(here)
        assert all(stage.batches[i].reference_logprobs.shape == (rows, 64) for i in range(steps))
        assert len(found[-1]) == (expected or len({row[0] for row in found[-1]}))
    assert len(found[1]) > 2


def test_it_learns_to_prefer_and_resumes_bit_for_bit(here, start, tmp_path):
    with StopRequest() as stop:
        whole = jax.device_get(supervised.train(here, dpo.stage(here), stop))
    rows = [json.loads(line) for line in (here.workdir / "dpo_metrics.jsonl").read_text().splitlines()]
    assert rows[0]["loss"] == pytest.approx(np.log(2), abs=1e-6) and rows[0]["accuracy"] <= 1
    assert rows[-1]["loss"] < 0.3 * rows[0]["loss"] and rows[-1]["accuracy"] == 1
    assert rows[-1]["chosen_reward"] > rows[-1]["rejected_reward"]

    config = config_of(start)
    pipeline.prepare_workdir(config, tmp_path / "again")
    again = setup.build(config, tmp_path / "again")

    class Stop(StopRequest):
        def requested_at(self, step):
            return step == 3

    with Stop() as stop, pytest.raises(Interrupted):
        supervised.train(again, dpo.stage(again), stop)
    again = setup.build(config, tmp_path / "again")
    with StopRequest() as stop:
        resumed = jax.device_get(supervised.train(again, dpo.stage(again), stop))
    jax.tree.map(np.testing.assert_array_equal, resumed, whole)


def test_alpha_keeps_the_chosen_answers_likely(start, tmp_path, monkeypatch):
    miniature.prepare(monkeypatch)
    found = {}
    for alpha in (0.0, 2.0):
        config = config_of(start, **{"dpo.alpha": alpha})
        pipeline.prepare_workdir(config, tmp_path / str(alpha))
        here = setup.build(config, tmp_path / str(alpha))
        with StopRequest() as stop:
            supervised.train(here, dpo.stage(here), stop)
        lines = (here.workdir / "dpo_metrics.jsonl").read_text().splitlines()
        found[alpha] = [json.loads(line) for line in lines]
    first, last = ({alpha: rows[i] for alpha, rows in found.items()} for i in (0, -1))
    assert first[2.0]["chosen_nll"] == first[0.0]["chosen_nll"] > 0
    assert first[2.0]["loss"] == pytest.approx(first[0.0]["loss"] + 2 * first[0.0]["chosen_nll"], rel=1e-6)
    assert last[2.0]["chosen_nll"] < 0.8 * last[0.0]["chosen_nll"] and last[2.0]["accuracy"] == 1


def test_sides_that_become_the_same_tokens_are_refused(here):
    path = pathlib.Path(here.config.dpo.pairs)
    record = json.loads(path.read_text().splitlines()[0])
    alike = here.workdir / "alike.jsonl"
    alike.write_text(json.dumps(record | {"rejected": record["chosen"]}))
    here.config.dpo.pairs = str(alike)
    with pytest.raises(ValueError, match="alike.jsonl, line 1: .*same text"):
        dpo.stage(here)


def test_a_pair_that_no_row_can_hold_is_named(here):
    record = json.loads(pathlib.Path(here.config.dpo.pairs).read_text().splitlines()[3])
    long = here.workdir / "long.jsonl"
    long.write_text(json.dumps(record | {"rejected": "1 " * 40}))
    here.config.dpo.pairs = str(long)
    told = rf"long.jsonl: pair '{re.escape(record['id'])}' has \d+ tokens on its two sides.*config.rows.tokens=64"
    with pytest.raises(ValueError, match=told):
        dpo.stage(here)


@pytest.mark.parametrize(
    "changes, told",
    [
        ({"init": None}, "needs a policy to begin with"),
        ({"dpo.beta": 0.0}, "dpo.beta=0.0 must be positive"),
        ({"dpo.alpha": -0.5}, "dpo.alpha=-0.5 must not be negative"),
        ({"sft.steps": 0, "rl.iterations": 1}, "sft.steps=0 .*must be positive"),
        ({"reward_model.kind": "chain_of_thought"}, "drop config.data.mixture and reward_model.kind"),
    ],
)
def test_configs_that_cannot_be(start, changes, told):
    with pytest.raises(ValueError, match=told):
        config_of(start, **changes)
