"""The loop over fixed data: batches -> loss -> update -> now and then: evaluate, checkpoint.

What a stage of training is made of, a `Stage`, says what the batches are and how they are learned. The one here is
cross-entropy on whatever is to be imitated: the documents of pretraining (k1.5 §2.5.1), what the assistant says in
conversations (§2.5.2), or worked solutions of the problems that RL will be about (§2.2).
"""

import collections
import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import grain
import jax
import ml_collections
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from kimi_jax import evals
from kimi_jax.arrays import PackedRows, pytree
from kimi_jax.data.loaders import prefetched, sft_batches, trained_tokens
from kimi_jax.losses.token import cross_entropy
from kimi_jax.sampling.logits import SamplingSettings
from kimi_jax.trainers import sources
from kimi_jax.trainers.interrupt import Interrupted, StopRequest
from kimi_jax.trainers.setup import EVALUATION, Setup
from kimi_jax.training.checkpoint import Checkpointer
from kimi_jax.training.metrics import MetricsWriter, Stopwatch, progress
from kimi_jax.training.step import LossFn, Reads, check_finite
from kimi_jax.types import Problem


@dataclasses.dataclass(frozen=True)
class Stage:
    """What one supervised stage is made of.

    name: of its checkpoints, checkpoints/NAME, and of NAME_metrics.jsonl. options: its section of the config. batches:
    element i is the batch of update i + 1, a pytree of NumPy arrays whose first axis is rows, with a field `rows`.
    loss_fn: see `training.step`; hyper["weight"] is `weight(batch)`, 1 over what the loss is a mean of. summarize: from
    the metrics of several updates to what is written. evaluate: what else is written, from parameters. reads: what of
    the policy the loss is given.
    """

    name: str
    options: ml_collections.ConfigDict
    batches: grain.MapDataset
    loss_fn: LossFn
    weight: Callable[[Any], float]
    summarize: Callable[[list[dict]], dict]
    evaluate: Callable[[dict], dict]
    reads: Reads = "logprobs"


def train(setup: Setup, stage: Stage, stop: StopRequest) -> dict:
    """Runs or resumes the stage and returns its final parameters. Raises Interrupted, NonFiniteError."""
    config, title = stage.options, stage.name.upper()
    writer = MetricsWriter(setup.workdir / f"{stage.name}_metrics.jsonl")
    stepper = setup.stepper(stage.loss_fn, config.optimizer, config.steps, stage.reads)

    # --- state: new, or from the last checkpoint
    directory = setup.workdir / "checkpoints" / stage.name
    with Checkpointer(directory, keep_last=1, keep_best=0, best_metric=None) as checkpoints:
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
        before = len(waiting)  # of an earlier attempt, which took its seconds with it
        start = start or 0
        writer.cut_back(start)

        # --- updates
        watch = Stopwatch()
        bar = progress(desc=title, total=config.steps, initial=start)
        data = prefetched(stage.batches, start, num_threads=1)
        for step in range(start + 1, config.steps + 1):
            with watch("update"):
                whole = next(data)
                hyper = {"temperature": np.float32(1), "weight": np.float32(stage.weight(whole))}
                acc = None
                for begin in range(0, config.rows, config.micro_rows):
                    batch = jax.tree.map(lambda x, b=begin: x[b : b + config.micro_rows], whole)
                    batch = setup.put_rows(batch)
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
                    check_finite(metrics, f"{title}, update {step} or shortly before")
            if evaluate:
                summary = stage.summarize(waiting) | {
                    "grad_norm": float(np.mean([m["grad_norm"] for m in waiting])),
                    "learning_rate": waiting[-1]["learning_rate"],
                }
                bar.set_postfix(loss=f"{summary['loss']:.3f}")
                with watch("evaluation"):
                    summary |= stage.evaluate(state.params)
                seconds = watch.pop()
                summary |= {f"seconds_{phase}": s for phase, s in seconds.items()}
                summary["tokens_per_second"] = sum(m["tokens"] for m in waiting[before:]) / seconds["update"]
                writer.write(step, summary)
                waiting, before = [], 0
            if save:
                checkpoints.save(step, state, meta={"waiting": waiting}, wait=last or stopping)
            if stopping and not last:
                raise Interrupted(f"{title} stopped and saved at step {step} of {config.steps}")
        bar.close()
    return state.params


# --- cross-entropy ----------------------------------------------------------------------------------------------------


@pytree
class SFTBatch:
    rows: PackedRows


def loss_fn(logprobs, batch: SFTBatch, hyper):
    return cross_entropy(logprobs, batch.rows.loss_mask, weight=hyper["weight"])


def sft(setup: Setup) -> Stage:
    """The mixture of config.data, or else the worked solutions of the first train problems."""
    config = setup.config.sft
    if setup.config.data.mixture:
        batches = sources.batches(setup.config, setup.chat, setup.packing)
    else:
        solved = [p for p in first_per_kind(setup.train, config.examples_per_kind) if p.solution]
        prompts = setup.prompts(solved)
        examples = [setup.chat.encode_example(prompts[i], p.solution) for i, p in enumerate(solved)]
        for problem, example in zip(solved, examples, strict=True):
            if len(example.tokens) > setup.config.rows.tokens:
                raise ValueError(
                    f"Problem {problem.id!r} has {len(example.tokens)} tokens with its solution, but a row has "
                    f"config.rows.tokens={setup.config.rows.tokens}. Raise that or drop the problem."
                )
        batches = sft_batches(examples, seed=setup.config.seed, rows_per_batch=config.rows, **setup.packing)
    measures = []
    if config.eval_problems and setup.config.data.mixture:
        measures.append(_heldout_loss(setup))
    if config.eval_problems and setup.heldout:
        measures.append(functools.partial(greedy_accuracy, setup))
    return Stage(
        name="sft",
        options=config,
        batches=batches.map(SFTBatch),
        loss_fn=loss_fn,
        weight=lambda batch: 1 / max(trained_tokens(batch.rows), 1),
        summarize=_summary,
        evaluate=lambda params: {name: value for measure in measures for name, value in measure(params).items()},
    )


def first_per_kind(problems: Sequence[Problem], count: int) -> list[Problem]:
    """The first so many of each kind, in their order."""
    kept, seen = [], collections.Counter[str]()
    for problem in problems:
        seen[problem.kind] += 1
        if seen[problem.kind] <= count:
            kept.append(problem)
    return kept


def _summary(metrics: list[dict]) -> dict:
    tokens = sum(m["tokens"] for m in metrics)
    return {name: sum(m[part] for m in metrics) / tokens for name, part in (("loss", "nll"), ("entropy", "entropy"))}


def _heldout_loss(setup: Setup) -> Callable[[dict], dict]:
    """Of each source that has held-out records, the mean loss of their tokens."""
    heldout = sources.heldout(setup.config, setup.chat, setup.packing)
    chunk = setup.config.rows.logits_chunk
    everywhere = NamedSharding(setup.mesh, PartitionSpec())

    @functools.partial(jax.jit, out_shardings=everywhere)
    def total(params, rows):
        logprobs, _ = setup.policy.logprobs(params, rows, temperature=1.0, logits_chunk=chunk)
        return cross_entropy(logprobs, rows.loss_mask, weight=1.0)[0]

    def measure(params):
        found = {}
        for name, batches in heldout.items():
            nll = sum(total(params, setup.put_rows(rows)) for rows in batches)  # on the device, so that nothing waits
            found[f"{name}_heldout_loss"] = nll / sum(map(trained_tokens, batches))
        return {name: float(loss) for name, loss in jax.device_get(found).items()}

    return measure


def greedy_accuracy(setup: Setup, params) -> dict:
    """Greedy accuracy per kind on the first held-out problems."""
    problems = first_per_kind(setup.heldout, setup.config.sft.eval_problems)
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
