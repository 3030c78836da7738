"""From a mixture in the config to batches: what attends to what, packed against alone, and what is refused."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest

from kimi_jax.data.chat import NativeChat
from kimi_jax.data.documents import Conversation, Document
from kimi_jax.data.loaders import document_rows, in_batches, trained_tokens
from kimi_jax.data.tokenizer import Tokenizer
from kimi_jax.losses.token import cross_entropy
from kimi_jax.models.policy import Policy
from kimi_jax.trainers import pipeline, setup, sources, supervised
from kimi_jax.trainers.config import check_config, source
from tests.helpers import CONFIG, VISION, random_params
from tests.trainers import miniature

ROOT = pathlib.Path(__file__).parents[2]
LIMITS = dict(row_tokens=97, row_patches=152)
LAYOUT = LIMITS | dict(patch_dim=VISION.patch_dim, merge=VISION.merge_size)


@pytest.fixture(scope="module")
def chat(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "m"
    return NativeChat(Tokenizer.train(["abcdefghij"], path, vocab_size=283), VISION.patch_size, VISION.merge_size)


@pytest.fixture(scope="module")
def model(chat):
    config = dataclasses.replace(CONFIG, vocab_size=chat.tokenizer.vocab_size)
    policy, params = Policy(config), random_params(config)

    def loss(params, rows):
        logprobs, _ = policy.logprobs(params, rows, temperature=1.0, logits_chunk=LIMITS["row_tokens"])
        return cross_entropy(logprobs, rows.loss_mask, weight=1.0)[0], logprobs

    return params, jax.jit(jax.value_and_grad(loss, has_aux=True))


def pixels(rng):
    return rng.integers(0, 256, (*rng.integers(3, 19, 2), 3), dtype=np.uint8)


def records(count):
    """Conversations with up to three images in several turns, and documents with up to two."""
    rng = np.random.default_rng(7)
    word = lambda: "".join(rng.choice(list("abcdefghij"), rng.integers(2, 9)))  # noqa: E731
    found = []
    for i in range(count):
        shown = rng.integers(0, 2, 3)
        if i % 3 == 0:
            text = word() + f"<image>{word()}" * shown[0] + f"<image>{word()}" * shown[1]
            found.append(Document(text, tuple(pixels(rng) for _ in range(shown[:2].sum()))))
            continue
        turns = tuple(
            (role, word() + "<image>" * n) for role, n in zip(("user", "assistant", "user"), shown, strict=True)
        )
        found.append(Conversation((*turns, ("assistant", word())), tuple(pixels(rng) for _ in range(shown.sum()))))
    return found


def packed(examples, chat, rows, **options):
    made = document_rows(examples, seed=3, image_id=chat.image_id, **LIMITS, **options)
    content = [make() for make in made]
    padded = content + [[]] * (-len(content) % rows)
    data = in_batches(setup.grain.MapDataset.source(padded), rows_per_batch=rows, image_id=chat.image_id, **LAYOUT)
    return list(data), content


def of_examples(batches, content, logprobs):
    """{tokens of an example: the log-probs of its targets}"""
    rows = [row for batch in logprobs for row in np.asarray(batch)]
    found = {}
    for row, members in zip(rows, content, strict=False):
        start = 0
        for example in members:
            stop = start + len(example.tokens)
            found[example.tokens.tobytes()] = row[start : stop - 1][example.trained[1:]]
            start = stop
    return found


def test_packed_equals_alone_with_several_images_in_several_turns(chat, model):
    """Partial attention: log-probs, loss and gradients."""
    params, grad = model
    examples = [record.encode(chat) for record in records(17)]
    assert max(len(example.images) for example in examples) == 3
    together, content = packed(examples, chat, 2, whole=True, attention="partial")
    assert max(map(len, content)) > 2
    results = []
    for batches, members in ((together, content), packed_alone(examples, chat)):
        outcome = [grad(params, rows) for rows in batches]
        results.append(
            (
                sum(float(loss) for (loss, _), _ in outcome),
                of_examples(batches, members, [logprobs for (_, logprobs), _ in outcome]),
                jax.tree.map(lambda *leaves: np.sum(leaves, axis=0), *[grads for _, grads in outcome]),
            )
        )
    (loss, logprobs, grads), (other_loss, other_logprobs, other_grads) = results
    assert len(logprobs) == 17 and logprobs.keys() == other_logprobs.keys()
    for key, values in logprobs.items():
        np.testing.assert_allclose(values, other_logprobs[key], atol=1e-5)
    assert loss == pytest.approx(other_loss, rel=1e-5)
    scale = max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(other_grads))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * scale), grads, other_grads)


def packed_alone(examples, chat):
    data = setup.grain.MapDataset.source([[example] for example in examples] + [[]])
    return list(in_batches(data, rows_per_batch=2, image_id=chat.image_id, **LAYOUT)), [[e] for e in examples]


def test_with_full_attention_a_document_sees_those_before_it_and_nothing_is_lost(chat, model):
    params, grad = model
    examples = [Document(text).encode(chat) for text in ("abc" * 9, "hij" * 5, "de", "fg" * 50, "a")]
    rows, content = packed(examples, chat, 1, whole=False, attention="full")
    assert all(len(members) == 1 for members in content)
    tokens = sum(len(example.tokens) for example in examples)
    assert sum(int((batch.segments > 0).sum()) for batch in rows) == tokens > LIMITS["row_tokens"]
    assert sum(map(trained_tokens, rows)) == tokens - len(rows)  # all but the first of each row
    # A token of the first document of a row reaches the last target of the row; with partial attention it does not.
    for attention, reaches in (("full", True), ("partial", False)):
        rows, _ = packed(examples, chat, 1, whole=False, attention=attention)
        batch = max(rows, key=lambda batch: int((batch.tokens == chat.tokenizer.end_id).sum()))
        last = int(np.flatnonzero(batch.loss_mask[0])[-1])
        changed = dataclasses.replace(batch, tokens=batch.tokens.copy())
        changed.tokens[0, 0] += 1
        before, after = (np.asarray(grad(params, rows)[0][1])[0, last] for rows in (batch, changed))
        assert (before != after) == reaches


def test_the_epoch_of_a_source_has_all_of_its_documents_once(chat):
    examples = [record.encode(chat) for record in records(23)]
    for attention in ("partial", "full"):
        _, content = packed(examples, chat, 1, whole=False, attention=attention)
        text = b"".join(sorted(example.tokens.tobytes() for members in content for example in members))
        assert len(text) == sum(example.tokens.nbytes for example in examples)
    images = [image.patches.tobytes() for members in content for example in members for image in example.images]
    assert sorted(images) == sorted(image.patches.tobytes() for example in examples for image in example.images)


# --- refusals ---------------------------------------------------------------------------------------------------------


def config_with(**changes):
    config = miniature.get_config()
    with config.unlocked():
        config.data.text_tasks = config.data.image_tasks = ()
        config.rl.iterations = 0
        config.data.mixture.text = source(tasks=("chain",), records=11)
        config.data.mixture.images = source(tasks=("pips",), records=7)
        config.update_from_flattened_dict({name.replace("__", "."): value for name, value in changes.items()})
    return config


@pytest.fixture
def nothing_expensive(monkeypatch):
    miniature.prepare(monkeypatch)

    def refuse(*args, **kwargs):
        raise AssertionError("training began")

    monkeypatch.setattr(supervised, "train", refuse)


MIX = "data__mixture__"


@pytest.mark.parametrize(
    "changes, told",
    [
        ({f"{MIX}text__tasks": ("chian",)}, r"mixture\.text: no task is called 'chian'; did you mean 'chain'"),
        ({f"{MIX}text__tasks": ()}, r"mixture\.text needs either tasks or files"),
        ({f"{MIX}text__files": ("a.jsonl",)}, r"mixture\.text needs either tasks or files; it has tasks=\('chain',\)"),
        ({f"{MIX}text__tasks": (), f"{MIX}text__files": ("no.jsonl",)}, r"mixture\.text: there is no file no\.jsonl"),
        ({f"{MIX}text__form": "chats"}, r"text\.form='chats' must be one of \('documents', 'chat'\)"),
        ({f"{MIX}text__attention": "none"}, r"text\.attention='none' must be one of \('partial', 'full'\)"),
        ({f"{MIX}text__form": "chat", f"{MIX}text__attention": "full"}, "conversations do not attend to others"),
        ({f"{MIX}text__records": 0}, r"text\.records=0 must be at least 1"),
        ({f"{MIX}text__weight": ((0, -1.0),)}, "the weight of 'text' is -1.0"),
        ({f"{MIX}text__weight": ((0, 0.0),), f"{MIX}images__weight": ((0, 1.0), (9, 0.0))}, "zero at step 9"),
        (
            {f"{MIX}text__form": "chat", f"{MIX}text__problems": 9},
            r"mixture\.text: example \d+ has \d+ tokens.*row_tok",
        ),
        ({"rows__patches": 8}, r"mixture\.images: an image of \d+ tokens and \d+ patches does not fit in a row"),
        ({"sft__steps": 0}, "there is nothing to do"),
        ({"rl__iterations": 3}, "There are no problems"),
    ],
)
def test_a_mixture_that_cannot_work(changes, told, tmp_path, nothing_expensive):
    with pytest.raises((ValueError, FileNotFoundError), match=told):
        pipeline.run(config_with(**changes), tmp_path / "run")
    assert not (tmp_path / "run/checkpoints").exists()


def test_images_need_a_tower(tmp_path, nothing_expensive, monkeypatch):
    monkeypatch.setattr(miniature, "SIZE", dataclasses.replace(miniature.SIZE, vision=None))
    with pytest.raises(ValueError, match=r"mixture\.images: it has images, but the model has no vision tower"):
        pipeline.run(config_with(), tmp_path / "run")


def test_a_misspelt_setting_of_a_source(tmp_path):
    with pytest.raises((KeyError, AttributeError), match="weights"):
        source(weights=((0, 1.0),))
    config = config_with()
    with config.unlocked():
        config.data.mixture.text.weigth = 1.0
    with pytest.raises(ValueError, match=r"'data\.mixture\.text\.weigth'.*Did you mean 'data\.mixture\.text\.weight'"):
        check_config(config)


def test_conversations_and_documents_of_files_are_batches(tmp_path, nothing_expensive):
    lines = [{"text": f"number {i} is {i * i}"} for i in range(5)]
    talk = [{"role": "user", "content": "2+2"}, {"role": "assistant", "content": "4"}]
    lines += [
        {"messages": talk + [{"role": "user", "content": f"+{i}"}, {"role": "assistant", "content": f"{4 + i}"}]}
        for i in range(3)
    ]
    for name, part in (("train", lines), ("heldout", lines[4:6])):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, part)))
    files = {f"{MIX}text__tasks": (), f"{MIX}text__files": (f"{tmp_path}/train.jsonl",)}
    files[f"{MIX}text__heldout_files"] = (f"{tmp_path}/heldout.jsonl",)
    config = config_with(**files, **{f"{MIX}images__weight": ((0, 0.0),)})
    here = setup.build(config, tmp_path)
    batches = sources.batches(config, here.chat, here.packing)
    assert len(batches) == config.sft.steps
    text = here.chat.tokenizer.decode(batches[0].tokens.ravel())
    assert all(f"number {i} is {i * i}" in text for i in range(5)) and all(f"+{i}" in text for i in range(3))
    heldout = sources.heldout(config, here.chat, here.packing)
    expected = sum(
        record.encode(here.chat).trained.sum() for record in list(sources.records(config, "text", heldout=True))
    )
    assert sum(map(trained_tokens, heldout["text"])) == expected
    assert {rows.tokens.shape[0] for rows in heldout["text"]} == {config.sft.micro_rows}


def test_a_source_can_be_changed_on_the_command_line(tmp_path):
    run = lambda *flags: subprocess.run(  # noqa: E731
        [sys.executable, "scripts/train.py", "--config=configs/pretrain_joint.py", "--dry_run", *flags],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    told = run("--config.data.mixture.images.weight=((0,0.1),(70,0.2))", "--config.data.mixture.text.records=13")
    assert told.returncode == 0, told.stderr
    assert "data.mixture.images.weight = ((0, 0.1), (70, 0.2))" in told.stdout
    assert "data.mixture.text.records = 13" in told.stdout and "rollout" not in told.stdout
    wrong = run("--config.data.mixture.images.weigth=((0,0.1),)")
    assert wrong.returncode == 2 and "Did you mean --config.data.mixture.images.weight?" in wrong.stderr
