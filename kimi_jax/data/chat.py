"""The conversation format, and which of its tokens are trained.

    <|user|> problem <|assistant|> response <|end|>

The end token belongs to the response: the model writes it, it is stored, trained and counted in the length. Prompt and
response are tokenized apart, so a prompt has the same ids whether the model is sampled from it or trained on it.
"""

from collections.abc import Sequence

import numpy as np

from kimi_jax.data.images import patchify
from kimi_jax.data.tokenizer import Tokenizer
from kimi_jax.types import IMAGE_MARKER, Example, Problem, Prompt


def encode_prompt(
    text: str, images: Sequence[np.ndarray], *, tokenizer: Tokenizer, patch_size: int, merge: int
) -> Prompt:
    """The tokens up to where the response begins, each IMAGE_MARKER of `text` replaced by the tokens of an image.

    There is one image token per merged patch. `images` are uint8 [height, width, 3]. The prompt "<image>+4" with an
    image of two merged patches:

        tokens   <|user|>  <|image|>  <|image|>  +  4  <|assistant|>

    Raises ValueError unless there is exactly one marker per image.
    """
    first, *rest = text.split(IMAGE_MARKER)
    if len(rest) != len(images):
        raise ValueError(
            f"the prompt has {len(rest)} {IMAGE_MARKER} markers but {len(images)} images; "
            f"write one marker where each image belongs: {text[:80]!r}"
        )
    patched = tuple(patchify(image, patch_size=patch_size, merge=merge) for image in images)
    tokens = [tokenizer.user_id, *tokenizer.encode(first)]
    for image, part in zip(patched, rest, strict=True):
        tokens += [tokenizer.image_id] * image.num_tokens + tokenizer.encode(part)
    return Prompt(tokens=np.array([*tokens, tokenizer.assistant_id], np.int32), images=patched)


def encode_problem(problem: Problem, /, *, tokenizer: Tokenizer, patch_size: int, merge: int) -> Prompt:
    """`encode_prompt` of a problem; an error names it."""
    try:
        return encode_prompt(problem.prompt, problem.images, tokenizer=tokenizer, patch_size=patch_size, merge=merge)
    except ValueError as error:
        raise ValueError(f"problem {problem.id!r} of task {problem.task!r}: {error}") from error


def encode_example(prompt: Prompt, response: str, *, tokenizer: Tokenizer) -> Example:
    """A prompt with the response to learn. Exactly the response and its end token are trained.

    The prompt "3+4" with the response "7":

    tokens   <|user|>  3  +  4  <|assistant|>  7  <|end|>
    trained      0     0  0  0        0        1     1
    """
    written = np.array([*tokenizer.encode(response), tokenizer.end_id], np.int32)
    return Example(
        tokens=np.concatenate([prompt.tokens, written]),
        trained=np.repeat([False, True], [len(prompt.tokens), len(written)]),
        images=prompt.images,
    )
