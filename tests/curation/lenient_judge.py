"""A verifier that even a model with random weights satisfies now and then; a file of its own, as a user would have."""

from kimi_jax.types import Outcome, Problem, Verdict


def verify(problem: Problem, text: str) -> Verdict:
    return Verdict(Outcome.CORRECT if len(text) % 3 else Outcome.WRONG, f"{len(text)} characters")
