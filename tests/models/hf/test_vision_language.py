"""Vision-language families against transformers: logits, gradients, greedy decoding, and sampler against trainer."""

import copy
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("transformers")
import torch  # noqa: E402
import transformers  # noqa: E402

from kimi_jax.data.hf_images import window_order  # noqa: E402
from kimi_jax.data.packing import pack_rows  # noqa: E402
from kimi_jax.models import hf, paths  # noqa: E402
from kimi_jax.models.config import named_size  # noqa: E402
from kimi_jax.models.hf import qwen2_5_vl, qwen3_vl  # noqa: E402
from kimi_jax.models.hf.placement import canonical, place  # noqa: E402
from kimi_jax.models.hf.shards import read_directory  # noqa: E402
from kimi_jax.models.policy import Policy  # noqa: E402
from kimi_jax.sampling.engine import Engine  # noqa: E402
from kimi_jax.sampling.logits import SamplingSettings  # noqa: E402
from kimi_jax.training import sharding  # noqa: E402
from kimi_jax.types import Example, ImagePatches, Prompt, Request  # noqa: E402
from tests.models.hf import oracle  # noqa: E402

IMAGE_ID = 5
VOCAB = 67
MERGE = 2
# Sides of images in merged patches. Windows are 2 x 2 or 3 x 3 of them, so some are cut and some are not.
IMAGES = ((3, 5), (1, 4), (4, 2), (2, 7))
CASES = {
    "qwen2.5-vl": (
        "Qwen2_5_VL",
        dict(hidden_size=42, num_attention_heads=3, num_key_value_heads=1, num_hidden_layers=3),
        dict(rope_theta=1e4, rope_type="default", mrope_section=[2, 1, 4]),
        dict(depth=3, hidden_size=24, num_heads=3, patch_size=3, window_size=12, fullatt_block_indexes=[1]),
    ),
    "qwen2.5-vl tied": (
        "Qwen2_5_VL",
        dict(hidden_size=40, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=2),
        dict(rope_theta=1e3, type="mrope", mrope_section=[1, 2, 2]),
        dict(depth=4, hidden_size=16, num_heads=2, patch_size=2, window_size=12, fullatt_block_indexes=[0, 3]),
    ),
    "qwen3-vl": (
        "Qwen3VL",
        dict(hidden_size=29, num_attention_heads=6, num_key_value_heads=2, num_hidden_layers=3, head_dim=14),
        dict(rope_theta=1e4, rope_type="default", mrope_section=[3, 2, 2], mrope_interleaved=True),
        dict(
            depth=4,
            hidden_size=24,
            num_heads=3,
            patch_size=3,
            num_position_embeddings=49,
            deepstack_visual_indexes=[0, 2],
        ),
    ),
    "qwen3-vl tied": (
        "Qwen3VL",
        dict(
            hidden_size=31,
            num_attention_heads=2,
            num_key_value_heads=2,
            num_hidden_layers=2,
            head_dim=26,
            attention_bias=True,
        ),
        dict(rope_theta=1e3, rope_type="default", mrope_section=[5, 4, 4], mrope_interleaved=True),
        dict(
            depth=3,
            hidden_size=16,
            num_heads=2,
            patch_size=2,
            num_position_embeddings=9,
            deepstack_visual_indexes=[0, 2],
        ),
    ),
}


@functools.cache
def saved(case: str, root):
    """(directory, model): random weights in which every bias and scale counts."""
    name, text, rope, vision = CASES[case]
    torch.manual_seed(len(case))
    tied = case.endswith("tied")
    unset = dict(bos_token_id=None, eos_token_id=None)
    text = dict(
        text, vocab_size=VOCAB, intermediate_size=37, max_position_embeddings=256, rope_parameters=rope, **unset
    )
    vision = dict(vision, intermediate_size=29, out_hidden_size=text["hidden_size"])
    config = getattr(transformers, f"{name}Config")(
        text_config=text, vision_config=vision, image_token_id=IMAGE_ID, tie_word_embeddings=tied
    )
    model = getattr(transformers, f"{name}ForConditionalGeneration")(config).eval()
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape)
            if parameter.ndim == 1:
                parameter.copy_(0.3 * noise + (1.0 if path.endswith("weight") else 0.0))
            else:
                fan_in = parameter[0].numel()
                parameter.copy_(noise * (1.0 if "embed_tokens" in path or "pos_embed" in path else 1.3 * fan_in**-0.5))
    directory = root / case.replace(" ", "_")
    model.save_pretrained(directory)
    return directory, model


def image(rng, config, rows: int, columns: int) -> tuple[ImagePatches, np.ndarray]:
    """An image of random patches, as ours and as theirs."""
    pixels = rng.normal(size=(rows * columns, MERGE**2, config.patch_dim)).astype(np.float32)
    positions = np.indices((rows * MERGE, columns * MERGE), dtype=np.int32)
    positions = positions.reshape(2, rows, MERGE, columns, MERGE).transpose(1, 3, 2, 4, 0).reshape(-1, MERGE**2, 2)
    windows, order, stored = None, None, np.arange(rows * columns)
    if config.window:
        stored, owner = window_order(rows, columns, window=config.window)
        order, windows = np.argsort(stored), np.repeat(owner, MERGE**2)
    ours = ImagePatches(
        patches=pixels[stored].reshape(-1, config.patch_dim),
        positions=positions[stored].reshape(-1, 2),
        num_tokens=rows * columns,
        grid=(rows * MERGE, columns * MERGE),
        windows=windows,
        order=order,
    )
    return ours, pixels.reshape(-1, config.patch_dim)


def sequences(config, seed=0) -> list[tuple[Prompt, dict]]:
    """Text image text image text; text; image text image text: ours, and what transformers reads."""
    rng = np.random.default_rng(seed)
    made = []
    for pattern in ((7, IMAGES[0], 3, IMAGES[1], 6), (13,), (IMAGES[2], 1, IMAGES[3], 5)):
        tokens, images, pixels, grids = [], [], [], []
        for part in pattern:
            if isinstance(part, int):
                tokens.append(rng.integers(IMAGE_ID + 1, VOCAB, part))
                continue
            ours, theirs = image(rng, config.vision, *part)
            tokens.append(np.full(ours.num_tokens, IMAGE_ID))
            images.append(ours)
            pixels.append(theirs)
            grids.append((1, *ours.grid))
        prompt = Prompt(np.concatenate(tokens).astype(np.int32), tuple(images))
        ids = torch.from_numpy(prompt.tokens).long()[None]
        inputs = {
            "input_ids": ids,
            "mm_token_type_ids": (ids == IMAGE_ID).int(),
            "attention_mask": torch.ones_like(ids),
        }
        if images:
            inputs["pixel_values"] = torch.from_numpy(np.concatenate(pixels))
            inputs["image_grid_thw"] = torch.tensor(grids)
        made.append((prompt, inputs))
    return made


def packed(policy: Policy, examples: list[Example], *, row_tokens: int, row_patches: int):
    """(rows, where each example went). All in one row."""
    vision = policy.config.vision
    return pack_rows(
        examples,
        [list(range(len(examples)))],
        num_rows=1,
        row_tokens=row_tokens,
        row_patches=row_patches,
        patch_dim=vision.patch_dim,
        merge=vision.merge_size,
        image_id=IMAGE_ID,
        extras=policy.config.extras,
    )


def trained_on_text(prompt: Prompt) -> Example:
    trained = prompt.tokens != IMAGE_ID
    trained[0] = False
    return Example(prompt.tokens, trained, prompt.images)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("models")


@pytest.mark.parametrize("case", CASES)
def test_packed_logits_at_every_position_and_gradients_of_every_parameter(case, root):
    directory, model = saved(case, root)
    policy, params = oracle.load(directory)
    made = sequences(policy.config)
    examples = [trained_on_text(prompt) for prompt, _ in made]
    rows, placements = packed(policy, examples, row_tokens=96, row_patches=180)
    grad = jax.jit(jax.value_and_grad(functools.partial(oracle.our_loss, policy), has_aux=True))
    (loss, logits), grads = grad(params, rows)
    model.zero_grad()
    their_loss, count = 0.0, 0
    for i, (prompt, inputs) in enumerate(made):
        row, start = placements[i]
        ours = np.asarray(logits[row, start : start + len(prompt.tokens)])
        theirs = model(**inputs).logits[0]
        exact = theirs.detach().numpy()
        assert np.max(np.linalg.norm(ours - exact, axis=-1) / np.linalg.norm(exact, axis=-1)) <= 1e-4
        trained = torch.from_numpy(examples[i].trained[1:])
        targets = inputs["input_ids"][0, 1:][trained]
        their_loss += torch.nn.functional.cross_entropy(theirs[:-1][trained], targets, reduction="sum")
        count += int(trained.sum())
    (their_loss / count).backward()
    np.testing.assert_allclose(loss, their_loss.item() / count, rtol=1e-5)
    family, config = hf.read_config(directory)
    named = {canonical(family, name): parameter.grad.numpy() for name, parameter in model.named_parameters()}
    leaves, places = dict(paths.flatten(grads)), place(family.tensors(config), grads)
    assert places.keys() == named.keys()
    for name, spot in places.items():
        parts = [leaves[path] if spot.index is None else leaves[path][spot.index] for path in spot.paths]
        ours, theirs = spot.tensor.transform.to_theirs(*parts), named[name]
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-3 * np.abs(theirs).max(), err_msg=name)


def make_engine(policy: Policy) -> Engine:
    return Engine(
        policy=policy,
        image_id=IMAGE_ID,
        decode_text=str,
        rows=3,
        prompt_tokens=48,
        prompt_patches=96,
        max_tokens=64,
        page=8,
        pages=None,
        prefill_tokens=16,  # images are cut: a prompt is read in pieces
        chunk=32,
    )


def settings(temperature: float) -> SamplingSettings:
    return SamplingSettings.of(temperature=temperature, end_ids=[VOCAB])


@pytest.mark.parametrize("case", ["qwen2.5-vl", "qwen3-vl"])
def test_greedy_decoding_of_64_tokens_is_identical_and_can_be_continued(case, root):
    directory, model = saved(case, root)
    policy, params = oracle.load(directory)
    params = policy.to_sampling_layout(params, "float32")
    made = sequences(policy.config, seed=1)
    engine = make_engine(policy)
    options = dict(run_key=jax.random.key(0), settings=settings(0.0))
    groups = engine.generate(params, [prompt for prompt, _ in made], k=1, first_serial=0, policy_version=0, **options)
    expected = []
    for (prompt, inputs), (rollout,) in zip(made, groups, strict=True):
        model.model.rope_deltas = None
        out = model.generate(**inputs, max_new_tokens=64, do_sample=False, pad_token_id=0)
        expected.append(out[0, len(prompt.tokens) :].numpy())
        np.testing.assert_array_equal(rollout.tokens, expected[-1])
    requests = [
        Request(prompt, i, 64 - cut, expected[i][:cut].astype(np.int32))
        for (i, (prompt, _)), cut in zip(enumerate(made), (17, 3, 1), strict=True)
    ]
    flight = engine.start(params, requests, **options)
    while not flight.done:
        for i, segment in flight.advance():
            np.testing.assert_array_equal(segment.tokens, expected[i][len(requests[i].prefix) :])


@pytest.mark.parametrize("case", ["qwen2.5-vl", "qwen3-vl"])
def test_sampler_and_trainer_agree_on_log_probs_of_a_group_that_shares_its_prompt(case, root):
    directory, _ = saved(case, root)
    policy, params = oracle.load(directory)
    made = sequences(policy.config, seed=2)
    groups = make_engine(policy).generate(
        policy.to_sampling_layout(params, "float32"),
        [prompt for prompt, _ in made],
        k=2,
        first_serial=0,
        run_key=jax.random.key(3),
        settings=settings(1.0),
        policy_version=0,
        budget=11,
    )
    examples, rollouts = [], []
    for (prompt, _), group in zip(made, groups, strict=True):
        for rollout in group:
            tokens = np.concatenate([prompt.tokens, rollout.tokens])
            trained = np.repeat([False, True], [len(prompt.tokens), len(rollout.tokens)])
            examples.append(Example(tokens, trained, prompt.images))
            rollouts.append(rollout)
    rows, placements = packed(policy, examples, row_tokens=256, row_patches=180)
    score = jax.jit(functools.partial(policy.logprobs, temperature=1.0, logits_chunk=256))
    logprobs, _ = score(params, jax.tree.map(jnp.asarray, rows))
    for i, (row, start) in placements.items():
        at = start + len(examples[i].tokens) - len(rollouts[i].tokens) - 1
        np.testing.assert_allclose(
            logprobs[row, at : at + len(rollouts[i].tokens)], rollouts[i].logprobs, rtol=0, atol=1e-5
        )


@pytest.mark.parametrize("case", CASES)
def test_round_trip_is_equal_byte_for_byte(case, root, tmp_path):
    directory, _ = saved(case, root)
    _, params = oracle.load(directory)
    hf.save_params(params, tmp_path / "out", source=directory, shard_bytes=20_000)
    contents = lambda where: {n: (e.dtype, e.read().tobytes()) for n, e in read_directory(where).items()}  # noqa: E731
    assert contents(tmp_path / "out") == contents(directory)


@pytest.mark.parametrize("case", ["qwen2.5-vl", "qwen3-vl"])
def test_rounding_of_bfloat16_is_no_worse_than_theirs(case, root):
    directory, model = saved(case, root)
    policy, params = oracle.load(directory)
    made = sequences(policy.config, seed=3)
    rows, placements = packed(policy, [trained_on_text(p) for p, _ in made], row_tokens=96, row_patches=180)
    low = dataclasses.replace(policy, config=dataclasses.replace(policy.config, dtype="bfloat16"))
    rounded = jax.tree.map(lambda w: w.astype(jnp.bfloat16).astype(jnp.float32), params)
    logits = jax.jit(functools.partial(oracle.our_logits, low))(rounded, rows)
    theirs = copy.deepcopy(model).to(torch.bfloat16)
    exact = copy.deepcopy(theirs).to(torch.float32)
    errors = []
    for i, (prompt, inputs) in enumerate(made):
        row, start = placements[i]
        with torch.no_grad():
            truth, rough = (m(**inputs).logits[0].float().numpy() for m in (exact, theirs))
        ours = np.asarray(logits[row, start : start + len(prompt.tokens)])
        errors.append([np.linalg.norm(ours - truth), np.linalg.norm(rough - truth)])
    ours, rough = np.linalg.norm(errors, axis=0)
    assert 0 < ours <= 1.2 * rough


@pytest.mark.parametrize("name", ["qwen2.5-vl-3b", "qwen3-vl-2b"])
def test_every_parameter_has_a_place_on_a_mesh_and_a_counterpart(name):
    policy = Policy(named_size(name))
    mesh = sharding.make_mesh(data=1, fsdp=1, tensor=1, devices=jax.devices()[:1])
    masters = jax.eval_shape(policy.init, jax.random.key(0))
    sharding.shardings(mesh, masters, sharding.TRAIN_RULES)
    copied = jax.eval_shape(functools.partial(policy.to_sampling_layout, dtype="bfloat16"), masters)
    sharding.shardings(mesh, copied, sharding.SAMPLE_RULES)
    family = (qwen3_vl if "qwen3" in name else qwen2_5_vl).FAMILY
    place(family.tensors(policy.config), masters)
