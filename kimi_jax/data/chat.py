"""The conversation format, and which of its tokens are trained.

    <|user|> problem <|assistant|> response <|end|>

The end token belongs to the response: the model writes it, it is stored, trained and counted in the length. Prompt and
response are tokenized apart, so a prompt has the same ids whether the model is sampled from it or trained on it.

`ChatFormat` is what the rest of the program knows of a format. `NativeChat` is the one above; `data.hf_chat.HFChat` is
that of a published checkpoint.
"""

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np

from kimi_jax.data.images import patchify
from kimi_jax.data.tokenizer import Tokenizer
from kimi_jax.types import IMAGE_MARKER, Example, Problem, Prompt


class ChatFormat(Protocol):
    """How a problem is put to the model, and how a response is learnt."""

    @property
    def tokenizer(self) -> Any:
        """Has vocab_size, encode, decode, pad_id, end_id and image_id, as `data.tokenizer.Tokenizer`."""

    @property
    def end_ids(self) -> tuple[int, ...]:
        """All tokens that end a response; the first is the one that responses are taught to end with."""

    @property
    def image_id(self) -> int:
        """The token that stands for a merged patch; -1 if the model reads no images."""

    def encode_prompt(self, text: str, images: Sequence[np.ndarray]) -> Prompt: ...

    def encode_problem(self, problem: Problem, /) -> Prompt: ...

    def encode_example(self, prompt: Prompt, response: str) -> Example: ...


@dataclasses.dataclass(frozen=True)
class NativeChat:
    """The format of this project (`ChatFormat`). patch_size, merge: of the vision tower."""

    tokenizer: Tokenizer
    patch_size: int
    merge: int

    @property
    def end_ids(self) -> tuple[int, ...]:
        return (self.tokenizer.end_id,)

    @property
    def image_id(self) -> int:
        return self.tokenizer.image_id

    def encode_prompt(self, text: str, images: Sequence[np.ndarray]) -> Prompt:
        return encode_prompt(text, images, tokenizer=self.tokenizer, patch_size=self.patch_size, merge=self.merge)

    def encode_problem(self, problem: Problem, /) -> Prompt:
        return encode_problem(problem, tokenizer=self.tokenizer, patch_size=self.patch_size, merge=self.merge)

    def encode_example(self, prompt: Prompt, response: str) -> Example:
        return encode_example(prompt, response, tokenizer=self.tokenizer)


def encode_prompt(
    text: str, images: Sequence[np.ndarray], *, tokenizer: Tokenizer, patch_size: int, merge: int
) -> Prompt:
    """The tokens up to where the response begins, each IMAGE_MARKER of `text` replaced by the tokens of an image.

    There is one image token per merged patch. `images` are uint8 [height, width, 3]. The prompt "<image>+4" with an
    image of two merged patches:

        tokens   <|user|>  <|image|>  <|image|>  +  4  <|assistant|>

    Raises ValueError unless there is exactly one marker per image.
    """
    check_markers(text, images)
    first, *rest = text.split(IMAGE_MARKER)
    patched = tuple(patchify(image, patch_size=patch_size, merge=merge) for image in images)
    tokens = [tokenizer.user_id, *tokenizer.encode(first)]
    for image, part in zip(patched, rest, strict=True):
        tokens += [tokenizer.image_id] * image.num_tokens + tokenizer.encode(part)
    return Prompt(tokens=np.array([*tokens, tokenizer.assistant_id], np.int32), images=patched)


def encode_problem(problem: Problem, /, *, tokenizer: Tokenizer, patch_size: int, merge: int) -> Prompt:
    """`encode_prompt` of a problem; an error names it."""
    with naming_the_problem(problem):
        return encode_prompt(problem.prompt, problem.images, tokenizer=tokenizer, patch_size=patch_size, merge=merge)


def encode_example(prompt: Prompt, response: str, *, tokenizer: Tokenizer) -> Example:
    """A prompt with the response to learn. Exactly the response and its end token are trained.

    The prompt "3+4" with the response "7":

    tokens   <|user|>  3  +  4  <|assistant|>  7  <|end|>
    trained      0     0  0  0        0        1     1
    """
    return encode_response(prompt, [*tokenizer.encode(response), tokenizer.end_id])


def encode_response(prompt: Prompt, response: Sequence[int]) -> Example:
    """A prompt with the token ids to learn behind it."""
    return Example(
        tokens=np.concatenate([prompt.tokens, np.array(response, np.int32)]),
        trained=np.repeat([False, True], [len(prompt.tokens), len(response)]),
        images=prompt.images,
    )


def check_markers(text: str, images: Sequence[np.ndarray]) -> None:
    """Raises ValueError unless `text` has one IMAGE_MARKER for each image."""
    markers = text.count(IMAGE_MARKER)
    if markers != len(images):
        raise ValueError(
            f"the prompt has {markers} {IMAGE_MARKER} markers but {len(images)} images; "
            f"write one marker where each image belongs: {text[:80]!r}"
        )


@contextlib.contextmanager
def naming_the_problem(problem: Problem) -> Iterator[None]:
    """Puts the name of the problem before the message of a ValueError."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"problem {problem.id!r} of task {problem.task!r}: {error}") from error
