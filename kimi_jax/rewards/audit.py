"""The record of verdicts: one JSON object per response that was trained on, enough to judge it again and to compare.

{"step": 12, "group": 31, "serial": 3081, "task": "chain", "problem": "chain:3,7>10", "prompt": "3+7=?", "answer": "10",
 "response": "3+7=10;...", "tokens": 19, "stop": "end", "outcome": "correct", "detail": "10", "well_formed": true,
 "failed": "", "reward": 1.2, "reward_correct": 1.0, "reward_length": 0.2, ...}

Records of one step and group were compared with each other, and have what components saw of them. `failed` says which
components of the user could not be computed, and why.
"""

import dataclasses
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from kimi_jax.types import Problem, RolloutGroup, Verdict


def records(
    groups: Sequence[RolloutGroup],
    rewards: Sequence[np.ndarray],
    components: Sequence[Mapping[str, np.ndarray]],
    failures: Sequence[Mapping[str, str]],
) -> Iterator[dict[str, Any]]:
    """One record per response.

    rewards, components: of each group, as `components.shaped_rewards` returns them. failures: of each group, why
    components of the user failed, by name.
    """
    for g, (group, total, parts, failed) in enumerate(zip(groups, rewards, components, failures, strict=True)):
        problem = group.problem
        for i, (rollout, verdict) in enumerate(zip(group.rollouts, group.verdicts, strict=True)):
            yield {
                "group": g,
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
                "well_formed": verdict.well_formed,
                "failed": "; ".join(f"{name}: {reason}" for name, reason in failed.items()),
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
    """Says when the share of responses without a reward jumps: a broken verifier must not pass for hard problems.

    It rings when the share is above `share`, and above three times what it was on average in the iterations before.
    """

    share: float
    seen: int = 0  # iterations
    mean: float = 0.0

    def rings(self, reasons: Sequence[str], *, of: int) -> str | None:
        """What to tell the user about one iteration; None if all is as usual.

        reasons: why a response has no reward, for each that has none of the `of` responses that there are.
        """
        if not of:
            return None
        rate, usual = len(reasons) / of, self.mean
        self.mean += (rate - usual) / (self.seen + 1)
        self.seen += 1
        if rate <= self.share or self.seen > 1 and rate <= 3 * usual:
            return None
        reason, times = Counter(reasons).most_common(1)[0]
        return (
            f"{len(reasons)} of {of} responses could not be graded ({rate:.0%}; so far {usual:.0%}), "
            f"{times} of them because of: {reason:.200}"
        )
