import numpy as np
import pytest

from kimi_jax.data.chat import encode_example, encode_problem, encode_prompt
from kimi_jax.data.tokenizer import Tokenizer
from kimi_jax.types import IMAGE_MARKER, Problem

CUT = dict(patch_size=3, merge=2)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return Tokenizer.train(["3+4=7. 左 <image>"], tmp_path_factory.mktemp("tokenizer") / "m", vocab_size=283)


def image(height, width):
    return np.full((height, width, 3), 7 * height + width, np.uint8)


def written(tokenizer, ids):
    special = {"user": tokenizer.user_id, "assistant": tokenizer.assistant_id}
    special |= {"end": tokenizer.end_id, "image": tokenizer.image_id}
    names = {token: f"<|{name}|>" for name, token in special.items()}
    return [names.get(int(token)) or tokenizer.decode([token]) for token in ids]


def docstring_row(function, name):
    (line,) = [line for line in function.__doc__.splitlines() if line.split()[:1] == [name]]
    return line.split()[1:]


def test_the_rows_in_the_docstrings(tokenizer):
    pictured = encode_prompt("<image>+4", [image(6, 12)], tokenizer=tokenizer, **CUT)
    assert written(tokenizer, pictured.tokens) == docstring_row(encode_prompt, "tokens")

    example = encode_example(encode_prompt("3+4", [], tokenizer=tokenizer, **CUT), "7", tokenizer=tokenizer)
    assert written(tokenizer, example.tokens) == docstring_row(encode_example, "tokens")
    assert [str(int(flag)) for flag in example.trained] == docstring_row(encode_example, "trained")
    assert (example.tokens.dtype, example.trained.dtype) == (np.int32, np.bool_)


def test_each_marker_becomes_its_own_image(tokenizer):
    images = [image(6, 6), image(7, 13)]  # 1 x 1 and 2 x 3 merged patches
    prompt = encode_prompt(f"{IMAGE_MARKER}左{IMAGE_MARKER}", images, tokenizer=tokenizer, **CUT)
    assert written(tokenizer, prompt.tokens) == ["<|user|>", "<|image|>", "左", *["<|image|>"] * 6, "<|assistant|>"]
    assert [cut.num_tokens for cut in prompt.images] == [1, 6]
    for cut, original in zip(prompt.images, images, strict=True):
        np.testing.assert_allclose(cut.patches[0], original[0, 0, 0] / 127.5 - 1, atol=1e-6)


def test_a_response_is_text_only(tokenizer):
    prompt = encode_prompt(IMAGE_MARKER, [image(5, 5)], tokenizer=tokenizer, **CUT)
    response = f"{IMAGE_MARKER} <|end|>\n"
    example = encode_example(prompt, response, tokenizer=tokenizer)
    np.testing.assert_array_equal(example.tokens[: len(prompt.tokens)], prompt.tokens)
    assert tokenizer.decode(example.tokens[len(prompt.tokens) :]) == response
    assert (example.tokens == tokenizer.image_id).sum() == 1 and (example.tokens == tokenizer.end_id).sum() == 1
    assert example.images is prompt.images  # so that k responses to one prompt can share them in a row
    assert encode_example(prompt, "", tokenizer=tokenizer).trained.sum() == 1  # the end token alone


@pytest.mark.parametrize("text, count", [("3", 1), (IMAGE_MARKER, 0), (IMAGE_MARKER * 2, 1)])
def test_markers_and_images_must_agree(tokenizer, text, count):
    message = f"the prompt has {text.count(IMAGE_MARKER)} <image> markers but {count} images"
    with pytest.raises(ValueError, match=message):
        encode_prompt(text, [image(3, 3)] * count, tokenizer=tokenizer, **CUT)


def test_an_error_names_the_problem(tokenizer):
    problem = Problem(id="scene:7", task="scene", prompt=f"{IMAGE_MARKER}?", answer="3", images=(image(5, 11),))
    prompt = encode_problem(problem, tokenizer=tokenizer, **CUT)
    same = encode_prompt(problem.prompt, problem.images, tokenizer=tokenizer, **CUT)
    np.testing.assert_array_equal(prompt.tokens, same.tokens)
    np.testing.assert_array_equal(prompt.images[0].patches, same.images[0].patches)
    empty = np.zeros((0, 3, 3), np.uint8)
    broken = Problem(id="scene:11", task="scene", prompt=IMAGE_MARKER, answer="3", images=(empty,))
    with pytest.raises(ValueError, match="problem 'scene:11' of task 'scene': an image must be"):
        encode_problem(broken, tokenizer=tokenizer, **CUT)
