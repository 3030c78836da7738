"""The engine with a real, tiny model. What a flight does with slots and pages is in `test_flight`."""

import dataclasses

import jax
import numpy as np
import pytest

from kimi_jax.models.policy import Policy
from kimi_jax.sampling import decode, repetition
from kimi_jax.sampling.logits import SamplingSettings
from kimi_jax.sampling.repetition import RepetitionSettings
from kimi_jax.types import Prompt, Request, StopReason
from tests.helpers import CONFIG, IMAGE_ID, make_engine, random_params, random_prompt, random_prompts, sampling_params

# Two layers: what the second one keeps of a token depends on what that token saw.
SMALL = dataclasses.replace(CONFIG, num_layers=2, vision=dataclasses.replace(CONFIG.vision, num_layers=1))


def engine_with(**changes):
    return make_engine(**dict(policy=Policy(SMALL)) | changes)


ENGINE = engine_with()  # 6 rows
OTHER = engine_with(  # other shapes
    rows=5, prompt_tokens=23, prompt_patches=36, max_tokens=17, page=5, prefill_tokens=16, chunk=3
)
PROMPTS = random_prompts()
RUN_KEY = jax.random.key(3)
NEVER = CONFIG.vocab_size


@pytest.fixture(scope="module")
def params():
    return sampling_params(random_params(SMALL), SMALL)


def generate(params, prompts=PROMPTS, *, engine=ENGINE, temperature=1.0, end_ids=(NEVER,), **changes):
    settings = SamplingSettings.of(temperature=temperature, end_ids=end_ids)
    draws = dict(k=2, first_serial=0, run_key=RUN_KEY, policy_version=7) | changes
    return engine.generate(params, prompts, settings=settings, **draws)


def assert_same(rollout, other):
    assert rollout.serial == other.serial and rollout.stop == other.stop
    np.testing.assert_array_equal(rollout.tokens, other.tokens)
    np.testing.assert_allclose(rollout.logprobs, other.logprobs, atol=1e-5)


@pytest.mark.smoke
def test_responses_differ_within_a_group_and_between_runs_and_repeat_exactly(params):
    kwargs = dict(k=6, first_serial=100)
    groups = generate(params, **kwargs)
    assert [[r.serial for r in group] for group in groups] == [[100 + 6 * i + j for j in range(6)] for i in range(6)]
    for group in groups:
        assert len({r.tokens.tobytes() for r in group}) == 6
        assert all(len(r) == len(r.versions) and set(r.versions) == {7} for r in group)
    again, other_run = generate(params, **kwargs), generate(params, **kwargs, run_key=jax.random.key(4))
    for rollout, same, other in zip(sum(groups, ()), sum(again, ()), sum(other_run, ()), strict=True):
        assert_same(rollout, same)
        assert rollout.tokens.tobytes() != other.tokens.tobytes()


def test_the_same_serial_gives_the_same_tokens_wherever_it_is_sampled(params):
    """In another slot, order and company, and with other sizes of everything; prompts in pieces, images in pieces."""
    kwargs = dict(end_ids=[7, 41], budget=13)

    def elsewhere(i, first_serial):  # in the middle of seven where there are five slots
        return generate(params, [PROMPTS[i]], engine=OTHER, k=7, first_serial=first_serial - 3, **kwargs)[0][3:5]

    groups = generate(params, first_serial=50, **kwargs)
    assert {r.stop for r in sum(groups, ())} == {StopReason.END, StopReason.LENGTH}
    for i, group in enumerate(groups):
        for rollout, other in zip(group, elsewhere(i, 50 + 2 * i), strict=True):
            assert_same(rollout, other)
    # In reverse order, prompt i answers with the serials that belong to its new place.
    for place, group in enumerate(generate(params, PROMPTS[::-1], first_serial=50, **kwargs)):
        for rollout, other in zip(group, elsewhere(5 - place, 50 + 2 * place), strict=True):
            assert_same(rollout, other)


def test_end_tokens_are_stored_and_budgets_kept(params):
    free = generate(params)
    end_ids = [int(free[0][0].tokens[4]), int(free[1][1].tokens[2])]
    for budget in (13, 5, 1):
        stopped = generate(params, end_ids=end_ids, budget=budget)
        for rollout, whole in zip(sum(stopped, ()), sum(free, ()), strict=True):
            ends = np.flatnonzero(np.isin(whole.tokens, end_ids)) + 1
            n = min([*ends[:1], budget])
            assert len(rollout) == len(rollout.logprobs) == n
            np.testing.assert_array_equal(rollout.tokens, whole.tokens[:n])
            assert rollout.stop == (StopReason.END if n in ends else StopReason.LENGTH)
            assert rollout.text == " ".join(map(str, whole.tokens[:n]))  # the end token goes through decode_text too


def test_more_than_fits_and_none_at_all(params):
    seven = generate(params, [*PROMPTS, PROMPTS[0]], k=5)
    assert [len(group) for group in seven] == [5] * 7
    assert_same(seven[6][1], generate(params, [PROMPTS[0]], k=1, first_serial=31)[0][0])
    assert generate(params, []) == [] and generate(params, k=0) == [()] * 6


def ragged():
    """23 requests in an order of their own: groups that share a prompt, budgets, some already begun."""
    rng = np.random.default_rng(11)
    sizes = (1, 5, 3, 2, 7, 5)
    requests = [
        Request(
            prompt, int(rng.integers(2**32)), int(rng.integers(1, 7)), rng.integers(8, 40, 5 * (j % 2)).astype(np.int32)
        )
        for prompt, k in zip(PROMPTS, sizes, strict=True)
        for j in range(k)
    ]
    return [requests[i] for i in rng.permutation(len(requests))]


def segments(params, requests, *, engine=ENGINE, temperature=1.0, end_ids=(7, 41), **options):
    settings = SamplingSettings.of(temperature=temperature, end_ids=end_ids)
    flight = engine.start(params, requests, run_key=RUN_KEY, settings=settings, **options)
    found = {}
    while not flight.done:
        found |= flight.advance()
    return [found[i] for i in range(len(requests))]


def assert_same_segments(found, others):
    assert [s.stop for s in found] == [s.stop for s in others]
    for segment, other in zip(found, others, strict=True):
        np.testing.assert_array_equal(segment.tokens, other.tokens)
        np.testing.assert_allclose(segment.logprobs, other.logprobs, atol=1e-5)


def test_what_a_request_gets_does_not_depend_on_anything_else(params):
    requests = ragged()
    found = segments(params, requests)
    assert_same_segments(
        found, [segments(params, [request])[0] for request in requests]
    )  # alone, its prompt not shared
    assert_same_segments(found, segments(params, requests[::-1])[::-1])
    assert_same_segments(found, segments(params, requests, engine=OTHER))
    waiting = dataclasses.replace(OTHER, pages=OTHER.row_pages + 3)  # where requests wait for pages
    assert_same_segments(found, segments(params, requests, engine=waiting))
    assert {s.stop for s in found} == {StopReason.END, StopReason.LENGTH}


def test_interrupted_and_continued_equals_uninterrupted(params):
    """By its budget, then by the end of the flight; the rest in another engine."""
    whole = generate(params, k=3, end_ids=[7, 41])
    requests = [Request(p, 3 * i + j, 4) for i, p in enumerate(PROMPTS) for j in range(3)]
    parts = [[segment] for segment in segments(params, requests)]
    for engine, budget in ((ENGINE, 9), (OTHER, 13)):
        left = [i for i, part in enumerate(parts) if part[-1].stop != StopReason.END]
        prefixes = [np.concatenate([s.tokens for s in parts[i]]) for i in left]
        again = [
            Request(requests[i].prompt, i, budget - len(prefix), prefix)
            for i, prefix in zip(left, prefixes, strict=True)
        ]
        settings = SamplingSettings.of(temperature=1.0, end_ids=[7, 41])
        flight = engine.start(params, again, run_key=RUN_KEY, settings=settings)
        found = dict(flight.advance())
        while engine is OTHER and not flight.done:
            found |= flight.advance()
        for place, segment in [*found.items(), *flight.close()]:
            parts[left[place]].append(segment)
    assert max(map(len, parts)) == 3
    for rollout, part in zip(sum(whole, ()), parts, strict=True):
        np.testing.assert_array_equal(np.concatenate([s.tokens for s in part]), rollout.tokens)
        np.testing.assert_allclose(np.concatenate([s.logprobs for s in part]), rollout.logprobs, atol=1e-5)
        assert part[-1].stop == rollout.stop


def test_stop_strings_stop_at_the_token_that_completes_them(params):
    requests = [Request(prompt, i, 13) for i, prompt in enumerate(PROMPTS)]
    whole = [" ".join(map(str, s.tokens)) for s in segments(params, requests, end_ids=[NEVER])]
    strings = (" ".join(whole[1].split()[4:6]), " ".join(whole[2].split()[8:11]))  # the first across a chunk border
    end_ids = [int(whole[1].split()[7]), int(whole[2].split()[9])]  # after the first, before the end of the second
    found = segments(params, requests, end_ids=end_ids, stop_strings=strings)
    texts = [" ".join(map(str, s.tokens)) for s in found]
    assert texts[1] == " ".join(whole[1].split()[:6]) and found[1].stop == StopReason.STRING
    assert texts[2] == " ".join(whole[2].split()[:10]) and found[2].stop == StopReason.END
    assert all(len(s.tokens) == len(s.logprobs) for s in found)


def test_repetition_stops_a_response_also_where_it_is_continued(params):
    """Greedy decoding goes round in circles soon; the alarm is that of `repetition.update`, token by token."""
    rules = RepetitionSettings.of(min_tokens=7, repeats=3, span=5, share=1.0)
    watched = dataclasses.replace(ENGINE, max_tokens=37, repetition_window=11, repetition=rules)
    prompts, update = [PROMPTS[i] for i in (0, 2, 3)], jax.jit(repetition.update)
    options = dict(engine=watched, temperature=0.0, end_ids=[NEVER])
    whole = segments(params, [Request(prompt, 0, 37) for prompt in prompts], **options)
    assert {s.stop for s in whole} == {StopReason.LENGTH, StopReason.REPETITION}
    for segment in whole:
        state, alarms = repetition.start(1, window=11), []
        for token in segment.tokens:
            state, alarm = update(state, token[None], np.ones(1, bool), rules)
            alarms.append(bool(alarm[0]))
        assert alarms.index(True) + 1 == len(alarms) if segment.stop == StopReason.REPETITION else not any(alarms)
    begun = [Request(p, 0, 40 - len(s.tokens), s.tokens[:-3]) for p, s in zip(prompts, whole, strict=True)]
    rest = segments(params, begun, **options)
    assert [(s.tokens.tolist(), s.stop) for s in rest] == [(s.tokens[-3:].tolist(), s.stop) for s in whole]


def test_stream_grows_to_the_response_that_generate_gives(params):
    settings = SamplingSettings.of(temperature=1.0, end_ids=[NEVER])
    parts = list(ENGINE.stream(params, PROMPTS[1], serial=36, run_key=RUN_KEY, settings=settings))
    assert [len(part) for part in parts] == [5, 10, 13]
    for part in parts:  # what was handed out earlier is not written over by later chunks
        np.testing.assert_array_equal(part.tokens, parts[-1].tokens[: len(part)])
        np.testing.assert_array_equal(part.logprobs, parts[-1].logprobs[: len(part)])
        assert part.text == " ".join(map(str, part.tokens))
    assert_same(parts[-1], generate(params, [PROMPTS[1]], k=6, first_serial=36)[0][0])
    short = list(ENGINE.stream(params, PROMPTS[1], serial=36, run_key=RUN_KEY, settings=settings, budget=2))
    assert len(short[-1]) == 2


def test_compilations_are_bounded_by_the_buckets(params):
    """Lengths, images, group sizes, prefixes and order vary; what compiles is one program per bucket and kind."""
    engine = engine_with(rows=5, prompt_tokens=61, max_tokens=11, prefill_tokens=32, chunk=4)
    programs = (decode.prefill, decode.fork, decode.decode)
    before = [program._cache_size() for program in programs]
    rng = np.random.default_rng(13)
    for _ in range(7):
        requests = []
        for length in rng.integers(1, 55, 5):
            prompt = random_prompt(rng, int(length), [[], [(7, 13)]][rng.integers(2)])
            if prompt.tokens[-1] != IMAGE_ID:
                prefix = rng.integers(8, 40, rng.integers(0, 9)).astype(np.int32)
                requests += [Request(prompt, 0, 2, prefix)] * int(rng.integers(1, 4))
        segments(params, requests, engine=engine)
    compiled = [program._cache_size() - n for program, n in zip(programs, before, strict=True)]
    assert compiled[1:] == [1, 1]
    assert 4 <= compiled[0] <= 2 * 2 * 2  # rows of 16 or 32, with and without images, at the beginning or further on


def test_pages_that_do_not_fit_on_the_device_say_what_would(params, monkeypatch):
    def full(arrays):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 99 bytes.")

    engine = engine_with(rows=7, pages=None)
    # 2 layers, keys and values, 2 heads of 10 float32 for 4 tokens a page; 8 + 1 pages a row, and the trash page
    size = 2 * 2 * 2 * 10 * 4 * 4
    monkeypatch.setattr(jax, "block_until_ready", full)
    with pytest.raises(MemoryError, match=f"64 pages of 4 tokens.*{size / 2**20:.2f} MiB a page") as error:
        generate(params, engine=engine)
    for remedy in ("sampling.rows=7", "sampling.max_tokens=13", "set sampling.pages"):
        assert remedy in str(error.value)
    monkeypatch.setattr(jax, "block_until_ready", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        generate(params, engine=engine)


def text_only():
    return engine_with(policy=Policy(dataclasses.replace(SMALL, vision=None)))


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda p: generate(p, budget=14), r"budget of 14 tokens for request 0 of 12 is outside 1\.\.13"),
        (lambda p: generate(p, budget=0), r"budget of 0 tokens for request 0 of 12 is outside 1\.\.13"),
        (
            lambda p: segments(p, [Request(PROMPTS[0], 0, 9), Request(PROMPTS[0], 1, 9, np.arange(5))]),
            r"budget of 9 tokens for request 1 of 2 is outside 1\.\.8 \(sampling.max_tokens=13, 5 of them written\)",
        ),
        (lambda p: generate(p, [Prompt(np.zeros(0, np.int32))]), "request 0 of 2 is empty.*at least one token"),
        (lambda p: generate(p, engine=text_only()), "request 2 of 12 has images.*text alone. Drop the images"),
        (
            lambda p: generate(p, [dataclasses.replace(PROMPTS[5], tokens=PROMPTS[5].tokens[:15])]),
            "request 0 of 2 ends with an image.*Let text follow",
        ),
        (lambda p: segments(p, [Request(PROMPTS[0], 0, 1)], stop_strings=["a", ""]), "stop string is empty"),
        (
            lambda p: next(ENGINE.stream(p, PROMPTS[0], serial=0, run_key=RUN_KEY, settings=None, budget=14)),
            r"budget of 14 tokens for request 0 of 1 is outside 1\.\.13",
        ),
        (
            lambda p: generate(p, [PROMPTS[0], random_prompt(np.random.default_rng(0), 20)]),
            "request 2 of 4 has size 20, the limit is sampling.prompt_tokens=19",
        ),
        (
            lambda p: generate(p, [random_prompt(np.random.default_rng(0), 2, [(17, 18)])]),
            "request 0 of 2 has size 36, the limit is sampling.prompt_patches=32",
        ),
    ],
)
def test_what_cannot_be_sampled_is_refused(params, call, message):
    with pytest.raises(ValueError, match=message):
        call(params)


def test_rows_that_do_not_divide_over_the_devices_are_refused():
    mesh = jax.sharding.AbstractMesh((2, 2, 1), ("data", "fsdp", "tensor"))
    with pytest.raises(ValueError, match=r"sampling.rows=6 must be a multiple of 4.*mesh.data x mesh.fsdp"):
        engine_with(policy=Policy(SMALL, mesh=mesh))


def test_a_cache_too_small_for_one_response_is_refused_when_the_engine_is_made():
    make_engine(pages=9)  # 19 + 13 tokens in pages of 4, and the end of a prompt that is shared
    with pytest.raises(ValueError, match="sampling.pages=8 cannot hold one response .* takes 8 pages .* at least 9"):
        make_engine(pages=8)
