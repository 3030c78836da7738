import jax
import numpy as np
import pytest

from kimi_jax.sampling import decode
from kimi_jax.sampling.logits import SamplingSettings
from kimi_jax.types import StopReason
from tests.helpers import CONFIG, make_engine, random_params, random_prompt, random_prompts, sampling_params

ENGINE = make_engine()  # 6 rows
OTHER = make_engine(rows=4, prompt_tokens=23, prompt_patches=36, max_tokens=17, chunk=3)  # other shapes
PROMPTS = random_prompts()
RUN_KEY = jax.random.key(3)
NEVER = CONFIG.vocab_size


@pytest.fixture(scope="module")
def params():
    return sampling_params(random_params(CONFIG))


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
        assert all(r.policy_version == 7 for r in group)
    again, other_run = generate(params, **kwargs), generate(params, **kwargs, run_key=jax.random.key(4))
    for rollout, same, other in zip(sum(groups, ()), sum(again, ()), sum(other_run, ()), strict=True):
        assert_same(rollout, same)
        assert rollout.tokens.tobytes() != other.tokens.tobytes()


def test_the_same_serial_gives_the_same_tokens_wherever_it_is_sampled(params):
    """In another row, order and company, and with other numbers of rows, responses, buckets and chunk sizes."""
    kwargs = dict(end_ids=[7, 41], budget=13)

    def elsewhere(i, first_serial):  # in the middle of four rows that are all there is
        return generate(params, [PROMPTS[i]], engine=OTHER, k=4, first_serial=first_serial - 1, **kwargs)[0][1:3]

    groups = generate(params, first_serial=50, **kwargs)
    assert {r.stop for r in sum(groups, ())} == set(StopReason)
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


def test_one_more_prompt_than_fits_and_none_at_all(params):
    seven = generate(params, [*PROMPTS, PROMPTS[0]], k=6)
    assert [len(group) for group in seven] == [6] * 7
    assert_same(seven[6][0], generate(params, [PROMPTS[0]], k=6, first_serial=36)[0][0])
    assert generate(params, []) == []


def test_stream_grows_to_the_response_that_generate_gives(params):
    settings = SamplingSettings.of(temperature=1.0, end_ids=[NEVER])
    parts = list(ENGINE.stream(params, PROMPTS[1], serial=36, run_key=RUN_KEY, settings=settings))
    assert [len(part) for part in parts] == [1, 6, 11, 13]
    for part in parts:  # what was handed out earlier is not written over by later chunks
        np.testing.assert_array_equal(part.tokens, parts[-1].tokens[: len(part)])
        np.testing.assert_array_equal(part.logprobs, parts[-1].logprobs[: len(part)])
        assert part.text == " ".join(map(str, part.tokens))
    assert_same(parts[-1], generate(params, [PROMPTS[1]], k=6, first_serial=36)[0][0])
    short = list(ENGINE.stream(params, PROMPTS[1], serial=36, run_key=RUN_KEY, settings=settings, budget=2))
    assert len(short[-1]) == 2


def test_calls_with_one_k_compile_once(params):
    generate(params)
    compiled = decode.start._cache_size(), decode.decode_chunk._cache_size()
    generate(params, PROMPTS[3:], temperature=0.0, end_ids=[1, 2, 3], budget=3, first_serial=2**31)
    assert (decode.start._cache_size(), decode.decode_chunk._cache_size()) == compiled


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda p: generate(p, k=4), "sampling.rows=6 must be a multiple of k=4"),
        (lambda p: generate(p, k=0), "sampling.rows=6 must be a multiple of k=0"),
        (lambda p: generate(p, budget=14), r"budget of 14 tokens is outside 1\.\.13"),
        (lambda p: generate(p, budget=0), r"budget of 0 tokens is outside 1\.\.13"),
        (
            lambda p: next(ENGINE.stream(p, PROMPTS[0], serial=0, run_key=RUN_KEY, settings=None, budget=14)),
            r"budget of 14 tokens is outside 1\.\.13",
        ),
        (
            lambda p: generate(p, [PROMPTS[0], random_prompt(np.random.default_rng(0), 20)]),
            "prompt 1 of 2 has size 20, the limit is sampling.prompt_tokens=19",
        ),
        (
            lambda p: generate(p, [random_prompt(np.random.default_rng(0), 2, [(17, 18)])]),
            "prompt 0 of 1 has size 36, the limit is sampling.prompt_patches=32",
        ),
    ],
)
def test_what_cannot_be_sampled_is_refused(params, call, message):
    with pytest.raises(ValueError, match=message):
        call(params)
