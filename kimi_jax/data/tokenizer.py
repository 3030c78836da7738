"""Text <-> token ids: SentencePiece BPE in which any text encodes and comes back exactly.

Three properties that the rest of the project relies on:

* Every string round-trips. Characters without a piece become UTF-8 bytes, and nothing is normalised: not spaces, not
  newlines.
* The special tokens are never the encoding of a text. A user who writes "<|end|>" gets seven ordinary characters.
* Decoding is concatenation of bytes, so a response that stops in the middle of a character still decodes.
"""

import io
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import sentencepiece

PAD, UNKNOWN, END, USER, ASSISTANT, IMAGE = "<|pad|>", "<unk>", "<|end|>", "<|user|>", "<|assistant|>", "<|image|>"

_SPACE = "\u2581"  # how a piece writes a space, hence the one character that SentencePiece cannot tell from another
_SMALLEST_VOCABULARY = 256 + 6  # the bytes and the special tokens


class Tokenizer:
    """A trained vocabulary. The special ids: `pad_id` = 0, `end_id`, `user_id`, `assistant_id`, `image_id`."""

    def __init__(self, model: sentencepiece.SentencePieceProcessor):
        special = (PAD, END, USER, ASSISTANT, IMAGE)
        missing = [piece for piece in special if not model.is_control(model.piece_to_id(piece))]
        if missing:
            raise ValueError(
                f"this SentencePiece model lacks the control tokens {missing}; use a model written by Tokenizer.train"
            )
        self._model = model
        self.pad_id = model.piece_to_id(PAD)
        self.end_id = model.piece_to_id(END)
        self.user_id = model.piece_to_id(USER)
        self.assistant_id = model.piece_to_id(ASSISTANT)
        self.image_id = model.piece_to_id(IMAGE)
        self._bytes = [_bytes_of(model, token) for token in range(model.get_piece_size())]
        self._ids_of_space_mark = [model.piece_to_id(f"<0x{byte:02X}>") for byte in _SPACE.encode()]

    @property
    def vocab_size(self) -> int:
        return len(self._bytes)

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`; none of them is special. Joining two encodings decodes to the joined texts."""
        ids: list[int] = []
        for index, part in enumerate(text.split(_SPACE)):
            if index:
                ids += self._ids_of_space_mark
            ids += self._model.encode(part)
        return ids

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of `ids`. Special tokens are dropped; incomplete UTF-8 shows as U+FFFD. Unknown ids: ValueError."""
        unknown = [int(token) for token in ids if not 0 <= token < self.vocab_size]
        if unknown:
            raise ValueError(f"token ids {unknown[:5]} are not in the vocabulary, 0..{self.vocab_size - 1}")
        return b"".join([self._bytes[token] for token in ids]).decode("utf-8", errors="replace")

    @classmethod
    def train(cls, texts: Iterable[str], path: str | os.PathLike, *, vocab_size: int) -> "Tokenizer":
        """Learns at most `vocab_size` tokens (fewer from a small corpus) and writes the model to `path`.

        The same texts in the same order give the same model. Digits stay single, so every number is spelled alike.
        Raises ValueError for an empty corpus, or for a vocabulary too small for the bytes and the corpus's alphabet.
        """
        texts = [text for text in texts if text]
        if not texts:
            raise ValueError("no text to train a tokenizer on: `texts` is empty or holds only empty strings")
        if vocab_size <= _SMALLEST_VOCABULARY:
            raise ValueError(
                f"vocab_size={vocab_size} is too small: {_SMALLEST_VOCABULARY} tokens are bytes and special tokens, "
                "and each common character of the corpus needs one more"
            )
        longest = max(len(text.encode()) for text in texts)
        model = io.BytesIO()
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(texts),
                model_writer=model,
                model_type="bpe",
                vocab_size=vocab_size,
                hard_vocab_limit=False,
                byte_fallback=True,
                split_digits=True,
                normalization_rule_name="identity",
                remove_extra_whitespaces=False,
                add_dummy_prefix=False,
                pad_id=0,
                pad_piece=PAD,
                unk_id=1,
                unk_piece=UNKNOWN,
                bos_id=-1,
                eos_id=-1,
                control_symbols=[END, USER, ASSISTANT, IMAGE],
                max_sentence_length=max(longest + 1, 10),  # texts above it would be left out in silence
                num_threads=1,
                minloglevel=2,
            )
        except RuntimeError as error:
            raise ValueError(f"cannot train vocab_size={vocab_size} tokens on {len(texts)} texts: {error}") from error
        temporary = Path(f"{path}.tmp")  # a run that is killed here shall not find half a file when it resumes
        temporary.write_bytes(model.getvalue())
        temporary.replace(path)
        return cls.from_bytes(model.getvalue())

    @classmethod
    def load(cls, path: str | os.PathLike) -> "Tokenizer":
        """Reads what `train` wrote. Raises FileNotFoundError, or ValueError if the file is not such a model."""
        if not Path(path).is_file():
            raise FileNotFoundError(
                f"no tokenizer at {str(path)!r}; write one with Tokenizer.train(texts, path, vocab_size=...)"
            )
        try:
            return cls.from_bytes(Path(path).read_bytes())
        except ValueError as error:
            raise ValueError(f"{str(path)!r}: {error}") from error

    @classmethod
    def from_bytes(cls, data: bytes) -> "Tokenizer":
        """The inverse of `to_bytes`. Raises ValueError if `data` is not a model of this project."""
        model = sentencepiece.SentencePieceProcessor()
        try:
            if not data:
                raise RuntimeError("it is empty")
            model.LoadFromSerializedProto(data)
        except RuntimeError as error:
            raise ValueError(f"not a SentencePiece model ({len(data)} bytes): {error}") from error
        return cls(model)

    def to_bytes(self) -> bytes:
        """The whole tokenizer, to be stored beside the weights."""
        return self._model.serialized_model_proto()


def _bytes_of(model: sentencepiece.SentencePieceProcessor, token: int) -> bytes:
    piece = model.id_to_piece(token)
    if model.is_control(token) or model.is_unknown(token):
        return b""
    if model.is_byte(token):
        return bytes([int(piece[len("<0x") : -len(">")], 16)])
    return piece.replace(_SPACE, " ").encode()
