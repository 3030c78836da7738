"""Reward models of a few updates: what they read, that training cannot see the answer, and their way into RL."""

import dataclasses
import functools
import json
import re

import jax
import numpy as np
import pytest

from kimi_jax.models.policy import Policy
from kimi_jax.rewards.judges import ClassicJudge, CoTJudge
from kimi_jax.trainers import pipeline, reward_models, rl, setup
from kimi_jax.types import Outcome, Problem, Verdict
from tests.trainers import miniature, riddles

pytestmark = pytest.mark.slow

TEXT = {"data.image_tasks": (), "rows.patches": 0, "sampling.prompt_patches": 0}
CHANGES = TEXT | {
    "data.text_tasks": ("equivalence",),
    "data.train_per_kind": 53,
    "data.heldout_per_kind": 23,
    "sft.examples_per_kind": 53,
    "sft.steps": 3,
    "sft.rows": 8,
    "rows.tokens": 192,
    "rows.logits_chunk": 192,
    "sampling.prompt_tokens": 101,
    "sampling.max_tokens": 13,
}
CLASSIC = {"reward_model.kind": "classic", "model.scalar_head": True}


def config_of(**changes):
    config = miniature.get_config()
    config.update_from_flattened_dict(changes)
    return config


@pytest.fixture(scope="module", autouse=True)
def quick():
    with pytest.MonkeyPatch.context() as patch:
        miniature.prepare(patch)
        yield


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """{kind: (workdir, summary)}"""
    found = {}
    for kind, changes in (("classic", CLASSIC), ("chain_of_thought", {"reward_model.kind": "chain_of_thought"})):
        workdir = tmp_path_factory.mktemp(kind)
        found[kind] = workdir, pipeline.run(config_of(**CHANGES, **changes), workdir)
    return found


def one_device():
    return setup.sharding.make_mesh(data=1, fsdp=1, tensor=1)


@pytest.fixture(scope="module")
def judges(runs):
    return {kind: reward_models.load_judge(workdir, one_device(), votes=2) for kind, (workdir, _) in runs.items()}


@pytest.fixture(scope="module")
def here(runs):
    """The Setup of the classic run, and its final parameters as its judge has them."""
    workdir = runs["classic"][0]
    judge = reward_models.load_judge(workdir, one_device(), votes=1)
    return setup.build(config_of(**CHANGES, **CLASSIC), workdir), judge.score_fn.args[0]


TEXTS = [
    f"{i}+{j}=?\nReference: {i + j}\nResponse: Answer:{i + j}" for i, j in ((3, 4), (29, 17), (5, 5), (1, 11), (8, 9))
]


@pytest.mark.parametrize("kind", ["classic", "chain_of_thought"])
def test_what_a_run_says_of_itself(runs, kind):
    workdir, summary = runs[kind]
    assert summary["reward_model"] == kind and summary["heldout"]["n"] == 23
    assert json.loads((workdir / "summary.json").read_text()) == summary
    stage = {"classic": "rm", "chain_of_thought": "sft"}[kind]
    row = json.loads((workdir / f"{stage}_metrics.jsonl").read_text())
    assert row["step"] == 3 and row["loss"] > 0


def test_a_score_is_the_scalar_at_the_last_token_of_the_prompt_alone(here):
    made, params = here
    scores = reward_models.scorer(made)(params, TEXTS)
    scalars = jax.jit(Policy(made.policy.config).scalars)
    for text, score in list(zip(TEXTS, scores, strict=True))[:2]:
        tokens = made.chat.encode_prompt(text, ()).tokens
        rows = made.engine.prefill_arrays(len(tokens), False)[0]
        one = jax.tree.map(lambda x: np.array(x[:1]), rows)
        one.tokens[0], one.positions[0], one.segments[0] = tokens, np.arange(len(tokens)), 1
        assert score == pytest.approx(float(scalars(params, one)[0, -1]), rel=1e-4, abs=1e-5)
    assert len(set(scores.tolist())) == len(TEXTS)


def test_the_label_cannot_be_seen_where_it_is_learnt(here):
    made, params = here
    rows = reward_models.classic(made).batches[0].rows
    assert rows.loss_mask.any() and set(rows.targets[rows.loss_mask].tolist()) == {0, 1}
    shown = rows.tokens.copy()
    places = np.argwhere(rows.loss_mask) + [0, 1]  # where the label stands as a token
    assert (shown[tuple(places.T)] == rows.targets[rows.loss_mask]).all()
    shown[tuple(places.T)] = 1 - shown[tuple(places.T)]
    scalars = jax.jit(made.policy.scalars)
    flipped = dataclasses.replace(rows, tokens=shown)
    before, after = (np.asarray(scalars(params, jax.tree.map(np.asarray, r))) for r in (rows, flipped))
    np.testing.assert_array_equal(before[rows.loss_mask], after[rows.loss_mask])
    assert not np.array_equal(before, after)


def test_labels_are_those_of_the_prompts(here):
    made, _ = here
    rows = reward_models.classic(made).batches[1].rows
    truth = {problem.prompt: problem.answer for problem in made.train}
    for row, position in np.argwhere(rows.loss_mask):
        own = rows.tokens[row][rows.segments[row] == rows.segments[row, position]]
        assert rows.targets[row, position] == (truth[made.chat.tokenizer.decode(own[:-1])] == "true")


def test_pairs_stay_together_and_their_loss_falls(here):
    made, _ = here
    config = config_of(**CHANGES, **CLASSIC, **{"reward_model.objective": "pairs"})
    stage = reward_models.classic(dataclasses.replace(made, config=config))
    rows = stage.batches[0].rows
    for segments, mask, labels in zip(rows.segments, rows.loss_mask, rows.targets, strict=True):
        number = (segments[mask] - 1) // 2
        assert np.bincount(number).tolist() == [2] * (len(number) // 2)
        assert (labels[mask].reshape(-1, 2) == [1, 0]).all()
    stepper = made.stepper(stage.loss_fn, config.sft.optimizer, 20, "scalars")
    params = made.init_params()
    state = made.new_state(params, stepper.init_optimizer(params))
    batch, hyper = made.put_rows(stage.batches[0]), {"weight": np.float32(stage.weight(stage.batches[0]))}
    losses = []
    for _ in range(9):
        acc = stepper.accumulate(None, state.params, batch, hyper)
        state, metrics = stepper.apply(state, acc)
        losses.append(float(metrics["loss"]))
    assert losses[0] == pytest.approx(np.log(2), abs=0.3) and losses[-1] < losses[0] - 0.02
    assert metrics["pairs"] * 2 == metrics["tokens"] == rows.loss_mask.sum()


def test_without_a_pair_there_is_no_accuracy_of_pairs():
    score = lambda texts: np.array([len(text) for text in texts], float)  # noqa: E731
    right, wrong = (
        Problem("p", "equivalence", prompt, answer) for prompt, answer in (("long", "true"), ("x", "false"))
    )
    assert reward_models.pair_accuracy(score, [right, wrong]) == {"accuracy": 1.0, "n": 1}
    found = reward_models.pair_accuracy(score, [right, right])
    assert np.isnan(found["accuracy"]) and found["n"] == 0


def test_a_response_is_judged_alike_beside_whatever_it_is_judged(judges):
    for judge in judges.values():
        again = [judge.read(TEXTS[i : i + 1])[0] for i in range(len(TEXTS))]
        backwards = judge.read([TEXTS[0], *TEXTS[::-1]])
        first = judge.read(TEXTS)
        assert [v.outcome for v in first] == [v.outcome for v in again] == [v.outcome for v in backwards[:0:-1]]
        assert backwards[0] == backwards[-1]


def test_votes_differ_and_repeat(judges):
    write = judges["chain_of_thought"].generate_fn
    assert write(TEXTS, 3) == write(TEXTS, 3)
    assert [own[:2] for own in write(TEXTS, 3)] == write(TEXTS, 2)


def test_what_is_too_long_to_read_is_ungradable(judges):
    for judge in judges.values():
        short, long = Problem("", "", "1+1=?", "2"), Problem("", "", "1+1=?" * 99, "2")
        verdicts = judge([(long, "Answer:2"), (short, "Answer:2" * 99)])
        assert {verdict.outcome for verdict in verdicts} == {Outcome.UNGRADABLE}


def test_judges_have_the_kind_that_was_trained(judges):
    assert isinstance(judges["classic"], ClassicJudge) and isinstance(judges["chain_of_thought"], CoTJudge)
    assert judges["chain_of_thought"].votes == 2


def damaged(tmp_path, **changes):
    (tmp_path / "config.json").write_text(config_of(**CHANGES, **changes).to_json_best_effort())
    return tmp_path


def test_a_judge_that_is_none_is_refused_with_its_reason(tmp_path):
    load = functools.partial(reward_models.load_judge, mesh=one_device(), votes=1)
    with pytest.raises(FileNotFoundError, match="(?s)nowhere' must be the workdir of a reward model.*no config.json"):
        load(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="what was trained there is a policy"):
        load(damaged(tmp_path))
    with pytest.raises(ValueError, match="no score is the border"):
        load(damaged(tmp_path, **CLASSIC, **{"reward_model.objective": "pairs"}))
    with pytest.raises(FileNotFoundError, match="no checkpoint yet"):
        load(damaged(tmp_path, **CLASSIC))


def test_problems_that_are_no_judgements_are_refused(tmp_path):
    with pytest.raises(ValueError, match="(?s)'true' or 'false'.*equivalence"):
        pipeline.run(config_of(**TEXT, **CLASSIC), tmp_path)


def even(text):
    return len(re.sub(r"\s", "", text)) % 2 == 0


def test_in_rl_the_judge_rewards_and_the_verifier_is_logged(tmp_path, monkeypatch):
    """A judge that cares for nothing but the length of the text."""
    judged = lambda text: Verdict(Outcome.CORRECT if even(text) else Outcome.WRONG, "judged")  # noqa: E731
    judge = lambda responses: [judged(text) for _, text in responses]  # noqa: E731
    asked = []
    monkeypatch.setattr(reward_models, "load_judge", lambda *args, **kwargs: asked.append((args, kwargs)) or judge)
    config = config_of(**TEXT, **{"sft.steps": 1, "rl.iterations": 2, "rewards.weights.length": 0.0})
    config.rewards.verifiers = (f"chain={riddles.__name__}:verify",)
    config.rewards.judge, config.rewards.votes, config.rewards.workers = "the/judge", 3, 0
    pipeline.run(config, tmp_path)
    assert [(str(args[0]), kwargs) for args, kwargs in asked] == [("the/judge", {"votes": 3})]
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    records = [json.loads(line) for line in (tmp_path / "verdicts.jsonl").read_text().splitlines()]
    ruled = []
    for row in rows:
        own = [record for record in records if record["step"] == row["step"]]
        problems = [(Problem(r["problem"], r["task"], r["prompt"], r["answer"]), r["response"]) for r in own]
        assert all(record["detail"] == "judged" for record in own)
        assert row["accuracy"] == pytest.approx(np.mean([even(text) for _, text in problems]))
        ruled += (own := [riddles.verify(*question).outcome == Outcome.CORRECT for question in problems])
        assert row["accuracy_rule"] == pytest.approx(np.mean(own))
        assert row["seconds_judge"] >= 0
    assert 0 < np.mean(ruled) < 1


def test_the_policy_judges_with_the_weights_that_wrote(tmp_path, monkeypatch):
    handed_over, judged_with, really = [], [], rl.collect

    def collect(*args, params, **kwargs):
        handed_over.append(jax.device_get(params))
        return really(*args, params=params, **kwargs)

    def judgements(here, params, texts, votes):
        judged_with.append(jax.device_get(params))
        assert all(text.partition("\nReference: ")[2] for text in texts) and votes == 3
        return [[f'so\n{{"correct": {str(even(text)).lower()}}}'] * 2 + ["hm"] for text in texts]

    monkeypatch.setattr(rl, "collect", collect)
    monkeypatch.setattr(reward_models, "judgements", judgements)
    config = config_of(**TEXT, **{"sft.steps": 1, "rl.iterations": 2})
    config.rewards.judge, config.rewards.votes, config.rewards.workers = "policy", 3, 0
    pipeline.run(config, tmp_path)
    jax.tree.map(np.testing.assert_array_equal, judged_with, handed_over)
    first, second = (np.concatenate([leaf.ravel() for leaf in jax.tree.leaves(copy)]) for copy in judged_with)
    assert (first != second).any()
    records = [json.loads(line) for line in (tmp_path / "verdicts.jsonl").read_text().splitlines()]
    assert {record["outcome"] for record in records} == {"correct", "wrong"}
    assert all("of 3 votes" in record["detail"] for record in records)
