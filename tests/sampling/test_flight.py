"""Slots, pages and the order of things, on a device that only keeps books (`ledger`): hundreds of flights a second."""

import dataclasses

import numpy as np
import pytest
from jax.sharding import AbstractMesh

from kimi_jax.models.policy import Policy
from kimi_jax.types import Prompt, Request, StopReason
from tests.helpers import CONFIG, IMAGE_ID, make_engine, random_prompt
from tests.sampling.ledger import Ledger, expected

NOTHING = dict(params=None, run_key=None, settings=None)


def engine_on(data=1, fsdp=1, **changes):
    mesh = AbstractMesh((data, fsdp, 1), ("data", "fsdp", "tensor"))
    return make_engine(policy=Policy(CONFIG, mesh=mesh), **changes)


def requests_for(prompts, budgets, first_serial=0):
    return [Request(*args) for args in zip(prompts, range(first_serial, 10**6), budgets, strict=False)]


def fly(flight, *, chunks=10**4):
    """Every response, by index of the request, of at most so many chunks."""
    found = {}
    while not flight.done and chunks:
        before = flight.chunks
        finished = flight.advance()
        assert flight.chunks == before + 1, "nothing moves"
        assert [index for index, _ in finished] == sorted(index for index, _ in finished)
        assert not found.keys() & dict(finished).keys()
        found |= finished
        chunks -= 1
    return found


def check(flight, requests, stop_strings=()):
    """All responses are what each request gets alone, and nothing is kept of them."""
    found = fly(flight)
    assert found.keys() == set(range(len(requests)))
    for index, request in enumerate(requests):
        tokens, stop = expected(request, stop_strings)
        assert (found[index].tokens.tolist(), found[index].stop) == (tokens, stop), index
        np.testing.assert_array_equal(found[index].logprobs, -np.array(tokens))
    for free in flight._free:
        assert sorted(free.take(len(free))) == list(range(1, flight.engine.shard_pages))
    return found


def start(monkeypatch, engine, requests, **options):
    ledger = Ledger(engine).install(monkeypatch)
    return engine.start(requests=requests, **NOTHING, **options), ledger


def random_flight(seed):
    """(engine, requests): ragged groups with and without images, prefixes and budgets, in any order."""
    rng = np.random.default_rng(seed)
    data, fsdp = [(1, 1), (2, 1), (1, 3), (2, 2)][rng.integers(4)]
    limits = dict(prompt_tokens=37, max_tokens=29, prompt_patches=32)
    engine = engine_on(
        data,
        fsdp,
        rows=data * fsdp * int(rng.choice([1, 2, 3, 5, 11])),
        page=int(rng.choice([1, 2, 3, 5, 16, 67])),
        chunk=int(rng.choice([1, 3, 7, 31])),
        prefill_tokens=int(rng.choice([1, 16, 23, 32, 64])),
        **limits,
    )
    if rng.random() < 0.6:  # a pool that just holds the longest request
        engine = dataclasses.replace(engine, pages=data * fsdp * (engine.row_pages + 1 + int(rng.integers(0, 3))))
    requests = []
    for _ in range(rng.integers(1, 9)):
        images = [[], [], [(7, 13)], [(5, 11), (6, 4)]][rng.integers(4)]
        prompt = random_prompt(rng, int(rng.choice([1, 2, 3, 5, 16, 17, 23])) + bool(images), images)
        if images:  # text comes last, as in every prompt that ends with the token of the assistant
            prompt = Prompt(np.append(prompt.tokens, np.int32(47)), prompt.images)
        for _ in range(rng.choice([1, 1, 2, 3, 8])):
            prefix = rng.choice([8, 9, 44, 46], rng.choice([0, 0, 1, 5, 17])).astype(np.int32)
            budget = int(rng.integers(1, limits["max_tokens"] - len(prefix) + 1))
            requests.append(Request(prompt, int(rng.integers(2**32)), budget, prefix))
    if rng.random() < 0.7:
        requests = [requests[i] for i in rng.permutation(len(requests))]
    return engine, requests


@pytest.mark.smoke
@pytest.mark.parametrize("first_seed", range(0, 120, 30))
def test_every_request_gets_what_it_gets_alone(monkeypatch, first_seed):
    stops = set()
    for seed in range(first_seed, first_seed + 30):
        engine, requests = random_flight(seed)
        strings = [("2 1", "33", "5 6 "), ()][seed % 2]
        flight, _ = start(monkeypatch, engine, requests, stop_strings=strings)
        try:
            stops |= {segment.stop for segment in check(flight, requests, strings).values()}
        except Exception as error:
            raise AssertionError(f"seed {seed}: {engine}") from error
    assert stops == {StopReason.END, StopReason.LENGTH, StopReason.STRING}


@pytest.mark.parametrize("seed", range(3))
def test_interrupted_and_continued_equals_uninterrupted(monkeypatch, seed):
    """Closed at any chunk, cut by a budget, closed again, in another order and another engine."""
    engine, requests = random_flight(1000 + seed)
    rng = np.random.default_rng(seed)
    written = [request.prefix for request in requests]
    left = set(range(len(requests)))
    turns = 0
    while left:
        turns += 1
        assert turns < 1000
        order = rng.permutation(sorted(left))
        parts = [
            Request(r.prompt, r.serial, int(rng.integers(1, total_left + 1)), written[i])
            for i in order
            for r in [requests[i]]
            for total_left in [r.budget + len(r.prefix) - len(written[i])]
        ]
        other = dataclasses.replace(engine, chunk=int(rng.integers(1, 9)), pages=None)
        flight, _ = start(monkeypatch, other, parts)
        found = fly(flight, chunks=rng.integers(1, 4))
        unfinished = dict(flight.close())
        assert flight.done and not found.keys() & unfinished.keys() and len(found) + len(unfinished) == len(parts)
        assert list(unfinished) == sorted(unfinished)
        for place, segment in (found | unfinished).items():
            index = order[place]
            written[index] = np.append(written[index], segment.tokens)
            assert (segment.stop is None) == (place in unfinished)
            whole, stop = expected(requests[index])
            if segment.stop == StopReason.END or len(written[index]) == len(requests[index].prefix) + len(whole):
                left.remove(index)
                assert written[index][len(requests[index].prefix) :].tolist() == whole
                assert segment.stop in (stop, None)
    assert turns > 3


@pytest.mark.parametrize("page", [5, 16])
@pytest.mark.parametrize("rows", [3, 7])
def test_a_group_reads_its_prompt_once(monkeypatch, page, rows):
    """Also the members that enter when others have left; what does not fill a page is copied for each."""
    for length in (1, 2, page - 1, page, page + 1, 2 * page, 2 * page + 1):
        rng = np.random.default_rng(length)
        prompt = random_prompt(rng, length)
        requests = requests_for([prompt] * 7, rng.permutation(np.arange(1, 8)))
        engine = engine_on(rows=rows, page=page, prompt_tokens=33)
        flight, ledger = start(monkeypatch, engine, requests)
        check(flight, requests)
        assert flight.prefilled_tokens == length - 1
        assert ledger.forked == (7 if (length - 1) % page else 0)


def test_only_what_is_read_again_is_read_again(monkeypatch):
    """A continued member of a group reads its last token of the prompt and its own text but for the last token."""
    prompt = random_prompt(np.random.default_rng(0), 14)
    prefixes = [np.arange(8, 8 + n, dtype=np.int32) for n in (0, 5, 1)]
    requests = [Request(prompt, serial, 7, prefix) for serial, prefix in enumerate(prefixes)]
    flight, ledger = start(monkeypatch, engine_on(rows=3), requests)
    check(flight, requests)
    assert flight.prefilled_tokens == 13 + 5 + 1
    # The prompt first; then what hangs on it, both in one call.
    assert [(fresh, tokens) for _, _, fresh, tokens in ledger.read] == [(True, 13), (False, 6)]


def test_requests_wait_for_pages(monkeypatch):
    prompts = [random_prompt(np.random.default_rng(i), 13) for i in range(5)]
    requests = requests_for(prompts, [3, 13, 7, 5, 11])
    engine = engine_on(rows=5, page=4)
    flight, _ = start(monkeypatch, dataclasses.replace(engine, pages=11), requests)
    check(flight, requests)
    assert max((rows >= 0).sum() for rows, _ in flight.trace) == 2  # 4 + 7 of 11 pages, or 5 + 5
    flight, _ = start(monkeypatch, engine, requests)
    check(flight, requests)
    assert (flight.trace[0][0] >= 0).all()


@pytest.mark.parametrize("k, page", [(2, 3), (2, 16), (3, 4), (8, 5)])
def test_there_are_pages_enough_for_all_slots_unless_the_config_says_fewer(monkeypatch, k, page):
    prompts = [random_prompt(np.random.default_rng(i), 19) for i in range(11)]
    for seed in range(5):
        requests = requests_for([p for p in prompts for _ in range(k)], [13] * (11 * k), 1000 * seed)
        flight, _ = start(monkeypatch, engine_on(rows=5, page=page, chunk=1), requests)
        while not flight.done:
            waited = bool(flight._waiting)
            flight.advance()
            assert not (waited and flight._waiting) or (flight.trace[-1][0] >= 0).all()


def test_a_prompt_that_only_waits_gives_its_pages_away(monkeypatch):
    """Members of two groups take turns where there is room for one response: each turn reads its prompt again."""
    prompts = [random_prompt(np.random.default_rng(i), 17) for i in range(2)]
    requests = requests_for(prompts * 3, [9] * 6)
    engine = engine_on(rows=3, page=4)
    flight, _ = start(monkeypatch, dataclasses.replace(engine, pages=engine.row_pages + 1), requests)
    check(flight, requests)
    assert flight.prefilled_tokens == 6 * 16


def test_groups_stay_in_one_shard_and_fill_all_of_them(monkeypatch):
    rng = np.random.default_rng(5)
    prompts = [random_prompt(rng, int(n)) for n in rng.integers(1, 20, 13)]
    requests = requests_for([p for p in prompts for _ in range(3)], rng.integers(1, 14, 39))
    flight, _ = start(monkeypatch, engine_on(2, 2, rows=12), requests)
    check(flight, requests)
    shards = [set() for _ in prompts]
    for rows, _ in flight.trace:
        for slot, index in enumerate(rows):
            if index >= 0:
                shards[index // 3].add(slot // 3)
    assert all(len(used) == 1 for used in shards) and set().union(*shards) == {0, 1, 2, 3}
    assert (flight.trace[0][0] >= 0).all()
    assert flight.prefilled_tokens == sum(len(p.tokens) - 1 for p in prompts)


def test_a_chunk_ends_early_when_slots_are_free_that_somebody_waits_for(monkeypatch):
    monkeypatch.setattr("tests.sampling.ledger.END", ())
    budgets = [13] * 16
    budgets[3], budgets[5], budgets[11] = 2, 4, 5
    for waiting, steps in ((0, 7), (1, 4)):  # one slot of eight must be free: two of sixteen
        requests = requests_for([random_prompt(np.random.default_rng(i), 3) for i in range(17)], [*budgets, 1])
        flight, _ = start(monkeypatch, engine_on(rows=16, chunk=7), requests[: 16 + waiting])
        flight.advance()
        assert flight.steps == steps and flight.trace[0][1].max() == steps


def test_long_prompts_are_read_in_pieces_between_chunks(monkeypatch):
    monkeypatch.setattr("tests.sampling.ledger.END", ())
    long, short = (random_prompt(np.random.default_rng(0), n) for n in (19 * 16 + 2, 2))
    requests = requests_for([short, long], [13, 13])
    engine = engine_on(rows=2, prompt_tokens=400, prefill_tokens=16, chunk=1)
    flight, ledger = start(monkeypatch, engine, requests)
    calls = []
    while not flight.done:
        before = len(ledger.read)
        flight.advance()
        calls.append(len(ledger.read) - before)
        assert flight.trace[-1][1][0] == (len(calls) <= 13)  # the short one writes on at every chunk
    assert calls[:4] == [8, 8, 5, 0] and sum(calls) == 21  # one of them for the short prompt
    assert {bucket for bucket, *_ in ledger.read} == {16}


def test_one_call_reads_as_many_prompts_as_it_has_room_for(monkeypatch):
    prompts = [random_prompt(np.random.default_rng(i), n) for i, n in enumerate((17, 14, 11, 16, 13, 40, 3, 30))]
    requests = requests_for(prompts, [1] * 8)
    flight, ledger = start(monkeypatch, engine_on(rows=8, prompt_tokens=64, prefill_tokens=64), requests)
    check(flight, requests)
    read = sorted((bucket, tokens) for bucket, _, _, tokens in ledger.read)
    assert read == [(16, 12 + 2), (16, 16 + 13 + 10 + 15), (32, 29), (64, 39)]


def test_images_are_seen_in_the_pieces_that_hold_them_and_only_there(monkeypatch):
    rng = np.random.default_rng(3)
    tokens = random_prompt(rng, 37).tokens
    [image] = random_prompt(rng, 1, [(7, 13)]).images
    tokens = np.concatenate([tokens[:13], np.full(image.num_tokens, IMAGE_ID, np.int32), tokens[13:]])
    prompt = Prompt(tokens, (image,))
    requests = requests_for([prompt] * 2, [5, 7]) + requests_for([Prompt(prompt.tokens, prompt.images)], [7], 2)
    flight, ledger = start(monkeypatch, engine_on(rows=3, prompt_tokens=64, prefill_tokens=16), requests)
    check(flight, requests)
    assert len(prompt.tokens) == 43 and image.num_tokens == 6  # which stand at 13..18
    pieces = [(True, True, 16), (True, False, 16), (False, False, 10)]
    assert sorted(ledger.read) == sorted((16, *piece) for piece in pieces * 2)


def test_stop_strings_end_with_the_token_that_completes_them(monkeypatch):
    requests = requests_for([random_prompt(np.random.default_rng(i), 3) for i in range(40)], [13] * 40)
    plain, _ = start(monkeypatch, engine_on(rows=7), requests)
    whole = [" ".join(map(str, segment.tokens)) for _, segment in sorted(check(plain, requests).items())]
    strings = ("1 7", "22", *(" ".join(text.split()[4:6]) for text in whole[:9] if text.count(" ") > 5))
    for chunk in (1, 5, 13):
        flight, _ = start(monkeypatch, engine_on(rows=7, chunk=chunk), requests, stop_strings=strings)
        found = check(flight, requests, strings)
        for index, segment in found.items():
            text = " ".join(map(str, segment.tokens))
            assert whole[index].startswith(text)
            assert (segment.stop == StopReason.STRING) == any(string in text for string in strings)
            assert not any(string in text.rsplit(" ", 1)[0] for string in strings) or " " not in text
    assert {s.stop for s in found.values()} == {StopReason.STRING, StopReason.END, StopReason.LENGTH}


@pytest.mark.parametrize("chunk", [1, 3])
def test_stop_strings_are_found_across_tokens_without_text_and_within_characters(monkeypatch, chunk):
    monkeypatch.setattr("tests.sampling.ledger.END", ())
    pieces = [b"a", *(bytes([byte]) for byte in "é日".encode()), *[b""] * (CONFIG.vocab_size - 6)]  # most are special
    decode_text = lambda tokens: b"".join(pieces[token] for token in tokens).decode(errors="replace")  # noqa: E731
    requests = requests_for([random_prompt(np.random.default_rng(i), 3) for i in range(60)], [61] * 60)
    engine = engine_on(rows=60, chunk=chunk, max_tokens=61, decode_text=decode_text)
    plain, _ = start(monkeypatch, engine, requests)
    whole = {index: segment.tokens for index, segment in fly(plain).items()}
    strings, stopped = ("aa", "aé"), 0
    flight, _ = start(monkeypatch, engine, requests, stop_strings=strings)
    for index, segment in fly(flight).items():
        complete = [n for n in range(1, 62) if any(s in decode_text(whole[index][:n]) for s in strings)]
        assert segment.tokens.tolist() == whole[index][: min([61, *complete])].tolist()
        stopped += segment.stop == StopReason.STRING
    assert 5 < stopped < 55


def test_peek_and_close_show_what_is_there(monkeypatch):
    monkeypatch.setattr("tests.sampling.ledger.END", ())
    requests = requests_for([random_prompt(np.random.default_rng(i), 3) for i in range(4)], [2, 13, 11, 7])
    flight, _ = start(monkeypatch, engine_on(rows=2, chunk=3), requests)
    assert len(flight.peek(1).tokens) == 0
    assert [index for index, _ in flight.advance()] == [0]
    part = flight.peek(1)
    assert part.tokens.tolist() == expected(requests[1])[0][: len(part.tokens)] and 2 <= len(part.tokens) <= 3
    rest = flight.close()
    assert [index for index, _ in rest] == [1, 2, 3] and flight.done
    assert [segment.tokens.tolist() for _, segment in rest] == [part.tokens.tolist(), [], []]
    assert {segment.stop for _, segment in rest} == {None}
    assert flight.advance() == [] and flight.close() == []
