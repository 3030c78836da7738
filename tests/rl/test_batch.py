"""From judged groups to micro-batches, read back response by response; and the log-probs of sampler and trainer."""

import dataclasses

import jax
import numpy as np
import pytest

from kimi_jax.models.policy import Policy
from kimi_jax.rl.batch import build_minibatches
from kimi_jax.sampling.logits import SamplingSettings
from kimi_jax.training import optim
from kimi_jax.types import Problem, Rollout, RolloutGroup, StopReason
from tests.helpers import (
    CONFIG,
    PACKING,
    make_engine,
    random_groups,
    random_params,
    random_prompts,
    random_rewards,
    rl_stepper,
    sampling_params,
)

SHAPE = dict(rows=3, row_tokens=41, row_patches=32, responses=7, oldest_version=0, **PACKING)


def read_back(batch):
    """{(version of the first token, response tokens): facts} of every response that a micro-batch weighs."""
    found = {}
    assert not (batch.response[~batch.rows.loss_mask]).any()
    for n in range(len(batch.weights)):
        here = batch.rows.loss_mask & (batch.response == n)
        if not batch.weights[n]:
            assert not here.any() and batch.lengths[n] == 1
            continue
        (row,) = set(np.nonzero(here)[0])
        columns = np.flatnonzero(here[row])
        np.testing.assert_array_equal(np.diff(columns), 1)
        np.testing.assert_array_equal(batch.rows.targets[row, columns], batch.rows.tokens[row, columns + 1])
        segment = batch.rows.segments[row, columns[0]]
        whole = batch.rows.tokens[row, batch.rows.segments[row] == segment]
        found[batch.versions[row, columns[0]], tuple(batch.rows.targets[row, columns])] = dict(
            prompt=tuple(whole[: -len(columns)]),
            behavior=batch.behavior_logprobs[row, columns],
            versions=batch.versions[row, columns],
            image_tokens=int(np.sum(batch.rows.image_index[row, batch.rows.segments[row] == segment] >= 0)),
            **{name: getattr(batch, name)[n] for name in ("rewards", "advantages", "weights", "lengths", "group")},
        )
    return found


@pytest.mark.smoke
@pytest.mark.parametrize("minibatches", [1, 2, 3])
def test_every_gradable_response_is_there_once_with_its_facts(minibatches):
    groups = random_groups(0, (2, 3, 5, 4, 2, 3, 5))
    rewards, advantages = random_rewards(1, groups)
    for i, j in [(1, 2), (4, 0), (6, 0), (6, 1), (6, 3), (6, 4)]:  # ungradable; groups 4 and 6 keep only one
        rewards[i][j] = advantages[i][j] = np.nan
    kept = [0, 1, 2, 3, 5]
    batches = build_minibatches(groups, rewards, advantages, minibatches=minibatches, **SHAPE)
    assert len(batches) == minibatches
    for m, minibatch in enumerate(batches):
        members = kept[m::minibatches]
        found = {}
        for batch in minibatch:
            assert batch.rows.tokens.shape == (3, 41) and batch.rows.patches.shape == (3, 32, 27)
            assert batch.weights.shape == (7,) and np.isnan(batch.reference_logprobs).all()
            part = read_back(batch)
            assert part and not part.keys() & found.keys()
            found |= part
        assert sum(facts["weights"] for facts in found.values()) == pytest.approx(1, abs=1e-6)
        expected = {}
        for place, i in enumerate(members):
            gradable = np.flatnonzero(np.isfinite(rewards[i]))
            for j in gradable:
                rollout = groups[i].rollouts[j]
                expected[i + 3, tuple(rollout.tokens)] = dict(
                    prompt=tuple(groups[i].prompt.tokens),
                    behavior=rollout.logprobs,
                    versions=rollout.versions,
                    image_tokens=sum(image.num_tokens for image in groups[i].prompt.images),
                    rewards=rewards[i][j],
                    advantages=advantages[i][j],
                    weights=1 / (len(gradable) * len(members)),
                    lengths=len(rollout.tokens),
                    group=place,
                )
        assert found.keys() == expected.keys()
        for key, facts in expected.items():
            assert found[key]["prompt"] == facts["prompt"]
            for name, value in facts.items():
                np.testing.assert_allclose(found[key][name], value, rtol=1e-6, err_msg=name)


@pytest.mark.parametrize("responses", [1, 2, 5])
def test_rows_of_short_responses_never_exceed_the_capacity(responses):
    groups = random_groups(2, (11, 7), max_response=2)
    rewards, advantages = random_rewards(3, groups)
    # Where a row holds many responses, group and version do not tell them apart, but the reward does.
    (minibatch,) = build_minibatches(
        groups, rewards, advantages, minibatches=1, **SHAPE | dict(row_tokens=101, responses=responses)
    )
    for batch in minibatch:
        assert batch.rows.tokens.shape == (3, 101) and batch.weights.shape == (responses,)
        assert batch.rows.loss_mask.any()
    found = np.concatenate([batch.rewards[batch.weights > 0] for batch in minibatch])
    np.testing.assert_allclose(np.sort(found), np.sort(np.concatenate(rewards)), rtol=1e-6)


def test_without_enough_groups_some_mini_batches_are_empty():
    groups = random_groups(4, (2, 2))
    rewards, advantages = random_rewards(5, groups)
    rewards[0][0] = np.nan
    batches = build_minibatches(groups, rewards, advantages, minibatches=3, **SHAPE)
    assert [len(minibatch) for minibatch in batches] == [1, 0, 0]
    assert build_minibatches([], [], [], minibatches=2, **SHAPE) == [[], []]


def test_a_response_that_no_row_can_hold_is_refused():
    groups = random_groups(6, (2,))
    rewards, advantages = random_rewards(7, groups)
    with pytest.raises(ValueError, match="a row holds row_tokens=5; raise row_tokens"):
        build_minibatches(groups, rewards, advantages, minibatches=1, **SHAPE | dict(row_tokens=5))


@pytest.fixture(scope="module")
def score():
    """The log-probs of the trainer."""
    return rl_stepper(Policy(CONFIG), optimizer=optim.sgd(), rate=0.0).score


@pytest.mark.parametrize("temperature", [1.0, 0.7, 0.0])
def test_trainer_and_sampler_agree_on_the_log_probs_of_what_was_sampled(score, temperature):
    masters = random_params(CONFIG)
    engine, prompts = make_engine(), random_prompts()
    settings = SamplingSettings.of(temperature=temperature, end_ids=[7, 41])
    draws = dict(k=2, first_serial=0, run_key=jax.random.key(5), policy_version=0)
    rollouts = engine.generate(sampling_params(masters), prompts, settings=settings, **draws)
    problem = Problem(id="p", task="none", prompt="", answer="")
    groups = [RolloutGroup(problem, prompt, group) for prompt, group in zip(prompts, rollouts, strict=True)]
    rewards, advantages = random_rewards(0, groups)
    total = sum(len(rollout) for group in rollouts for rollout in group)
    at_temperature = np.float32(temperature or 1.0)  # of greedy tokens, the log-prob of temperature 1
    for shape in (
        dict(rows=3, row_tokens=64, row_patches=64, responses=12),  # several to a row
        dict(rows=1, row_tokens=32, row_patches=32, responses=1),  # one to a row
    ):
        shape |= dict(oldest_version=0, **PACKING)
        (minibatch,) = build_minibatches(groups, rewards, advantages, minibatches=1, **shape)
        for batch in minibatch:
            mask = batch.rows.loss_mask
            trainer = np.asarray(score(masters, batch.rows, at_temperature))
            np.testing.assert_allclose(trainer[mask], batch.behavior_logprobs[mask], atol=1e-5)
        assert sum(batch.rows.loss_mask.sum() for batch in minibatch) == total
    assert np.ptp([len(r) for group in rollouts for r in group]) > 3


@pytest.mark.parametrize("oldest, trained", [(0, 11), (2, 11), (3, 7), (4, 4), (6, 0)])
def test_tokens_of_old_versions_carry_no_loss_but_keep_their_place(oldest, trained):
    """One response was written over three iterations, two of which may be too long ago (k1.5 §2.6.2)."""
    groups = random_groups(8, (3, 2))
    rng = np.random.default_rng(8)
    versions = np.repeat([2, 3, 5], [4, 3, 4]).astype(np.int32)
    mixed = Rollout(
        serial=1,
        tokens=rng.integers(6, CONFIG.vocab_size, 11).astype(np.int32),
        logprobs=-rng.exponential(size=11).astype(np.float32),
        versions=versions,
        stop=StopReason.END,
    )
    groups[0] = dataclasses.replace(groups[0], rollouts=(groups[0].rollouts[0], mixed, groups[0].rollouts[2]))
    rewards, advantages = random_rewards(9, groups)
    (minibatch,) = build_minibatches(groups, rewards, advantages, minibatches=1, **SHAPE | dict(oldest_version=oldest))
    found = 0
    for batch in minibatch:
        for n in np.flatnonzero(np.isclose(batch.rewards, rewards[0][1]) & (batch.weights > 0)):
            # Length, weight and advantage are those of the whole response, and it is read whole.
            assert batch.lengths[n] == 11 and batch.weights[n] == pytest.approx(1 / 6)
            assert batch.advantages[n] == pytest.approx(advantages[0][1])
            (row, first), *_ = np.argwhere(batch.behavior_logprobs == mixed.logprobs[0])
            here = (row, slice(first, first + 11))
            np.testing.assert_array_equal(batch.rows.targets[here], mixed.tokens)
            np.testing.assert_array_equal(batch.versions[here], versions)
            np.testing.assert_array_equal(batch.behavior_logprobs[here], mixed.logprobs)
            np.testing.assert_array_equal(batch.rows.loss_mask[here], versions >= oldest)
            assert (batch.response[here][versions >= oldest] == n).all()
            found += batch.rows.loss_mask[here].sum()
        assert (batch.versions[batch.rows.loss_mask] >= oldest).all()
    assert found == trained
