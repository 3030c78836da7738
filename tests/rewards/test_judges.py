"""Judges with models made of Python: what they read, how strictly a verdict is read, how votes are counted."""

import numpy as np
import pytest

from kimi_jax.rewards.judges import ClassicJudge, CoTJudge, judgement_prompt, majority, parse_verdict, verdict_line
from kimi_jax.types import Outcome, Problem

PROBLEM = Problem("1", "none", "How many? <image>", "12")


def test_a_judge_reads_question_reference_and_response_without_image_markers():
    assert judgement_prompt(PROBLEM, "Answer:10+2<image>") == (
        "How many? (image)\nReference: 12\nResponse: Answer:10+2(image)"
    )


@pytest.mark.parametrize("correct", [True, False])
def test_a_verdict_comes_back(correct):
    assert parse_verdict(verdict_line(correct)) is correct
    assert parse_verdict(f"10+2=12;\nso {{yes}}\n{verdict_line(correct)}") is correct


@pytest.mark.parametrize(
    "text",
    [
        "",
        "true",
        "correct",
        '{"correct": "true"}',
        '{"correct": 1}',
        '{"correct": null}',
        '{"correct": True}',
        '{"correct": true',
        '{"correct": true}.',
        '{"correct": true}\n',
        '{"correct": true} {"correct": true}',
        '{"correct": true, "correct": false}',
        '{"correct": true, "sure": false}',
        '{"Correct": true}',
        '[["correct", true]]',
        '[{"correct": true}]',
        'so {"correct": true}',
        '{"correct": false}\n{"correct": true}',
        "[" * 100_000,
    ],
)
def test_everything_else_is_malformed(text):
    assert parse_verdict(text) is None


@pytest.mark.parametrize(
    "votes, outcome",
    [
        ([True], Outcome.CORRECT),
        ([False], Outcome.WRONG),
        ([True, False, True], Outcome.CORRECT),
        ([None, False, None], Outcome.WRONG),
        ([None, None], Outcome.UNGRADABLE),
        ([True, False, None], Outcome.UNGRADABLE),
        ([], Outcome.UNGRADABLE),
    ],
)
def test_most_votes_decide_and_malformed_ones_abstain(votes, outcome):
    assert majority(votes).outcome == outcome


def test_verdicts_of_a_judge_that_writes_are_in_the_order_of_the_responses():
    asked = []

    def generate(texts, n):
        asked.append((list(texts), n))
        good = [verdict_line("yes" in text) for text in texts]
        return [[line, "?", line] if "silent" not in text else [] for text, line in zip(texts, good, strict=True)]

    judge = CoTJudge(generate, votes=3)
    verdicts = judge([(PROBLEM, "yes"), (PROBLEM, "no"), (PROBLEM, "silent yes"), (PROBLEM, "yes")])
    assert [v.outcome.value for v in verdicts] == ["correct", "wrong", "ungradable", "correct"]
    assert verdicts[0].detail == "2 of 3 votes for correct, 0 for wrong"
    assert asked == [([judgement_prompt(PROBLEM, text) for text in ("yes", "no", "silent yes", "yes")], 3)]


def test_verdicts_of_a_judge_that_scores():
    judge = ClassicJudge(lambda texts: np.float32([3.0, -0.1, np.nan, np.inf, 0.0])[: len(texts)])
    verdicts = judge([(PROBLEM, text) for text in "abcde"])
    assert [v.outcome.value for v in verdicts] == ["correct", "wrong", "ungradable", "ungradable", "wrong"]
    assert verdicts[0].detail == "score 3.00"


def test_a_model_that_leaves_one_out_is_not_matched_by_luck():
    for judge in (ClassicJudge(lambda texts: [1.0]), CoTJudge(lambda texts, n: [["?"]], votes=1)):
        with pytest.raises(ValueError, match="zip"):
            judge([(PROBLEM, "a"), (PROBLEM, "b")])


def test_no_votes_are_refused():
    with pytest.raises(ValueError, match="votes=0 must be at least 1"):
        CoTJudge(lambda texts, n: [], votes=0)
