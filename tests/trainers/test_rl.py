"""One run of the loop with partial rollouts, a judge that hangs now and then, and a penalty on repetition, looked at
from all sides: what went into each update, and what was logged, against what the responses themselves say.
"""

import dataclasses
import json
import pathlib
import shutil
import types
from typing import Any

import jax
import numpy as np
import pytest

from kimi_jax import tasks
from kimi_jax.rewards import audit
from kimi_jax.rewards.components import shaped_rewards
from kimi_jax.tasks.base import make_problems
from kimi_jax.trainers import pipeline, rl, setup
from kimi_jax.trainers.interrupt import StopRequest
from kimi_jax.training.checkpoint import Checkpointer
from kimi_jax.types import Outcome, StopReason, Verdict
from scripts import replay_verdicts
from tests.trainers import miniature, stubborn_judge

pytestmark = pytest.mark.slow

LAG, PENALTY = 1, 0.3
CHANGES = {
    "data.image_tasks": (),
    "rows.patches": 0,
    "sampling.prompt_patches": 0,
    "sampling.repetition.window": 5,
    "sampling.repetition.min_tokens": 1,
    "sampling.repetition.repeats": 2,
    "rl.iterations": 6,
    "rl.eval_every": 4,
    "rl.eval_problems": 3,
    "rl.segment_tokens": 10,
    "rl.max_segment_lag": LAG,
    "rewards.weights.repetition": PENALTY,
    "rl.permute_advantages": False,
    "rewards.workers": 1,
    "rewards.verifiers": (f"chain={stubborn_judge.__name__}:verify",),
    "rewards.deadline_s": 1.5,
}


@dataclasses.dataclass
class Iteration:
    """What was handed from one part of the loop to the next."""

    groups: list = dataclasses.field(default_factory=list)
    waiting: list = dataclasses.field(default_factory=list)  # (group, response) of the buffer after the rollout
    copies: list = dataclasses.field(default_factory=list)  # previous rollout copies that hand-overs were given
    rewards: list = dataclasses.field(default_factory=list)
    minibatches: list = dataclasses.field(default_factory=list)
    before: Any = None  # parameters
    after: Any = None
    metrics: dict = dataclasses.field(default_factory=dict)

    @property
    def responses(self):
        """(group, its place among the groups, response, its verdict, its reward) of all that were released."""
        for g, group in enumerate(self.groups):
            for rollout, verdict, reward in zip(group.rollouts, group.verdicts, self.rewards[g], strict=True):
                yield group, g, rollout, verdict, reward


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(the run's Setup, its first parameters, what happened in each iteration)"""
    workdir, seen = tmp_path_factory.mktemp("run"), []

    def spy(name, note):
        function = getattr(rl, name)

        def call(*args, **kwargs):
            result = function(*args, **kwargs)
            note(args, kwargs, result)
            return result

        patch.setattr(rl, name, call)

    def collected(args, kwargs, result):
        seen.append(Iteration(groups=result.groups))
        seen[-1].waiting = [(group, r) for group in args[0].groups for r in group.responses if r.stop]
        seen[-1].copies = [handed_over.pop() for _ in range(len(handed_over))]

    def built(args, kwargs, result):
        seen[-1].rewards, seen[-1].minibatches = args[1], result

    with pytest.MonkeyPatch.context() as patch:
        miniature.prepare(patch)
        config = miniature.get_config()
        config.update_from_flattened_dict(CHANGES)
        pipeline.prepare_workdir(config, workdir)
        here = setup.build(config, workdir)
        handed_over, to_rollout = [], here.to_rollout

        def hand_over(params, previous):
            handed_over.append(previous)
            return to_rollout(params, previous)

        here = dataclasses.replace(here, to_rollout=hand_over)
        spy("collect", collected)
        spy("build_minibatches", built)
        update = rl._update

        def watched(setup, stepper, state, *rest):
            seen[-1].before = jax.device_get(state.params)
            state, metrics = update(setup, stepper, state, *rest)
            seen[-1].after = jax.device_get(state.params)
            return state, metrics

        patch.setattr(rl, "_update", watched)
        with StopRequest() as stop:
            rl.train(here, here.init_params(), stop)
        rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
        for iteration, row in zip(seen, rows, strict=True):
            iteration.metrics = row
        yield here, list(seen)  # as it is now: the spies stay


def share(values) -> float:
    return float(np.mean(list(values)))


def with_groups(run) -> list[Iteration]:
    return [iteration for iteration in run[1] if iteration.groups]


def test_an_iteration_without_a_complete_group_changes_nothing_and_the_run_goes_on(run):
    _, seen = run
    assert len(seen) == 6 and not seen[0].groups and sum(bool(iteration.groups) for iteration in seen) >= 3
    for iteration in seen:
        same = jax.tree.map(lambda a, b: bool((a == b).all()), iteration.before, iteration.after)
        assert all(jax.tree.leaves(same)) == (not iteration.groups)
        assert iteration.metrics["groups"] == len(iteration.groups)
        assert (iteration.metrics["updates"] > 0) == bool(iteration.groups)
        for name in ("learning_rate", "entropy", "kl", "logprob_gap", "max_log_ratio", "grad_norm", "staleness"):
            assert (iteration.metrics[name] is None) == (not iteration.groups), name
    nothing = ("accuracy", "accuracy_text", "reward", "response_length", "truncated", "repetitive", "ungradable")
    assert all(seen[0].metrics[name] is None for name in (*nothing, "tokens_masked", "responses_masked"))
    assert seen[0].metrics["buffer_groups"] == 6 and seen[0].metrics["seconds_rollout"] > 0


def test_a_response_whose_judge_never_returns_is_left_out_and_no_other(run):
    hung = 0
    for iteration in with_groups(run):
        gradable = 0
        for group, g, rollout, verdict, reward in iteration.responses:
            hangs = stubborn_judge.hangs(group.problem, rollout.text)
            assert (verdict.outcome == Outcome.UNGRADABLE) == hangs == np.isnan(reward)
            gradable += not hangs and np.isfinite(iteration.rewards[g]).sum() >= 2
            hung += hangs
        batches = [batch for minibatch in iteration.minibatches for batch in minibatch]
        assert sum((batch.weights > 0).sum() for batch in batches) == gradable > 0
        for minibatch in iteration.minibatches:
            assert not minibatch or sum(batch.weights.sum() for batch in minibatch) == pytest.approx(1)
        ungradable = [verdict.outcome == Outcome.UNGRADABLE for _, _, _, verdict, _ in iteration.responses]
        assert iteration.metrics["ungradable"] == pytest.approx(share(ungradable))
    assert hung > 0


def test_missed_deadlines_are_counted_in_the_iteration_that_missed_them(run):
    """Those of released responses by then; those of others when their time is up, for which nobody waits."""
    here, seen = run
    released, finished, missed = set(), set(), 0
    for iteration in seen:
        hung = lambda problem, text: stubborn_judge.hangs(problem, text)  # noqa: E731
        released |= {r.serial for group, _, r, _, _ in iteration.responses if hung(group.problem, r.text)}
        finished |= released | {
            r.serial
            for group, r in iteration.waiting
            if hung(here.train[group.problem], here.engine.decode_text(r.tokens))
        }
        missed += iteration.metrics["missed_deadlines"]
        assert len(released) <= missed <= len(finished)
    assert missed


def test_the_penalty_on_repetition_reaches_the_reward(run):
    repetitive = 0
    for iteration in with_groups(run):
        for group, rewards in zip(iteration.groups, iteration.rewards, strict=True):
            shaped, _ = shaped_rewards(group, {"length": 1.0})
            stopped = np.array([rollout.stop == StopReason.REPETITION for rollout in group.rollouts])
            np.testing.assert_allclose(rewards, np.where(stopped, shaped - PENALTY, shaped), rtol=1e-12)
            repetitive += stopped.sum()
            for rollout in group.rollouts:  # two equal tokens at its end, and none before
                again = np.flatnonzero(rollout.tokens[1:] == rollout.tokens[:-1])
                if rollout.stop != StopReason.REPETITION:
                    assert not again.size
        stops = [rollout.stop == StopReason.REPETITION for _, _, rollout, _, _ in iteration.responses]
        assert iteration.metrics["repetitive"] == pytest.approx(share(stops))
        rewards = [reward for *_, reward in iteration.responses if np.isfinite(reward)]
        assert iteration.metrics["reward"] == pytest.approx(share(rewards))
    assert repetitive > 0


def test_old_tokens_carry_no_loss_and_the_metrics_say_how_many(run):
    here, _ = run
    masked_ever = 0
    for iteration in with_groups(run):
        now = iteration.metrics["iteration"] - 1
        ages = [now - rollout.versions for _, _, rollout, _, _ in iteration.responses]
        old = [age > LAG for age in ages]
        assert iteration.metrics["staleness"] == pytest.approx(share(np.concatenate(ages)))
        assert iteration.metrics["tokens_masked"] == pytest.approx(share(np.concatenate(old)))
        assert iteration.metrics["responses_masked"] == pytest.approx(share(mask.all() for mask in old))
        trained = [
            (token, version)
            for (_, g, rollout, _, reward), mask in zip(iteration.responses, old, strict=True)
            if np.isfinite(reward) and np.isfinite(iteration.rewards[g]).sum() >= 2
            for token, version in zip(rollout.tokens[~mask].tolist(), rollout.versions[~mask].tolist(), strict=True)
        ]
        found = []
        for batch in [batch for minibatch in iteration.minibatches for batch in minibatch]:
            mask = batch.rows.loss_mask
            found += zip(batch.rows.targets[mask].tolist(), batch.versions[mask].tolist(), strict=True)
        assert sorted(found) == sorted(trained)
        masked_ever += sum(mask.sum() for mask in old)
        lengths = [len(rollout) for _, _, rollout, _, _ in iteration.responses]
        assert max(lengths) <= here.config.sampling.max_tokens
        assert iteration.metrics["response_length"] == pytest.approx(share(lengths))
    assert masked_ever > 0
    # As long as weights do not change, an old token is no reason for a gap between sampler and trainer.
    gaps = [iteration.metrics["max_logprob_gap"] for iteration in with_groups(run)]
    assert gaps[0] < 1e-4 < max(gaps)


def test_there_is_never_more_than_one_rollout_copy(run):
    """Evaluations between iterations take the place of the old one as well."""
    _, seen = run
    assert [len(iteration.copies) for iteration in seen] == [1, 1, 1, 1, 2, 1]
    copies = [copy for iteration in seen for copy in iteration.copies]
    assert copies[0] is None and None not in copies[1:]


def test_what_is_usual_of_ungradable_responses_is_resumed(run, tmp_path, monkeypatch):
    here, seen = run
    shutil.copytree(here.workdir, tmp_path / "copy")
    config = here.config.copy_and_resolve_references()
    config.rl.iterations = 9

    class Asked(Exception):
        pass

    def rings(alarm, reasons, *, of):
        raise Asked(alarm.seen, alarm.mean)

    monkeypatch.setattr(audit.UngradableAlarm, "rings", rings)
    with StopRequest() as stop, pytest.raises(Asked) as asked:
        rl.train(dataclasses.replace(here, config=config, workdir=tmp_path / "copy"), here.init_params(), stop)
    shares = [iteration.metrics["ungradable"] for iteration in with_groups(run)]
    assert asked.value.args == (len(shares), pytest.approx(share(shares))) and share(shares) > 0


def contents(directory: pathlib.Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    "note, told",
    [
        ({"tokens": 1}, r"arrays differ.*buffer/tokens: checkpoint int32\[\d+\], expected int32\[1\]"),
        (None, r"notes tokens, responses and groups, not \[\].*another version.*empty --workdir"),
    ],
)
def test_a_replay_buffer_that_does_not_match_is_refused_and_nothing_is_lost(run, monkeypatch, note, told):
    here, _ = run
    before = contents(here.workdir)
    meta = Checkpointer.read_meta

    def read_meta(checkpoints):
        found = meta(checkpoints)
        buffer = found.pop("buffer")
        return found | {"buffer": buffer | note} if note else found

    monkeypatch.setattr(Checkpointer, "read_meta", read_meta)
    config = here.config.copy_and_resolve_references()
    config.rl.iterations = 9
    with StopRequest() as stop, pytest.raises(ValueError, match=f"(?s){told}"):
        rl.train(dataclasses.replace(here, config=config), here.init_params(), stop)
    assert contents(here.workdir) == before


def test_every_verdict_is_on_record_and_comes_out_the_same_when_judged_again(run):
    here, seen = run
    records = [json.loads(line) for line in (here.workdir / "verdicts.jsonl").read_text().splitlines()]
    expected = [
        (iteration.metrics["step"], rollout.serial, rollout.text, verdict.outcome.value)
        for iteration in seen
        for _, _, rollout, verdict, _ in iteration.responses
    ]
    assert [(r["step"], r["serial"], r["response"], r["outcome"]) for r in records] == expected
    gradable = [record for record in records if record["outcome"] != "ungradable"]
    again = [tasks.verify(*audit.question(record)) for record in gradable]
    assert len(gradable) < len(records) and audit.disagreements(gradable, again) == []
    one = next(record for record in gradable if record["outcome"] == "wrong")
    arguments = [f"--workdir={here.workdir}", f"--serial={one['serial']}"]
    assert replay_verdicts.main(arguments) == 0
    path = here.workdir / "verdicts.jsonl"
    lie = json.dumps(one | {"outcome": "correct"}) + "\n"
    path.write_text("".join(json.dumps(r) + "\n" for r in records if r is not one) + lie)
    assert replay_verdicts.main(arguments) == 1
    earned = [r["reward_correct"] + r["reward_length"] + PENALTY * r["reward_repetition"] for r in gradable]
    np.testing.assert_allclose([record["reward"] for record in gradable], earned, rtol=1e-12)
    for iteration in with_groups(run):
        of_it = [r["reward_length"] for r in gradable if r["step"] == iteration.metrics["step"]]
        assert iteration.metrics["reward_length"] == pytest.approx(share(of_it))


def test_what_is_measured_on_the_way_is_sampled_once_and_as_many_of_each_kind():
    drawn = {t: iter(make_problems(tasks.get_task(t), split="heldout", count=5, seed=0)) for t in ("chain", "pips")}
    heldout = [next(drawn[task]) for task in ("chain", "chain", "pips", "chain", "chain", "pips", "pips", "pips")]
    asked = []

    class Written(str):  # as long as it has tokens
        text = property(str)

    def generate(params, prompts, *, k, settings, **_):
        asked.append((prompts, k, float(settings.temperature)))
        return [(Written("x" * prompt),) for prompt in prompts]

    here = types.SimpleNamespace(
        heldout=heldout,
        config=types.SimpleNamespace(rl=types.SimpleNamespace(eval_problems=3)),
        engine=types.SimpleNamespace(generate=generate),
        prompts=lambda problems: [heldout.index(problem) + 1 for problem in problems],
        chat=types.SimpleNamespace(end_ids=(0,)),
        key=lambda stream: None,
        judge=lambda responses: [Verdict(Outcome.CORRECT if len(t) in (2, 6) else Outcome.WRONG) for _, t in responses],
    )
    found = rl._evaluate(here, {})
    assert asked == [([1, 2, 3, 4, 6, 7], 1, 1.0)]
    assert found == {
        **{"eval_text_accuracy": 1 / 3, "eval_text_tokens": 7 / 3},
        **{"eval_image_accuracy": 1 / 3, "eval_image_tokens": 16 / 3},
    }
