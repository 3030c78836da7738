"""The loop over fixed data: supervised fine-tuning on worked solutions (k1.5 §2.5.2, §2.2).

examples -> packed rows -> cross-entropy on response and end token -> update -> now and then: evaluate, checkpoint
"""

import jax
import numpy as np

from kimi_jax import evals
from kimi_jax.arrays import PackedRows, pytree
from kimi_jax.data.loaders import prefetched, sft_batches, trained_tokens
from kimi_jax.losses.token import cross_entropy
from kimi_jax.sampling.logits import SamplingSettings
from kimi_jax.trainers.interrupt import Interrupted, StopRequest
from kimi_jax.trainers.setup import EVALUATION, Setup
from kimi_jax.training.checkpoint import Checkpointer
from kimi_jax.training.metrics import MetricsWriter, Stopwatch, progress
from kimi_jax.training.step import check_finite


@pytree
class SFTBatch:
    rows: PackedRows


def loss_fn(logprobs, batch: SFTBatch, hyper):
    return cross_entropy(logprobs, batch.rows.loss_mask, weight=hyper["weight"])


def train(setup: Setup, stop: StopRequest) -> dict:
    """Runs or resumes the stage and returns its final parameters. Raises Interrupted, NonFiniteError."""
    config = setup.config.sft
    writer = MetricsWriter(setup.workdir / "sft_metrics.jsonl")
    stepper = setup.stepper(loss_fn, config.optimizer, total_steps=config.steps)

    # --- data
    solved = _first_per_kind(setup.train, config.examples_per_kind)
    prompts = setup.prompts(solved)
    examples = [setup.chat.encode_example(prompts[i], p.solution) for i, p in enumerate(solved)]
    batches = sft_batches(examples, seed=setup.config.seed, rows_per_batch=config.rows, **setup.packing)

    # --- state: new, or from the last checkpoint
    with Checkpointer(setup.workdir / "checkpoints" / "sft", keep_last=1, keep_best=0, best_metric=None) as checkpoints:
        start = checkpoints.latest_step()
        if start is None:
            params = setup.init_params()
            state = setup.new_state(params, stepper.init_optimizer(params))
        else:
            _, state, meta = checkpoints.restore(setup.state_like(stepper, moments=True))
        if start == config.steps:
            return state.params
        # Metrics since the last evaluation. They stay on the device: reading them would wait for the update.
        waiting = meta["waiting"] if start else []
        start = start or 0
        writer.cut_back(start)

        # --- updates
        watch = Stopwatch()
        bar = progress(desc="SFT", total=config.steps, initial=start)
        data = prefetched(batches, start, num_threads=1)
        for step in range(start + 1, config.steps + 1):
            with watch("update"):
                rows = next(data)
                hyper = {"temperature": np.float32(1), "weight": np.float32(1 / max(trained_tokens(rows), 1))}
                acc = None
                for begin in range(0, config.rows, config.micro_rows):
                    batch = SFTBatch(jax.tree.map(lambda x, b=begin: x[b : b + config.micro_rows], rows))
                    batch = setup.put_rows(batch)
                    acc = stepper.zeros(state.params, batch, hyper) if acc is None else acc
                    acc = stepper.accumulate(acc, state.params, batch, hyper)
                state, metrics = stepper.apply(state, acc)
            waiting.append(metrics)
            bar.update(1)

            last = step == config.steps
            stopping = stop.requested_at(step)  # looked at once: a request that comes later waits for the next step
            evaluate = step % config.eval_every == 0 or last
            save = step % config.checkpoint_every == 0 or last or stopping
            if evaluate or save:
                with watch("update"):
                    waiting = [{name: float(x) for name, x in metrics.items()} for metrics in jax.device_get(waiting)]
                for metrics in waiting:
                    check_finite(metrics, f"SFT, update {step} or shortly before")
            if evaluate:
                summary = _summary(waiting)
                bar.set_postfix(loss=f"{summary['loss']:.3f}")
                if config.eval_problems:
                    with watch("evaluation"):
                        summary |= _evaluate(setup, state.params)
                seconds = watch.pop()
                summary |= {f"seconds_{phase}": s for phase, s in seconds.items()}
                summary["tokens_per_second"] = sum(m["tokens"] for m in waiting) / seconds["update"]
                writer.write(step, summary)
                waiting = []
            if save:
                checkpoints.save(step, state, meta={"waiting": waiting}, wait=last or stopping)
            if stopping and not last:
                raise Interrupted(f"SFT stopped and saved at step {step} of {config.steps}")
        bar.close()
    return state.params


def _first_per_kind(problems, count):
    kept, seen = [], {}
    for problem in problems:
        kind = problem.kind
        seen[kind] = seen.get(kind, 0) + 1
        if seen[kind] <= count:
            kept.append(problem)
    return kept


def _summary(metrics: list[dict]) -> dict:
    tokens = sum(m["tokens"] for m in metrics)
    return {
        "loss": float(sum(m["nll"] for m in metrics) / tokens),
        "entropy": float(sum(m["entropy"] for m in metrics) / tokens),
        "grad_norm": float(np.mean([m["grad_norm"] for m in metrics])),
        "learning_rate": float(metrics[-1]["learning_rate"]),
    }


def _evaluate(setup: Setup, params) -> dict:
    """Greedy accuracy per kind on the first held-out problems."""
    problems = _first_per_kind(setup.heldout, setup.config.sft.eval_problems)
    groups = evals.sample_groups(
        setup.engine,
        setup.to_rollout(params, None),
        problems,
        list(setup.prompts(problems)),
        k=1,
        settings=SamplingSettings.of(temperature=0.0, end_ids=setup.chat.end_ids),
        key=setup.key(EVALUATION),
        judge=setup.judge,
    )
    kinds = [problem.kind for problem in problems]
    return {
        f"{kind}_greedy_accuracy": evals.accuracy([g for g, other in zip(groups, kinds, strict=True) if other == kind])
        for kind in dict.fromkeys(kinds)
    }
