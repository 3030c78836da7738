"""A flight: requests being answered with a fixed number of slots.

    admit     waiting requests take empty slots, in order, while there are pages for prompt and budget
    prefill   what they share is read once (the k responses to a prompt share its pages), then what is their own
    decode    one jitted chunk for all live slots; the host sleeps meanwhile
    hand out  finished responses leave, their pages are free, the next requests are admitted

The host decides from small arrays alone, and never by the clock: what a request gets depends on its serial, not on its
slot, its neighbours or the order of the others (exactly so in float32).
"""

import time
from typing import TYPE_CHECKING

import jax
import numpy as np

from kimi_jax.sampling import decode, repetition
from kimi_jax.sampling.holdings import FreePages, Group, Load, Row, segment_of
from kimi_jax.types import Segment, StopReason

if TYPE_CHECKING:
    from kimi_jax.sampling.engine import Engine

_PREFILL_CALLS = 8  # most of them between two chunks, so that long prompts do not starve the rows that decode
_REFILL_SHARE = 8  # a chunk ends early when one in so many slots has become free and requests wait


class Flight:
    """Requests being answered. `advance` until `done`, or `close` to take what there is."""

    def __init__(self, engine: "Engine", params, requests, run_key, settings, stop_strings):
        self.engine, self.params, self.requests = engine, params, list(requests)
        self.chunks = 0  # decode chunks so far
        self.steps = 0  # decode steps so far
        self.seconds = 0.0  # in `advance`
        self.prefilled_tokens = 0
        self.prefill_seconds = 0.0
        self.trace: list[tuple[np.ndarray, np.ndarray]] = []  # per chunk: the request in each slot or -1, tokens drawn
        self._draw_args = (run_key, settings)
        self._stop_strings = tuple(stop_strings)
        self._pages = engine.new_pages() if requests else None
        self._repeated = engine.put_rows(repetition.start(engine.rows, window=engine.repetition_window))
        self._free = [FreePages(engine.shard_pages) for _ in range(engine.shards)]
        self._slots = engine.empty_slots()
        self._rows: list[Row | None] = [None] * engine.rows
        self._groups: dict[int, Group] = {}  # by id of the prompt
        for request in self.requests:
            group = self._groups.setdefault(id(request.prompt), Group(request.prompt))
            group.members += 1
            group.left += 1
        self._waiting = list(range(len(self.requests)))
        self._loads: list[Load] = []
        self._new: list[Row] = []  # that took their slots since the last chunk
        self._fork_from = np.zeros(engine.rows, np.int32)
        self._fork_to = np.zeros(engine.rows, np.int32)

    @property
    def done(self) -> bool:
        return not self._waiting and all(row is None for row in self._rows)

    def advance(self) -> list[tuple[int, Segment]]:
        """One chunk. Returns what finished: (index of the request, what was added to it), in order of the requests."""
        begin = time.perf_counter()
        self._admit()
        self._prefill()
        live = int(self._slots.live.sum())
        finished = []
        if live:
            free_soon = max(1, self.engine.rows // _REFILL_SHARE)
            enough = np.int32(max(0, live - free_soon) if self._waiting else 0)
            slots = self.engine.put_rows(self._slots)
            self._pages, self._repeated, drawn = decode.decode(
                self.params,
                self._pages,
                self._repeated,
                slots,
                *self._draw_args,
                self.engine.repetition,
                enough,
                policy=self.engine.policy,
                steps=self.engine.chunk,
            )
            finished = self._hand_out(jax.device_get(drawn))
        if self.done:
            self._pages = None
        self.seconds += time.perf_counter() - begin
        return finished

    def peek(self, index: int) -> Segment:
        """What was added to a request so far."""
        row = next((row for row in self._rows if row is not None and row.index == index), None)
        return row.segment(None) if row else segment_of([], [], None)

    def close(self) -> list[tuple[int, Segment]]:
        """Ends the flight. Returns what was added to the requests that are not finished, in order."""
        rest = [(row.index, row.segment(None)) for row in self._rows if row is not None]
        rest += [(index, segment_of([], [], None)) for index in self._waiting]
        self._rows = [None] * self.engine.rows
        self._slots.live[:] = False
        self._waiting, self._pages = [], None
        self._loads.clear()
        return sorted(rest, key=lambda item: item[0])

    # --- admit ---

    def _admit(self) -> None:
        """Waiting requests take empty slots, first come, first served within each shard."""
        per_shard = self.engine.rows // self.engine.shards
        empty = [
            [b for b in range(s * per_shard, (s + 1) * per_shard) if self._rows[b] is None]
            for s in range(self.engine.shards)
        ]
        empty = [slots[::-1] for slots in empty]
        blocked = [not slots for slots in empty]  # a shard whose next request does not fit takes no later one either
        still_waiting = []
        for place, index in enumerate(self._waiting):
            if all(blocked):
                still_waiting += self._waiting[place:]
                break
            group = self._groups[id(self.requests[index].prompt)]
            shard = group.shard
            if shard is None:  # its members stay together, or they could not share pages
                shard = max((s for s in range(len(empty)) if not blocked[s]), key=lambda s: len(empty[s]))
            if blocked[shard] or not self._place(index, group, shard, empty[shard]):
                blocked[shard] = True
                still_waiting.append(index)
            else:
                blocked[shard] = not empty[shard]
        self._waiting = still_waiting

    def _place(self, index: int, group: Group, shard: int, empty: list[int]) -> bool:
        """Reserves pages and a slot. False if there are not enough pages."""
        request, page, free = self.requests[index], self.engine.page, self._free[shard]
        shared = len(group.prompt.tokens) - 1 if group.members > 1 else 0
        own = -(-(len(request.prompt.tokens) + len(request.prefix) + request.budget) // page) - shared // page
        common = -(-shared // page)
        fits = lambda: own + (common if group.pages is None else 0) <= len(free)  # noqa: E731
        if not fits() and len(empty) * self.engine.shards == self.engine.rows:
            self._forget_prompts(shard)  # nobody is here who would leave
        if not fits():
            return False
        group.shard = shard
        if group.pages is None:
            group.pages = free.take(common)
            if shared:
                table = np.array(group.pages, np.int32)
                images = self.engine.image_rows(group.prompt)
                group.load = Load(group.prompt.tokens[:shared], 0, table, shard, images, 0)
                self._loads.append(group.load)
        slot = empty.pop()
        row = Row(index, group, slot, shard, free.take(own))
        self._rows[slot] = row
        self._new.append(row)
        tokens = np.concatenate([request.prompt.tokens, request.prefix]).astype(np.int32)
        table = np.array(group.pages[: shared // page] + row.pages, np.int32)
        self._slots.table[slot] = 0
        self._slots.table[slot, : len(table)] = table
        offset = self.engine.rope_offset(group.prompt)
        if self._slots.rope_offsets is not None:
            self._slots.rope_offsets[slot] = offset
        for name, value in dict(
            last_token=tokens[-1],
            positions=len(tokens) - 1,
            serials=request.serial,
            lengths=len(request.prefix),
            budgets=len(request.prefix) + request.budget,
        ).items():
            getattr(self._slots, name)[slot] = value
        if shared % page:
            row.fork = (group.pages[-1], row.pages[0])
        if len(tokens) - 1 > shared:
            images = None if shared else self.engine.image_rows(group.prompt)
            row.load = Load(tokens[shared:-1], shared, table, shard, images, offset)
        if group.load and not group.load.done:
            group.load.then.append(row)
        else:
            self._loaded(row)
        return True

    def _forget_prompts(self, shard: int) -> None:
        """Gives back the pages of prompts whose other members all wait; the next one reads its prompt again."""
        for group in self._groups.values():
            if group.shard == shard and group.left:
                self._free[shard].give(group.pages)
                group.shard = group.pages = group.load = None

    # --- prefill ---

    def _loaded(self, row: Row) -> None:
        """The next thing that a row needs, now that what it shares is in the cache."""
        if row.fork:
            self._fork_from[row.slot], self._fork_to[row.slot] = row.fork
            row.fork = None
        if row.load:
            row.load.then.append(row)
            self._loads.append(row.load)
            row.load = None
        else:
            self._slots.live[row.slot] = True

    def _prefill(self) -> None:
        """Reads what was admitted, in calls of one shape each."""
        begin, calls = time.perf_counter(), 0
        while self._loads and (calls < _PREFILL_CALLS or not self._slots.live.any()):
            self._fork()
            self._prefill_call()
            calls += 1
        self._fork()
        self._remember()
        if calls:
            jax.block_until_ready(self._pages)
            self.prefill_seconds += time.perf_counter() - begin

    def _fork(self) -> None:
        if self._fork_to.any():
            arrays = self.engine.put_rows((self._fork_from, self._fork_to))
            self._pages = decode.fork(self._pages, *arrays, mesh=self.engine.policy.mesh)
            self._fork_from, self._fork_to = np.zeros_like(self._fork_from), np.zeros_like(self._fork_to)

    def _remember(self) -> None:
        """Brings what is known of repetitions up to date in the slots that were taken since."""
        window = self.engine.repetition_window
        if window and self._new:
            written = [np.zeros(0, np.int32)] * self.engine.rows
            slots = np.full(self.engine.rows, self.engine.rows, np.int32)  # out of range: left as it is
            for n, row in enumerate(self._new):
                written[n], slots[n] = self.requests[row.index].prefix, row.slot
            tails = repetition.tails(written, self.engine.repetition, window=window)
            self._repeated = _refresh(self._repeated, slots, tails, self.engine.repetition)
        self._new = []

    def _prefill_call(self) -> None:
        """The next piece of the first load, and of as many others of the same shape as one call takes."""
        engine = self.engine
        shape = bucket, with_images, fresh = self._loads[0].shape(engine)
        per_shard = engine.prefill_rows(bucket) // engine.shards
        chosen: list[list[Load]] = [[] for _ in range(engine.shards)]
        for load in self._loads:
            if len(chosen[load.shard]) < per_shard and load.shape(engine) == shape:
                chosen[load.shard].append(load)
        rows, table = engine.prefill_arrays(bucket, with_images)
        for shard, loads in enumerate(chosen):
            for r, load in enumerate(loads, start=shard * per_shard):
                self.prefilled_tokens += load.fill(r, rows, table)
        self._pages = decode.prefill(
            self.params, self._pages, *engine.put_rows((rows, table)), policy=engine.policy, fresh=fresh
        )
        for load in [load for load in self._loads if load.complete]:
            self._loads.remove(load)
            load.done = True
            for row in load.then:
                self._loaded(row)

    # --- hand out ---

    def _hand_out(self, drawn) -> list[tuple[int, Segment]]:
        slots, finished = self._slots, []
        self.chunks += 1
        self.steps += int(drawn.counts.max())
        self.trace.append((np.array([-1 if row is None else row.index for row in self._rows]), drawn.counts))
        for b in np.flatnonzero(slots.live):
            row, n = self._rows[b], int(drawn.counts[b])
            row.tokens.append(drawn.tokens[b, :n])
            row.logprobs.append(drawn.logprobs[b, :n])
            slots.last_token[b] = drawn.tokens[b, n - 1] if n else slots.last_token[b]
            slots.positions[b] += n
            slots.lengths[b] += n
            stop = None
            if drawn.ended[b]:
                stop = StopReason.END
            elif drawn.repeats[b]:
                stop = StopReason.REPETITION
            elif slots.lengths[b] >= slots.budgets[b]:
                stop = StopReason.LENGTH
            if self._stop_strings and (surplus := self._after_stop_string(row, n)) is not None:
                row.cut(surplus)
                stop = StopReason.STRING
            if stop:
                finished.append((row.index, row.segment(stop)))
                self._leave(row)
        return sorted(finished, key=lambda item: item[0])

    def _after_stop_string(self, row: Row, n: int) -> int | None:
        """How many of the newest n tokens come after the one that completes a stop string; None without one."""
        text = self.engine.decode_text
        written = np.concatenate([self.requests[row.index].prefix, *row.tokens])
        before, longest = len(written) - n, max(map(len, self._stop_strings))
        reach = 4 * longest  # a character takes at most 4 tokens, one per byte, and those without text between them
        while reach < before and len(text(written[before - reach : before])) < longest + 3:  # 3: of one cut in two
            reach *= 2
        tail = written[max(0, before - reach) :]
        if not any(stop in text(tail) for stop in self._stop_strings):
            return None
        for surplus in range(n - 1, -1, -1):
            if any(stop in text(tail[: len(tail) - surplus]) for stop in self._stop_strings):
                return surplus
        return None

    def _leave(self, row: Row) -> None:
        group = row.group
        free = self._free[row.shard]
        free.give(row.pages)
        group.left -= 1
        if not group.left:
            free.give(group.pages)
        self._rows[row.slot] = None
        self._slots.live[row.slot] = False


_refresh = jax.jit(repetition.refresh, donate_argnames="state")
