"""Reward models: a model says whether a response has an answer that is equal to the reference (k1.5 §2.3.5).

Two kinds read the same text, `judgement_prompt`. The classic one gives a number, the log-odds of being correct. The
chain-of-thought one reasons, and ends with a verdict on a line of its own:

    17-2=?                       12+3=15;got 15, want 15
    Reference: 15       ->       {"correct": true}
    Response: Answer:12+3

Both judge many responses of complete groups at once, and say `ungradable` where they have no verdict. What computes is
given from above: a judge knows nothing of models and meshes.
"""

import dataclasses
import json
import math
from collections.abc import Callable, Iterable, Sequence

from kimi_jax.types import IMAGE_MARKER, Outcome, Problem, Verdict

_KEY = "correct"


def judgement_prompt(problem: Problem, response: str) -> str:
    """What a reward model reads: question, reference answer, response. It sees no images, only where they were."""
    question = problem.prompt.replace(IMAGE_MARKER, "(image)")
    response = response.replace(IMAGE_MARKER, "(image)")
    return f"{question}\nReference: {problem.answer}\nResponse: {response}"


def verdict_line(correct: bool) -> str:
    """What a judgement ends with."""
    return json.dumps({_KEY: correct})


def parse_verdict(text: str) -> bool | None:
    """The verdict of a judgement; None if its last line is not one, or if there is another before it.

    Strict: a JSON object with the key "correct" alone, once, and true or false for it.
    """
    reasoning, _, last = text.rpartition("\n")
    if f'"{_KEY}"' in reasoning:
        return None
    try:
        pairs = json.loads(last, object_pairs_hook=tuple)
    except (ValueError, RecursionError):
        return None
    is_verdict = isinstance(pairs, tuple) and len(pairs) == 1 and pairs[0][0] == _KEY and isinstance(pairs[0][1], bool)
    return pairs[0][1] if is_verdict else None


def majority(votes: Sequence[bool | None]) -> Verdict:
    """The verdict of most votes. A malformed one (None) abstains; without a majority the response is ungradable."""
    yes, no = votes.count(True), votes.count(False)
    detail = f"{yes} of {len(votes)} votes for correct, {no} for wrong"
    if yes == no:
        return Verdict(Outcome.UNGRADABLE, detail)
    return Verdict(Outcome.CORRECT if yes > no else Outcome.WRONG, detail)


@dataclasses.dataclass(frozen=True)
class ClassicJudge:
    """score_fn: from texts to the score of each, log-odds of being correct; nan where the model cannot read it."""

    score_fn: Callable[[Sequence[str]], Iterable[float]]

    def __call__(self, responses: Sequence[tuple[Problem, str]]) -> list[Verdict]:
        return self.read([judgement_prompt(problem, text) for problem, text in responses])

    def read(self, texts: Sequence[str]) -> list[Verdict]:
        """Verdicts on judgement prompts."""
        return [self._verdict(float(score)) for score, _ in zip(self.score_fn(texts), texts, strict=True)]

    def _verdict(self, score: float) -> Verdict:
        if not math.isfinite(score):
            return Verdict(Outcome.UNGRADABLE, f"score {score}")
        return Verdict(Outcome.CORRECT if score > 0 else Outcome.WRONG, f"score {score:.2f}")


@dataclasses.dataclass(frozen=True)
class CoTJudge:
    """generate_fn: from (texts, n) to n judgements of each; none where the model cannot read it. votes: that n."""

    generate_fn: Callable[[Sequence[str], int], Sequence[Sequence[str]]]
    votes: int

    def __post_init__(self):
        if self.votes < 1:
            raise ValueError(f"votes={self.votes} must be at least 1.")

    def __call__(self, responses: Sequence[tuple[Problem, str]]) -> list[Verdict]:
        return self.read([judgement_prompt(problem, text) for problem, text in responses])

    def read(self, texts: Sequence[str]) -> list[Verdict]:
        """Verdicts on judgement prompts."""
        judgements = self.generate_fn(texts, self.votes)
        return [majority([parse_verdict(text) for text in own]) for own, _ in zip(judgements, texts, strict=True)]
