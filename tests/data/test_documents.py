import base64
import io
import json

import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordWriter
from PIL import Image

from kimi_jax.data.chat import NativeChat
from kimi_jax.data.documents import Conversation, Document, from_tasks, read_files, record_of
from kimi_jax.data.hf_chat import load_chat_format
from kimi_jax.data.tokenizer import Tokenizer
from kimi_jax.tasks import get_task
from kimi_jax.tasks.base import split_of
from tests.trainers import published

PIXELS = [np.full((6 + i, 5, 3), 31 * i, np.uint8) for i in range(3)]
TALK = (("user", "<image> or <image>?"), ("assistant", "the 2nd"), ("user", "and <image>"), ("assistant", "no"))


def png(pixels):
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "pictures").mkdir()
    for i, pixels in enumerate(PIXELS):
        (tmp_path / f"pictures/{i}.png").write_bytes(png(pixels))
    return tmp_path


def url(i):
    return "data:image/png;base64," + base64.b64encode(png(PIXELS[i])).decode()


def records():
    parts = [{"type": "image"}, {"type": "text", "text": " or "}, {"type": "image"}, {"type": "text", "text": "?"}]
    messages = [{"role": role, "content": text} for role, text in TALK]
    return [
        {"text": "plain <b>", "id": "1"},
        {"text": "<image> a cat, <image> a dog", "images": ["pictures/0.png", url(2)]},
        {
            "messages": [{"role": "user", "content": parts}, *messages[1:]],
            "images": [f"pictures/{i}.png" for i in range(3)],
        },
    ]


def check(found):
    assert [type(record) for record in found] == [Document, Document, Conversation]
    assert found[0].text == "plain <b>" and found[0].images == ()
    for record, which in ((found[1], (0, 2)), (found[2], (0, 1, 2))):
        assert len(record.images) == len(which)
        for pixels, i in zip(record.images, which, strict=True):
            np.testing.assert_array_equal(pixels, PIXELS[i])
    assert found[2].turns == TALK


def test_lines_and_entries_of_several_files_are_read_in_any_order(folder):
    lines = [json.dumps(record) for record in records()]
    (folder / "a.jsonl").write_text(f"{lines[0]}\n\n  \n{lines[1]}\n")
    writer = ArrayRecordWriter(str(folder / "b.array_record"), "group_size:1")
    writer.write(lines[2].encode())
    writer.close()
    found = read_files([folder / "a.jsonl", str(folder / "b.array_record")])
    assert len(found) == 3
    check([found[i] for i in (2, 0, 1)][1:] + [found[2]])
    check(list(found))


@pytest.mark.parametrize(
    "record, told",
    [
        ([1], "either 'text' or 'messages'"),
        ({"text": "a", "messages": []}, "either 'text' or 'messages'"),
        ({"text": "a", "txt": "b"}, "unknown field 'txt'"),
        ({"text": " "}, "'text' must be a text that is not empty"),
        ({"text": "a <image>"}, "1 <image> markers but 0 images"),
        ({"text": "a <image>", "images": ["no.png"]}, "there is no image .*no.png"),
        ({"text": "a <image>", "images": ["data:image/png;base64,###"]}, "no base64"),
        ({"text": "a <image>", "images": ["data:image/png;base64,QUJD"]}, "cannot be decoded"),
        ({"text": "a", "images": "x.png"}, "'images' must be a list"),
        ({"messages": "hello"}, "'messages' must be a list"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "a message has a role"),
        ({"messages": [{"role": "user", "content": [{"type": "video"}]}]}, "parts of a message"),
        ({"messages": [{"role": "user", "content": ["x"]}]}, "a text or a list of parts"),
    ],
)
def test_a_record_that_is_none(record, told, tmp_path):
    with pytest.raises(ValueError, match=told):
        record_of(record, folder=tmp_path)
    (tmp_path / "x.jsonl").write_text('{"text": "fine"}\n\n' + json.dumps(record))
    with pytest.raises(ValueError, match=r"x.jsonl, line 3: .*"):
        read_files([tmp_path / "x.jsonl"])[1]


def test_files_that_are_none(tmp_path):
    (tmp_path / "x.txt").write_text("text")
    (tmp_path / "x.jsonl").write_text("\n")
    for name, told in (("no.jsonl", "there is no file"), ("x.txt", "from .jsonl and .array_record, not from '.txt'")):
        with pytest.raises((ValueError, FileNotFoundError), match=told):
            read_files([tmp_path / name])
    with pytest.raises(ValueError, match="there are no records in .*x.jsonl"):
        read_files([tmp_path / "x.jsonl"])


# --- as tokens --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def native(tmp_path_factory):
    tokenizer = Tokenizer.train(["3+4=7. 左"], tmp_path_factory.mktemp("tokenizer") / "m", vocab_size=283)
    return NativeChat(tokenizer, patch_size=3, merge=2)


@pytest.fixture(scope="module")
def foreign(tmp_path_factory):
    return load_chat_format(published.write("qwen2.5-vl", tmp_path_factory.mktemp("model") / "m"), system="Reckon.")


def bracketed(chat, example):
    """The text, what is trained in brackets; <,> for each run of image tokens."""
    special = {getattr(chat.tokenizer, f"{name}_id", -1): f"<{name}>" for name in ("user", "assistant", "end", "image")}
    text, on = "", False
    for token, trained in zip(example.tokens.tolist(), example.trained.tolist(), strict=True):
        text += "[" * (trained and not on) + "]" * (on and not trained)
        text += special.get(token) or chat.tokenizer.decode([token], **KEEP.get(type(chat).__name__, {}))
        on = trained
    text += "]" * on
    while "<image><image>" in text:
        text = text.replace("<image><image>", "<image>")
    return text


KEEP = {"HFChat": {"keep_special": True}}


def test_of_a_conversation_exactly_what_the_assistant_says_is_trained(native, foreign):
    ours = Conversation(TALK, tuple(PIXELS)).encode(native)
    assert bracketed(native, ours) == (
        "<user><image> or <image>?<assistant>[the 2nd<end>]<user>and <image><assistant>[no<end>]"
    )
    theirs = Conversation(TALK, tuple(PIXELS)).encode(foreign)
    picture = "<|vision_start|><image><|vision_end|>"
    assert bracketed(foreign, theirs).replace("<end>", "<|im_end|>") == (
        f"<|im_start|>system\nReckon.<|im_end|>\n<|im_start|>user\n{picture} or {picture}?<|im_end|>\n"
        f"<|im_start|>assistant\n[the 2nd<|im_end|>]\n<|im_start|>user\nand {picture}<|im_end|>\n"
        "<|im_start|>assistant\n[no<|im_end|>]\n"
    )
    for chat, example in ((native, ours), (foreign, theirs)):
        assert len(example.images) == 3
        assert (example.tokens == chat.image_id).sum() == sum(image.num_tokens for image in example.images)


def test_the_rows_in_the_docstring(native):
    example = native.encode_conversation((("user", "3+4"), ("assistant", "7"), ("user", "-2"), ("assistant", "5")), ())
    lines = {
        line.split()[0]: line.split()[1:] for line in native.encode_conversation.__doc__.splitlines() if line.split()
    }
    assert [str(int(flag)) for flag in example.trained] == lines["trained"]
    assert len(lines["tokens"]) == len(example.tokens)


def test_one_turn_is_the_example_of_a_problem(native):
    problem = get_task("pips").draw(np.random.default_rng(3), 2)
    example = native.encode_example(native.encode_problem(problem), problem.solution)
    turns = (("user", problem.prompt), ("assistant", problem.solution))
    talk = native.encode_conversation(turns, problem.images)
    np.testing.assert_array_equal(talk.tokens, example.tokens)
    np.testing.assert_array_equal(talk.trained, example.trained)


@pytest.mark.parametrize("roles", ["", "a", "ua ", "uau", "sua", "uua"])
def test_roles_that_do_not_take_turns(roles, native):
    names = {"u": "user", "a": "assistant", "s": "system", " ": "assistant"}
    with pytest.raises(ValueError, match="take turns"):
        native.encode_conversation([(names[role], "x") for role in roles], ())


def test_of_a_document_everything_but_its_first_token_and_images_is_trained(native, foreign):
    document = Document("3+<image>=7 <|im_end|>", (PIXELS[1],))
    assert bracketed(native, document.encode(native)) == "3[+]<image>[=7 <|im_end|><end>]"
    assert bracketed(foreign, document.encode(foreign)) == (
        "3[+<|vision_start|>]<image>[<|vision_end|>=7 <|im_end|><end>]"
    )
    written = document.encode(foreign).tokens
    assert (written == foreign.end_id).sum() == 1  # what the text spells is no special token
    first = Document("<image>7", (PIXELS[1],)).encode(native)
    assert bracketed(native, first) == "<image>[7<end>]"
    with pytest.raises(ValueError, match="0 <image> markers but 1 images"):
        Document("7", (PIXELS[1],)).encode(native)


# --- from tasks -------------------------------------------------------------------------------------------------------


def test_tasks_take_turns_and_splits_are_apart():
    tasks = [get_task("chain"), get_task("pips")]
    make = lambda **changes: list(  # noqa: E731
        from_tasks(tasks, **dict(split="train", count=13, per_record=1, chat=False, seed=3) | changes)
    )
    train, heldout = make(), make(split="heldout")
    assert [bool(record.images) for record in train] == [False, True] * 6 + [False]
    assert [record.text for record in train] == [record.text for record in make()]
    assert not {record.text for record in train[::2]} & {record.text for record in heldout[::2]}
    (user, _), (assistant, solution) = make(chat=True)[0].turns[0], make(chat=True)[0].turns[1]
    assert (user, assistant) == ("user", "assistant") and train[0].text.endswith(f"\n{solution}")


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_a_long_document_ends_with_a_question_that_it_answers(split):
    task = get_task("chain")
    drawn = []

    class Spy:
        difficulties = task.difficulties

        def draw(self, rng, difficulty):
            drawn.append(task.draw(rng, difficulty))
            return drawn[-1]

    made = from_tasks([Spy()], split=split, count=5, per_record=7, chat=False, seed=1)
    text = made[3].text
    assert text == made[3].text != made[2].text
    answers = {}
    for part in text.split("Problem ")[1:]:
        number, _, rest = part.partition(": ")
        answers[number] = rest.partition("Answer:")[2].split("\n")[0]
    assert list(answers) == [str(n) for n in range(1, 8)]
    asked = text.partition("What was the answer to problem ")[2]
    assert asked.partition("?\nAnswer:")[2] == answers[asked.partition("?")[0]]
    used = [problem for problem in drawn if problem.solution in text and problem.prompt in text]
    assert len(used) >= 7 and any(split_of(problem.id) != split for problem in drawn)
    assert all(split_of(problem.id) == split for problem in used)
    talk = from_tasks([task], split=split, count=5, per_record=3, chat=True, seed=1)[0]
    assert [role for role, _ in talk.turns] == ["user", "assistant"] * 3
