"""Text families against transformers: logits, gradients, greedy decoding, and rounding in bfloat16."""

import functools

import jax
import numpy as np
import pytest

pytest.importorskip("transformers")
import torch  # noqa: E402
import transformers  # noqa: E402

from kimi_jax.models import hf, paths  # noqa: E402
from kimi_jax.models.config import RopeScaling  # noqa: E402
from kimi_jax.models.hf.placement import place  # noqa: E402
from kimi_jax.models.layers import rope_frequencies  # noqa: E402
from kimi_jax.sampling.engine import Engine  # noqa: E402
from kimi_jax.sampling.logits import SamplingSettings  # noqa: E402
from kimi_jax.types import Prompt  # noqa: E402
from tests.models.hf import oracle  # noqa: E402


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("models")


@pytest.mark.parametrize("case", oracle.CASES)
def test_logits_at_every_position_and_gradients_of_every_parameter(case, root):
    directory, model = oracle.saved(case, root)
    policy, params = oracle.load(directory)
    tokens = oracle.sequences(policy.config.vocab_size)
    grad = jax.jit(jax.value_and_grad(functools.partial(oracle.our_loss, policy), has_aux=True))
    (loss, logits), grads = grad(params, oracle.rows(tokens))
    for ours, theirs in zip(oracle.split(logits, tokens), oracle.their_logits(model, tokens), strict=True):
        theirs = theirs.detach().numpy()
        error = np.linalg.norm(ours - theirs, axis=-1) / np.linalg.norm(theirs, axis=-1)
        assert error.max() <= 1e-4
    model.zero_grad()
    expected = oracle.their_loss(model, tokens)
    expected.backward()
    np.testing.assert_allclose(loss, expected.item(), rtol=1e-5)
    named, leaves = dict(model.named_parameters()), dict(paths.flatten(grads))
    family, config = hf.read_config(directory)
    places = place(family.tensors(config), grads)
    assert places.keys() == named.keys()
    for name, spot in places.items():
        parts = [leaves[path] if spot.index is None else leaves[path][spot.index] for path in spot.paths]
        theirs = named[name].grad.numpy()
        np.testing.assert_allclose(
            spot.tensor.transform.to_theirs(*parts), theirs, rtol=0, atol=1e-3 * np.abs(theirs).max(), err_msg=name
        )


@pytest.mark.parametrize("case", ["qwen2", "qwen3", "llama scaled"])
def test_greedy_decoding_of_64_tokens_is_identical(case, root):
    directory, model = oracle.saved(case, root)
    policy, params = oracle.load(directory)
    prompts = [Prompt(one[:n]) for one, n in zip(oracle.sequences(policy.config.vocab_size, 1), (5, 11), strict=True)]
    engine = Engine(
        policy=policy,
        image_id=-1,
        decode_text=str,
        rows=2,
        prompt_tokens=11,
        prompt_patches=0,
        max_tokens=64,
        page=8,
        pages=None,
        prefill_tokens=32,
        chunk=32,
    )
    groups = engine.generate(
        policy.to_sampling_layout(params, "float32"),
        prompts,
        k=1,
        first_serial=0,
        run_key=jax.random.key(0),
        policy_version=0,
        settings=SamplingSettings.of(temperature=0.0, end_ids=[policy.config.vocab_size]),
    )
    for prompt, (rollout,) in zip(prompts, groups, strict=True):
        ids = torch.from_numpy(prompt.tokens).long()[None]
        theirs = model.generate(ids, max_new_tokens=64, do_sample=False, pad_token_id=0)
        np.testing.assert_array_equal(rollout.tokens, theirs[0, len(prompt.tokens) :].numpy())


@pytest.mark.parametrize("family", ["Qwen2", "Qwen3", "Llama"])
def test_rounding_of_bfloat16_is_no_worse_than_theirs(family, tmp_path):
    options = dict(hidden_size=96, num_attention_heads=6, num_key_value_heads=2, head_dim=16, num_hidden_layers=4)
    model = oracle.make(family, {**options, "vocab_size": 251, "intermediate_size": 190}, seed=1, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path)
    tokens = oracle.sequences(251)
    policy, params = oracle.load(tmp_path)
    assert policy.config.dtype == "bfloat16"
    logits = jax.jit(functools.partial(oracle.our_logits, policy))(params, oracle.rows(tokens))
    ours = np.concatenate(oracle.split(logits, tokens))
    with torch.no_grad():
        theirs = torch.cat(oracle.their_logits(model, tokens)).float().numpy()
        truth = torch.cat(oracle.their_logits(model.float(), tokens)).numpy()
    error = lambda x: np.sqrt(np.mean((x - truth) ** 2))  # noqa: E731
    assert error(ours) <= 1.2 * error(theirs)


def test_stretched_frequencies_are_those_of_llama_3_1():
    values = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    config = transformers.LlamaConfig(
        hidden_size=4096,
        num_attention_heads=32,
        rope_parameters={"rope_theta": 500_000.0, "rope_type": "llama3", **values},
    )
    theirs, scale = transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS["llama3"](config)
    ours = rope_frequencies(64, 500_000.0, RopeScaling(*values.values()))
    assert scale == 1.0
    np.testing.assert_allclose(ours, theirs.numpy(), rtol=1e-6)
    plain = rope_frequencies(64, 500_000.0, None)
    kept, stretched = ours == plain, np.isclose(ours, plain / 8, rtol=1e-6)
    assert kept.sum() > 20 and stretched.sum() > 20 and kept.sum() + stretched.sum() < 64
