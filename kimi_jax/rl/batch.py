"""Host -> device: judged groups become the packed micro-batches of an iteration's updates."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from kimi_jax.arrays import RLBatch
from kimi_jax.data.packing import pack_rows, plan_rows
from kimi_jax.types import Example, RolloutGroup


def build_minibatches(
    groups: Sequence[RolloutGroup],
    rewards: Sequence[np.ndarray],
    advantages: Sequence[np.ndarray],
    *,
    minibatches: int,
    rows: int,
    row_tokens: int,
    row_patches: int,
    responses: int,
    patch_dim: int,
    merge: int,
    image_id: int,
    extras: Sequence[str] = (),
    oldest_version: int,
) -> list[list[RLBatch]]:
    """Splits groups into mini-batches (one update each) and those into micro-batches of fixed shape (NumPy arrays).

    rewards, advantages: per group float [k], nan where a response is ungradable; those responses are left out, and a
    group of fewer than two others is left out whole (k1.5 §2.3.2; the caller counts them). Groups keep their order and
    are dealt out in turn. rows, row_tokens, row_patches: shape of a micro-batch; responses: N, its capacity in
    responses; patch_dim to extras: see `data.packing.pack_rows`. Tokens that a version before `oldest_version` sampled
    carry no loss (k1.5 §2.6.2). The number of micro-batches varies, their shape does not, so nothing recompiles.
    """
    kept = [i for i in range(len(groups)) if np.isfinite(rewards[i]).sum() >= 2]
    out = []
    for m in range(minibatches):
        members = kept[m::minibatches]
        examples, records = [], []
        for group, i in enumerate(members):
            gradable = np.flatnonzero(np.isfinite(rewards[i])).tolist()
            for j in gradable:
                examples.append(_example(groups[i], j))
                weight = 1.0 / (len(gradable) * len(members))
                records.append((groups[i].rollouts[j], rewards[i][j], advantages[i][j], weight, group))
        plan = plan_rows(examples, row_tokens=row_tokens, row_patches=row_patches) if examples else []
        # A row of short responses may hold more of them than a micro-batch: cut it.
        plan = [row[i : i + responses] for row in plan for i in range(0, len(row), responses)]
        pack = dict[str, Any](row_tokens=row_tokens, row_patches=row_patches, patch_dim=patch_dim, merge=merge)
        pack |= dict(image_id=image_id, extras=extras)
        out.append(
            [
                _micro_batch(examples, records, part, rows, responses, oldest_version, pack)
                for part in _parts(plan, rows, responses)
            ]
        )
    return out


def _example(group: RolloutGroup, j: int) -> Example:
    prompt, response = group.prompt.tokens, group.rollouts[j].tokens
    trained = np.repeat([False, True], [len(prompt), len(response)])
    return Example(np.concatenate([prompt, response]).astype(np.int32), trained, group.prompt.images)


def _parts(plan, rows, responses):
    """Consecutive rows of the plan, at most `rows` rows and `responses` responses at a time."""
    part: list[list[int]] = []
    for row in plan:
        if len(part) == rows or sum(map(len, part)) + len(row) > responses:
            yield part
            part = []
        part.append(row)
    if part:
        yield part


def _micro_batch(examples, records, plan, rows, responses, oldest_version, pack) -> RLBatch:
    packed, placements = pack_rows(examples, plan, num_rows=rows, **pack)
    response = np.zeros(packed.tokens.shape, np.int32)
    behavior = np.zeros(packed.tokens.shape, np.float32)
    versions = np.zeros(packed.tokens.shape, np.int32)
    per_response = {name: np.zeros(responses, np.float32) for name in ("rewards", "advantages", "weights")}
    per_response["group"] = np.zeros(responses, np.int32)
    lengths = np.ones(responses, np.float32)
    for n, (index, (row, start)) in enumerate(placements.items()):
        rollout, reward, advantage, weight, group = records[index]
        prompt_length = len(examples[index].tokens) - len(rollout)
        # The target of position t is token t + 1.
        targets = slice(start + prompt_length - 1, start + len(examples[index].tokens) - 1)
        in_loss = rollout.versions >= oldest_version
        packed.loss_mask[row, targets] &= in_loss
        response[row, targets] = np.where(in_loss, n, 0)
        behavior[row, targets] = rollout.logprobs
        versions[row, targets] = rollout.versions
        lengths[n] = max(len(rollout), 1)  # a response may be cut before its first token
        values = (reward, advantage, weight, group)
        for name, value in zip(per_response, values, strict=True):
            per_response[name][n] = value
    return RLBatch(
        rows=packed,
        response=response,
        behavior_logprobs=behavior,
        versions=versions,
        reference_logprobs=np.full_like(behavior, np.nan),  # until scored,
        lengths=lengths,
        **per_response,
    )
