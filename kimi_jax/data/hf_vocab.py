"""The ways in which published checkpoints store a vocabulary, all read into one kind of object: `tokenizers.Tokenizer`.

    tokenizer.json                                   the `tokenizers` library's own file, complete
    tokenizer.model, spiece.model                    SentencePiece BPE (Llama 2)
    tokenizer.model, tiktoken.model, *.tiktoken      tiktoken: lines of base64 bytes and a rank (Llama 3, Kimi, Qwen)
    vocab.json, merges.txt                           byte-level BPE as GPT-2 stored it

The first one found is used. What the last three leave open (the pattern that splits words, special tokens) is in
tokenizer_config.json, or follows from its "tokenizer_class".
"""

import base64
import binascii
import json
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

_TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_CONTRACTED = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
_THREE_DIGITS = _WORDS + r"|\p{N}{1,3}" + _TAIL  # Llama 3
_ONE_DIGIT = _WORDS + r"|\p{N}" + _TAIL  # Qwen
_HAN_APART = (  # Kimi
    r"[\p{Han}]+"
    rf"|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_CONTRACTED}"
    rf"|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_CONTRACTED}"
    r"|\p{N}{1,3}" + _TAIL
)
_PATTERNS = {  # by tokenizer_class
    "QWenTokenizer": _ONE_DIGIT,
    "Qwen2Tokenizer": _ONE_DIGIT,
    "Qwen2TokenizerFast": _ONE_DIGIT,
    "TikTokenTokenizer": _HAN_APART,
}
_SPACE = "\u2581"  # how SentencePiece writes a space
_UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 2, 3, 4, 6  # kinds of SentencePiece pieces


def read_vocabulary(directory: Path, config: Mapping[str, Any]) -> Tokenizer:
    """The vocabulary in `directory`. config: its tokenizer_config.json.

    Raises FileNotFoundError if there is none, and ValueError, which names the file, if it cannot be read.
    """
    candidates = [directory / name for name in ("tokenizer.json", "tokenizer.model", "tiktoken.model", "spiece.model")]
    candidates += sorted(directory.glob("*.tiktoken")) + [directory / "vocab.json"]
    path = next((path for path in candidates if path.is_file()), None)
    if path is None:
        raise FileNotFoundError(
            f"no vocabulary in {str(directory)!r}: there is none of tokenizer.json, tokenizer.model, tiktoken.model, "
            "*.tiktoken, vocab.json with merges.txt. Copy the tokenizer files of the model there."
        )
    try:
        if path.name == "tokenizer.json":
            return _read_tokenizer_json(path)
        if path.name == "vocab.json":
            return _read_vocab_and_merges(path, config)
        data = path.read_bytes()
        return _read_tiktoken(data, config) if _is_tiktoken(data) else _read_sentencepiece(data, config)
    except Exception as error:  # the readers of damaged files raise whatever they stumble over
        raise ValueError(f"{str(path)!r} is not a vocabulary that can be read: {error}") from error


def _read_tokenizer_json(path: Path) -> Tokenizer:
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.no_truncation()  # the file may hold the settings of whoever saved it
    tokenizer.no_padding()
    return tokenizer


def _read_vocab_and_merges(path: Path, config: Mapping[str, Any]) -> Tokenizer:
    vocabulary = json.loads(path.read_text(encoding="utf-8"))
    lines = path.with_name("merges.txt").read_text(encoding="utf-8").split("\n")
    pairs = [line.split(" ") for line in lines if line.strip() and not line.startswith("#version")]
    merges = [(left, right) for left, right in pairs]
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    pattern = _pattern(config)
    _set_byte_level(tokenizer, pattern, add_prefix_space=bool(config.get("add_prefix_space")))
    if pattern == _ONE_DIGIT:
        tokenizer.normalizer = normalizers.NFC()
    return tokenizer


# --- tiktoken


def _is_tiktoken(data: bytes) -> bool:
    words = data.split(b"\n", 1)[0].split()
    return len(words) == 2 and words[1].isdigit() and data[:1] not in (b"\x0a", b"")


def _read_tiktoken(data: bytes, config: Mapping[str, Any]) -> Tokenizer:
    """tiktoken joins the two neighbours whose union has the lowest rank, so each way to halve a token is a merge."""
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(data.splitlines(), start=1):
        if line:
            try:
                token, rank = line.split()
                ranks[base64.b64decode(token, validate=True)] = int(rank)
            except (ValueError, binascii.Error) as error:
                raise ValueError(f"line {number} is not 'base64 rank': {line[:40]!r}") from error
    letters = byte_letters()
    spelled = {token: "".join([letters[byte] for byte in token]) for token in ranks}
    merges = []
    for token, _ in sorted(ranks.items(), key=lambda item: item[1]):
        halves = [(token[:cut], token[cut:]) for cut in range(1, len(token))]
        known = [(left, right) for left, right in halves if left in ranks and right in ranks]
        known.sort(key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))
        merges += [(spelled[left], spelled[right]) for left, right in known]
    vocabulary = {spelled[token]: rank for token, rank in ranks.items()}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=True))
    _set_byte_level(tokenizer, _pattern(config) or _THREE_DIGITS, add_prefix_space=False)
    _add_reserved(tokenizer, config, first=max(ranks.values()) + 1)
    return tokenizer


def _add_reserved(tokenizer: Tokenizer, config: Mapping[str, Any], *, first: int) -> None:
    """Special tokens follow the ranks. Ids before the last one that have no name get one: the library skips no id."""
    named = {int(index): token["content"] for index, token in config.get("added_tokens_decoder", {}).items()}
    contents = [named.get(index, f"<|reserved_token_{index}|>") for index in range(first, max(named, default=0) + 1)]
    tokenizer.add_special_tokens([AddedToken(content, normalized=False) for content in contents])


def _pattern(config: Mapping[str, Any]) -> str | None:
    """The regular expression that cuts a text into words; None: GPT-2's."""
    return config.get("pat_str") or _PATTERNS.get(config.get("tokenizer_class", ""))


def _set_byte_level(tokenizer: Tokenizer, pattern: str | None, *, add_prefix_space: bool) -> None:
    letters = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space, use_regex=pattern is None)
    if pattern is None:
        tokenizer.pre_tokenizer = letters
    else:
        split = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, letters])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)


def byte_letters() -> list[str]:
    """How byte-level vocabularies write each byte: printable Latin-1 as itself, the others from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    codes = {byte: byte for byte in printable} | {byte: 0x100 + index for index, byte in enumerate(others)}
    return [chr(codes[byte]) for byte in range(256)]


# --- SentencePiece


def _read_sentencepiece(data: bytes, config: Mapping[str, Any]) -> Tokenizer:
    """As Llama uses it: bytes for characters without a piece, a space before the text, nothing normalized."""
    pieces, model_type, rules = _parse_sentencepiece(data)
    if model_type != "bpe":
        raise ValueError(f"its type is {model_type!r}; of SentencePiece models only 'bpe' is supported")
    if rules:
        raise ValueError("it normalizes text with rules of its own, which is not supported; use its tokenizer.json")
    ids = {piece: index for index, (piece, _) in enumerate(pieces)}
    joined = {piece for piece, kind in pieces if kind not in (_UNKNOWN, _CONTROL, _BYTE)}
    merges = []
    for piece in (piece for piece, _ in pieces if piece in joined):  # the better a piece, the lower its id
        halves = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
        known = [(left, right) for left, right in halves if left in joined and right in joined]
        merges += sorted(known, key=lambda pair: (len(pair[0]), len(pair[1])))
    unknown = next((piece for piece, kind in pieces if kind == _UNKNOWN), None)
    tokenizer = Tokenizer(models.BPE(ids, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))

    prefix = config.get("add_prefix_space")
    prefix = True if prefix is None else prefix
    scheme = ("always" if config.get("legacy") else "first") if prefix else "never"
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement=_SPACE, prepend_scheme=scheme, split=False)
    steps = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(steps + ([decoders.Strip(content=" ", left=1)] if prefix else []))
    special = [(piece, kind != _USER_DEFINED) for piece, kind in pieces if kind in (_UNKNOWN, _CONTROL, _USER_DEFINED)]
    tokenizer.add_tokens([AddedToken(piece, normalized=False, special=is_special) for piece, is_special in special])
    return tokenizer


def _parse_sentencepiece(data: bytes) -> tuple[list[tuple[str, int]], str, bytes]:
    """[(piece, kind), ...], the type of the model, and its normalization rules (b"": it leaves the text as it is)."""
    pieces, trainer, normalizer = [], {}, {}
    for number, value in _protobuf(data):
        if number == 1:
            fields = dict(_protobuf(value))
            pieces.append((fields[1].decode(), fields.get(3, 1)))
        elif number == 2:
            trainer = dict(_protobuf(value))
        elif number == 3:
            normalizer = dict(_protobuf(value))
    if not pieces:
        raise ValueError("it holds no pieces")
    model_type = {1: "unigram", 2: "bpe", 3: "word", 4: "char"}.get(trainer.get(3, 1), "unknown")
    return pieces, model_type, normalizer.get(2, b"")


def _protobuf(data: bytes) -> Iterator[tuple[int, Any]]:
    """(number, value) of the fields of a protocol buffer message; messages within and strings come as bytes."""
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = data[at]
            at += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    while at < len(data):
        key = varint()
        number, wire = key >> 3, key & 7
        if wire == 0:
            yield number, varint()
            continue
        size = {1: 8, 5: 4}.get(wire) or (varint() if wire == 2 else 0)
        value = data[at : at + size]
        if wire not in (1, 2, 5) or len(value) < size:
            raise ValueError("it is damaged, or no SentencePiece model")
        at += size
        yield number, value if wire == 2 else struct.unpack("<d" if wire == 1 else "<f", value)[0]
