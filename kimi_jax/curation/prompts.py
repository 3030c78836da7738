"""Which problems are worth learning from by reinforcement (k1.5 §2.1): one decision about each, with its reason.

    multiple_choice, true_false, proof   nothing that could be checked, or right by chance
    contaminated                         asks the same as a problem of an evaluation set
    duplicate                            asks the same as an earlier problem
    trivial                              the model is right (nearly) always
    unsolved                             the model is right too seldom, if there is a limit to that
    hackable                             the model guesses the answer without thinking
    surplus                              left over when domains and difficulties are balanced

What needs no model goes first, and each problem is dropped for the first reason that is found.
"""

import collections
import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from kimi_jax.curation import selection
from kimi_jax.curation.asking import Generate, Judge, Judged, Ledger, ask, correct, question
from kimi_jax.curation.duplicates import find_copies
from kimi_jax.curation.exclusion import exclusion
from kimi_jax.tasks.base import ANSWER_MARKER
from kimi_jax.types import Outcome, Problem, Verdict

REASONS = (
    "multiple_choice",
    "true_false",
    "proof",
    "contaminated",
    "duplicate",
    "trivial",
    "unsolved",
    "hackable",
    "surplus",
)
LEVELS = 10  # difficulty is counted in tenths of the answers that are wrong
GUESS_INSTRUCTION = f'Do not think and do not explain. Write only the final answer, after "{ANSWER_MARKER}".'
_GUESS_TOKENS = 32  # too few to think in


def _field(default: Any, meaning: str) -> Any:
    return dataclasses.field(default=default, metadata={"help": meaning})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rules:
    """The report's numbers where it gives them: 10 samples, 8 guesses."""

    samples: int = _field(10, "answers to each problem, from which its difficulty is measured")
    temperature: float = _field(1.0, "of samples and guesses")
    guesses: int = _field(8, "answers without thinking; 0: no such filter")
    max_pass_rate: float = _field(0.9, "a problem that is solved more often is trivial")
    min_pass_rate: float = _field(0.0, "a problem that is solved less often is dropped as unsolved")
    similarity: float = _field(0.35, "of words, from which on problems with equal numbers and answers are the same")
    count: int | None = _field(None, "of problems to keep, balanced over domains and difficulties")
    seed: int = _field(0, "of all randomness")

    def __post_init__(self):
        if self.samples < 1 or self.guesses < 0:
            raise ValueError(f"samples={self.samples} must be at least 1, and guesses={self.guesses} not negative.")
        if self.temperature <= 0:
            raise ValueError(f"temperature={self.temperature} must be positive: equal samples measure nothing.")
        if not 0 <= self.min_pass_rate <= self.max_pass_rate <= 1:
            raise ValueError(
                f"min_pass_rate={self.min_pass_rate} and max_pass_rate={self.max_pass_rate} must be in order, "
                "between 0 and 1."
            )
        if not 0 < self.similarity <= 1:
            raise ValueError(f"similarity={self.similarity} must lie in (0, 1]; 1 drops equal words alone.")
        if self.count is not None and self.count < 1:
            raise ValueError(f"count={self.count} must be at least 1; leave it out to keep all.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Decision:
    """What became of a problem. `reason` is "" if it is kept, else one of REASONS."""

    id: str
    reason: str = ""
    detail: str = ""
    domain: str = ""
    pass_rate: float | None = None  # None: it was dropped before it was measured
    tokens: float | None = None  # mean length of its sampled answers

    @property
    def difficulty(self) -> int | None:
        return None if self.pass_rate is None else round(LEVELS * (1 - self.pass_rate))


def curate(
    problems: Sequence[Problem],
    evaluation: Sequence[Problem],
    *,
    tags: Mapping[str, Sequence[str]],
    generate: Generate,
    judge: Judge,
    verify: Callable[[Problem, str], Verdict],
    samples: Ledger,
    guesses: Ledger,
    source: str,
    instructed: bool,
    rules: Rules,
    batch: int,
    progress: Callable[[str, int], Callable[[int], Any]] = lambda stage, total: lambda n: None,
) -> list[Decision]:
    """One decision about each problem, in their order.

    Args:
        evaluation: problems that must not be learnt from.
        tags: of problems by id.
        verify: says whether two forms of an answer are equal.
        samples, guesses: where answers are kept.
        source: names model and judge.
        instructed: the model follows instructions, so that a guess can be asked for in words.
        progress: from the name of a stage and its size to what is told how much was done.

    Raises:
        ValueError: the judge fails (`asking.ask`).
    """
    dropped: dict[str, dict[str, Any]] = {}
    remaining = list(problems)

    def drop(reasons: Mapping[str, tuple[str, str]]) -> None:
        dropped.update({id_: {"reason": reason, "detail": detail} for id_, (reason, detail) in reasons.items()})
        remaining[:] = [problem for problem in remaining if problem.id not in reasons]

    drop({problem.id: why for problem in remaining if (why := exclusion(problem))})
    copies = find_copies(remaining, evaluation, similarity=rules.similarity, verify=verify)
    drop({remaining[i].id: (c.origin, f"of {c.of!r}, similarity {c.similarity:.2f}") for i, c in copies.items()})

    put = functools.partial(
        ask, generate=generate, judge=judge, source=source, temperature=rules.temperature, batch=batch
    )
    asked = [question(p, p.prompt, purpose="difficulty", seed=rules.seed, n=rules.samples) for p in remaining]
    told = progress("difficulty", len(asked))
    answers = dict(
        zip(
            [problem.id for problem in remaining],
            put(asked, ledger=samples, keep_texts=False, progress=told),
            strict=True,
        )
    )
    rates = {id_: correct(own) for id_, own in answers.items()}
    drop({id_: ("trivial", _solved(answers[id_])) for id_, rate in rates.items() if rate > rules.max_pass_rate})
    drop(
        {p.id: ("unsolved", _solved(answers[p.id])) for p in remaining if rates[p.id] < rules.min_pass_rate},
    )

    if rules.guesses:
        instruction = f"\n{GUESS_INSTRUCTION}" if instructed else ""
        asked = [
            question(p, p.prompt + instruction, purpose="guess", seed=rules.seed, n=rules.guesses) for p in remaining
        ]
        told = progress("guesses", len(asked))
        guessed = put(
            asked,
            ledger=guesses,
            prefix=ANSWER_MARKER,
            budget=_GUESS_TOKENS,
            read=_first_line,
            keep_texts=True,
            progress=told,
        )
        pairs = zip([problem.id for problem in remaining], guessed, strict=True)
        drop({id_: ("hackable", _guessed(own)) for id_, own in pairs if correct(own) > 0})

    domains = {problem.id: selection.domain(problem, tags.get(problem.id, ())) for problem in problems}
    decisions = [
        Decision(
            id=problem.id,
            domain=domains[problem.id],
            pass_rate=rates.get(problem.id),
            tokens=_mean_tokens(answers[problem.id]) if problem.id in answers else None,
            **dropped.get(problem.id, {}),
        )
        for problem in problems
    ]
    return decisions if rules.count is None else _balanced(decisions, rules.count)


def _balanced(decisions: list[Decision], count: int) -> list[Decision]:
    kept = [decision for decision in decisions if not decision.reason]
    keys = [lambda d: d.domain, lambda d: d.difficulty]
    chosen = {d.id for d in selection.balanced(kept, count, keys=keys, name=lambda d: d.id)}
    surplus = lambda d: dataclasses.replace(d, reason="surplus", detail=f"{d.domain}, difficulty {d.difficulty}")  # noqa: E731
    return [d if d.reason or d.id in chosen else surplus(d) for d in decisions]


def _first_line(text: str) -> str:
    """What a guess says before it can begin to think."""
    return text.lstrip().partition("\n")[0]


def _mean_tokens(answers: Sequence[Judged]) -> float:
    return sum(answer.tokens for answer in answers) / len(answers)


def _solved(answers: Sequence[Judged]) -> str:
    counts = collections.Counter(answer.outcome for answer in answers)
    return f"{counts[Outcome.CORRECT]} of {len(answers) - counts[Outcome.UNGRADABLE]} answers are correct"


def _guessed(answers: Sequence[Judged]) -> str:
    right = [answer.text for answer in answers if answer.outcome == Outcome.CORRECT]
    return f"{len(right)} of {len(answers)} guesses are correct, {right[0]!r:.80}"
