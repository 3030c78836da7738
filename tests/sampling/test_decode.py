"""The sampler against sampling without a cache: all of the sequence through the training path, for every token."""

import dataclasses

import jax
import numpy as np
import pytest

from kimi_jax.models.policy import Policy
from kimi_jax.sampling import decode
from kimi_jax.sampling.engine import Engine
from kimi_jax.sampling.logits import SamplingSettings
from kimi_jax.types import Request, StopReason
from tests.helpers import (
    CONFIG,
    make_engine,
    pack,
    random_params,
    random_prompts,
    sampling_params,
    with_response,
)

RUN_KEY = jax.random.key(3)
ENGINE = make_engine()
M = ENGINE.max_tokens
PROMPTS = random_prompts()
HIDDEN = jax.jit(Policy(CONFIG).hidden)
NEVER = CONFIG.vocab_size  # an id that no token has
new_pages = Engine.new_pages


def settings(*, temperature=0.0, end_ids=(NEVER,), **truncation):
    return SamplingSettings.of(temperature=temperature, end_ids=list(end_ids), **truncation)


@pytest.fixture(scope="module")
def masters():
    return random_params(CONFIG)


@pytest.fixture(scope="module")
def params(masters):
    return sampling_params(masters)


@dataclasses.dataclass
class Sampled:
    """One row per prompt, as the host sees it."""

    tokens: np.ndarray  # [6, M], 0 after the end
    logprobs: np.ndarray
    lengths: np.ndarray
    stops: list


def sample(params, s, *, prompts=PROMPTS, serials=range(6), budgets=(M,) * 6, run_key=RUN_KEY) -> Sampled:
    requests = [Request(*row) for row in zip(prompts, map(int, serials), map(int, budgets), strict=False)]
    flight = ENGINE.start(params, requests, run_key=run_key, settings=s)
    out = Sampled(np.zeros((6, M), np.int32), np.zeros((6, M)), np.zeros(6, int), [None] * 6)
    while not flight.done:
        for b, segment in flight.advance():
            n = out.lengths[b] = len(segment.tokens)
            out.tokens[b, :n], out.logprobs[b, :n], out.stops[b] = segment.tokens, segment.logprobs, segment.stop
    return out


def sample_without_cache(masters, *, temperature, serials=range(6)):
    """(tokens, log-probs) [6, M]. Token t of rollout u: argmax of logits + noise of the key (run, u, t)."""
    tokens, logprobs = np.zeros((6, M), np.int32), np.zeros((6, M))
    table = np.float64(masters["decoder"]["ends"]["embed"]["embedding"])
    for t in range(M):
        examples = [with_response(prompt, tokens[b, :t]) for b, prompt in enumerate(PROMPTS)]
        plan = [[b] for b in range(6)]
        rows, _ = pack(examples, plan, row_tokens=ENGINE.prompt_tokens + M, row_patches=ENGINE.prompt_patches)
        hidden = np.float64(HIDDEN(masters, rows))
        for b, u in enumerate(serials):
            logits = hidden[b, len(examples[b].tokens) - 1] @ table.T / (temperature or 1.0)
            noise = jax.random.gumbel(jax.random.fold_in(jax.random.fold_in(RUN_KEY, u), t), logits.shape)
            tokens[b, t] = np.argmax(logits + (noise if temperature else 0.0))
            logprobs[b, t] = logits[tokens[b, t]] - np.log(np.exp(logits).sum())
    return tokens, logprobs


@pytest.fixture(scope="module")
def greedy(masters):
    return sample_without_cache(masters, temperature=0.0)


@pytest.mark.smoke
def test_greedy_equals_decoding_without_a_cache(params, greedy):
    state = sample(params, settings())
    np.testing.assert_array_equal(state.tokens, greedy[0])
    np.testing.assert_allclose(state.logprobs, greedy[1], atol=1e-5)
    assert len(np.unique(greedy[0])) > 11  # not one token over and over
    assert (state.lengths == M).all() and set(state.stops) == {StopReason.LENGTH}


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_sampling_equals_drawing_without_a_cache_from_the_same_noise(masters, params, temperature):
    serials = (11, 2, 3, 5, 97, 7)
    tokens, logprobs = sample_without_cache(masters, temperature=temperature, serials=serials)
    state = sample(params, settings(temperature=temperature), serials=serials)
    np.testing.assert_array_equal(state.tokens, tokens)
    np.testing.assert_allclose(state.logprobs, logprobs, atol=1e-5)


def cut(tokens, budget, end_ids):
    """The tokens to the first end token, which is kept, or to the budget; and whether an end token is the last."""
    for t, token in enumerate(tokens[:budget]):
        if token in end_ids:
            return tokens[: t + 1], True
    return tokens[:budget], False


def test_end_ids_and_budgets_per_row_cut_the_same_responses(params, greedy):
    end_ids = (greedy[0][0, 4], greedy[0][1, 2], greedy[0][5, 0])
    natural = np.array([len(cut(tokens, M, end_ids)[0]) for tokens in greedy[0]])
    assert len(set(natural)) >= 4 and natural.max() == M  # rows that end at several places, and one that does not
    # An end token may be the very last that the budget allows, or come one too late.
    around = (natural, np.maximum(natural - 1, 1), np.minimum(natural + 1, M))
    for budgets in (np.full(6, M), *around, np.array([2, 1, 5, 3, 1, 7])):
        state = sample(params, settings(end_ids=end_ids), budgets=budgets)
        for b, budget in enumerate(budgets):
            expected, ended = cut(greedy[0][b], budget, end_ids)
            n = len(expected)
            assert (state.lengths[b], state.stops[b]) == (n, StopReason.END if ended else StopReason.LENGTH)
            np.testing.assert_array_equal(state.tokens[b, :n], expected)
            np.testing.assert_allclose(state.logprobs[b, :n], greedy[1][b, :n], atol=1e-5)


def test_padding_and_what_stood_in_the_pages_before_have_no_influence(params, monkeypatch):
    """Garbage in the padding of a prefill call, in pages that are taken over, in the trash page, in empty slots."""
    s = settings(temperature=1.0)
    clean = sample(params, s, budgets=range(2, 8))
    rng = np.random.default_rng(1)
    read, draw = decode.prefill, decode.decode

    def prefill(params, pages, rows, table, **statics):
        assert (rows.segments == 0).any() and (rows.patch_segments == 0).any() == bool(rows.patches.size)
        padding, no_patch = rows.segments == 0, rows.patch_segments == 0
        rows.tokens[padding] = rng.integers(0, CONFIG.vocab_size, padding.sum())
        rows.patches[no_patch], rows.patch_positions[no_patch] = 1e3, 79
        return read(params, pages, rows, table, **statics)

    def scribbled(params, pages, repeated, slots, *args, **statics):
        empty = ~slots.live
        slots.last_token[empty], slots.positions[empty], slots.serials[empty] = 3, 11, 13
        return draw(params, pages, repeated, slots, *args, **statics)

    monkeypatch.setattr(decode, "prefill", prefill)
    monkeypatch.setattr(decode, "decode", scribbled)
    monkeypatch.setattr(Engine, "new_pages", lambda engine: jax.tree.map(lambda x: x - 1e3, new_pages(engine)))
    scribbled = sample(params, s, budgets=range(2, 8))
    np.testing.assert_array_equal(scribbled.tokens, clean.tokens)
    np.testing.assert_allclose(scribbled.logprobs, clean.logprobs, atol=1e-6)


def test_truncation_renormalises_the_log_probs_of_the_same_logits(params, greedy):
    # Greedy tokens do not change under top-k, so neither do the logits; their log-probs can only grow, top-1 to 0.
    one = sample(params, settings(top_k=1))
    np.testing.assert_array_equal(one.tokens, greedy[0])
    np.testing.assert_allclose(one.logprobs, 0.0, atol=1e-6)
    three = sample(params, settings(top_k=3))
    np.testing.assert_array_equal(three.tokens, greedy[0])
    assert (three.logprobs > greedy[1]).all() and (three.logprobs >= np.log(1 / 3) - 1e-6).all()


def test_nothing_that_varies_at_run_time_compiles(params, caplog):
    """Not one program of any kind, the making of the cache included."""
    other_key = jax.random.key(4)
    sample(params, settings())
    sample(params, settings(), prompts=PROMPTS[:1] * 6)
    with jax.log_compiles():
        for s in (
            settings(temperature=1.3),
            settings(temperature=0.7, top_p=0.9),
            settings(temperature=1.0, top_k=7, end_ids=range(8)),
        ):
            sample(params, s)
        sample(params, settings(), serials=(9, 8, 7, 6, 5, 2**32 - 1), budgets=(1, 2, 3, 4, 5, 6))
        sample(params, settings(), run_key=other_key)
        sample(params, settings(), prompts=PROMPTS[2:])
        sample(params, settings(), prompts=PROMPTS[:1] * 5)
        assert "ompil" not in caplog.text
        jax.jit(lambda x: x + 17)(1)
        assert "ompil" in caplog.text
