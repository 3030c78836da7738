"""Learning from preferences between responses: DPO as a stage of the supervised loop (k1.5 §2.4).

The reference π_ref is the policy that the stage begins with. Its log-probs of the pairs are taken once, before the
first update, in the rows that training uses. Its weights are not kept; a run that resumes takes the log-probs again,
and finds the same.
"""

import functools
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from kimi_jax.arrays import PackedRows, pytree
from kimi_jax.data.loaders import endless
from kimi_jax.data.packing import pack_rows, plan_rows
from kimi_jax.long2short.choosing import Pair, read_pairs
from kimi_jax.losses.preference import direct_preference
from kimi_jax.trainers import supervised
from kimi_jax.trainers.setup import Setup
from kimi_jax.trainers.supervised import Stage
from kimi_jax.types import Example


@pytree
class PairBatch:
    """Rows in which the members of a pair are neighbours: segments 1 and 2, then 3 and 4, ...; the chosen one first."""

    rows: PackedRows
    reference_logprobs: Any  # float32 [R, T], of the targets


def stage(setup: Setup) -> Stage:
    """The pairs of config.dpo, with the settings of config.sft. Raises ValueError, FileNotFoundError."""
    options, config = setup.config.dpo, setup.config.sft
    pairs = [encode(setup, pair) for pair in read_pairs(options.pairs)]
    order = np.random.default_rng(setup.config.seed).permutation(len(pairs)).tolist()
    examples = [side for index in order for side in pairs[index]]
    plan = _plan(examples, setup.packing)
    epochs = endless(range(len(plan)), setup.config.seed)
    read = [epochs[i] for i in range(min(config.steps * config.rows, len(plan)))]  # all, if it comes to an epoch
    reference = dict(zip(read, _reference(setup, examples, [plan[i] for i in read]), strict=True))

    def pack(indices: list[int]) -> PairBatch:
        rows = _packed(setup, examples, [plan[i] for i in indices], config.rows)
        return PairBatch(rows, np.stack([reference[i] for i in indices]))

    one = config.rows == 1  # in batches of one, grain's length of an endless dataset overflows
    return Stage(
        name="dpo",
        options=config,
        batches=epochs.map(lambda i: pack([i])) if one else epochs.batch(config.rows, batch_fn=pack),
        loss_fn=functools.partial(loss_fn, beta=options.beta, alpha=options.alpha),
        weight=lambda batch: 1 / max(num_pairs(batch.rows), 1),
        summarize=_summary,
        evaluate=functools.partial(supervised.greedy_accuracy, setup) if config.eval_problems else lambda params: {},
    )


def encode(setup: Setup, pair: Pair) -> tuple[Example, Example]:
    """(chosen, rejected) with the prompt before them. Raises ValueError for sides whose tokens are the same, and for a
    pair that no row can hold."""
    prompt = setup.chat.encode_problem(pair.problem)
    chosen, rejected = (setup.chat.encode_example(prompt, text) for text in (pair.chosen, pair.rejected))
    if not pair.rejected_ends:
        rejected = Example(rejected.tokens[:-1], rejected.trained[:-1], rejected.images)
    if np.array_equal(chosen.tokens, rejected.tokens):
        raise ValueError(
            f"{setup.config.dpo.pairs}: the two sides of pair {pair.problem.id!r} are the same tokens, so nothing is "
            "preferred. Drop the pair."
        )
    tokens, limit = len(chosen.tokens) + len(rejected.tokens), setup.config.rows.tokens
    if tokens > limit:
        raise ValueError(
            f"{setup.config.dpo.pairs}: pair {pair.problem.id!r} has {tokens} tokens on its two sides, which share a "
            f"row, but a row has config.rows.tokens={limit}. Raise that or drop the pair."
        )
    return chosen, rejected


def loss_fn(logprobs, batch: PairBatch, hyper, *, beta: float, alpha: float):
    R, T = logprobs.shape
    member = batch.rows.segments - 1
    return direct_preference(
        logprobs,
        batch.reference_logprobs,
        batch.rows.loss_mask,
        member % 2 == 0,
        np.arange(R)[:, None] * T + member // 2,
        pairs=R * T,
        beta=beta,
        alpha=alpha,
        weight=hyper["weight"],
    )


def num_pairs(rows: PackedRows) -> int:
    return int(rows.segments.max(axis=1).sum()) // 2


def _plan(examples: list[Example], packing: dict) -> list[list[int]]:
    """Rows of pairs. Raises ValueError if one does not fit in a row."""
    joined = [
        Example(np.concatenate([a.tokens, b.tokens]), np.concatenate([a.trained, b.trained]), (*a.images, *b.images))
        for a, b in zip(examples[::2], examples[1::2], strict=True)
    ]
    sizes = {name: packing[name] for name in ("row_tokens", "row_patches")}
    return [[2 * pair + j for pair in row for j in range(2)] for row in plan_rows(joined, **sizes)]


def _packed(setup: Setup, examples: list[Example], plan: list[list[int]], num_rows: int) -> PackedRows:
    return pack_rows(examples, plan, num_rows=num_rows, **setup.packing)[0]


def _reference(setup: Setup, examples: list[Example], plan: list[list[int]]) -> np.ndarray:
    """Log-probs under the parameters that the stage begins with, float32 [rows of the plan, T]."""
    chunk, size = setup.config.rows.logits_chunk, setup.config.sft.micro_rows
    everywhere = NamedSharding(setup.mesh, PartitionSpec())

    @functools.partial(jax.jit, out_shardings=everywhere)
    def score(params, rows):
        return setup.policy.logprobs(params, rows, temperature=np.float32(1), logits_chunk=chunk)[0]

    params, found = setup.init_params(), []
    for begin in range(0, len(plan), size):
        rows = setup.put_rows(_packed(setup, examples, plan[begin : begin + size], size))
        found.append(np.asarray(score(params, rows)))  # waits, once before training: else all rows would pile up there
    for leaf in jax.tree.leaves(params):  # the loop begins with parameters of its own
        leaf.delete()
    return np.concatenate(found)[: len(plan)]  # the last batch is filled up


def _summary(metrics: list[dict]) -> dict:
    """Means over pairs: `accuracy`, the share whose chosen response is preferred; rewards are β Δ; `chosen_nll` is per
    token."""
    total = lambda name: sum(m[name] for m in metrics)  # noqa: E731
    pairs = total("pairs")
    means = {name: total(name) / pairs for name in ("chosen_nll", "chosen_reward", "rejected_reward")}
    return {"loss": total("nll") / pairs, "accuracy": total("right") / pairs} | means
