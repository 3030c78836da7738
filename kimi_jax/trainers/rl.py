"""The loop over data that the policy makes: online policy mirror descent (k1.5 §2.3).

    hand-over     masters -> rollout copy of the weights
    rollout       problems by curriculum and success rate, k responses each
    verification  correct | wrong | ungradable -> success rates -> shaped rewards -> advantages r_j - b
    update        score under π_i, then one optimizer step per mini-batch, then drop the moments
    hand-over ...

Differences from the report, all switchable in the config: the loss is L/(2τ), so that the learning rate does not depend
on τ; an iteration is split into several updates, because with one update the τ term is identically zero.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from kimi_jax import evals
from kimi_jax.arrays import RLBatch, TrainState
from kimi_jax.losses.mirror_descent import Baseline, baseline, surrogate_loss
from kimi_jax.rewards.length import length_weight, shaped_rewards
from kimi_jax.rl.batch import build_minibatches
from kimi_jax.rl.prompts import PromptSampler
from kimi_jax.sampling.handover import num_bytes
from kimi_jax.sampling.logits import SamplingSettings
from kimi_jax.tasks import get_task
from kimi_jax.trainers.interrupt import Interrupted, StopRequest
from kimi_jax.trainers.setup import EVALUATION, ROLLOUT, Setup
from kimi_jax.training.checkpoint import Checkpointer
from kimi_jax.training.metrics import MetricsWriter, Stopwatch, progress
from kimi_jax.training.step import Stepper, check_finite
from kimi_jax.types import Outcome, RolloutGroup, StopReason


def loss_fn(logprobs, batch: RLBatch, hyper, *, form):
    # Before the first update of an iteration the policy is π_i: its log-probs are the reference, Δ is exactly 0.0.
    reference = jnp.where(hyper["is_pi_i"], jax.lax.stop_gradient(logprobs), batch.reference_logprobs)
    batch = dataclasses.replace(batch, reference_logprobs=reference)
    return surrogate_loss(logprobs, batch, tau=hyper["tau"], form=form)


def train(setup: Setup, params: dict, stop: StopRequest) -> dict:
    """Runs or resumes the stage from `params` and returns its final parameters. Raises Interrupted, NonFiniteError."""
    config = setup.config.rl
    writer = MetricsWriter(setup.workdir / "metrics.jsonl")
    stepper = setup.stepper(
        functools.partial(loss_fn, form=config.form), config.optimizer, total_steps=config.iterations * config.updates
    )
    settings = SamplingSettings.of(temperature=config.temperature, end_ids=[setup.tokenizer.end_id])
    prompts = setup.prompts(setup.train)
    prompt_sampler = PromptSampler(
        np.array([problem.difficulty for problem in setup.train]),
        seed=setup.config.seed,
        curriculum=config.curriculum,
        curriculum_iterations=config.curriculum_iterations,
        hard_difficulty=config.hard_difficulty,
        prior_success=config.prior_success,
        prior_visits=config.prior_visits,
        floor=config.priority_floor,
    )

    # --- state: from SFT, or from the last checkpoint
    state = setup.new_state(params, None if config.reset_optimizer else stepper.init_optimizer(params))
    serial = 0
    rollout_params = None
    with Checkpointer(
        setup.workdir / "checkpoints" / "rl",
        keep_last=config.keep_last,
        keep_best=config.keep_best,
        best_metric="accuracy" if config.keep_best else None,
    ) as checkpoints:
        start = checkpoints.latest_step() or 0
        if start:
            _, saved, meta = checkpoints.restore({"state": state, "prompts": prompt_sampler.state()})
            state, serial = saved["state"], meta["serial"]
            prompt_sampler.restore(saved["prompts"])
        writer.cut_back(start)

        watch = Stopwatch()
        bar = progress(desc="RL", total=config.iterations, initial=start)
        for iteration in range(start, config.iterations):
            # --- hand-over
            with watch("handover"):
                rollout_params = jax.block_until_ready(setup.to_rollout(state.params, rollout_params))

            # --- rollout
            with watch("rollout"):
                chosen = prompt_sampler.draw(iteration, config.problems)
                rollouts = setup.engine.generate(
                    rollout_params,
                    [prompts[int(i)] for i in chosen],
                    k=config.responses,
                    first_serial=serial,
                    run_key=setup.key(ROLLOUT),
                    settings=settings,
                    policy_version=iteration,
                )
                serial += config.problems * config.responses

            # --- verification
            with watch("verification"):
                groups = [
                    evals.judge(RolloutGroup(setup.train[i], prompts[int(i)], group))
                    for i, group in zip(chosen, rollouts, strict=True)
                ]
                for i, group in zip(chosen, groups, strict=True):
                    outcomes = [verdict.outcome for verdict in group.verdicts]
                    gradable = len(outcomes) - outcomes.count(Outcome.UNGRADABLE)
                    prompt_sampler.update(int(i), outcomes.count(Outcome.CORRECT), gradable)
                weight = length_weight(iteration, weight=config.length_weight, warmup_iterations=config.length_warmup)
                rewards = [
                    shaped_rewards(g.verdicts, [len(r) for r in g.rollouts], length_weight=weight)[0] for g in groups
                ]
                advantages = [_advantages(r, kind=config.baseline, tau=config.tau) for r in rewards]
                if config.permute_advantages:
                    rng = np.random.default_rng((setup.config.seed, iteration, 1))  # 1: not the stream of the draws
                    advantages = [_permuted(a, rng) for a in advantages]

            # --- update
            with watch("update"):
                minibatches = build_minibatches(
                    groups,
                    rewards,
                    advantages,
                    minibatches=config.updates,
                    rows=config.micro_rows,
                    responses=config.micro_rows * config.responses,
                    **setup.packing,
                )
                state, updates = _update(setup, stepper, state, minibatches)

            # --- metrics, checkpoint
            for update in updates:
                check_finite(update, f"RL iteration {iteration + 1}")
            metrics = _metrics(groups, rewards, updates, watch.pop())
            metrics["handover_bytes"] = num_bytes(rollout_params)
            done = iteration + 1
            last = done == config.iterations
            stopping = stop.requested  # looked at once: a request that comes later waits for the next iteration
            if config.eval_every and (done % config.eval_every == 0 or last):
                metrics |= _evaluate(setup, state.params)
            writer.write(done, {"iteration": done} | metrics)
            bar.set_postfix(accuracy=f"{metrics['accuracy']:.2f}", tokens=f"{metrics['response_length']:.0f}")
            bar.update(1)
            if done % config.checkpoint_every == 0 or last or stopping:
                arrays = {"state": state, "prompts": prompt_sampler.state()}
                checkpoints.save(
                    done, arrays, {"serial": serial}, {"accuracy": metrics["accuracy"]}, wait=last or stopping
                )
            if stopping and not last:
                raise Interrupted(f"RL stopped and saved at iteration {done} of {config.iterations}")
        bar.close()
    return state.params


def _update(setup: Setup, stepper: Stepper, state: TrainState, minibatches) -> tuple[TrainState, list[dict]]:
    """The optimizer steps of one iteration. All dispatched without looking; the metrics are read once at the end."""
    config = setup.config.rl
    hyper = {"temperature": np.float32(config.temperature), "tau": np.float32(config.tau), "is_pi_i": True}
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
        acc = stepper.zeros(state.params, minibatch[0], hyper)
        for batch in minibatch:
            acc = stepper.accumulate(acc, state.params, batch, hyper)
        state, update = stepper.apply(state, acc)
        metrics.append(update)
        hyper |= {"is_pi_i": False}
    if config.reset_optimizer:  # ... to here; the step counter, and with it the schedule, runs on (k1.5 §2.3.2)
        state = dataclasses.replace(state, opt_state=None)
    return state, jax.device_get(metrics)


def _advantages(rewards: np.ndarray, *, kind: Baseline, tau: float) -> np.ndarray:
    """r_j - b over the gradable responses of one group; nan stays nan."""
    gradable = np.isfinite(rewards)
    return rewards - float(baseline(rewards[gradable], kind=kind, tau=tau)) if gradable.any() else rewards


def _permuted(advantages: np.ndarray, rng) -> np.ndarray:
    gradable = np.isfinite(advantages)
    out = advantages.copy()
    out[gradable] = rng.permutation(advantages[gradable])
    return out


def _metrics(groups, rewards, updates, seconds) -> dict:
    """What an iteration was like. Means over responses unless the name says otherwise."""
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    outcomes = np.array([[verdict.outcome == Outcome.CORRECT for verdict in group.verdicts] for group in groups])
    kinds = np.array([get_task(group.problem.task).kind for group in groups])
    total = lambda name: sum(float(update[name]) for update in updates)  # noqa: E731
    tokens = max(total("tokens"), 1.0)
    metrics = {
        "reward": float(np.nanmean(np.stack(rewards))),
        "accuracy": float(outcomes.mean()),
        **{f"accuracy_{kind}": float(outcomes[kinds == kind].mean()) for kind in sorted(set(kinds))},
        "response_length": float(np.mean([len(rollout) for rollout in rollouts])),
        "truncated": float(np.mean([rollout.stop == StopReason.LENGTH for rollout in rollouts])),
        "ungradable": float(np.mean([v.outcome == Outcome.UNGRADABLE for group in groups for v in group.verdicts])),
        "groups_all_right": float(outcomes.all(axis=1).mean()),
        "groups_all_wrong": float((~outcomes.any(axis=1)).mean()),
        "groups_dropped": float(np.mean([np.isfinite(r).sum() < 2 for r in rewards])),
        "entropy": total("entropy") / tokens,
        "kl": total("kl") / tokens,
        "logprob_gap": total("logprob_gap") / tokens,
        "max_logprob_gap": max((float(update["max_logprob_gap"]) for update in updates), default=0.0),
        "first_log_ratio": float(updates[0]["max_log_ratio"]) if updates else 0.0,
        "max_log_ratio": max((float(update["max_log_ratio"]) for update in updates), default=0.0),
        "regularizer": total("regularizer"),
        "grad_norm": total("grad_norm") / max(len(updates), 1),
        "first_update_norm": float(updates[0]["update_norm"]) if updates else 0.0,
        "learning_rate": float(updates[-1]["learning_rate"]) if updates else 0.0,
        "updates": len(updates),
        "tokens_per_second": sum(len(rollout) for rollout in rollouts) / seconds["rollout"],
    }
    return metrics | {f"seconds_{phase}": s for phase, s in seconds.items()}


def _evaluate(setup: Setup, params) -> dict:
    """Sampled accuracy per kind on the first held-out problems."""
    problems = setup.heldout[: 2 * setup.config.rl.eval_problems]
    kinds = [get_task(problem.task).kind for problem in problems]
    results = evals.evaluate(
        setup.engine,
        setup.to_rollout(params, None),
        problems,
        list(setup.prompts(problems)),
        kinds=kinds,
        end_ids=[setup.tokenizer.end_id],
        key=setup.key(EVALUATION),
    )
    return {f"eval_{kind}_accuracy": result["accuracy"] for kind, result in results.items()}
