"""Slots, pages and the order of things, on a device that only keeps books (`ledger`): hundreds of flights a second."""

import dataclasses

import numpy as np
import pytest
from jax.sharding import AbstractMesh

from kimi_jax.models.policy import Policy
from kimi_jax.types import Prompt, Request, StopReason
from tests.helpers import CONFIG, make_engine, random_prompt
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
@pytest.mark.parametrize("first_seed", range(0, 200, 50))
def test_every_request_gets_what_it_gets_alone(monkeypatch, first_seed):
    stops = set()
    for seed in range(first_seed, first_seed + 50):
        engine, requests = random_flight(seed)
        strings = [("2 1", "33", "5 6 "), ()][seed % 2]
        flight, _ = start(monkeypatch, engine, requests, stop_strings=strings)
        try:
            stops |= {segment.stop for segment in check(flight, requests, strings).values()}
        except Exception as error:
            raise AssertionError(f"seed {seed}: {engine}") from error
    assert stops == {StopReason.END, StopReason.LENGTH, StopReason.STRING}
