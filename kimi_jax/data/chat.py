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
from kimi_jax.types import IMAGE_MARKER, Example, ImagePatches, Problem, Prompt

Turn = tuple[str, str]  # (role, text); IMAGE_MARKER stands in the texts once for each image, in order


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

    def encode_conversation(self, turns: Sequence[Turn], images: Sequence[np.ndarray]) -> Example: ...

    def encode_document(self, text: str, images: Sequence[np.ndarray]) -> Example: ...


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

    def encode_conversation(self, turns: Sequence[Turn], images: Sequence[np.ndarray]) -> Example:
        """All that the assistant wrote is trained, with the end token of each of its turns:

            tokens   <|user|>  3  +  4  <|assistant|>  7  <|end|>  <|user|>  -  2  <|assistant|>  5  <|end|>
            trained      0     0  0  0        0        1     1         0     0  0        0        1     1

        Raises ValueError unless user and assistant take turns, the user first, with one marker per image.
        """
        roles = [role for role, _ in turns]
        if not turns or roles != ["user", "assistant"] * (len(turns) // 2):
            raise ValueError(
                f"in a conversation user and assistant take turns, and the assistant has the last word, but the roles "
                f"are {', '.join(roles) or 'none'}; put what a system message says into the first turn of the user"
            )
        check_markers("".join(text for _, text in turns), images)
        left = [self._patchify(image) for image in images]
        tokens, trained, shown = [], [], []
        for role, text in turns:
            own, left = left[: text.count(IMAGE_MARKER)], left[text.count(IMAGE_MARKER) :]
            shown += own
            written = role == "assistant"
            body = _encode_text(text, own, self.tokenizer) + [self.tokenizer.end_id] * written
            tokens += [self.tokenizer.assistant_id if written else self.tokenizer.user_id, *body]
            trained += [False, *(written and token != self.tokenizer.image_id for token in body)]
        return Example(np.array(tokens, np.int32), np.array(trained), tuple(shown))

    def encode_document(self, text: str, images: Sequence[np.ndarray]) -> Example:
        """A text to learn as it is, images within it, and that it ends. Its first token is not trained: nothing
        predicts it. Raises ValueError unless there is one marker per image."""
        check_markers(text, images)
        patched = [self._patchify(image) for image in images]
        tokens = np.array([*_encode_text(text, patched, self.tokenizer), self.tokenizer.end_id], np.int32)
        return document(tokens, patched, image_id=self.image_id)

    def _patchify(self, image: np.ndarray) -> ImagePatches:
        return patchify(image, patch_size=self.patch_size, merge=self.merge)


def document(tokens: np.ndarray, images: Sequence[ImagePatches], *, image_id: int) -> Example:
    """All tokens are trained but the first, which nothing predicts, and those of images."""
    trained = tokens != image_id
    trained[0] = False
    return Example(tokens=tokens, trained=trained, images=tuple(images))


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
    patched = tuple(patchify(image, patch_size=patch_size, merge=merge) for image in images)
    tokens = [tokenizer.user_id, *_encode_text(text, patched, tokenizer), tokenizer.assistant_id]
    return Prompt(tokens=np.array(tokens, np.int32), images=patched)


def _encode_text(text: str, images: Sequence[ImagePatches], tokenizer: Tokenizer) -> list[int]:
    """The text around the images and, where a marker stands, the tokens of an image."""
    first, *rest = text.split(IMAGE_MARKER)
    tokens = tokenizer.encode(first)
    for image, part in zip(images, rest, strict=True):
        tokens += [tokenizer.image_id] * image.num_tokens + tokenizer.encode(part)
    return tokens


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
