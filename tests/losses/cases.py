"""A micro-batch of ragged groups for the objectives of RL, the same facts as plain lists, and a policy in NumPy."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kimi_jax.arrays import PackedRows, RLBatch

GROUPS = (2, 3, 5)  # responses per problem
ROWS, ROW_LENGTH = 7, 23


class Case(NamedTuple):
    """Three problems, responses in any order in rows, and the same facts as plain lists for the oracles."""

    batch: RLBatch
    logprobs: np.ndarray  # [R, T], nan where the mask is off
    rewards: list  # per problem [k]
    responses: list  # per problem, per response: (rows, columns) of its tokens in the loss


def make_case(advantages=lambda r: r - r.mean(), seed=0) -> Case:
    """advantages: from the rewards of a problem [k]."""
    rng = np.random.default_rng(seed)
    n = sum(GROUPS) + 1  # the last one is padding
    num_tokens = rng.integers(2, 9, n - 1)
    free = np.zeros(ROWS, int)
    places = [None] * (n - 1)
    for j in rng.permutation(n - 1):
        row = rng.choice(np.flatnonzero(free + num_tokens[j] + 3 <= ROW_LENGTH)[:3])
        start = free[row] + rng.integers(1, 3)  # a prompt, which is not in the loss
        columns = np.delete(start + np.arange(num_tokens[j]), rng.integers(1, num_tokens[j]))  # and a hole
        places[j] = (np.full(columns.size, row), columns)
        free[row] = start + num_tokens[j]

    mask = np.zeros((ROWS, ROW_LENGTH), bool)
    response = np.zeros((ROWS, ROW_LENGTH), np.int32)
    for j, place in enumerate(places):
        assert not mask[place].any()
        mask[place], response[place] = True, j
    assert max(len(set(response[row][mask[row]])) for row in range(ROWS)) >= 2

    logprobs, reference, behavior = (
        np.where(mask, -rng.exponential(size=mask.shape), garbage) for garbage in (np.nan, np.inf, np.nan)
    )
    rewards = [rng.integers(0, 2, k) + 0.2 * rng.normal(size=k) for k in GROUPS]
    zeros = np.zeros((ROWS, ROW_LENGTH), np.int32)
    batch = RLBatch(
        rows=PackedRows(
            tokens=zeros,
            targets=zeros,
            loss_mask=mask,
            positions=zeros,
            segments=mask.astype(np.int32),
            image_index=zeros - 1,
            patches=np.zeros((ROWS, 0, 3)),
            patch_positions=np.zeros((ROWS, 0, 2), np.int32),
            patch_segments=np.zeros((ROWS, 0), np.int32),
        ),
        response=response,
        behavior_logprobs=behavior,
        versions=zeros,
        reference_logprobs=reference,
        rewards=np.append(np.concatenate(rewards), 0.0),
        advantages=np.append(np.concatenate([advantages(r) for r in rewards]), 0.0),
        weights=np.append(np.concatenate([np.full(k, 1 / (k * len(GROUPS))) for k in GROUPS]), 0.0),
        lengths=np.append(num_tokens, 1).astype(float),  # holes included: |y_j| is not the number of tokens in the loss
        group=np.append(np.repeat(np.arange(len(GROUPS)), GROUPS), 0).astype(np.int32),
    )
    bounds = np.cumsum((0, *GROUPS))
    return Case(batch, logprobs, rewards, [places[a:b] for a, b in zip(bounds, bounds[1:], strict=False)])


def cast(tree, dtype):
    return jax.tree.map(lambda x: jnp.asarray(x, dtype if np.issubdtype(x.dtype, np.floating) else x.dtype), tree)


def log_softmax(logits):
    logits = logits - logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def softmax_model(seed=1, features=3, vocabulary=5):
    """A policy with parameters: log softmax(x W) at the targets, in NumPy and in JAX."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(ROWS, ROW_LENGTH, features))
    targets = rng.integers(0, vocabulary, (ROWS, ROW_LENGTH, 1))
    params = rng.normal(size=(features, vocabulary))
    in_numpy = lambda w: np.take_along_axis(log_softmax(x @ w), targets, -1)[..., 0]  # noqa: E731
    in_jax = lambda w: jnp.take_along_axis(jax.nn.log_softmax(x @ w), targets, -1)[..., 0]  # noqa: E731
    return params, x, targets, in_numpy, in_jax


def central_differences(f, params, eps=1e-5):
    grad = np.zeros_like(params)
    for i in np.ndindex(params.shape):
        step = np.zeros_like(params)
        step[i] = eps
        grad[i] = (f(params + step) - f(params - step)) / (2 * eps)
    return grad


def rows_of(case: Case, chosen: np.ndarray) -> Case:
    """The micro-batch of these rows, with responses of its own, numbered backwards, and padding to the same N."""
    arrays = {field.name: getattr(case.batch, field.name) for field in dataclasses.fields(case.batch)}
    n = arrays["weights"].size
    mask = case.batch.rows.loss_mask[chosen]
    present = np.unique(case.batch.response[chosen][mask])[::-1]
    number = np.zeros(n, np.int32)
    number[present] = np.arange(present.size)
    padding = {"weights": 0.0, "advantages": 0.0, "rewards": 0.0, "lengths": 1.0, "group": 0}
    for name, fill in padding.items():
        arrays[name] = np.append(arrays[name][present], np.full(n - present.size, fill, arrays[name].dtype))
    for name in ("behavior_logprobs", "versions", "reference_logprobs"):
        arrays[name] = arrays[name][chosen]
    arrays["response"] = np.where(mask, number[case.batch.response[chosen]], 0)
    arrays["rows"] = jax.tree.map(lambda x: x[chosen], case.batch.rows)
    return case._replace(batch=RLBatch(**arrays), logprobs=case.logprobs[chosen])
