"""Who holds what in a flight: pages and slots, and what is on its way into the cache."""

import dataclasses
from typing import TYPE_CHECKING

import numpy as np

from kimi_jax.arrays import PackedRows
from kimi_jax.types import Prompt, Segment, StopReason

if TYPE_CHECKING:
    from kimi_jax.sampling.engine import Engine


class FreePages:
    """The pages of one shard that nobody holds. Page 0 is never among them."""

    def __init__(self, count: int):
        self._pages = list(range(count - 1, 0, -1))

    def __len__(self) -> int:
        return len(self._pages)

    def take(self, count: int) -> list[int]:
        return [self._pages.pop() for _ in range(count)]

    def give(self, pages: list[int]) -> None:
        self._pages += pages


@dataclasses.dataclass(eq=False)
class Group:
    """The requests that hold one prompt. If they are several, it is read once, but for its last token."""

    prompt: Prompt
    members: int = 0
    left: int = 0  # members that are not finished: the references to `pages`
    shard: int | None = None
    pages: list[int] | None = None  # of the shared part; the last may be partly filled, and each member copies it
    load: "Load | None" = None


@dataclasses.dataclass(eq=False)
class Load:
    """Tokens on their way into the cache, piece by piece."""

    tokens: np.ndarray  # int32 [n]
    start: int  # position of the first
    table: np.ndarray  # int32, pages of the sequence
    shard: int
    images: PackedRows | None  # one row: the prompt that `tokens` begins, if it has images
    rope_offset: int  # of text behind the images
    read: int = 0
    done: bool = False
    then: list["Row"] = dataclasses.field(default_factory=list)  # who waits for it

    @property
    def complete(self) -> bool:
        return self.read == len(self.tokens)

    def _piece(self, engine: "Engine") -> int:
        return min(len(self.tokens) - self.read, engine.bucket(len(self.tokens) - self.read))

    def shape(self, engine: "Engine") -> tuple[int, bool, bool]:
        """Of a call that reads the next piece: (row length, are there images in it, does it begin the sequence?)"""
        piece = self._piece(engine)
        pictured = self.images is not None and (self.images.image_index[0, self.read : self.read + piece] >= 0).any()
        return engine.bucket(piece), bool(pictured), self.start + self.read == 0

    def fill(self, r: int, rows: PackedRows, table: np.ndarray) -> int:
        """Writes the next piece into row r of the arguments of a prefill call. Returns its length."""
        piece = self.tokens[self.read : self.read + rows.tokens.shape[1]]
        n = len(piece)
        rows.tokens[r, :n] = piece
        rows.positions[r, :n] = self.start + self.read + np.arange(n)
        rows.segments[r, :n] = 1
        if rows.patches.shape[1]:
            image_index = self.images.image_index[0, self.read : self.read + n]
            rows.image_index[r, : len(image_index)] = image_index
            rows.patches[r], rows.patch_positions[r] = self.images.patches[0], self.images.patch_positions[0]
            rows.patch_segments[r] = self.images.patch_segments[0]
        for name in ("patch_windows", "patch_grids"):
            if rows.patches.shape[1] and (array := getattr(rows, name)) is not None:
                array[r] = getattr(self.images, name)[0]
        if rows.rope_positions is not None:
            rows.rope_positions[r, :n] = rows.positions[r, :n, None] + self.rope_offset
            if self.images is not None:
                of_prompt = self.images.rope_positions[0, self.read : self.read + n]
                rows.rope_positions[r, : len(of_prompt)] = of_prompt
        table[r, : len(self.table)] = self.table
        self.read += n
        return n


@dataclasses.dataclass(eq=False)
class Row:
    """A request in a slot."""

    index: int
    group: Group
    slot: int
    shard: int
    pages: list[int]  # its own
    fork: tuple[int, int] | None = None  # page to copy before anything else, and where to
    load: Load | None = None  # to read after that
    tokens: list[np.ndarray] = dataclasses.field(default_factory=list)  # per chunk
    logprobs: list[np.ndarray] = dataclasses.field(default_factory=list)

    def cut(self, surplus: int) -> None:
        """Drops the newest tokens, all of them from the last chunk."""
        if surplus:
            self.tokens[-1], self.logprobs[-1] = self.tokens[-1][:-surplus], self.logprobs[-1][:-surplus]

    def segment(self, stop: StopReason | None) -> Segment:
        return segment_of(self.tokens, self.logprobs, stop)


def segment_of(tokens, logprobs, stop) -> Segment:
    return Segment(
        np.concatenate([np.zeros(0, np.int32), *tokens]), np.concatenate([np.zeros(0, np.float32), *logprobs]), stop
    )
