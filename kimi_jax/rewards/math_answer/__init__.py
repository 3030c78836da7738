"""Verdicts on answers to mathematical problems (k1.5 §2.3.5): which answer a response gives, and whether it is right.

    verify_math("a^2-4", r"... so we get \\\\boxed{(a+2)(a-2)}.")  ->  Verdict(CORRECT, "(a+2)(a-2)")

A response that gives several different answers is wrong, even if one of them is right: a hedge must not pass by luck.
Texts and numbers are bounded, so that a judgement takes milliseconds; it uses neither signals nor threads. Run it in
the processes of `rewards.pool`, whose deadline is the backstop.
"""

from kimi_jax.rewards.math_answer.compare import equivalent
from kimi_jax.rewards.math_answer.extract import extract_answers
from kimi_jax.rewards.math_answer.reading import MAX_CHARS
from kimi_jax.rewards.math_answer.tree import TooLarge
from kimi_jax.types import Outcome, Verdict

__all__ = ["equivalent", "extract_answers", "verify_math"]

_MAX_ANSWERS = 8  # different texts; more are not compared with each other


def verify_math(reference: str, response: str) -> Verdict:
    """Judges a response by the reference answer.

    Args:
        reference: the answer, as LaTeX or text; \\boxed{...}, $...$ and "#### ..." around it are allowed.
        response: the text that the model wrote.

    Returns:
        CORRECT or WRONG with the extracted answer, or why there is none; UNGRADABLE if the reference is empty or too
        large to be compared with. What is too large in the response is wrong.
    """
    gold = extract_answers(reference) if "\\boxed" in reference or "####" in reference else [reference.strip()]
    if len(gold) != 1 or not gold[0]:
        what = "is empty" if not reference.strip() else f"gives {len(gold)} answers, not one"
        return Verdict(Outcome.UNGRADABLE, f"the reference {what}")
    if len(gold[0]) > MAX_CHARS:
        return Verdict(Outcome.UNGRADABLE, f"the reference has {len(gold[0])} characters; {MAX_CHARS} are allowed")
    answers = extract_answers(response)
    if not answers:
        return Verdict(Outcome.WRONG, "no final answer; an unclosed box is none", well_formed=False)
    answer = answers[-1]
    if len(answer) > MAX_CHARS:
        return Verdict(Outcome.WRONG, f"the answer has {len(answer)} characters; {MAX_CHARS} are allowed")
    if len(answers) > 1 and (len(answers) > _MAX_ANSWERS or not all(_agree(other, answer) for other in answers[:-1])):
        listed = " | ".join(other[:40] for other in answers[:_MAX_ANSWERS])
        return Verdict(Outcome.WRONG, f"several different answers: {listed}", well_formed=False)
    try:
        correct = equivalent(gold[0], answer)
    except TooLarge as error:
        return Verdict(Outcome.UNGRADABLE, f"the reference is too large: {error}")
    return Verdict(Outcome.CORRECT if correct else Outcome.WRONG, answer)


def _agree(x: str, y: str) -> bool:
    try:
        return equivalent(x, y)
    except TooLarge:
        return False
