"""The record of verdicts: one JSON object per response that was trained on, enough to judge it again and to compare.

{"step": 12, "serial": 3081, "task": "chain", "problem": "chain:3,7>10", "answer": "10", "response": "3+7=10;...",
 "tokens": 19, "stop": "end", "outcome": "correct", "detail": "10", "reward": 1.2, "reward_correct": 1.0,
 "reward_length": 0.2, ...}
"""

import dataclasses
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from kimi_jax.types import Outcome, Problem, RolloutGroup, Verdict


def records(
    groups: Sequence[RolloutGroup], rewards: Sequence[np.ndarray], components: Sequence[Mapping[str, np.ndarray]]
) -> Iterator[dict[str, Any]]:
    """One record per response. rewards, components: of each group, as `components.shaped_rewards` returns them."""
    for group, total, parts in zip(groups, rewards, components, strict=True):
        problem = group.problem
        for i, (rollout, verdict) in enumerate(zip(group.rollouts, group.verdicts, strict=True)):
            yield {
                "serial": rollout.serial,
                "task": problem.task,
                "problem": problem.id,
                "prompt": problem.prompt,
                "answer": problem.answer,
                "response": rollout.text,
                "tokens": len(rollout),
                "stop": rollout.stop.value,
                "outcome": verdict.outcome.value,
                "detail": verdict.detail,
                "reward": total[i],
                **{f"reward_{name}": part[i] for name, part in parts.items()},
            }


def question(record: Mapping[str, Any]) -> tuple[Problem, str]:
    """What the verifier was asked: the problem, without its images, and the response."""
    problem = Problem(record["problem"], record["task"], record["prompt"], record["answer"])
    return problem, record["response"]


def disagreements(
    recorded: Iterable[Mapping[str, Any]], verdicts: Iterable[Verdict]
) -> list[tuple[Mapping[str, Any], Verdict]]:
    """Records whose verdict came out otherwise when they were judged again. Ungradable ones may; others must not."""
    pairs = zip(recorded, verdicts, strict=True)
    return [(record, verdict) for record, verdict in pairs if record["outcome"] != verdict.outcome.value]


@dataclasses.dataclass
class UngradableAlarm:
    """Says when the share of responses that cannot be graded jumps: a broken verifier must not pass for hard problems.

    It rings when the share is above `share`, and above three times what it was on average in the iterations before.
    """

    share: float
    seen: int = 0  # iterations
    mean: float = 0.0

    def rings(self, groups: Sequence[RolloutGroup]) -> str | None:
        """What to tell the user about the responses of one iteration; None if all is as usual."""
        verdicts = [verdict for group in groups for verdict in group.verdicts]
        failed = Counter(verdict.detail for verdict in verdicts if verdict.outcome == Outcome.UNGRADABLE)
        if not verdicts:
            return None
        rate, usual = failed.total() / len(verdicts), self.mean
        self.mean += (rate - usual) / (self.seen + 1)
        self.seen += 1
        if rate <= self.share or self.seen > 1 and rate <= 3 * usual:
            return None
        reason, times = failed.most_common(1)[0]
        return (
            f"{failed.total()} of {len(verdicts)} responses could not be graded ({rate:.0%}; so far {usual:.0%}), "
            f"{times} of them because of: {reason:.200}"
        )
