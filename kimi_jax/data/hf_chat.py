"""Conversations as token ids, in the format that a published checkpoint was trained on.

`encode_messages` makes what a model is to answer, `encode_conversation` what it is to learn. `load_chat_format` makes
of a directory the `data.chat.ChatFormat` that the rest of the program works with.
"""

import dataclasses
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kimi_jax.data.chat import Turn, check_markers, document, encode_response, naming_the_problem
from kimi_jax.data.chat_template import ChatTemplate, Message, Rendered
from kimi_jax.data.hf_images import ImageProcessor
from kimi_jax.data.hf_tokenizer import NO_IMAGES, HFTokenizer, read_json
from kimi_jax.types import IMAGE_MARKER, Example, ImagePatches, Problem, Prompt

_AROUND_IMAGES = ("vision_start_token_id", "vision_end_token_id")  # in config.json

ProcessImage = Callable[[np.ndarray], ImagePatches]


def encode_messages(
    messages: Sequence[Message],
    images: Sequence[np.ndarray] = (),
    *,
    tokenizer: HFTokenizer,
    template: ChatTemplate,
    process_image: ProcessImage | None,
    tools: Sequence[dict[str, Any]] | None = None,
    allow_special: bool = False,
) -> Prompt:
    """The conversation up to where the assistant begins to write. `images` are those of the messages, in order.

    Each image stands in the content of a message as {"type": "image"}. Raises ValueError if their numbers differ, if
    images are given to a model that reads none (process_image is None), or what `ChatTemplate.render` raises.
    """
    rendered = template.render(messages, tools=tools, add_generation_prompt=True, allow_special=allow_special)
    tokens, _ = _encode_rendered(rendered, tokenizer)
    processed = _process(images, process_image)
    counts = _tokens_per_token(tokens, processed, tokenizer.image_id)
    return Prompt(tokens=np.repeat(tokens, counts), images=processed)


def encode_conversation(
    messages: Sequence[Message],
    images: Sequence[np.ndarray] = (),
    *,
    tokenizer: HFTokenizer,
    template: ChatTemplate,
    process_image: ProcessImage | None,
    tools: Sequence[dict[str, Any]] | None = None,
    allow_special: bool = False,
    end_ids: Sequence[int] | None = None,
) -> Example:
    """A whole conversation; what its assistants wrote is trained, with the token that ends each of their turns.

    end_ids: the tokens that may; None: those of the tokenizer. Raises what `encode_messages` raises, and ValueError if
    nothing is trained or `ChatTemplate.render_turns` cannot tell what is.
    """
    ends = [tokenizer.text_of(token) for token in (tokenizer.end_ids if end_ids is None else end_ids)]
    rendered = template.render_turns(
        messages, tools=tools, allow_special=allow_special, end_texts=[end for end in ends if end]
    )
    tokens, trained = _encode_rendered(rendered, tokenizer)
    if not trained.any():
        raise ValueError("the conversation has no turn of an assistant, so there is nothing to learn from it")
    processed = _process(images, process_image)
    counts = _tokens_per_token(tokens, processed, tokenizer.image_id)
    trained &= tokens != tokenizer.image_id
    return Example(tokens=np.repeat(tokens, counts), trained=np.repeat(trained, counts), images=processed)


def _encode_rendered(rendered: Rendered, tokenizer: HFTokenizer) -> tuple[np.ndarray, np.ndarray]:
    """int32 [n], bool [n]: the ids, and which of the tokens cover something that an assistant wrote."""
    ids: list[int] = []
    covered: list[tuple[int, int]] = []
    at = 0
    for piece, from_user in rendered.pieces:
        piece_ids, spans = _encode_piece(tokenizer, piece, first=at == 0, allow_special=not from_user)
        ids += piece_ids
        covered += [(at + start, at + stop) for start, stop in spans]
        at += len(piece)
    starts, stops = np.array(covered, np.int64).reshape(-1, 2).T
    trained = np.zeros(len(ids), bool)
    for start, stop in rendered.assistant:
        trained |= (starts < stop) & ((stops > start) | (starts >= start))  # some tokens cover no character
    return np.array(ids, np.int32), trained


def _encode_piece(
    tokenizer: HFTokenizer, piece: str, *, first: bool, allow_special: bool
) -> tuple[list[int], list[tuple[int, int]]]:
    """Within a text a piece is encoded behind a newline, as some vocabularies put a space before what they begin."""
    if not first:
        newline = tokenizer.encode("\n", allow_special=allow_special)
        ids, spans = tokenizer.encode_spans("\n" + piece, allow_special=allow_special)
        if ids[: len(newline)] == newline:
            return ids[len(newline) :], [(start - 1, stop - 1) for start, stop in spans[len(newline) :]]
    return tokenizer.encode_spans(piece, allow_special=allow_special)


def _process(images: Sequence[np.ndarray], process_image: ProcessImage | None) -> tuple[ImagePatches, ...]:
    if images and process_image is None:
        raise ValueError(f"{len(images)} images were given, but this model reads no images")
    return tuple(process_image(image) for image in images)


def _tokens_per_token(tokens: np.ndarray, images: Sequence[ImagePatches], image_id: int) -> np.ndarray:
    """int [n]: how often each token is repeated, so that there is one image token per merged patch."""
    is_image = tokens == image_id
    if is_image.sum() != len(images):
        raise ValueError(
            f"the conversation has places for {is_image.sum()} images, but there are {len(images)}; write "
            '{"type": "image"} in the content of a message where each belongs'
        )
    counts = np.ones(len(tokens), np.int64)
    counts[is_image] = [image.num_tokens for image in images]
    return counts


@dataclasses.dataclass(frozen=True)
class HFChat:
    """The `data.chat.ChatFormat` of a published checkpoint: a problem is a user's message, a response the answer.

    template: None for a model that continues text: a prompt is then encoded as it is, special tokens in it are formed,
    and IMAGE_MARKER becomes `image_text`.
    """

    tokenizer: HFTokenizer
    template: ChatTemplate | None
    process_image: ImageProcessor | None
    system: str  # a message before each problem; "": none
    image_text: str  # what stands for an image in a text
    end_ids: tuple[int, ...]  # all tokens that end a response

    @property
    def image_id(self) -> int:
        return self.tokenizer.image_id

    @property
    def end_id(self) -> int:
        """The token that a response ends with when it is learnt: the one that the template writes behind it."""
        return self.end_ids[0]

    def encode_prompt(self, text: str, images: Sequence[np.ndarray]) -> Prompt:
        """Up to where the response begins. Raises ValueError unless `text` has one IMAGE_MARKER per image."""
        check_markers(text, images)
        if self.template is None:
            tokens = np.array(self.tokenizer.encode_document(text.replace(IMAGE_MARKER, self.image_text)), np.int32)
            processed = _process(images, self.process_image)
            counts = _tokens_per_token(tokens, processed, self.image_id)
            return Prompt(tokens=np.repeat(tokens, counts), images=processed)
        return encode_messages(
            self.messages(text),
            images,
            tokenizer=self.tokenizer,
            template=self.template,
            process_image=self.process_image,
        )

    def messages(self, text: str) -> list[dict[str, Any]]:
        """The conversation that `text` opens."""
        return [*self._opening, _message("user", text)]

    @property
    def _opening(self) -> list[dict[str, Any]]:
        return [{"role": "system", "content": self.system}] if self.system else []

    def encode_problem(self, problem: Problem, /) -> Prompt:
        """`encode_prompt` of a problem; an error names it."""
        with naming_the_problem(problem):
            return self.encode_prompt(problem.prompt, problem.images)

    def encode_example(self, prompt: Prompt, response: str) -> Example:
        """A prompt with the response to learn. Exactly the response and its end token are trained."""
        return encode_response(prompt, [*self.tokenizer.encode(response), self.end_id])

    def encode_conversation(self, turns: Sequence[Turn], images: Sequence[np.ndarray]) -> Example:
        """What the assistant wrote is trained, with what ends its turns. One that has no system message gets `system`.

        Raises ValueError unless there is one IMAGE_MARKER per image, and what the function of this name raises.
        """
        if self.template is None:
            raise ValueError("conversations need a chat template, and raw=True uses none")
        check_markers("".join(text for _, text in turns), images)
        opening = [] if turns and turns[0][0] == "system" else self._opening
        return encode_conversation(
            [*opening, *(_message(role, text) for role, text in turns)],
            images,
            tokenizer=self.tokenizer,
            template=self.template,
            process_image=self.process_image,
            end_ids=self.end_ids,
        )

    def encode_document(self, text: str, images: Sequence[np.ndarray]) -> Example:
        """A text to learn as it is, images within it, and that it ends. Special tokens in it are not formed. Its first
        token is not trained: nothing predicts it. Raises ValueError unless there is one IMAGE_MARKER per image."""
        check_markers(text, images)
        first, *rest = text.split(IMAGE_MARKER)
        tokens = self.tokenizer.encode_document("") + self.tokenizer.encode(first)
        for part in rest:
            tokens += self.tokenizer.encode(self.image_text, allow_special=True) + self.tokenizer.encode(part)
        processed = _process(images, self.process_image)
        whole = np.array([*tokens, self.tokenizer.end_id], np.int32)
        repeated = np.repeat(whole, _tokens_per_token(whole, processed, self.image_id))
        return document(repeated, processed, image_id=self.image_id)


def _message(role: str, text: str) -> dict[str, Any]:
    """With images the content is a list of parts, else, for all templates, a string."""
    if IMAGE_MARKER not in text:
        return {"role": role, "content": text}
    parts = re.split(f"({re.escape(IMAGE_MARKER)})", text)
    content = [{"type": "image"} if p == IMAGE_MARKER else {"type": "text", "text": p} for p in parts if p]
    return {"role": role, "content": content}


def load_chat_format(directory: str | os.PathLike, *, system: str = "", raw: bool = False, **variables: Any) -> HFChat:
    """Tokenizer, chat template and image processor of a directory in the Hugging Face layout.

    raw: use no chat template. variables: options that the template knows, e.g. enable_thinking=False. Raises
    FileNotFoundError or ValueError for what is missing or damaged, and for a vocabulary larger than the embedding.
    """
    directory = Path(directory)
    tokenizer = HFTokenizer.load(directory)
    model = read_json(directory / "config.json")
    vocab_size = model.get("text_config", model).get("vocab_size")
    if vocab_size is not None:
        tokenizer.check_vocab(vocab_size)
    reads_images = tokenizer.image_id != NO_IMAGES
    around = ["" if model.get(name) is None else tokenizer.text_of(model[name]) for name in _AROUND_IMAGES]
    image = tokenizer.text_of(tokenizer.image_id) if reads_images else ""
    template = None if raw else ChatTemplate.load(directory, tokenizer, **variables)
    written = [] if template is None else _end_of_turn(template, tokenizer)
    return HFChat(
        tokenizer=tokenizer,
        template=template,
        process_image=ImageProcessor.load(directory) if reads_images else None,
        system=system,
        image_text=f"{around[0]}{image}{around[1]}",
        end_ids=tuple(dict.fromkeys([*written, *tokenizer.end_ids])),
    )


def _end_of_turn(template: ChatTemplate, tokenizer: HFTokenizer) -> list[int]:
    """The special token that the template writes behind an answer; [] if it writes none."""
    probe = "probe of the end"
    turns = [{"role": "user", "content": probe}, {"role": "assistant", "content": probe}]
    try:
        text = template.render(turns, add_generation_prompt=False).text
    except ValueError:  # it wants something else of a conversation; what the tokenizer says must do
        return []
    behind = text.rpartition(probe)[2]
    places = {behind.find(token): index for token, index in tokenizer.special_ids.items() if token in behind}
    return [places[min(places)]] if places else []
