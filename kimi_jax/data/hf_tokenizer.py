"""Text <-> token ids with the vocabulary of a published checkpoint, equal to what transformers does with it.

`HFTokenizer` has the interface of `data.tokenizer.Tokenizer`, with its three properties as far as the vocabulary lets
it: special tokens are the encoding of a text only if they are asked for, and any ids decode, an unfinished character at
their end to U+FFFD.
"""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import AddedToken, Tokenizer, processors

from kimi_jax.data.hf_vocab import read_vocabulary

NO_IMAGES = -1  # the image_id of a model that reads none: no token has it
_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_IMAGE = "<|image_pad|>"  # of Qwen2-VL and its successors


class HFTokenizer:
    """A vocabulary. `pad_id`, `end_id` and `image_id` (NO_IMAGES: none) are ids; `end_ids` are all that end a text.

    special_tokens: {"eos_token": "<|im_end|>", ...}, the named ones, which chat templates refer to.
    """

    def __init__(
        self,
        backend: Tokenizer,
        *,
        special_tokens: Mapping[str, str],
        end_ids: Sequence[int],
        pad_id: int,
        image_id: int,
    ):
        self.special_tokens = dict(special_tokens)
        self.end_id, self.end_ids, self.pad_id, self.image_id = end_ids[0], tuple(end_ids), pad_id, image_id
        self.vocab_size = max(backend.get_vocab(with_added_tokens=True).values()) + 1
        self._special_ids = {
            token.content: index for index, token in backend.get_added_tokens_decoder().items() if token.special
        }
        self._set_backend(backend)

    def _set_backend(self, backend: Tokenizer) -> None:
        self._backend = backend
        # Two objects, because whether special tokens are formed is a switch of the object, and threads share it.
        self._plain = type(backend).from_str(backend.to_str())
        self._plain.encode_special_tokens = True  # as what they are spelled

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_plain": None}  # pickling would lose its switch

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._set_backend(self._backend)

    @property
    def special_ids(self) -> Mapping[str, int]:
        """{text: id} of the special tokens."""
        return self._special_ids

    def encode(self, text: str, *, allow_special: bool = False) -> list[int]:
        """Token ids of `text`. allow_special: "<|im_end|>" in it is the token, not the characters."""
        return self._with(allow_special).encode(text, add_special_tokens=False).ids

    def encode_spans(self, text: str, *, allow_special: bool = False) -> tuple[list[int], list[tuple[int, int]]]:
        """`encode`, and for each token which characters it covers, [start, stop)."""
        encoding = self._with(allow_special).encode(text, add_special_tokens=False)
        return encoding.ids, encoding.offsets

    def encode_document(self, text: str) -> list[int]:
        """A text as the model met it in pre-training: special tokens are formed, and e.g. Llama's begin token added."""
        return self._backend.encode(text).ids

    def decode(self, ids: Sequence[int] | np.ndarray, *, keep_special: bool = False) -> str:
        """The text of `ids`. Special tokens are dropped unless kept; incomplete UTF-8 shows as U+FFFD.

        Embeddings are often longer than the vocabulary; ids beyond it have no text. Negative ids: ValueError.
        """
        ids = [int(token) for token in ids]
        if min(ids, default=0) < 0:
            raise ValueError(f"token ids {[token for token in ids if token < 0][:5]} are negative")
        return self._backend.decode(ids, skip_special_tokens=not keep_special)

    def check_vocab(self, vocab_size: int) -> None:
        """Raises ValueError unless an embedding of `vocab_size` rows has one for each token."""
        if self.vocab_size > vocab_size:
            raise ValueError(
                f"the tokenizer has ids up to {self.vocab_size - 1}, but the embedding of the model only "
                f"{vocab_size} rows: they are not of the same model"
            )

    def text_of(self, token: int) -> str | None:
        """How the vocabulary writes a token; None if there is no such token."""
        return self._backend.id_to_token(token)

    def _with(self, allow_special: bool) -> Tokenizer:
        return self._backend if allow_special else self._plain

    @classmethod
    def load(cls, directory: str | os.PathLike) -> "HFTokenizer":
        """Reads the tokenizer of a directory in the Hugging Face layout (`data.hf_vocab` says which files).

        Raises FileNotFoundError if there is none, ValueError if it cannot be read or nothing in it ends a text.
        """
        directory = Path(directory)
        config = read_json(directory / "tokenizer_config.json")
        generation, model = read_json(directory / "generation_config.json"), read_json(directory / "config.json")
        backend = read_vocabulary(directory, config)
        if "added_tokens_decoder" not in config:  # older directories have these two files instead
            config |= {name: value for name, value in read_json(directory / "special_tokens_map.json").items() if value}
            added = read_json(directory / "added_tokens.json")
            config["added_tokens_decoder"] = {index: {"content": text} for text, index in added.items()}
        names = {name: _content(config[name]) for name in _NAMES if config.get(name)}
        _add_tokens(backend, config, names.values())
        if not (directory / "tokenizer.json").is_file():
            _add_ends(backend, config, names)

        def id_of(name: str) -> list[int]:
            token = backend.token_to_id(names[name]) if name in names else None
            return [] if token is None else [token]

        text_model = model.get("text_config", model)
        end_ids = id_of("eos_token") + _ids(generation.get("eos_token_id")) + _ids(text_model.get("eos_token_id"))
        if not end_ids:
            raise ValueError(
                f"nothing in {str(directory)!r} says which token ends a text: give 'eos_token' in "
                "tokenizer_config.json, or 'eos_token_id' in generation_config.json"
            )
        pad_ids = id_of("pad_token") + _ids(generation.get("pad_token_id")) + _ids(text_model.get("pad_token_id"))
        return cls(
            backend,
            special_tokens=names,
            end_ids=list(dict.fromkeys(end_ids)),
            pad_id=(pad_ids + end_ids)[0],
            image_id=_image_id(backend, model),
        )


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; {} if there is no such file. Raises ValueError, which names it, if it is damaged."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{str(path)!r} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{str(path)!r} must hold a JSON object, not a {type(value).__name__}")
    return value


def _content(token: str | Mapping[str, Any]) -> str:
    return token if isinstance(token, str) else token["content"]


def _ids(value: int | list[int] | None) -> list[int]:
    return [] if value is None else [value] if isinstance(value, int) else list(value)


def _add_tokens(backend: Tokenizer, config: Mapping[str, Any], named: Iterable[str]) -> None:
    """Adds what tokenizer_config.json declares beyond the vocabulary. Raises ValueError if an id comes out wrong."""
    flags = ("lstrip", "rstrip", "single_word", "normalized", "special")
    declared = sorted((int(index), token) for index, token in config.get("added_tokens_decoder", {}).items())
    known = {token.content: token for token in backend.get_added_tokens_decoder().values()}
    for index, token in declared:
        wanted = {flag: token[flag] for flag in flags if flag in token}
        old = known.get(token["content"])
        if old is None or any(getattr(old, flag) != value for flag, value in wanted.items()):
            backend.add_tokens([AddedToken(token["content"], **wanted)])
        found = backend.token_to_id(token["content"])
        if found != index:
            raise ValueError(
                f"tokenizer_config.json says that {token['content']!r} has id {index}, but in the vocabulary it has "
                f"{found}: they are not of the same model"
            )
    extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    extra = list(extra.values()) if isinstance(extra, dict) else list(extra)
    extra += [value for key, value in config.items() if key.endswith("_token") and key not in _NAMES and value]
    known = {token.content: token for token in backend.get_added_tokens_decoder().values()}
    for content in [*named, *(_content(token) for token in extra if isinstance(token, str | dict))]:
        if content not in known or not known[content].special:
            backend.add_special_tokens([AddedToken(content, normalized=False, special=True)])


def _add_ends(backend: Tokenizer, config: Mapping[str, Any], names: Mapping[str, str]) -> None:
    """A tokenizer.json says itself which tokens a text begins and ends with; else tokenizer_config.json does."""
    begin, end = (
        [names[f"{which}_token"]] if config.get(f"add_{which}_token") and f"{which}_token" in names else []
        for which in ("bos", "eos")
    )
    if begin or end:
        backend.post_processor = processors.TemplateProcessing(
            single=[*begin, "$A", *end],
            special_tokens=[(token, backend.token_to_id(token)) for token in {*begin, *end}],
        )


def _image_id(backend: Tokenizer, model: Mapping[str, Any]) -> int:
    """model: config.json. Text models of the Qwen family have the token too, but no use for it."""
    token = model.get("image_token_id")
    if token is None and (not model or "vision_config" in model):
        token = backend.token_to_id(_IMAGE)
    return NO_IMAGES if token is None else token
