"""The loop over data that the policy makes: online policy mirror descent (k1.5 §2.3), or another objective.

    hand-over     masters -> rollout copy of the weights
    rollout       open responses of earlier iterations, and k responses to each of the problems drawn by curriculum and
                  success rate; judged in other processes meanwhile; the unfinished go into the replay buffer (§2.6.2)
    rewards       correct | wrong | ungradable -> success rates -> shaped rewards -> advantages (r_j - b)
    update        score under π_i, then one optimizer step per mini-batch, then drop the moments
    hand-over ...

Differences from the report, all switchable in the config: the loss is L/(2τ), so that the learning rate does not depend
on τ; an iteration is split into several updates, because with one update the τ term is identically zero.
"""

import dataclasses
import functools
import itertools
import math
import sys
from collections.abc import Callable

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from kimi_jax import evals
from kimi_jax.arrays import RLBatch, TrainState
from kimi_jax.rewards import audit
from kimi_jax.rewards.components import COMPONENTS, shaped_rewards
from kimi_jax.rewards.length import length_weight
from kimi_jax.rewards.pool import VerifierPool
from kimi_jax.rl.batch import build_minibatches
from kimi_jax.rl.prompts import PromptSampler
from kimi_jax.rl.replay_buffer import ReplayBuffer
from kimi_jax.rl.rollout import collect
from kimi_jax.sampling.handover import num_bytes
from kimi_jax.sampling.logits import SamplingSettings
from kimi_jax.trainers import objectives
from kimi_jax.trainers import rewards as rewards_lib
from kimi_jax.trainers.interrupt import Interrupted, StopRequest
from kimi_jax.trainers.objectives import Objective
from kimi_jax.trainers.setup import EVALUATION, ROLLOUT, Setup
from kimi_jax.trainers.supervised import first_per_kind
from kimi_jax.training.checkpoint import Checkpointer
from kimi_jax.training.metrics import MetricsWriter, Stopwatch, peak_memory, progress
from kimi_jax.training.step import Stepper, check_finite
from kimi_jax.types import Outcome, RolloutGroup, StopReason


def loss_fn(logprobs, batch: RLBatch, hyper, *, objective: Objective):
    # Before the first update of an iteration the policy is π_i: its log-probs are the reference, Δ is exactly 0.0.
    reference = jnp.where(hyper["is_pi_i"], jax.lax.stop_gradient(logprobs), batch.reference_logprobs)
    batch = dataclasses.replace(batch, reference_logprobs=reference)
    return objective.loss(logprobs, batch, **{name: hyper[name] for name in objective.hyper})


def train(setup: Setup, params: dict, stop: StopRequest, judge: Callable[[dict], evals.Judge] | None = None) -> dict:
    """Runs or resumes the stage from `params`, which it consumes, and returns its final parameters.

    judge: from the rollout copy of the policy to a reward model, whose verdicts take the place of the verifiers', which
    are then only logged.

    Raises Interrupted, NonFiniteError.
    """
    config, scoring = setup.config.rl, setup.config.rewards
    writer = MetricsWriter(setup.workdir / "metrics.jsonl")
    verdicts = MetricsWriter(setup.workdir / "verdicts.jsonl")
    alarm = audit.UngradableAlarm(scoring.alarm)
    own_components = rewards_lib.own_components(scoring.components)
    objective = objectives.find(config)
    stepper = setup.stepper(
        functools.partial(loss_fn, objective=objective),
        config.optimizer,
        total_steps=config.iterations * config.updates,
    )
    settings = SamplingSettings.of(temperature=config.temperature, end_ids=setup.chat.end_ids)
    prompts = setup.prompts(setup.train)
    kinds = sorted({problem.kind for problem in setup.train})
    prompt_sampler = make_prompt_sampler(setup)
    ahead = _ahead(config)

    # --- state: from SFT, or from the last checkpoint
    serial = 0
    buffer = ReplayBuffer()
    rollout_params = None
    with (
        VerifierPool(setup.verify, workers=scoring.workers, deadline_s=scoring.deadline_s) as verifiers,
        rewards_lib.component_pool(own_components, scoring) as component_workers,
        Checkpointer(
            setup.workdir / "checkpoints" / "rl",
            keep_last=config.keep_last,
            keep_best=config.keep_best,
            best_metric="accuracy" if config.keep_best else None,
        ) as checkpoints,
    ):
        start = checkpoints.latest_step() or 0
        if start:
            for leaf in jax.tree.leaves(params):  # there is no room for both, and whoever called still holds these
                leaf.delete()
            like = {
                "state": setup.state_like(stepper, moments=not config.reset_optimizer),
                "prompts": prompt_sampler.state(),
                "buffer": buffer.like(checkpoints.read_meta().get("buffer", {})),
            }
            _, saved, meta = checkpoints.restore(like)
            state, serial = saved["state"], meta["serial"]
            alarm = audit.UngradableAlarm(**meta["alarm"])
            prompt_sampler.restore(saved["prompts"])
            buffer.restore(saved["buffer"], problems=len(setup.train))
        else:
            state = setup.new_state(params, None if config.reset_optimizer else stepper.init_optimizer(params))
        writer.cut_back(start)
        verdicts.cut_back(start)

        watch = Stopwatch()
        lost = {"missed_deadlines": 0, "verifier_crashes": 0}  # in earlier iterations
        bar = progress(desc="RL", total=config.iterations, initial=start)
        for iteration in range(start, config.iterations):
            # --- hand-over
            with watch("handover"):
                rollout_params = jax.block_until_ready(setup.to_rollout(state.params, rollout_params))

            # --- rollout: as many new problems as an iteration trains on, and at first what is to be ahead of it
            chosen = prompt_sampler.draw(iteration, config.problems + max(ahead - len(buffer.groups), 0))
            collected = collect(
                buffer,
                chosen,
                engine=setup.engine,
                params=rollout_params,
                problems=setup.train,
                prompts=prompts,
                submit=verifiers.submit,
                k=config.responses,
                iteration=iteration,
                first_serial=serial,
                segment_tokens=config.segment_tokens,
                enough=config.problems if ahead else None,
                max_age=config.max_age,
                run_key=setup.key(ROLLOUT),
                settings=settings,
            )
            groups = collected.groups
            if judge and groups:
                with watch("judge"):
                    groups = _judged(groups, judge(rollout_params))
            serial += len(chosen) * config.responses

            # --- rewards
            for i, group in zip(collected.problems, groups, strict=True):
                outcomes = [verdict.outcome for verdict in group.verdicts]
                gradable = len(outcomes) - outcomes.count(Outcome.UNGRADABLE)
                prompt_sampler.update(i, outcomes.count(Outcome.CORRECT), gradable)
            weights = dict(scoring.weights)
            weights["length"] = length_weight(
                iteration, weight=scoring.weights.length, warmup_iterations=scoring.length_warmup
            )
            weights |= {name: component.weight for name, component in own_components.items()}
            with watch("components"):
                own, failures = rewards_lib.own_values(groups, own_components, component_workers)
            shaped = [shaped_rewards(group, weights, values) for group, values in zip(groups, own, strict=True)]
            rewards, components = [total for total, _ in shaped], [parts for _, parts in shaped]
            ungradable = rewards_lib.without_reward(groups, rewards, failures)
            if warning := alarm.rings(ungradable, of=sum(map(len, rewards))):
                bar.write(f"RL iteration {iteration + 1}: {warning}", file=sys.stderr)
            advantages = [_advantages(objective, *judged) for judged in zip(groups, rewards, strict=True)]
            if config.permute_advantages:
                rng = np.random.default_rng((setup.config.seed, iteration, 1))  # 1: not the stream of the draws
                advantages = [_permuted(a, rng) for a in advantages]

            # --- update
            oldest_version = 0 if config.max_segment_lag is None else iteration - config.max_segment_lag
            with watch("update"):
                minibatches = build_minibatches(
                    groups,
                    rewards,
                    advantages,
                    minibatches=config.updates,
                    rows=config.micro_rows,
                    responses=config.micro_rows * config.responses,
                    oldest_version=oldest_version,
                    **setup.packing,
                )
                state, updates = _update(setup, stepper, state, minibatches, objective.hyper)

            # --- metrics, checkpoint
            for update in updates:
                check_finite(update, f"RL iteration {iteration + 1}")
            names = (*COMPONENTS, *own_components)
            metrics = _metrics(groups, rewards, components, updates, names, oldest_version=oldest_version, kinds=kinds)
            metrics |= collected.metrics
            if judge:
                metrics["accuracy_rule"] = evals.accuracy(collected.groups)
            metrics |= {f"seconds_{phase}": s for phase, s in watch.pop().items()}
            metrics["handover_bytes"] = num_bytes(rollout_params)
            metrics["peak_memory_bytes"] = peak_memory()
            metrics["ungradable_alarm"] = float(warning is not None)
            metrics["component_failures"] = sum(map(len, failures))
            so_far = {"missed_deadlines": verifiers.missed_deadlines, "verifier_crashes": verifiers.crashes}
            metrics |= {name: so_far[name] - lost[name] for name in so_far}
            lost = so_far
            done = iteration + 1
            last = done == config.iterations
            stopping = stop.requested  # looked at once: a request that comes later waits for the next iteration
            if config.eval_every and (done % config.eval_every == 0 or last):
                rollout_params = setup.to_rollout(state.params, rollout_params)
                metrics |= _evaluate(setup, rollout_params)
            if scoring.audit:
                verdicts.write_all(done, audit.records(groups, rewards, components, failures))
            writer.write(done, {"iteration": done} | metrics)
            bar.set_postfix(accuracy=f"{metrics['accuracy']:.2f}", tokens=f"{metrics['response_length']:.0f}")
            bar.update(1)
            if done % config.checkpoint_every == 0 or last or stopping:
                arrays = {"state": state, "prompts": prompt_sampler.state(), "buffer": buffer.state()}
                meta = {"serial": serial, "buffer": buffer.sizes(), "alarm": dataclasses.asdict(alarm)}
                checkpoints.save(done, arrays, meta, {"accuracy": metrics["accuracy"]}, wait=last or stopping)
            if stopping and not last:
                raise Interrupted(f"RL stopped and saved at iteration {done} of {config.iterations}")
        bar.close()
    return state.params


def make_prompt_sampler(setup: Setup) -> PromptSampler:
    """Over the training problems. Raises ValueError if an iteration would draw more than the curriculum leaves it."""
    config = setup.config.rl
    sampler = PromptSampler(
        np.array([problem.difficulty for problem in setup.train]),
        seed=setup.config.seed,
        curriculum=config.curriculum,
        curriculum_iterations=config.curriculum_iterations,
        hard_difficulty=config.hard_difficulty,
        prior_success=config.prior_success,
        prior_visits=config.prior_visits,
        floor=config.priority_floor,
    )
    sampler.draw(0, config.problems + _ahead(config))  # the most, from all problems or from the hard ones
    sampler.draw(config.iterations - 1, config.problems)
    return sampler


def _ahead(config: ml_collections.ConfigDict) -> int:
    """How many problems are open beyond those that an iteration trains on."""
    return round(config.oversubscribe * config.problems)


def _update(
    setup: Setup, stepper: Stepper, state: TrainState, minibatches, hyper: dict
) -> tuple[TrainState, list[dict]]:
    """The optimizer steps of one iteration. All dispatched without looking; the metrics are read once at the end."""
    config = setup.config.rl
    hyper = hyper | {"temperature": np.float32(config.temperature), "is_pi_i": True}
    minibatches = [[setup.put_rows(batch) for batch in minibatch] for minibatch in minibatches if minibatch]

    # π_i of the later mini-batches, before the first update moves θ. That of the first comes from its own forward pass.
    for minibatch in minibatches[1:]:
        for n, batch in enumerate(minibatch):
            reference = stepper.score(state.params, batch.rows, hyper["temperature"])
            minibatch[n] = dataclasses.replace(batch, reference_logprobs=reference)

    if config.reset_optimizer:  # the moments exist from here ...
        state = dataclasses.replace(state, opt_state=stepper.init_optimizer(state.params))
    metrics = []
    for minibatch in minibatches:
        acc = None
        for batch in minibatch:
            acc = stepper.accumulate(acc, state.params, batch, hyper)
        state, update = stepper.apply(state, acc)
        metrics.append(update)
        hyper |= {"is_pi_i": False}
    if config.reset_optimizer:  # ... to here; the step counter, and with it the schedule, runs on (k1.5 §2.3.2)
        state = dataclasses.replace(state, opt_state=None)
    return state, jax.device_get(metrics)


def _judged(groups: list[RolloutGroup], judge: evals.Judge) -> list[RolloutGroup]:
    """The groups with the judge's verdicts. Whether there is an answer to judge is still what the verifier says."""
    verdicts = iter(judge([(group.problem, rollout.text) for group in groups for rollout in group.rollouts]))
    judged = lambda ruled: dataclasses.replace(next(verdicts), well_formed=ruled.well_formed)  # noqa: E731
    return [dataclasses.replace(group, verdicts=tuple(map(judged, group.verdicts))) for group in groups]


def _advantages(objective: Objective, group: RolloutGroup, rewards: np.ndarray) -> np.ndarray:
    """Of the gradable responses of a group; nan where one is not, and everywhere if fewer than two are."""
    gradable = np.isfinite(rewards)
    correct = np.array([verdict.outcome == Outcome.CORRECT for verdict in group.verdicts])
    advantages = np.full(len(rewards), np.nan)
    if gradable.sum() >= 2:
        advantages[gradable] = objective.advantages(rewards[gradable], correct[gradable])
    return advantages


def _permuted(advantages: np.ndarray, rng) -> np.ndarray:
    gradable = np.isfinite(advantages)
    out = advantages.copy()
    out[gradable] = rng.permutation(advantages[gradable])
    return out


def _metrics(groups, rewards, components, updates, names, *, oldest_version: int, kinds: list[str]) -> dict:
    """What an iteration was like. Means over responses unless the name says otherwise.

    nan where there is nothing to measure: no response, or no update.
    """
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    verdicts = [verdict.outcome for group in groups for verdict in group.verdicts]
    outcomes = [[verdict.outcome == Outcome.CORRECT for verdict in group.verdicts] for group in groups]
    of_kind = lambda kind: [group.problem.kind == kind for group in groups]  # noqa: E731
    masked = [rollout.versions < oldest_version for rollout in rollouts]
    total = lambda name: sum(float(update[name]) for update in updates)  # noqa: E731
    highest = lambda name: max((float(update[name]) for update in updates), default=math.nan)  # noqa: E731
    tokens = total("tokens") or math.nan
    return {
        "reward": _mean([r for group in rewards for r in group if np.isfinite(r)]),
        **{
            f"reward_{name}": _mean([r for parts in components for r in parts[name] if np.isfinite(r)])
            for name in names
        },
        "accuracy": _mean(sum(outcomes, [])),
        **{f"accuracy_{kind}": _mean(sum(itertools.compress(outcomes, of_kind(kind)), [])) for kind in kinds},
        "groups": len(groups),
        "response_length": _mean([len(rollout) for rollout in rollouts]),
        "truncated": _mean([rollout.stop == StopReason.LENGTH for rollout in rollouts]),
        "repetitive": _mean([rollout.stop == StopReason.REPETITION for rollout in rollouts]),
        "ungradable": _mean([outcome == Outcome.UNGRADABLE for outcome in verdicts]),
        "groups_all_right": _mean([all(group) for group in outcomes]),
        "groups_all_wrong": _mean([not any(group) for group in outcomes]),
        "groups_dropped": _mean([np.isfinite(r).sum() < 2 for r in rewards]),
        "tokens_masked": _mean(np.concatenate([np.zeros(0), *masked])),
        "responses_masked": _mean([m.all() for m in masked]),
        "entropy": total("entropy") / tokens,
        "kl": total("kl") / tokens,
        "logprob_gap": total("logprob_gap") / tokens,
        "max_logprob_gap": highest("max_logprob_gap"),
        "first_log_ratio": float(updates[0]["max_log_ratio"]) if updates else math.nan,
        "max_log_ratio": highest("max_log_ratio"),
        "regularizer": total("regularizer") if updates else math.nan,
        **({"clipped": total("clipped") / tokens} if updates and "clipped" in updates[0] else {}),
        "grad_norm": _mean([float(update["grad_norm"]) for update in updates]),
        "first_update_norm": float(updates[0]["update_norm"]) if updates else math.nan,
        "learning_rate": float(updates[-1]["learning_rate"]) if updates else math.nan,
        "updates": len(updates),
    }


def _mean(values) -> float:
    return float(np.mean(values)) if len(values) else float("nan")


def _evaluate(setup: Setup, rollout_params: dict) -> dict:
    """Sampled accuracy and length per kind on the first held-out problems."""
    problems = first_per_kind(setup.heldout, setup.config.rl.eval_problems)
    groups = evals.sample_groups(
        setup.engine,
        rollout_params,
        problems,
        list(setup.prompts(problems)),
        k=1,
        settings=SamplingSettings.of(temperature=1.0, end_ids=setup.chat.end_ids),
        key=setup.key(EVALUATION),
        judge=setup.judge,
    )
    found: dict[str, float] = {}
    for kind in dict.fromkeys(problem.kind for problem in problems):
        own = [group for group in groups if group.problem.kind == kind]
        found |= {f"eval_{kind}_accuracy": evals.accuracy(own), f"eval_{kind}_tokens": evals.mean_tokens(own)}
    return found
