"""Stands in for the device under a flight: no arithmetic, but what every token could see when it was read.

A cell of a page holds a number made of the token and of all cells that it saw, and the next token of a response is made
of those that its row sees. A page too few, one too many, a piece read too early, a row of the wrong shard: the response
becomes another one than `expected`, which knows of no pages.
"""

import dataclasses
import zlib

import numpy as np

from kimi_jax.arrays import Drawn
from kimi_jax.sampling import decode
from kimi_jax.sampling.engine import Engine
from kimi_jax.types import StopReason
from tests.helpers import CONFIG, IMAGE_ID, VISION

MERGED = VISION.merge_size**2
END = (7, 41)


def see(cells, token) -> int:
    return hash((*cells, int(token)))


def draw(cells, token, serial, length) -> int:
    return see((*cells, int(serial), int(length)), token) % CONFIG.vocab_size


def picture(patches) -> int:
    """What stands in place of an image token."""
    return zlib.crc32(np.ascontiguousarray(patches).tobytes())


def expected(request, stop_strings=()) -> tuple[list[int], StopReason]:
    """The response to a request, token by token."""
    prompt, cells = request.prompt, []
    features = [picture(p) for image in prompt.images for p in np.split(image.patches, len(image.patches) // MERGED)]
    read = [features.pop(0) if prompt.images and token == IMAGE_ID else token for token in prompt.tokens]
    written = [int(token) for token in request.prefix]
    *read, last = [*read, *written]
    for token in read:
        cells.append(see(cells, token))
    for _ in range(request.budget):
        token = draw(cells, last, request.serial, len(written))
        cells.append(see(cells, last))
        written, last = [*written, token], token
        text = " ".join(map(str, written))
        if any(string in text for string in stop_strings):
            return written[len(request.prefix) :], StopReason.STRING
        if token in END:
            return written[len(request.prefix) :], StopReason.END
    return written[len(request.prefix) :], StopReason.LENGTH


@dataclasses.dataclass(eq=False)
class Ledger:
    engine: Engine
    cells: dict = dataclasses.field(default_factory=dict)  # of (shard, page, slot)
    read: list = dataclasses.field(default_factory=list)  # per prefill call: (bucket, images?, fresh, tokens)
    forked: int = 0  # pages

    def install(self, monkeypatch) -> "Ledger":
        monkeypatch.setattr(Engine, "new_pages", lambda engine: (self,))
        for name in ("prefill", "fork", "decode"):
            monkeypatch.setattr(decode, name, getattr(self, name))
        return self

    def place(self, row, rows, table, position) -> tuple[int, int, int]:
        page = int(table[row, position // self.engine.page])
        assert 0 < page < self.engine.shard_pages, "the trash page, or one beyond the pool"
        return row // (rows // self.engine.shards), page, position % self.engine.page

    def seen(self, row, rows, table, count) -> list[int]:
        return [self.cells[self.place(row, rows, table, position)] for position in range(count)]

    def prefill(self, params, pages, rows, table, *, policy, fresh):
        new = {}
        R = len(rows.tokens)
        for r in range(R):
            positions = rows.positions[r][rows.positions[r] >= 0]
            n = len(positions)
            assert (rows.positions[r, n:] == -1).all() and (rows.segments[r] == (rows.positions[r] >= 0)).all()
            if not n:
                continue
            assert (np.diff(positions) == 1).all() and (positions[0] == 0 or not fresh)
            cells = [] if fresh else self.seen(r, R, table, positions[0])
            for t, position in enumerate(positions):
                token, index = rows.tokens[r, t], rows.image_index[r, t]
                if index >= 0:
                    patches = slice(index * MERGED, (index + 1) * MERGED)
                    assert rows.patch_segments[r, patches].all()
                    token = picture(rows.patches[r, patches])
                cells.append(see(cells, token))
                place = self.place(r, R, table, position)
                assert place not in new, "two rows of one call write to one cell"
                new[place] = cells[-1]
        self.cells |= new
        self.read.append((rows.tokens.shape[1], bool(rows.patches.shape[1]), fresh, len(new)))
        return pages

    def fork(self, pages, source, target, *, mesh):
        B = len(source)
        before = dict(self.cells)
        for b in np.flatnonzero(target):
            shard = b // (B // self.engine.shards)
            assert source[b] and source[b] != target[b]
            self.forked += 1
            for slot in range(self.engine.page):
                self.cells.pop((shard, target[b], slot), None)
                if (shard, source[b], slot) in before:
                    self.cells[shard, target[b], slot] = before[shard, source[b], slot]
        return pages

    def decode(self, params, pages, repeated, slots, run_key, settings, repetition, enough, *, policy, steps):
        B, live = len(slots.live), slots.live.copy()
        counts, ended, tokens = np.zeros(B, np.int32), np.zeros(B, bool), np.zeros((B, steps), np.int32)
        last, step = slots.last_token.copy(), 0
        while step < steps and live.sum() > enough:
            for b in np.flatnonzero(live):
                position = slots.positions[b] + step
                cells = self.seen(b, B, slots.table, position)
                length = slots.lengths[b] + step
                token = draw(cells, last[b], slots.serials[b], length)
                self.cells[self.place(b, B, slots.table, position)] = see(cells, last[b])
                tokens[b, step], last[b] = token, token
                counts[b] += 1
                ended[b] = token in END
                live[b] = not ended[b] and length + 1 < slots.budgets[b]
            step += 1
        return pages, repeated, Drawn(tokens, -tokens.astype(np.float32), counts, ended, np.zeros(B, bool))
