"""Judgements against exact arithmetic on what the prompts say."""

import re
from collections import Counter
from fractions import Fraction

import pytest

from kimi_jax.tasks import TASKS
from kimi_jax.tasks.base import make_problems
from kimi_jax.tasks.equivalence import WORDS
from kimi_jax.types import Outcome

EQUATION = re.compile(r"(\d+)([-+*])(\d+)=(\d+);")
COUNT = 1201


@pytest.fixture(scope="module")
def problems():
    return make_problems(TASKS["equivalence"], split="train", count=COUNT, seed=11)


def parts(problem):
    return re.fullmatch(r"(.*)\nReference: (\d+)\nResponse: (.*)", problem.prompt).groups()


def value(text):
    """Another reader than the task's: Python itself, after number words and leading zeros are gone."""
    if text in WORDS:
        return WORDS.index(text)
    return Fraction(text) if re.fullmatch(r"[+-]?[\d.]+", text) else eval(text)  # noqa: S307


def test_the_truth_is_exact_and_labels_are_balanced(problems):
    counts = Counter()
    for problem in problems:
        _, reference, response = parts(problem)
        answers = response.split("Answer:")[1:]
        correct = len(answers) == 1 and value(answers[0]) == int(reference)
        assert problem.answer == ("true" if correct else "false"), problem.prompt
        counts[problem.answer, ("none", "one", "two")[len(answers)]] += 1
    assert abs(counts["true", "one"] - COUNT / 2) <= 1
    assert counts["false", "none"] > 10 and counts["false", "two"] > 10


def test_reasoning_is_right_and_says_both_values(problems):
    for problem in problems:
        _, reference, response = parts(problem)
        working, found, wanted, verdict = re.fullmatch(
            r'(.*;|)got (\S+), want (\d+)\n(\{"correct": \w+\})', problem.solution
        ).groups()
        assert wanted == reference and verdict == f'{{"correct": {problem.answer}}}'
        if found not in ("none", "two"):
            assert value(found) == value(response.split("Answer:")[1])
        for a, sign, b, c in EQUATION.findall(working):
            assert {"+": int(a) + int(b), "-": int(a) - int(b), "*": int(a) * int(b)}[sign] == int(c)


def test_an_equal_answer_has_many_forms(problems):
    written = {parts(p)[2].split("Answer:")[1] for p in problems if p.answer == "true"}
    for form in (r"\d+", r"0\d+", r"\d+\.0", r"\+\d+", r"[a-z]+(-[a-z]+)?", r"\d+\*\d+", r"\d+\+\d", r"\d+\*\d+-\d+"):
        assert any(re.fullmatch(form, answer) for answer in written), form


def test_a_malformed_judgement_is_wrong_and_said_to_be_malformed(problems):
    verify = TASKS["equivalence"].verify
    for text in ("", "true", '{"correct": tru'):
        verdict = verify(problems[0], text)
        assert verdict.outcome == Outcome.WRONG and not verdict.well_formed
    opposite = "false" if problems[0].answer == "true" else "true"
    verdict = verify(problems[0], f'{{"correct": {opposite}}}')
    assert verdict.outcome == Outcome.WRONG and verdict.well_formed
