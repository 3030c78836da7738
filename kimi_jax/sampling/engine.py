"""The rollout engine: continuous batching over a paged cache, on the mesh that also trains (k1.5 §2.6).

The engine is what does not change: limits, shapes, where arrays lie. A `flight` is a list of requests being answered.

Shapes come from a few buckets, so the number of compilations is bounded: one decode chunk, one fork, and `prefill` once
per bucket of lengths, with and without images, at the beginning of a sequence and further on.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kimi_jax.arrays import PackedRows, Slots
from kimi_jax.data.packing import empty_extras, pack_rows, rope_offset
from kimi_jax.models.policy import Policy
from kimi_jax.sampling.flight import Flight
from kimi_jax.sampling.logits import SamplingSettings
from kimi_jax.sampling.repetition import RepetitionSettings
from kimi_jax.training import sharding
from kimi_jax.types import Example, Prompt, Request, Rollout, Segment, StopReason

_SMALLEST_BUCKET = 16  # tokens of a row of prefill


@dataclasses.dataclass(frozen=True)
class Engine:
    """Samples responses.

    rows: slots, hence responses in flight. prompt_tokens, prompt_patches, max_tokens: the longest prompt and response.
    page: tokens per page of the cache. pages: how many there are; None: enough for every slot at full length.
    prefill_tokens: of one prefill call, and the longest piece in which a sequence is read. chunk: decode steps between
    two looks at the host. repetition_window, repetition: see `sampling.repetition`; window 0 switches it off. put_rows:
    places arrays whose first axis is rows on the mesh.
    """

    policy: Policy
    image_id: int
    decode_text: Callable[[np.ndarray], str]
    rows: int
    prompt_tokens: int
    prompt_patches: int
    max_tokens: int
    page: int
    pages: int | None
    prefill_tokens: int
    chunk: int
    repetition_window: int = 0
    repetition: RepetitionSettings | None = None
    put_rows: Callable = lambda tree: tree

    def __post_init__(self):
        if self.rows % self.shards:
            raise ValueError(
                f"sampling.rows={self.rows} must be a multiple of {self.shards}, the devices that rows are split over "
                "(mesh.data x mesh.fsdp)."
            )
        if self.shard_pages <= self.row_pages + 1:
            raise ValueError(
                f"sampling.pages={self.pages} cannot hold one response of full length: that takes {self.row_pages} "
                f"pages of {self.page} tokens, and one more if it shares its prompt, on each of {self.shards} shards "
                "of rows. Set sampling.pages to at least "
                f"{(self.row_pages + 1) * self.shards}, or None for enough for all rows."
            )

    # --- what fits ---

    @property
    def shards(self) -> int:
        mesh = self.policy.mesh
        return math.prod(mesh.shape[axis] for axis in sharding.ROW_AXES) if mesh is not None else 1

    @property
    def row_pages(self) -> int:
        """Pages of the longest sequence."""
        return -(-(self.prompt_tokens + self.max_tokens) // self.page)

    @property
    def shard_pages(self) -> int:
        """Pages of each shard of rows, the trash page among them."""
        rows = self.rows // self.shards
        # A row may hold one page more than it reads: that from which it copied the end of a shared prompt.
        return 1 + (rows * (self.row_pages + 1) if self.pages is None else self.pages // self.shards)

    def check(self, prompt: Prompt, name: str) -> None:
        """Raises ValueError that names a prompt which does not fit, or which this model cannot read."""
        patches = sum(len(image.patches) for image in prompt.images)
        if patches and not self.policy.config.vision:
            raise ValueError(f"The prompt of {name} has images, and this model reads text alone. Drop the images.")
        for size, limit, knob in (
            (len(prompt.tokens), self.prompt_tokens, "sampling.prompt_tokens"),
            (patches, self.prompt_patches, "sampling.prompt_patches"),
        ):
            if not (size or knob.endswith("patches")):
                raise ValueError(f"The prompt of {name} is empty. Give it at least one token.")
            if size > limit:
                raise ValueError(
                    f"The prompt of {name} has size {size}, the limit is {knob}={limit}. Raise {knob} or drop it."
                )
        if patches and prompt.tokens[-1] == self.image_id:
            raise ValueError(f"The prompt of {name} ends with an image. Let text follow, if only one token of it.")

    # --- sampling ---

    def start(
        self,
        params: dict,
        requests: Sequence[Request],
        *,
        run_key: jax.Array,
        settings: SamplingSettings,
        stop_strings: Sequence[str] = (),
    ) -> Flight:
        """A flight that answers the requests. params: sampling layout.

        stop_strings: looked for at the ends of chunks; the response then ends with the token that completes one.
        Raises ValueError that names a request which cannot be answered.
        """
        if "" in stop_strings:
            raise ValueError("A stop string is empty, and so every response would stop at once. Drop it.")
        for i, request in enumerate(requests):
            name = f"request {i} of {len(requests)}"
            self.check(request.prompt, name)
            left = self.max_tokens - len(request.prefix)
            if not 1 <= request.budget <= left:
                raise ValueError(
                    f"A budget of {request.budget} tokens for {name} is outside 1..{left} "
                    f"(sampling.max_tokens={self.max_tokens}, {len(request.prefix)} of them written)."
                )
        return Flight(self, params, requests, run_key, settings, stop_strings)

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
        """k rollouts per prompt, all of them to their ends. Response j of prompt i has serial `first_serial + i·k + j`.

        params: sampling layout. budget: most tokens per response, by default max_tokens. Raises as `start` does.
        """
        budget = self.max_tokens if budget is None else budget
        requests = [
            Request(prompt, first_serial + i * k + j, budget) for i, prompt in enumerate(prompts) for j in range(k)
        ]
        flight = self.start(params, requests, run_key=run_key, settings=settings)
        rollouts: list[Any] = [None] * len(requests)
        while not flight.done:
            for i, segment in flight.advance():
                rollouts[i] = self.rollout(requests[i].serial, segment, policy_version)
        return [tuple(rollouts[i * k : (i + 1) * k]) for i in range(len(prompts))]

    def stream(self, params, prompt: Prompt, *, serial, run_key, settings, budget=None) -> Iterator[Rollout]:
        """One response, yielded as far as it is after every chunk; the last one yielded is whole."""
        request = Request(prompt, serial, self.max_tokens if budget is None else budget)
        flight = self.start(params, [request], run_key=run_key, settings=settings)
        while not flight.done:
            finished = flight.advance()
            yield self.rollout(serial, finished[0][1] if finished else flight.peek(0), 0)

    def rollout(self, serial: int, segment: Segment, policy_version: int) -> Rollout:
        """A response of one segment."""
        return Rollout(
            serial=serial,
            tokens=segment.tokens,
            logprobs=segment.logprobs,
            versions=np.full(len(segment.tokens), policy_version, np.int32),
            stop=segment.stop or StopReason.LENGTH,
            text=self.decode_text(segment.tokens),
        )

    # --- device arrays ---

    def new_pages(self) -> tuple:
        """The cache. Raises MemoryError that names the knobs when the device has no room for it."""
        shapes = self.page_shapes()
        try:
            return jax.block_until_ready(_zeros(*jax.tree.flatten(shapes)))
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            size = sum(math.prod(s.shape) * s.dtype.itemsize for s in jax.tree.leaves(shapes))
            count = self.shards * self.shard_pages
            raise MemoryError(
                f"The cache of {count:,} pages of {self.page} tokens takes {size / 2**30:.2f} GiB "
                f"({size / count / 2**20:.2f} MiB a page), which the device does not have. Lower sampling.rows"
                f"={self.rows} or sampling.max_tokens={self.max_tokens}, or set sampling.pages to what fits: requests "
                "then wait for pages."
            ) from error

    def page_shapes(self):
        """Shapes and shardings of the cache."""
        count = self.shards * self.shard_pages
        shapes = jax.eval_shape(lambda: self.policy.new_pages(count, self.page))
        return sharding.page_shapes(self.policy.mesh, shapes)

    def empty_slots(self) -> Slots:
        """NumPy arrays."""
        B = self.rows
        ints = lambda: np.zeros(B, np.int32)  # noqa: E731
        return Slots(
            table=np.zeros((B, self.row_pages), np.int32),
            last_token=ints(),
            positions=ints(),
            serials=np.zeros(B, np.uint32),
            lengths=ints(),
            budgets=ints(),
            live=np.zeros(B, bool),
            rope_offsets=ints() if self.policy.config.mrope_sections else None,
        )

    def prefill_arrays(self, bucket: int, with_images: bool) -> tuple[PackedRows, np.ndarray]:
        """Empty arguments of a prefill call: rows of `bucket` tokens and their tables, as NumPy arrays."""
        R = self.prefill_rows(bucket)
        patches = self.prompt_patches if with_images else 0
        vision = self.policy.config.vision
        rows = PackedRows(
            tokens=np.zeros((R, bucket), np.int32),
            targets=None,
            loss_mask=None,
            positions=np.full((R, bucket), -1, np.int32),
            segments=np.zeros((R, bucket), np.int32),
            image_index=np.full((R, bucket), -1, np.int32),
            patches=np.zeros((R, patches, vision.patch_dim if vision else 0), np.float32),
            patch_positions=np.zeros((R, patches, 2), np.int32),
            patch_segments=np.zeros((R, patches), np.int32),
            **empty_extras((R, bucket), patches, self.policy.config.extras),
        )
        return rows, np.zeros((R, self.row_pages), np.int32)

    def image_rows(self, prompt: Prompt) -> PackedRows | None:
        """The prompt as one row that holds its images, if it has any."""
        vision = self.policy.config.vision
        if not (prompt.images and vision):
            return None
        rows, _ = pack_rows(
            [Example(prompt.tokens, np.zeros(len(prompt.tokens), bool), prompt.images)],
            [[0]],
            num_rows=1,
            row_tokens=len(prompt.tokens),
            row_patches=self.prompt_patches,
            patch_dim=vision.patch_dim,
            merge=vision.merge_size,
            image_id=self.image_id,
            extras=self.policy.config.extras,
        )
        return rows

    def rope_offset(self, prompt: Prompt) -> int:
        """See `arrays.Slots`."""
        vision = self.policy.config.vision
        return rope_offset(prompt.images, merge=vision.merge_size) if vision else 0

    def prefill_rows(self, bucket: int) -> int:
        """Rows of a prefill call whose rows have `bucket` tokens: those that keep its size about `prefill_tokens`."""
        return max(self.prefill_tokens // bucket // self.shards, 1) * self.shards

    def bucket(self, tokens: int) -> int:
        """The row length for a piece of so many tokens: a power of two, or prefill_tokens."""
        return min(max(_SMALLEST_BUCKET, 1 << (tokens - 1).bit_length()), max(self.prefill_tokens, _SMALLEST_BUCKET))


def _zeros(shapes: list[jax.ShapeDtypeStruct], structure) -> Any:
    return jax.tree.unflatten(structure, _make_zeros(tuple((s.shape, s.dtype, s.sharding) for s in shapes))())


@functools.cache  # a new jitted function each time would be compiled each time
def _make_zeros(kinds):
    make = lambda: [jnp.zeros(shape, dtype) for shape, dtype, _ in kinds]  # noqa: E731
    return jax.jit(make, out_shardings=[sharding for _, _, sharding in kinds])
