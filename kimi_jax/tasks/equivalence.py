"""Judging as a task: is the answer of a response equal to the reference? Reward models learn it (k1.5 §2.3.5).

The responses look like those of a policy that does arithmetic, in text or about a picture, with its slips. Equal values
count as equal however they are written: 12, 012, 12.0, twelve, 10+2. The reference is an integer, and the truth exact.
"""

import numpy as np

from kimi_jax.rewards.judges import judgement_prompt, parse_verdict, verdict_line
from kimi_jax.tasks.base import ANSWER_MARKER, Task
from kimi_jax.tasks.math import draw_chain
from kimi_jax.types import IMAGE_MARKER, Outcome, Problem, Verdict

_ONES = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen"
).split()
_TENS = "twenty thirty forty fifty sixty".split()
WORDS = tuple(_ONES) + tuple(f"{ten}-{one}" if one != "zero" else ten for ten in _TENS for one in _ONES[:10])
_FORMS = ("plain", "spelled", "expression")
_PICTURE_QUESTIONS = (f"Compute {IMAGE_MARKER}", f"How many pips? {IMAGE_MARKER}")


def draw_equivalence(rng: np.random.Generator, difficulty: int) -> Problem:
    """A response to be judged. difficulty: 2 · (place of the form of the answer in _FORMS) + (1 if it is correct)."""
    form, correct = _FORMS[difficulty // 2], bool(difficulty % 2)
    _, question = draw_chain(rng, int(rng.choice([1, 2, 3], p=[0.5, 0.3, 0.2])))
    prompt = _PICTURE_QUESTIONS[int(rng.integers(2))] if rng.random() < 0.4 else question.prompt
    truth = int(question.answer)
    steps = question.solution.partition(ANSWER_MARKER)[0]
    value = truth if correct else _miss(rng, truth)
    if not correct and rng.random() < 0.7:  # a slip in the last step; else the answer contradicts the steps
        steps = steps.rpartition("=")[0] + f"={value};"
    answer, working = _written(rng, value, form)
    response, found = f"{steps}{ANSWER_MARKER}{answer}", str(value)
    if not correct and form == "plain":
        if (kind := rng.random()) < 0.1:  # cut before it answers
            response, found = response[: int(rng.integers(len(steps) + 1))], "none"
        elif kind < 0.2:  # hedges
            first, second = (truth, answer) if rng.random() < 0.5 else (answer, truth)
            response, found = f"{steps}{ANSWER_MARKER}{first};{ANSWER_MARKER}{second}", "two"
    elif not correct and form == "spelled" and rng.random() < 0.4:
        answer = f"-{truth}" if truth and rng.random() < 0.5 else f"{truth}.5"
        response, working, found = f"{steps}{ANSWER_MARKER}{answer}", "", answer
    judged = Problem(id="", task="", prompt=prompt, answer=str(truth))
    text = judgement_prompt(judged, response)
    return Problem(
        id=f"equivalence:{text}",
        task="equivalence",
        prompt=text,
        answer="true" if correct else "false",
        difficulty=difficulty,
        solution=f"{working}got {found}, want {truth}\n{verdict_line(correct)}",
    )


def _miss(rng: np.random.Generator, truth: int) -> int:
    """Another integer of 0..69, mostly near, or with the digits of the truth in another order."""
    while True:
        kind = rng.random()
        if kind < 0.5:
            value = truth + int(rng.choice([-3, -2, -1, 1, 2, 3]))
        elif kind < 0.75:
            value = truth + int(rng.choice([-20, -10, 10, 20]))
        else:
            value = int(str(truth)[::-1]) if kind < 0.8 else int(rng.integers(50))
        if value != truth and 0 <= value < len(WORDS):
            return value


def _written(rng: np.random.Generator, value: int, form: str) -> tuple[str, str]:
    """(the value in that form, how to read it)."""
    if form == "plain":
        return str(value), ""
    if form == "spelled":
        answer = (f"0{value}", f"{value}.0", f"+{value}", f"{value}.00", WORDS[value])[int(rng.choice(5))]
        return answer, f"{answer}={value};"
    a, b = int(rng.integers(2, 10)), int(rng.integers(1, 10))
    kind = int(rng.integers(4))
    if kind == 0 and value % a == 0:
        return f"{value // a}*{a}", f"{value // a}*{a}={value};"
    if kind == 1 and value >= b:
        return f"{value - b}+{b}", f"{value - b}+{b}={value};"
    if kind == 2:
        return f"{value + b}-{b}", f"{value + b}-{b}={value};"
    rest = value - a * b  # a*b+rest
    sign, rest = ("+", rest) if rest >= 0 else ("-", -rest)
    return f"{a}*{b}{sign}{rest}", f"{a}*{b}={a * b};{a * b}{sign}{rest}={value};"


def verify_equivalence(problem: Problem, text: str) -> Verdict:
    """Correct if the judgement ends with the true verdict."""
    verdict = parse_verdict(text)
    if verdict is None:
        return Verdict(Outcome.WRONG, "no verdict", well_formed=False)
    detail = "true" if verdict else "false"
    return Verdict(Outcome.CORRECT if detail == problem.answer else Outcome.WRONG, detail)


EQUIVALENCE = Task(
    name="equivalence",
    kind="text",
    difficulties=tuple(range(2 * len(_FORMS))),
    draw=draw_equivalence,
    verify=verify_equivalence,
)
