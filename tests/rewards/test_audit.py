"""The record of verdicts tells all that judging again needs, and the alarm rings when it should."""

import json

import numpy as np
import pytest

from kimi_jax.rewards import audit
from kimi_jax.rewards.components import shaped_rewards
from kimi_jax.tasks import verify
from kimi_jax.training.metrics import MetricsWriter
from kimi_jax.types import Outcome, Problem, Prompt, Rollout, RolloutGroup, StopReason, Verdict

PROBLEM = Problem("chain:3,4>7", "chain", "3+4=?", "7")
TEXTS = ("3+4=7;Answer:7", "Answer:8", "Answer:7 Answer:8", "no idea", "Answer:7")


def judged(verdicts, texts=TEXTS) -> RolloutGroup:
    rollouts = tuple(
        Rollout(11 + i, np.zeros(i + 2, np.int32), np.zeros(i + 2), np.zeros(i + 2, np.int32), StopReason.END, text)
        for i, text in enumerate(texts)
    )
    return RolloutGroup(PROBLEM, Prompt(np.zeros(3, np.int32)), rollouts, tuple(verdicts))


def written(path, group) -> list[dict]:
    rewards, components = shaped_rewards(group, {"length": 0.1})
    MetricsWriter(path).write_all(5, audit.records([group], [rewards], [components], [{"brevity": "it failed"}]))
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_records_can_be_judged_again(tmp_path):
    records = written(tmp_path / "verdicts.jsonl", judged([verify(PROBLEM, text) for text in TEXTS]))
    assert [r["outcome"] for r in records] == ["correct", "wrong", "wrong", "wrong", "correct"]
    assert [r["reward_format"] for r in records] == [0, 0, -1, -1, 0]
    assert [r["well_formed"] for r in records] == [True, True, False, False, True]
    assert {(r["group"], r["failed"]) for r in records} == {(0, "brevity: it failed")}
    assert [r["serial"] for r in records] == [11, 12, 13, 14, 15] and {r["step"] for r in records} == {5}
    again = [verify(*audit.question(record)) for record in records]
    assert audit.disagreements(records, again) == []
    lie = records[1] | {"outcome": "correct"}
    assert [record for record, _ in audit.disagreements([records[0], lie], again[:2])] == [lie]


def test_ungradable_responses_have_no_reward_in_the_record(tmp_path):
    verdicts = [Verdict(Outcome.UNGRADABLE, "deadline of 2 s")] + [verify(PROBLEM, text) for text in TEXTS[1:]]
    first = written(tmp_path / "verdicts.jsonl", judged(verdicts))[0]
    assert (first["reward"], first["reward_correct"], first["detail"]) == (None, None, "deadline of 2 s")


@pytest.mark.parametrize(
    "rates, rings",
    [
        ([0.0, 0.0, 0.04], [False, False, False]),  # below the share
        ([0.0, 0.0, 0.4], [False, False, True]),  # a jump
        ([0.4, 0.4, 0.4], [True, False, False]),  # from the start, said once
        ([0.1, 0.1, 0.2, 0.9], [True, False, False, True]),
    ],
)
def test_alarm(rates, rings):
    alarm = audit.UngradableAlarm(share=0.05)
    heard = []
    for rate in rates:
        failed = round(rate * 50)
        heard.append(alarm.rings(["TypeError: no"] * failed, of=50))
    assert [message is not None for message in heard] == rings
    assert all("TypeError: no" in message for message in heard if message)


def test_no_responses_are_no_alarm():
    assert audit.UngradableAlarm(share=0.05).rings([], of=0) is None
