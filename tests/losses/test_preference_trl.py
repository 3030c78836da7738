"""DPO beside that of TRL: the same tiny model, start and batch; loss and gradients of every parameter."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("trl")
import datasets  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
import trl  # noqa: E402
from tokenizers import Tokenizer, models, pre_tokenizers  # noqa: E402
from trl.trainer.dpo_trainer import DataCollatorForPreference  # noqa: E402

from kimi_jax.data.packing import pack_rows  # noqa: E402
from kimi_jax.models import hf, paths  # noqa: E402
from kimi_jax.models.hf.placement import place  # noqa: E402
from kimi_jax.trainers import dpo  # noqa: E402
from kimi_jax.types import Example  # noqa: E402
from tests.models.hf import oracle  # noqa: E402

pytestmark = pytest.mark.slow
BETA, ROW = 0.37, 53
LENGTHS = ((5, 3, 11), (7, 13, 2), (2, 5, 7))  # prompt, chosen, rejected
# Their mean of α's term is over tokens, ours over pairs of means over tokens: the same where chosen sides are as long.
EQUAL = ((5, 7, 11), (7, 7, 2), (2, 7, 5))


@functools.cache
def pairs(vocab_size: int, all_lengths: tuple[tuple[int, int, int], ...]):
    rng = np.random.default_rng(0)
    draw = lambda n: rng.integers(0, vocab_size, n).tolist()  # noqa: E731
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    return [dict(zip(names, map(draw, lengths), strict=True)) for lengths in all_lengths]


def their_trainer(model, reference, out, alpha) -> trl.DPOTrainer:
    backend = Tokenizer(models.WordLevel({"a": 0, "b": 1, "[PAD]": 2, "[EOS]": 3}, unk_token="a"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="[PAD]", eos_token="[EOS]")
    losses = {"sigmoid": 1.0} | ({"sft": alpha} if alpha else {})
    arguments = trl.DPOConfig(
        output_dir=str(out),
        beta=BETA,
        loss_type=list(losses),
        loss_weights=list(losses.values()),
        report_to=[],
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
    )
    unread = datasets.Dataset.from_list([{"prompt": "a", "chosen": " b", "rejected": " a"}])
    return trl.DPOTrainer(
        model=model, ref_model=reference, args=arguments, train_dataset=unread, processing_class=tokenizer
    )


@pytest.mark.parametrize("alpha, lengths", [(0.0, LENGTHS), (0.7, EQUAL)])
def test_loss_and_gradients(tmp_path, alpha, lengths):
    name, options = oracle.CASES["qwen2"]
    start = oracle.make(name, options, seed=1)
    start.save_pretrained(tmp_path / "start")
    moved = oracle.make(name, options, seed=1)
    with torch.no_grad():
        for i, parameter in enumerate(moved.parameters()):
            parameter.add_(0.01 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i)))
    moved.save_pretrained(tmp_path / "moved")
    policy, reference = oracle.load(tmp_path / "start")
    _, params = oracle.load(tmp_path / "moved")
    ids = pairs(policy.config.vocab_size, lengths)

    # Ours: the pairs packed into two rows.
    sides = [
        Example(
            np.array(one["prompt_ids"] + one[side], np.int32),
            np.repeat([False, True], [len(one["prompt_ids"]), len(one[side])]),
        )
        for one in ids
        for side in ("chosen_ids", "rejected_ids")
    ]
    packing = dict(row_tokens=ROW, row_patches=0, patch_dim=0, merge=1, image_id=-1)
    rows, _ = pack_rows(sides, [[0, 1, 2, 3], [4, 5]], num_rows=2, **packing)
    logprobs = lambda p: policy.logprobs(p, rows, temperature=1.0, logits_chunk=ROW)[0]  # noqa: E731
    batch = dpo.PairBatch(rows, jax.jit(logprobs)(reference))
    hyper = {"weight": jnp.float32(1 / dpo.num_pairs(rows))}
    loss_fn = lambda p: dpo.loss_fn(logprobs(p), batch, hyper, beta=BETA, alpha=alpha)  # noqa: E731
    (loss, parts), grads = jax.jit(jax.value_and_grad(loss_fn, has_aux=True))(params)

    # Theirs: padded side by side.
    trainer = their_trainer(moved, start, tmp_path, alpha)
    inputs = DataCollatorForPreference(pad_token_id=0)(ids)
    moved.zero_grad()
    expected = trainer._compute_loss(trainer.model, inputs, False)
    expected.backward()

    np.testing.assert_allclose(loss, expected.item(), rtol=1e-4)
    assert abs(expected.item() - np.log(2)) > 0.05
    for ours, theirs in (("chosen_reward", "rewards/chosen"), ("rejected_reward", "rewards/rejected")):
        np.testing.assert_allclose(parts[ours] / len(ids), np.mean(trainer._metrics["eval"][theirs]), rtol=1e-3)
    named, leaves = dict(moved.named_parameters()), dict(paths.flatten(grads))
    family, config = hf.read_config(tmp_path / "moved")
    places, worst = place(family.tensors(config), grads), 0.0
    assert places.keys() == named.keys()
    for name, spot in places.items():
        arrays = [leaves[path] if spot.index is None else leaves[path][spot.index] for path in spot.paths]
        theirs = named[name].grad.numpy()
        error = np.abs(spot.tensor.transform.to_theirs(*arrays) - theirs).max() / np.abs(theirs).max()
        worst = max(worst, error)
    assert worst <= 1e-4
