"""Evaluation: accuracy and length on held-out problems, sampled and greedy."""

from collections.abc import Callable, Sequence

import jax
import numpy as np

from kimi_jax.sampling.engine import Engine
from kimi_jax.sampling.logits import SamplingSettings
from kimi_jax.types import Outcome, Problem, Prompt, RolloutGroup, Verdict

Judge = Callable[[Sequence[tuple[Problem, str]]], list[Verdict]]  # of responses, each with its problem


def sample_groups(
    engine: Engine,
    params: dict,
    problems: Sequence[Problem],
    prompts: Sequence[Prompt],
    *,
    k: int,
    settings: SamplingSettings,
    key: jax.Array,
    judge: Judge,
    first_serial: int = 0,
    policy_version: int = 0,
) -> list[RolloutGroup]:
    """k judged responses to each problem. params: sampling layout."""
    rollouts = engine.generate(
        params, prompts, k=k, first_serial=first_serial, run_key=key, settings=settings, policy_version=policy_version
    )
    verdicts = judge([(problem, r.text) for problem, own in zip(problems, rollouts, strict=True) for r in own])
    groups = zip(problems, prompts, rollouts, strict=True)
    return [RolloutGroup(*parts, tuple(verdicts[i * k : (i + 1) * k])) for i, parts in enumerate(groups)]


def accuracy(groups: Sequence[RolloutGroup]) -> float:
    """Share of correct responses; an ungradable one counts as not correct. nan without groups."""
    outcomes = [verdict.outcome == Outcome.CORRECT for group in groups for verdict in group.verdicts]
    return float(np.mean(outcomes)) if outcomes else float("nan")


def ungradable(groups: Sequence[RolloutGroup]) -> float:
    """Share of responses without a verdict, which are so much of what `accuracy` is short of 1."""
    return float(np.mean([verdict.outcome == Outcome.UNGRADABLE for group in groups for verdict in group.verdicts]))


def mean_tokens(groups: Sequence[RolloutGroup]) -> float:
    """Mean response length in tokens, end token included."""
    return float(np.mean([len(rollout) for group in groups for rollout in group.rollouts]))


def evaluate(
    engine: Engine,
    params: dict,
    problems: Sequence[Problem],
    prompts: Sequence[Prompt],
    *,
    kinds: Sequence[str],
    end_ids: Sequence[int],
    key: jax.Array,
    judge: Judge,
) -> dict[str, dict[str, float]]:
    """Per kind of problem: {"accuracy": pass@1 at temperature 1, "greedy_accuracy", "mean_tokens" and "ungradable"
    (sampled), "n"}."""
    sample = lambda temperature: sample_groups(  # noqa: E731
        engine,
        params,
        problems,
        prompts,
        k=1,
        settings=SamplingSettings.of(temperature=temperature, end_ids=end_ids),
        key=key,
        judge=judge,
    )
    sampled, greedy = sample(1.0), sample(0.0)
    results = {}
    for kind in dict.fromkeys(kinds):
        members = [i for i, other in enumerate(kinds) if other == kind]
        results[kind] = {
            "accuracy": accuracy([sampled[i] for i in members]),
            "greedy_accuracy": accuracy([greedy[i] for i in members]),
            "mean_tokens": mean_tokens([sampled[i] for i in members]),
            "ungradable": ungradable([sampled[i] for i in members]),
            "n": len(members),
        }
    return results
