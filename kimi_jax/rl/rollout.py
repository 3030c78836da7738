"""The rollout phase of an iteration: partial rollouts in, complete groups out (k1.5 §2.6.2).

    continue   open responses of the replay buffer, oldest first: prompt and saved tokens are read again, under the new
               weights, and writing goes on with the noise that the uninterrupted response would have had
    begin      k responses to each new problem
    judge      a response as soon as it is finished, in worker processes, while others are still being written
    release    groups whose k responses are finished, once they are judged; the others stay in the buffer, and nobody
               waits for their verdicts

An iteration ends when every response has finished or has used up its `segment_tokens`, or, with `enough`, as soon as so
many groups are complete. The report leaves open how many of the old tokens are trained on: `max_segment_lag` of
`trainers.config` says it. The first complete groups are those with short responses: what that does is measured
(`tokens_released`, `tokens_open`), and with `segment_tokens` alone no group is passed over.
"""

import dataclasses
import itertools
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future

import jax
import numpy as np

from kimi_jax.rl.replay_buffer import ReplayBuffer
from kimi_jax.sampling.engine import Engine
from kimi_jax.sampling.logits import SamplingSettings
from kimi_jax.training import distributed
from kimi_jax.types import (
    OpenGroup,
    OpenResponse,
    Outcome,
    Problem,
    Prompt,
    Request,
    Rollout,
    RolloutGroup,
    Segment,
    StopReason,
    Verdict,
)


@dataclasses.dataclass(frozen=True)
class Collected:
    """What a rollout phase gave. `problems[i]` is the index of the problem of `groups[i]`."""

    problems: list[int]
    groups: list[RolloutGroup]
    metrics: dict[str, float]


def collect(
    buffer: ReplayBuffer,
    new: Sequence[int] | np.ndarray,
    *,
    engine: Engine,
    params: dict,
    problems: Sequence[Problem],
    prompts: Sequence[Prompt],
    submit: Callable[[Problem, str], Future[Verdict]],
    k: int,
    iteration: int,
    first_serial: int,
    segment_tokens: int | None,
    enough: int | None,
    max_age: int | None,
    run_key: jax.Array,
    settings: SamplingSettings,
) -> Collected:
    """Runs one rollout phase; `buffer` holds what is open afterwards.

    new: indices of the problems to begin; response j to the i-th of them has serial `first_serial + i · k + j`. submit:
    starts to judge a finished response (`rewards.pool`). segment_tokens: most tokens that a response may grow by; None:
    all it needs. enough: complete groups after which the phase ends; later ones wait in the buffer; None: no such end.
    max_age: iterations after which the open responses of a group are cut as if their budget was used up; None: never.
    """
    begin = time.perf_counter()
    buffer.groups += [
        OpenGroup(int(index), iteration, [OpenResponse(first_serial + i * k + j) for j in range(k)])
        for i, index in enumerate(new)
    ]
    encoded = {group.problem: prompts[group.problem] for group in buffer.groups}
    work = [(group, response) for group in buffer.groups for response in group.responses if not response.stop]
    limit = engine.max_tokens if segment_tokens is None else segment_tokens
    requests = [
        Request(encoded[group.problem], response.serial, min(limit, engine.max_tokens - len(response)), response.tokens)
        for group, response in work
    ]
    complete = [group for group in buffer.groups if group.complete]  # in the order in which they became so

    def judge(group: OpenGroup, response: OpenResponse) -> None:
        response.verdict = submit(problems[group.problem], engine.decode_text(response.tokens))

    for group in buffer.groups:
        for response in group.responses:
            if response.stop and not response.verdict:  # it comes from a checkpoint
                judge(group, response)

    # --- sample, and judge what is finished meanwhile
    flight = engine.start(params, requests, run_key=run_key, settings=settings)
    while not flight.done and (enough is None or len(complete) < enough):
        for index, segment in flight.advance():
            group, response = work[index]
            _extend(response, segment, iteration, engine.max_tokens)
            if response.stop:
                judge(group, response)
                if group.complete:
                    complete.append(group)
    for index, segment in flight.close():
        _extend(work[index][1], segment, iteration, engine.max_tokens)
    for group in buffer.groups:
        if max_age is not None and iteration - group.born >= max_age and not group.complete:
            for response in group.responses:
                if not response.stop:
                    response.stop = StopReason.LENGTH
                    judge(group, response)
            complete.append(group)
    sampled = time.perf_counter()

    # --- release
    released = complete[:enough]
    buffer.groups = [group for group in buffer.groups if not any(group is other for other in released)]
    verdicts = iter(_verdicts([response.verdict for group in released for response in group.responses]))
    groups = [_rollout_group(group, verdicts, problems, encoded, engine) for group in released]
    seconds = {"seconds_rollout": sampled - begin, "seconds_verification": time.perf_counter() - sampled}
    return Collected(
        [group.problem for group in released], groups, seconds | _metrics(buffer, groups, flight, iteration)
    )


def _verdicts(tickets: Sequence[Future[Verdict]]) -> list[Verdict]:
    """All processes judge, and the first one decides: a deadline may be missed in one and not in another."""
    verdicts = [ticket.result() for ticket in tickets]
    outcomes = list(Outcome)
    mine = np.array([(outcomes.index(v.outcome), v.well_formed) for v in verdicts], np.int32).reshape(-1, 2)
    agreed = [
        Verdict(outcomes[code], "as judged by process 0", bool(formed)) for code, formed in distributed.agreed(mine)
    ]
    same = lambda a, b: (a.outcome, a.well_formed) == (b.outcome, b.well_formed)  # noqa: E731
    return [own if same(own, other) else other for own, other in zip(verdicts, agreed, strict=True)]


def _extend(response: OpenResponse, segment: Segment, iteration: int, max_tokens: int) -> None:
    response.tokens = np.concatenate([response.tokens, segment.tokens])
    response.logprobs = np.concatenate([response.logprobs, segment.logprobs])
    response.versions = np.concatenate([response.versions, np.full(len(segment.tokens), iteration, np.int32)])
    only_paused = segment.stop in (None, StopReason.LENGTH) and len(response) < max_tokens
    response.stop = None if only_paused else segment.stop or StopReason.LENGTH


def _rollout_group(group: OpenGroup, verdicts, problems, encoded, engine: Engine) -> RolloutGroup:
    rollouts = tuple(
        Rollout(r.serial, r.tokens, r.logprobs, r.versions, r.stop, engine.decode_text(r.tokens))
        for r in group.responses
    )
    own = tuple(itertools.islice(verdicts, len(rollouts)))
    return RolloutGroup(problems[group.problem], encoded[group.problem], rollouts, own)


def _metrics(buffer: ReplayBuffer, groups: list[RolloutGroup], flight, iteration: int) -> dict[str, float]:
    """staleness: iterations since a released token was sampled, mean. Lengths are in tokens, means over responses; a
    mean of nothing is nan."""
    waiting = buffer.open_responses
    ages = [iteration - rollout.versions for group in groups for rollout in group.rollouts]
    lengths = [len(rollout) for group in groups for rollout in group.rollouts]
    drawn = sum(int(counts.sum()) for _, counts in flight.trace)
    continued = [request for request in flight.requests if len(request.prefix)]
    reread = sum(len(r.prefix) for r in continued) + sum(
        len(prompt.tokens) for prompt in {id(r.prompt): r.prompt for r in continued}.values()
    )
    return {
        "buffer_groups": len(buffer.groups),
        "buffer_responses": len(waiting),
        "buffer_tokens": sum(map(len, waiting)),
        "buffer_age": max((iteration - group.born for group in buffer.groups), default=0),
        "staleness": _mean(np.concatenate([np.zeros(0), *ages])),
        "tokens_released": _mean(lengths),
        "tokens_open": _mean([len(response) for response in waiting]),
        "tokens_per_second": drawn / flight.seconds if flight.seconds else 0.0,
        "slot_use": drawn / (flight.steps * flight.engine.rows) if flight.steps else 0.0,
        "prefilled_tokens": flight.prefilled_tokens,
        "seconds_prefill": flight.prefill_seconds,
        "seconds_reprefill": flight.prefill_seconds * reread / max(flight.prefilled_tokens, reread, 1),
    }


def _mean(values) -> float:
    return float(np.mean(values)) if len(values) else float("nan")
