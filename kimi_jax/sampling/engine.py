"""The host side of sampling: prompts in, rollouts out, in batches of a few fixed shapes."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from kimi_jax.arrays import SamplingState
from kimi_jax.data.packing import pack_rows
from kimi_jax.models.policy import Policy
from kimi_jax.sampling import decode
from kimi_jax.sampling.logits import SamplingSettings
from kimi_jax.types import Example, Prompt, Rollout, StopReason


@dataclasses.dataclass(frozen=True)
class Engine:
    """Samples k responses for each of a list of prompts.

    rows: responses in flight. prompt_tokens, prompt_patches: the bucket that every prompt is padded to. max_tokens:
    most tokens of a response. chunk: tokens between two looks at the host. One (k, bucket) is one compilation of
    prefill and of decode.
    """

    policy: Policy
    image_id: int
    decode_text: Callable[[np.ndarray], str]
    rows: int
    prompt_tokens: int
    prompt_patches: int
    max_tokens: int
    chunk: int
    put_rows: Callable = lambda tree: tree  # places arrays whose first axis is rows on the mesh

    def check(self, prompt: Prompt, name: str) -> None:
        """Raises ValueError that names a prompt which does not fit the buckets."""
        patches = sum(len(image.patches) for image in prompt.images)
        for size, limit, knob in (
            (len(prompt.tokens), self.prompt_tokens, "sampling.prompt_tokens"),
            (patches, self.prompt_patches, "sampling.prompt_patches"),
        ):
            if size > limit:
                raise ValueError(
                    f"The prompt of {name} has size {size}, the limit is {knob}={limit}. Raise {knob} or drop it."
                )

    def generate(
        self,
        params: dict,
        prompts: Sequence[Prompt],
        *,
        k: int,
        first_serial: int,
        run_key: jax.Array,
        settings: SamplingSettings,
        policy_version: int,
        budget: int | None = None,
    ) -> list[tuple[Rollout, ...]]:
        """k rollouts per prompt. Response j of prompt i has serial `first_serial + i · k + j`.

        params: sampling layout. budget: most tokens per response, by default max_tokens.
        Raises ValueError when k does not divide the rows, the budget is out of range, or a prompt is too long.
        """
        if k < 1 or self.rows % k:
            raise ValueError(f"sampling.rows={self.rows} must be a multiple of k={k} responses per prompt.")
        for i, prompt in enumerate(prompts):
            self.check(prompt, f"prompt {i} of {len(prompts)}")
        groups = []
        at_once = self.rows // k
        for begin in range(0, len(prompts), at_once):
            batch = prompts[begin : begin + at_once]
            start = self._start(params, batch, k, first_serial + begin * k, budget, run_key, settings)
            *_, end = self._chunks(params, start, run_key, settings)
            rollouts = self._collect(end, policy_version)
            del end  # or its cache would still be there while the next batch gets one
            groups += [tuple(rollouts[i * k : (i + 1) * k]) for i in range(len(batch))]
        return groups

    def stream(self, params, prompt: Prompt, *, serial, run_key, settings, budget=None) -> Iterator[Rollout]:
        """One response, yielded as far as it is after every chunk; the last one yielded is whole."""
        self.check(prompt, "the question")
        start = self._start(params, [prompt], self.rows, serial, budget, run_key, settings)
        for state in self._chunks(params, start, run_key, settings):
            yield self._collect(state, 0)[0]

    def _start(self, params, prompts, k, first_serial, budget, run_key, settings) -> SamplingState:
        budget = self.max_tokens if budget is None else budget
        if not 1 <= budget <= self.max_tokens:
            raise ValueError(f"A budget of {budget} tokens is outside 1..{self.max_tokens} (sampling.max_tokens).")
        arrays = self.start_arrays(prompts, k=k, first_serial=first_serial, budget=budget)
        return decode.start(params, *arrays, run_key, settings, **self.start_statics)

    @property
    def start_statics(self) -> dict[str, Any]:
        """What one compilation of `decode.start` is for."""
        slots = self.prompt_tokens + self.max_tokens
        return {"policy": self.policy, "slots": slots, "max_tokens": self.max_tokens}

    def start_arrays(self, prompts: Sequence[Prompt], *, k: int, first_serial: int, budget: int) -> tuple:
        """The arguments of `decode.start` that come from the host, from `prompts` to `budgets`, placed on the mesh."""
        num_prompts = self.rows // k
        examples = [Example(p.tokens, np.zeros(len(p.tokens), bool), p.images) for p in prompts]
        packed, _ = pack_rows(
            examples,
            [[i] for i in range(len(examples))],
            num_rows=num_prompts,
            row_tokens=self.prompt_tokens,
            row_patches=self.prompt_patches,
            patch_dim=self.policy.config.vision.patch_dim if self.policy.config.vision else 0,
            merge=self.policy.config.vision.merge_size if self.policy.config.vision else 1,
            image_id=self.image_id,
        )
        lengths = np.ones(num_prompts, np.int32)
        lengths[: len(prompts)] = [len(p.tokens) for p in prompts]
        prompt_of_row = np.arange(self.rows, dtype=np.int32) // k
        serials = np.arange(first_serial, first_serial + self.rows, dtype=np.uint32)
        budgets = np.where(prompt_of_row < len(prompts), budget, 0).astype(np.int32)
        return self.put_rows((packed, lengths, prompt_of_row, serials, budgets))

    def _chunks(self, params, state, run_key, settings) -> Iterator[SamplingState]:
        """`state`, and what each further chunk makes of it until every row is done. Only the newest is usable."""
        yield state
        while not bool(state.done.all()):
            state = decode.decode_chunk(params, state, run_key, settings, policy=self.policy, steps=self.chunk)
            yield state

    def _collect(self, state: SamplingState, policy_version: int) -> list[Rollout]:
        serials, tokens, logprobs, lengths, ended = jax.device_get(
            (state.serials, state.tokens, state.logprobs, state.lengths, state.ended)
        )
        return [
            Rollout(
                serial=int(serials[b]),
                tokens=tokens[b, : lengths[b]],
                logprobs=logprobs[b, : lengths[b]],
                stop=StopReason.END if ended[b] else StopReason.LENGTH,
                policy_version=policy_version,
                text=self.decode_text(tokens[b, : lengths[b]]),
            )
            for b in range(self.rows)
        ]
