"""The policy against a transformer in float64 NumPy that reads one sequence at a time and knows nothing of packing."""

import dataclasses
import functools
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from kimi_jax.models import layers
from kimi_jax.models.config import KEEPABLE
from kimi_jax.models.policy import DecoderEnds, Policy
from kimi_jax.types import Example
from tests.helpers import CONFIG, IMAGE_ID, assert_trees_close, pack, random_params, random_prompt

ROW_TOKENS, ROW_PATCHES = 33, 40
TEMPERATURE = 0.7
UNTIED = dataclasses.replace(
    CONFIG, tie_embeddings=False, qk_norm=False, qkv_bias=True, num_kv_heads=6, scalar_head=True
)


# --- the oracle -----------------------------------------------------------------------------------------------------


def linear(p, x):
    return x @ p["kernel"] + p.get("bias", 0.0)


def rms_norm(p, x):
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + 1e-6) * p["scale"]


def softmax(x):
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def rotated(x, coordinates, base):
    """x [T, E], coordinates [T, axes]: pair (i, i + E/2) turns by a share of the coordinate of its axis."""
    pairs = x.shape[1] // 2
    per_axis = pairs // coordinates.shape[1]
    out = np.empty_like(x)
    for i in range(pairs):
        axis, j = divmod(i, per_axis)
        z = (x[:, i] + 1j * x[:, i + pairs]) * np.exp(1j * coordinates[:, axis] / base ** (j / per_axis))
        out[:, i], out[:, i + pairs] = z.real, z.imag
    return out


def block(p, x, coordinates, *, heads, kv_heads, base, causal):
    T = len(x)
    attn, y = p["attn"], rms_norm(p["attn_norm"], x)
    q, k, v = (
        linear(attn[f"{name}_proj"], y).reshape(T, n, -1)
        for name, n in zip("qkv", (heads, kv_heads, kv_heads), strict=True)
    )
    out = []
    for h in range(heads):
        q_h, k_h, v_h = q[:, h], k[:, h * kv_heads // heads], v[:, h * kv_heads // heads]
        if "q_norm" in attn:
            q_h, k_h = rms_norm(attn["q_norm"], q_h), rms_norm(attn["k_norm"], k_h)
        scores = rotated(q_h, coordinates, base) @ rotated(k_h, coordinates, base).T / np.sqrt(q_h.shape[1])
        if causal:
            scores[np.triu_indices(T, 1)] = -np.inf
        out.append(softmax(scores) @ v_h)
    x = x + linear(attn["o_proj"], np.concatenate(out, axis=1))
    y = rms_norm(p["mlp_norm"], x)
    gate = linear(p["mlp"]["gate_proj"], y)
    return x + linear(p["mlp"]["down_proj"], gate / (1 + np.exp(-gate)) * linear(p["mlp"]["up_proj"], y))


def blocks(params, x, coordinates, **kwargs):
    stacked = params["runs"]["0"]
    for i in range(len(stacked["attn_norm"]["scale"])):
        layer = jax.tree.map(lambda leaf, i=i: leaf[i], stacked)
        x = block(layer, x, coordinates, **kwargs)
    return x


def image_features(config, params, image):
    """[tokens of the image, D]."""
    ends, v = params["ends"], config.vision
    x = linear(ends["patch_embed"], image.patches.astype(np.float64))
    x = blocks(params, x, image.positions, heads=v.num_heads, kv_heads=v.num_heads, base=v.rope_base, causal=False)
    x = linear(ends["proj_in"], rms_norm(ends["norm"], x).reshape(image.num_tokens, -1))
    gelu = 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
    return linear(ends["proj_out"], gelu)


def numpy_hidden(config, params, example):
    ends = params["decoder"]["ends"]
    x = ends["embed"]["embedding"][example.tokens]
    if example.images:
        x[(example.tokens == IMAGE_ID) & ~example.trained] = np.concatenate(
            [image_features(config, params["vision"], image) for image in example.images]
        )
    positions = np.arange(len(x))[:, None]
    shape = dict(heads=config.num_heads, kv_heads=config.num_kv_heads, base=config.rope_base, causal=True)
    return rms_norm(ends["norm"], blocks(params["decoder"], x, positions, **shape))


def numpy_log_softmax(config, params, example):
    """log π(· | prefix) at every token, [n, V]."""
    ends = params["decoder"]["ends"]
    logits = numpy_hidden(config, params, example) @ ends.get("head", ends["embed"])["embedding"].T / TEMPERATURE
    logits -= logits.max(axis=-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


# --- what is compared -----------------------------------------------------------------------------------------------


def make_examples():
    """Seven sequences; 1 and 2 answer one prompt and share its image, 3 and 5 have images of one size."""
    rng = np.random.default_rng(3)
    shared = random_prompt(rng, 5, [(7, 13)])
    prompts = [random_prompt(rng, 11), shared, shared, random_prompt(rng, 4, [(6, 11)]), random_prompt(rng, 17)]
    prompts += [random_prompt(rng, 4, [(6, 11)]), random_prompt(rng, 2, [(5, 5), (11, 3)])]
    examples = []
    for prompt, n in zip(prompts, (2, 3, 1, 7, 5, 7, 3), strict=True):
        response = rng.integers(IMAGE_ID, CONFIG.vocab_size, n)
        response[0] = IMAGE_ID  # written by the model: text, to which no picture belongs
        tokens = np.concatenate([prompt.tokens, response]).astype(np.int32)
        examples.append(Example(tokens, np.arange(len(tokens)) >= len(prompt.tokens), prompt.images))
    return examples


EXAMPLES = make_examples()
PLAN = [[0, 1], [2, 3], [4], [], [5, 6], [], []]  # as many rows as examples: packed or not, it is one program
WEIGHTS = [np.random.default_rng(i).normal(size=len(e.tokens) - 1).astype(np.float32) for i, e in enumerate(EXAMPLES)]


def packed(plan=None, examples=None):
    """(rows, weight per target: only text targets count, placements)."""
    examples = EXAMPLES if examples is None else examples
    rows, placements = pack(examples, PLAN if plan is None else plan, row_tokens=ROW_TOKENS, row_patches=ROW_PATCHES)
    weights = np.zeros(rows.tokens.shape, np.float32)
    for index, (row, start) in placements.items():
        weights[row, start : start + len(WEIGHTS[index])] = WEIGHTS[index]
    return rows, weights, placements


@functools.partial(jax.jit, static_argnames=("policy", "logits_chunk"))
def evaluate(params, rows, weights, *, policy, logits_chunk):
    """Log-probs, entropy, and the gradient of Σ weights · log-probs."""

    def loss(params):
        logprobs, entropy = policy.logprobs(params, rows, temperature=TEMPERATURE, logits_chunk=logits_chunk)
        return jnp.sum(weights * logprobs), (logprobs, entropy)

    (_, out), grads = jax.value_and_grad(loss, has_aux=True)(params)
    return *out, grads


POLICY = Policy(CONFIG)
run = functools.partial(evaluate, policy=POLICY, logits_chunk=ROW_TOKENS)


@pytest.fixture(scope="module")
def params():
    return random_params(CONFIG)


@pytest.fixture(scope="module")
def base(params):
    rows, weights, placements = packed()
    return rows, weights, placements, *run(params, rows, weights)


@pytest.mark.smoke
@pytest.mark.parametrize("config", [CONFIG, UNTIED], ids=["tied-qk_norm-gqa", "untied-bias-mha"])
def test_logprobs_entropy_and_gradient_match_float64_numpy(config):
    params = random_params(config)
    rows, weights, placements = packed()
    logprobs, entropy, grads = evaluate(params, rows, weights, policy=Policy(config), logits_chunk=ROW_TOKENS)
    exact = jax.tree.map(np.float64, params)
    for index, (row, start) in placements.items():
        log_p = numpy_log_softmax(config, exact, EXAMPLES[index])
        expected = log_p[np.arange(len(log_p) - 1), EXAMPLES[index].tokens[1:]]
        here = (row, slice(start, start + len(expected)))
        np.testing.assert_allclose(logprobs[here], expected, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(entropy[here], -(np.exp(log_p) * log_p).sum(axis=-1)[:-1], rtol=1e-4)

    # The gradient along a random direction is a central difference of the oracle.
    rng = np.random.default_rng(5)
    direction = jax.tree.map(lambda leaf: np.abs(leaf).mean() * rng.normal(size=leaf.shape), exact)

    def loss(step):
        moved = jax.tree.map(lambda leaf, d: leaf + step * d, exact, direction)
        at = lambda e: numpy_log_softmax(config, moved, e)[np.arange(len(e.tokens) - 1), e.tokens[1:]]  # noqa: E731
        return sum(float(w @ at(e)) for e, w in zip(EXAMPLES, WEIGHTS, strict=True))

    expected = (loss(1e-5) - loss(-1e-5)) / 2e-5
    slope = sum(jax.tree.leaves(jax.tree.map(lambda d, g: np.sum(d * np.float64(g)), direction, grads)))
    assert slope == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("config", [CONFIG, UNTIED], ids=["tied-qk_norm-gqa", "untied-bias-mha"])
def test_reading_in_pieces_and_token_by_token_matches_float64_numpy(config):
    """A piece that begins the sequences, one that goes on (images may span the two), then two tokens one by one."""
    policy, masters, p = Policy(config), random_params(config), 4
    params, exact = policy.to_sampling_layout(masters, "float32"), jax.tree.map(np.float64, masters)
    rows, _, _ = packed([[index] for index in range(len(EXAMPLES))])
    lengths = np.array([len(example.tokens) for example in EXAMPLES])
    B, M = len(lengths), -(-ROW_TOKENS // p)
    table = 1 + np.random.default_rng(2).permutation(B * M).reshape(B, M).astype(np.int32)
    pages = jax.tree.map(lambda page: page + 1e3, policy.new_pages(1 + B * M, p))  # what stood there before
    prefill = jax.jit(policy.prefill, static_argnames="fresh")
    cuts = (0, 7, ROW_TOKENS)
    for begin, end in zip(cuts, cuts[1:], strict=False):
        piece = slice(begin, end)
        real = np.arange(begin, end)[None] < lengths[:, None] - 2
        part = dataclasses.replace(
            rows,
            tokens=rows.tokens[:, piece],
            positions=np.where(real, np.arange(begin, end)[None], -1).astype(np.int32),
            segments=real.astype(np.int32),
            image_index=rows.image_index[:, piece],
            targets=None,
            loss_mask=None,
        )
        pages = prefill(params, pages, part, table, fresh=begin == 0)
    decode = jax.jit(policy.decode)
    for positions in (lengths - 2, lengths - 1):
        logits, pages = decode(params, pages, table, rows.tokens[np.arange(B), positions], positions)
        log_p = jax.nn.log_softmax(logits / TEMPERATURE)
        for index, example in enumerate(EXAMPLES):
            expected = numpy_log_softmax(config, exact, example)[positions[index]]
            np.testing.assert_allclose(log_p[index], expected, rtol=1e-4, atol=1e-4)


def test_a_norm_rounds_alike_with_the_masters_and_with_what_is_handed_over_to_sampling():
    norm = layers.rms_norm(CONFIG.width, 1e-6, jnp.bfloat16, nnx.Rngs(0))
    rng = np.random.default_rng(0)
    x = rng.normal(size=(7, CONFIG.width)).astype(jnp.bfloat16)
    norm.scale[...] = scale = jnp.asarray(rng.normal(size=CONFIG.width), jnp.float32)
    y = norm(x)
    assert y.dtype == jnp.bfloat16
    norm.scale[...] = scale.astype(jnp.bfloat16)
    np.testing.assert_array_equal(norm(x), y)


def test_the_gradient_of_a_token_that_is_seen_often_is_the_sum_over_all_it_is_seen_at():
    ends = DecoderEnds(CONFIG, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    tokens = jnp.full((1, 1009), 2)  # in bfloat16, 256 ones and another one are 256
    grads = nnx.grad(lambda ends: ends.embeddings(tokens).astype(jnp.float32).sum())(ends)
    np.testing.assert_array_equal(grads.embed.embedding[...][2], np.full(CONFIG.width, 1009.0))


def test_the_scalar_head_matches_numpy_and_is_missed_when_absent():
    params = random_params(UNTIED)
    rows, _, placements = packed()
    scalars = jax.jit(Policy(UNTIED).scalars)(params, rows)
    exact = jax.tree.map(np.float64, params)
    for index, (row, start) in placements.items():
        expected = linear(exact["decoder"]["ends"]["scalar_head"], numpy_hidden(UNTIED, exact, EXAMPLES[index]))[:, 0]
        np.testing.assert_allclose(scalars[row, start : start + len(expected)], expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="scalar_head=True"):
        POLICY.scalars(params, rows)


@pytest.mark.parametrize(
    "changes, logits_chunk",
    [({"unroll": CONFIG.num_layers}, 11), ({"remat": False}, 1), ({"kept": KEEPABLE}, 33)],
    ids=["unrolled-chunk-11", "no-remat-chunk-1", "all-kept-chunk-33"],
)
def test_how_it_is_computed_changes_nothing(params, base, changes, logits_chunk):
    rows, weights, _, logprobs, entropy, grads = base
    other = evaluate(params, rows, weights, policy=dataclasses.replace(POLICY, **changes), logits_chunk=logits_chunk)
    np.testing.assert_allclose(other[0], logprobs, atol=1e-5)
    np.testing.assert_allclose(other[1], entropy, atol=1e-5)
    assert_trees_close(other[2], grads, relative=1e-4)


def test_with_all_that_can_be_kept_no_product_is_computed_twice(params):
    rows, weights, _ = packed()

    def products(**options):
        policy = dataclasses.replace(POLICY, implementation="flash_interpret", **options)
        loss = lambda p: policy.logprobs(p, rows, temperature=TEMPERATURE, logits_chunk=ROW_TOKENS)[0]  # noqa: E731
        return str(jax.make_jaxpr(jax.grad(lambda p: jnp.sum(weights * loss(p))))(params)).count("dot_general")

    assert products() > products(kept=("attention",)) > products(kept=KEEPABLE) == products(remat=False)


def test_the_mlp_sees_many_tokens_in_pieces_unless_it_is_kept(params, base, monkeypatch):
    rows, weights, _, logprobs, entropy, grads = base
    R, F = len(rows.tokens), CONFIG.mlp_width
    monkeypatch.setattr(layers, "MLP_TOKENS", 7 * R + 1)  # 4 pieces of 7 tokens of each row, one of the 5 left

    def seen(**changes):
        policy = dataclasses.replace(POLICY, **changes)
        options = dict(policy=policy, logits_chunk=ROW_TOKENS)
        program = str(jax.make_jaxpr(lambda p: evaluate.__wrapped__(p, rows, weights, **options))(params))
        return [shape in program for shape in (f"f32[7,{R},{F}]", f"f32[5,{R},{F}]", f"f32[{R},{ROW_TOKENS},{F}]")]

    assert seen() == [True, True, False]
    assert seen(kept=("mlp",)) == seen(remat=False) == [False, False, True]
    in_pieces = jax.jit(lambda p: evaluate.__wrapped__(p, rows, weights, policy=POLICY, logits_chunk=ROW_TOKENS))
    other = in_pieces(params)
    np.testing.assert_allclose(other[0], logprobs, atol=1e-5)
    np.testing.assert_allclose(other[1], entropy, atol=1e-5)
    assert_trees_close(other[2], grads, relative=1e-5)


@pytest.mark.parametrize(
    "R, ways, pieces",
    [(3, None, [7, 1]), (6, (2, 3), [23, 6]), (6, (2, 1), [7, 1]), (5, (2, 1), [4, 1])],
    ids=["one-device", "a-row-each", "three-rows-each", "rows-that-do-not-divide"],
)
def test_a_piece_is_what_one_device_sees(R, ways, pieces, monkeypatch):
    monkeypatch.setattr(layers, "MLP_TOKENS", 23)
    mesh = ways and types.SimpleNamespace(shape=dict(zip(("data", "fsdp"), ways, strict=True)))
    x = np.random.default_rng(0).normal(size=(R, 29, 2)).astype(np.float32)
    tripled = lambda x: layers._in_pieces(lambda x: 3 * x, x, mesh)  # noqa: E731
    assert re.findall(rf"f32\[(\d+),{R},2\] = mul", str(jax.make_jaxpr(tripled)(x))) == [str(n) for n in pieces]
    np.testing.assert_array_equal(tripled(x), 3 * x)


def test_a_chunk_that_does_not_divide_the_row_is_refused(params, base):
    with pytest.raises(ValueError, match=r"logits_chunk=7 must divide the row length 33"):
        evaluate(params, *base[:2], policy=POLICY, logits_chunk=7)


def test_packed_equals_one_sequence_per_row(params, base):
    _, _, placements, logprobs, entropy, grads = base
    rows, weights, alone = packed([[index] for index in range(len(EXAMPLES))])
    logprobs_alone, entropy_alone, grads_alone = run(params, rows, weights)
    for index, (row, start) in placements.items():
        n = len(EXAMPLES[index].tokens) - 1
        assert alone[index] == (index, 0)
        np.testing.assert_allclose(logprobs[row, start : start + n], logprobs_alone[index, :n], atol=1e-5)
        np.testing.assert_allclose(entropy[row, start : start + n], entropy_alone[index, :n], atol=1e-5)
    assert_trees_close(grads, grads_alone, relative=1e-4)


def test_padding_has_no_influence(params, base):
    rows, weights, _, logprobs, _, grads = base
    rng = np.random.default_rng(7)
    padding, no_patch = rows.segments == 0, rows.patch_segments == 0
    assert padding.any() and no_patch.any()
    garbage = dataclasses.replace(
        rows,
        tokens=np.where(padding, rng.integers(0, CONFIG.vocab_size, padding.shape), rows.tokens).astype(np.int32),
        targets=np.where(padding, rng.integers(0, CONFIG.vocab_size, padding.shape), rows.targets).astype(np.int32),
        positions=np.where(padding, 97, rows.positions).astype(np.int32),
        patches=np.where(no_patch[..., None], 1e3, rows.patches).astype(np.float32),
        patch_positions=np.where(no_patch[..., None], 89, rows.patch_positions).astype(np.int32),
    )
    other = run(params, garbage, weights)
    np.testing.assert_allclose(other[0][~padding], logprobs[~padding], atol=1e-6)
    assert_trees_close(other[2], grads, relative=1e-6)


def spans(placements, index):
    row, start = placements[index]
    return row, slice(start, start + len(EXAMPLES[index].tokens) - 1)


def test_a_pixel_changes_what_follows_its_image_and_nothing_else(params, base):
    rows, weights, placements, logprobs, _, _ = base
    row, start = placements[3]
    first_image_token = start + int(np.flatnonzero(EXAMPLES[3].tokens == IMAGE_ID)[0])
    assert first_image_token > start
    merged = rows.image_index[row, first_image_token]
    patches = rows.patches.copy()
    patches[row, merged * 4, 11] += 0.5
    difference = np.abs(run(params, dataclasses.replace(rows, patches=patches), weights)[0] - logprobs)
    _, span = spans(placements, 3)
    assert difference[row, first_image_token : span.stop].min() > 1e-6
    difference[row, first_image_token : span.stop + 1] = 0
    assert difference[rows.segments > 0].max() < 1e-6


def test_swapping_the_images_of_two_sequences_changes_both(params, base):
    _, _, placements, logprobs, _, _ = base
    swapped = list(EXAMPLES)
    assert EXAMPLES[3].images[0].patches.shape == EXAMPLES[5].images[0].patches.shape
    swapped[3] = dataclasses.replace(EXAMPLES[3], images=EXAMPLES[5].images)
    swapped[5] = dataclasses.replace(EXAMPLES[5], images=EXAMPLES[3].images)
    rows, weights, _ = packed(examples=swapped)
    difference = np.abs(run(params, rows, weights)[0] - logprobs)
    for index in (3, 5):
        row, span = spans(placements, index)
        assert difference[row, span][EXAMPLES[index].trained[1:]].min() > 1e-3
    for index in (0, 1, 2, 4, 6):
        assert difference[spans(placements, index)].max() < 1e-6


def test_one_model_reads_text_alone_without_patches(params, base):
    """Rows of text may have room for no patch at all, which is another program; the vision tower does not run."""
    rows, _, placements, logprobs, _, _ = base
    text, placed = pack([EXAMPLES[0]], [[0]], row_tokens=ROW_TOKENS, row_patches=0)
    read = lambda p: POLICY.logprobs(p, text, temperature=TEMPERATURE, logits_chunk=ROW_TOKENS)  # noqa: E731
    out, _ = jax.jit(read)(params)
    n = len(EXAMPLES[0].tokens) - 1
    np.testing.assert_allclose(out[0, :n], logprobs[spans(placements, 0)], atol=1e-5)
