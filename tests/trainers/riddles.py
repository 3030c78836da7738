"""A verifier of one's own, as a user would write it. It has a file of its own, so that no worker imports pytest."""

from kimi_jax.types import Outcome, Problem, Verdict


def verify(problem: Problem, text: str) -> Verdict:
    if problem.answer == "unknowable":
        raise KeyError("nobody knows")
    return Verdict(Outcome.CORRECT if problem.answer[0] in text else Outcome.WRONG, text)
