"""Rollout phases in a row. What they should give is known beforehand: on the `ledger` a response is a pure function of
its prompt and serial, so its whole text, and with it the chunk in which it ends, is there before anything is sampled.
"""

import functools
import itertools
import math
import zlib
from concurrent.futures import Future

import jax
import numpy as np
import pytest

from kimi_jax.rewards.components import shaped_rewards
from kimi_jax.rewards.pool import VerifierPool
from kimi_jax.rl.batch import build_minibatches
from kimi_jax.rl.replay_buffer import ReplayBuffer
from kimi_jax.rl.rollout import collect
from kimi_jax.sampling.engine import Engine
from kimi_jax.sampling.logits import SamplingSettings
from kimi_jax.sampling.repetition import RepetitionSettings
from kimi_jax.types import Outcome, Problem, Request, StopReason, Verdict
from tests.helpers import CONFIG, PACKING, make_engine, random_params, random_prompts, sampling_params
from tests.rewards.pool_judge import obey
from tests.sampling.ledger import Ledger, expected

K, MAX, CHUNK = 3, 23, 5
PROMPTS = random_prompts()
PROBLEMS = [Problem(id=f"problem {i}", task="none", prompt="", answer=str(i)) for i in range(len(PROMPTS))]
SHAPE = dict(rows=3, row_tokens=64, row_patches=32, responses=7, **PACKING)


def verdict(problem: Problem, text: str) -> Verdict:
    right = zlib.crc32(f"{problem.id} {text}".encode()) % 3 == 0
    return Verdict(Outcome.CORRECT if right else Outcome.WRONG, text)


def at_once(problem, text) -> Future:
    ticket = Future()
    ticket.set_result(verdict(problem, text))
    return ticket


@pytest.fixture(autouse=True)
def lengths_that_differ(monkeypatch):
    monkeypatch.setattr("tests.sampling.ledger.END", (7, 11, 19, 23, 29, 41))


@functools.cache
def whole(problem: int, serial: int) -> tuple[list[int], StopReason]:
    return expected(Request(PROMPTS[problem], serial, MAX))


@pytest.fixture
def engine(monkeypatch):
    engine = make_engine(rows=60, max_tokens=MAX, chunk=CHUNK)
    Ledger(engine).install(monkeypatch)
    return engine


@pytest.fixture
def requests(monkeypatch):
    """What the engine was asked for, per phase."""
    asked, start = [], Engine.start
    monkeypatch.setattr(
        Engine,
        "start",
        lambda engine, params, given, **kw: (asked.append(given), start(engine, params, given, **kw))[1],
    )
    return asked


def phase(buffer, new, *, engine, iteration, **changes):
    """The serials of iteration i begin at 100 i."""
    options = dict(params=None, run_key=None, settings=None, submit=at_once)
    options |= dict(segment_tokens=None, enough=None, max_age=None) | changes
    return collect(
        buffer, new, engine=engine, problems=PROBLEMS, prompts=PROMPTS, k=K, iteration=iteration,
        first_serial=100 * iteration, **options,
    )  # fmt: skip


def check(collected, *, cut_at=MAX):
    """Complete groups, each response as it is when nobody interrupts it, or cut."""
    for index, group in zip(collected.problems, collected.groups, strict=True):
        assert group.problem is PROBLEMS[index] and group.prompt is PROMPTS[index]
        serials = [rollout.serial for rollout in group.rollouts]
        assert serials == list(range(serials[0], serials[0] + K))
        for rollout, judged in zip(group.rollouts, group.verdicts, strict=True):
            tokens, stop = whole(index, rollout.serial)
            assert rollout.tokens.tolist() == tokens[:cut_at]
            assert rollout.stop == (stop if len(tokens) <= cut_at else StopReason.LENGTH)
            np.testing.assert_array_equal(rollout.logprobs, -np.array(rollout.tokens, np.float32))
            assert rollout.text == " ".join(map(str, rollout.tokens))
            assert judged == verdict(group.problem, rollout.text)
            assert rollout.tokens.dtype == rollout.versions.dtype == np.int32 and rollout.logprobs.dtype == np.float32


def first_serials(collected):
    return [group.rollouts[0].serial for group in collected.groups]


NEW = [[0, 1, 2], [3, 0], [], [4, 5, 1, 0]]  # some problems come again while they are still open


@pytest.mark.parametrize("segment_tokens", [1, 4, 5, 7, 22, 23, None])
def test_groups_come_when_they_are_complete_in_the_order_in_which_they_became_so(engine, requests, segment_tokens):
    buffer, open_groups = ReplayBuffer(), []  # the second: (serial of the first response, problem, born)
    grow = segment_tokens or MAX
    for iteration in itertools.count():
        new = NEW[iteration] if iteration < len(NEW) else []
        open_groups += [(100 * iteration + K * i, problem, iteration) for i, problem in enumerate(new)]
        if not (open_groups or iteration < len(NEW)):
            break
        collected = phase(buffer, new, engine=engine, iteration=iteration, segment_tokens=segment_tokens)
        check(collected)

        due = []
        for first, problem, born in open_groups:
            lengths = [len(whole(problem, first + j)[0]) for j in range(K)]
            before = grow * (iteration - born)
            left = [n - before for n in lengths if n > before]
            if max(left) <= grow:
                due.append((math.ceil(max(left) / CHUNK), first))
        assert first_serials(collected) == [first for _, first in sorted(due)]
        open_groups = [group for group in open_groups if group[0] not in first_serials(collected)]
        assert [(g.responses[0].serial, g.problem, g.born) for g in buffer.groups] == open_groups

        for group in collected.groups:
            for rollout in group.rollouts:  # the versions mark the segments
                segments = rollout.serial // 100 + np.arange(len(rollout)) // grow
                np.testing.assert_array_equal(rollout.versions, segments)
        for request in requests[-1]:
            assert request.budget == min(grow, MAX - len(request.prefix))
        assert [request.serial for request in requests[-1]] == sorted(request.serial for request in requests[-1])
        check_metrics(collected, buffer, iteration)
    assert iteration == (len(NEW) if grow == MAX else len(NEW) - 1 + math.ceil(MAX / grow))


def check_metrics(collected, buffer, iteration):
    metrics, rollouts = collected.metrics, [r for group in collected.groups for r in group.rollouts]
    waiting = [r for group in buffer.groups for r in group.responses if r.stop is None]
    ages = [iteration - version for r in rollouts for version in r.versions.tolist()]
    mean = lambda values: pytest.approx(sum(values) / len(values) if values else math.nan, nan_ok=True)  # noqa: E731
    assert metrics["staleness"] == mean(ages)
    assert metrics["buffer_groups"] == len(buffer.groups) and metrics["buffer_responses"] == len(waiting)
    assert metrics["buffer_tokens"] == sum(len(r.tokens) for r in waiting)
    assert metrics["buffer_age"] == max([iteration - group.born for group in buffer.groups], default=0)
    assert metrics["tokens_released"] == mean([len(r.tokens) for r in rollouts])
    assert metrics["tokens_open"] == mean([len(r.tokens) for r in waiting])
    assert not any(value < 0 for value in metrics.values()) and metrics["slot_use"] <= 1
    assert metrics["seconds_reprefill"] <= metrics["seconds_prefill"] <= metrics["seconds_rollout"]


def test_reading_again_is_counted_and_only_that(engine):
    buffer = ReplayBuffer()
    first = phase(buffer, [0, 1], engine=engine, iteration=0, segment_tokens=4).metrics
    assert first["seconds_prefill"] > first["seconds_reprefill"] == 0
    prefixes = sum(map(len, buffer.open_responses))
    second = phase(buffer, [], engine=engine, iteration=1, segment_tokens=4).metrics
    assert second["prefilled_tokens"] == prefixes + sum(len(PROMPTS[i].tokens) - 1 for i in (0, 1))
    assert second["seconds_reprefill"] == second["seconds_prefill"] > 0


@pytest.mark.parametrize("rows, segment_tokens", [(60, None), (11, None), (7, 9)])
def test_with_enough_groups_the_phase_ends_and_the_others_wait(monkeypatch, rows, segment_tokens):
    engine = make_engine(rows=rows, max_tokens=MAX, chunk=CHUNK)
    Ledger(engine).install(monkeypatch)
    news = [[0, 1, 2, 3, 4, 5], [3, 0], [], [4, 5, 1, 0]]
    buffer, released, waited = ReplayBuffer(), [], 0
    for iteration in range(100):
        new = news[iteration] if iteration < len(news) else []
        surplus = [group.responses[0].serial for group in buffer.groups if group.complete]
        waited += len(surplus)
        options = dict(enough=2, segment_tokens=segment_tokens)
        collected = phase(buffer, new, engine=engine, iteration=iteration, **options)
        check(collected)
        released += first_serials(collected)
        assert first_serials(collected)[: len(surplus)] == surplus[:2]  # complete before, first now
        assert len(collected.groups) <= 2
        if segment_tokens is None:
            assert len(collected.groups) == 2 or not buffer.groups
        for group in buffer.groups:
            for response in group.responses:
                tokens, stop = whole(group.problem, response.serial)
                assert response.tokens.tolist() == tokens[: len(response)]
                assert len(response) <= (segment_tokens or MAX) * (iteration - group.born + 1)
                assert (response.stop is None) == (len(response) < len(tokens)) and response.stop in (None, stop)
                assert (response.verdict is None) == (response.stop is None)
                assert (np.diff(response.versions) >= 0).all() and set(response.versions) <= {*range(iteration + 1)}
        if iteration >= len(news) and not buffer.groups:
            break
    groups = [100 * i + K * j for i, new in enumerate(news) for j in range(len(new))]
    assert sorted(released) == groups and released != groups and (waited or rows == 7)


def test_the_first_groups_are_those_of_the_first_chunks(engine):
    """Ended as soon as there are enough: what the others have is what so many chunks give. No row waits here."""
    new = [0, 1, 2, 3, 4, 5]
    lengths = [[len(whole(problem, K * i + j)[0]) for j in range(K)] for i, problem in enumerate(new)]
    order = sorted(range(6), key=lambda i: (math.ceil(max(lengths[i]) / CHUNK), i))
    assert order != sorted(order)
    for enough in range(1, 7):
        buffer = ReplayBuffer()
        collected = phase(buffer, new, engine=engine, iteration=0, enough=enough)
        assert collected.problems == order[:enough]
        chunks = math.ceil(max(lengths[order[enough - 1]]) / CHUNK)
        for group in buffer.groups:
            assert [len(r) for r in group.responses] == [min(n, CHUNK * chunks) for n in lengths[group.problem]]


def test_old_groups_are_cut_and_judged_as_they_are(engine):
    """Two iterations after they were drawn, with three segments; behind those that became complete by themselves."""
    buffer, options = ReplayBuffer(), dict(engine=engine, segment_tokens=3, max_age=2)
    longest = {}  # of each group, by its first serial
    for iteration, new in enumerate([[0, 1, 2, 3], [4, 5], [], []]):
        serials = [100 * iteration + K * i for i in range(len(new))]
        longest |= {
            first: max(len(whole(p, first + j)[0]) for j in range(K)) for p, first in zip(new, serials, strict=True)
        }
        collected = phase(buffer, new, iteration=iteration, **options)
        check(collected, cut_at=9)
        by_themselves = [n for n in longest if 0 < longest[n] - 3 * (iteration - n // 100) <= 3]
        old = [n for n in longest if iteration - n // 100 == 2 and longest[n] > 9]
        assert first_serials(collected) == by_themselves + old
        assert bool(old) == (iteration >= 2)
    assert not buffer.groups and any(n <= 9 for n in longest.values())


def test_a_response_may_be_cut_before_it_has_begun(monkeypatch):
    """Too few slots, too young an age: it is judged by its empty text, and trains as one without tokens."""
    engine = make_engine(rows=K, max_tokens=MAX, chunk=CHUNK)
    Ledger(engine).install(monkeypatch)
    buffer = ReplayBuffer()
    options = dict(engine=engine, enough=1, max_age=0)
    groups = [phase(buffer, [0, 1, 2][3 * i :], iteration=i, **options).groups[0] for i in range(3)]
    assert [group.problem for group in groups] == PROBLEMS[:3] and not buffer.groups
    assert [len(r) for r in groups[2].rollouts] == [0, 0, 0]
    assert all(r.stop == StopReason.LENGTH and r.text == "" for r in groups[2].rollouts)
    rewards = [np.arange(3.0) + i for i in range(3)]
    [minibatch] = build_minibatches(groups, rewards, rewards, minibatches=1, oldest_version=0, **SHAPE)
    assert all((batch.lengths >= 1).all() for batch in minibatch)  # a loss divides by them
    assert sum(batch.rows.loss_mask.sum() for batch in minibatch) == sum(len(r) for g in groups for r in g.rollouts)
    assert sum(batch.weights.sum() for batch in minibatch) == pytest.approx(1)


@pytest.mark.parametrize("lag", [0, 1, 3])
def test_the_lag_masks_exactly_the_tokens_of_older_segments(engine, lag):
    buffer, groups, sampled = ReplayBuffer(), [], {}  # the last: when each token was there first, by (serial, place)
    for iteration, new in enumerate([[0, 1, 2, 3], [], []]):
        begun = {r.serial: len(r) for group in buffer.groups for r in group.responses}
        collected = phase(buffer, new, engine=engine, iteration=iteration, segment_tokens=9)
        groups += collected.groups
        everyone = [r for g in [*buffer.groups] for r in g.responses] + [r for g in groups for r in g.rollouts]
        for r in everyone:
            sampled |= {
                (r.serial, t): iteration for t in range(begun.get(r.serial, 0), len(r)) if (r.serial, t) not in sampled
            }
    rewards = [np.arange(3.0) for _ in groups]
    oldest = 2 - lag
    [minibatch] = build_minibatches(groups, rewards, rewards, minibatches=1, oldest_version=oldest, **SHAPE)
    trained = [
        r.tokens[t] for g in groups for r in g.rollouts for t in range(len(r)) if sampled[r.serial, t] >= 2 - lag
    ]
    found = np.concatenate([batch.rows.targets[batch.rows.loss_mask] for batch in minibatch])
    assert sorted(found) == sorted(trained) and len(groups) == 4
    assert 0 < len(trained) <= sum(len(r) for g in groups for r in g.rollouts) and (lag < 2) == (
        len(trained) < len(sampled)
    )


def test_a_judge_that_never_returns_costs_its_response_and_no_other(monkeypatch):
    endless = whole(1, 4)[0]
    engine = make_engine(
        rows=60, max_tokens=MAX, chunk=CHUNK, decode_text=lambda t: "loop" if t.tolist() == endless else f"echo {t[0]}"
    )
    Ledger(engine).install(monkeypatch)
    with VerifierPool(obey, workers=1, deadline_s=1.0) as pool:
        collected = phase(ReplayBuffer(), [0, 1, 2], engine=engine, iteration=0, submit=pool.submit)
        assert (pool.missed_deadlines, pool.crashes) == (1, 0)
    assert sorted(collected.problems) == [0, 1, 2]
    groups = sorted(collected.groups, key=lambda group: group.problem.id)
    outcomes = [[verdict.outcome for verdict in group.verdicts] for group in groups]
    assert outcomes == [
        [Outcome.CORRECT] * 3,
        [Outcome.CORRECT, Outcome.UNGRADABLE, Outcome.CORRECT],
        [Outcome.CORRECT] * 3,
    ]
    assert groups[1].verdicts[1].detail == "deadline of 1 s"
    rewards = [shaped_rewards(group, {"length": 1.0})[0] for group in groups]
    [minibatch] = build_minibatches(groups, rewards, rewards, minibatches=1, oldest_version=0, **SHAPE)
    weights = np.sort(np.concatenate([batch.weights[batch.weights > 0] for batch in minibatch]))
    np.testing.assert_allclose(weights, [1 / 9] * 6 + [1 / 6] * 2, rtol=1e-6)


@pytest.mark.parametrize("options", [dict(segment_tokens=7), dict(enough=1)])
def test_only_the_verdicts_of_released_groups_are_waited_for(engine, options):
    """As soon as a response is finished it is judged, once; the verdict is asked for when its group is released."""
    judged, waited = [], []

    class Ticket(Future):
        def result(self, timeout=None):
            waited.append(self)
            return super().result(timeout)

    def submit(problem, text):
        judged.append(Ticket())
        judged[-1].set_result(verdict(problem, text))
        return judged[-1]

    buffer, left_open = ReplayBuffer(), 0
    for iteration in range(9):
        new = [0, 1, 2, 3][4 * iteration :]
        collected = phase(buffer, new, engine=engine, iteration=iteration, submit=submit, **options)
        check(collected)
        finished = [r for group in buffer.groups for r in group.responses if r.stop]
        assert [r.verdict for r in finished if r.verdict not in judged or r.verdict in waited] == []
        assert len(waited) == len(judged) - len(finished)
        left_open += len(finished)
    assert left_open > 2 and len(set(waited)) == len(waited) == 4 * K and not buffer.groups


def test_what_was_finished_before_a_resume_is_judged_again_and_nothing_else_changes(engine):
    options = dict(engine=engine, segment_tokens=7)
    buffer, resumed = ReplayBuffer(), ReplayBuffer()
    phase(buffer, [0, 1, 2, 3], iteration=0, **options)
    resumed.restore(buffer.state(), problems=len(PROBLEMS))
    finished = [r for group in resumed.groups for r in group.responses if r.stop]
    assert finished and all(r.verdict is None for r in finished)
    for iteration in range(1, 5):
        one, other = (phase(b, [], iteration=iteration, **options) for b in (buffer, resumed))
        check(other)
        assert one.problems == other.problems
        assert [group.verdicts for group in one.groups] == [group.verdicts for group in other.groups]  # details as well
    assert not resumed.groups


def test_nothing_to_do(engine):
    collected = phase(ReplayBuffer(), [], engine=engine, iteration=3)
    assert (collected.problems, collected.groups) == ([], [])
    means = ("staleness", "tokens_released", "tokens_open")
    assert all(math.isnan(collected.metrics[name]) for name in means)
    rest = [name for name in collected.metrics if not name.startswith(("seconds", *means))]
    assert rest and not any(collected.metrics[name] for name in rest)


def test_partial_rollouts_equal_whole_ones_while_weights_are_unchanged():
    """With a real model, which also ends what repeats itself."""
    engine = make_engine(
        repetition_window=5, repetition=RepetitionSettings.of(min_tokens=2, repeats=2, span=3, share=1.0)
    )
    options = dict(
        engine=engine,
        params=sampling_params(random_params(CONFIG)),
        run_key=jax.random.key(11),
        settings=SamplingSettings.of(temperature=0.5, end_ids=[7, 41]),
    )
    [uninterrupted] = [phase(ReplayBuffer(), range(6), iteration=0, **options).groups]
    wanted = {r.serial: r for group in uninterrupted for r in group.rollouts}
    assert {r.stop for r in wanted.values()} == {StopReason.END, StopReason.LENGTH, StopReason.REPETITION}
    buffer, found = ReplayBuffer(), {}
    for iteration in range(4):
        collected = phase(buffer, range(6)[6 * iteration :], iteration=iteration, segment_tokens=4, **options)
        found |= {r.serial: r for group in collected.groups for r in group.rollouts}
    assert found.keys() == wanted.keys() and not buffer.groups
    for serial, rollout in found.items():
        np.testing.assert_array_equal(rollout.tokens, wanted[serial].tokens)
        np.testing.assert_allclose(rollout.logprobs, wanted[serial].logprobs, atol=1e-5)
        np.testing.assert_array_equal(rollout.versions, np.arange(len(rollout)) // 4)
        assert (rollout.stop, rollout.text) == (wanted[serial].stop, wanted[serial].text)
        assert set(wanted[serial].versions) == {0}
