"""What there is to read: documents and conversations, from files or made on the spot from tasks.

A record is a `Document` or a `Conversation`; a collection of them is a random-access grain dataset that reads or makes
a record when it is asked for it. Files have one JSON object per line (.jsonl) or per entry (.array_record):

    {"text": "A cat. <image> Another: <image>", "images": ["cat.png", "data:image/png;base64,..."]}
    {"messages": [{"role": "user", "content": "<image> What is it?"}, {"role": "assistant", "content": "A cat."}], ...}

Names of image files are relative to the folder of the file. In place of a text with markers, content may be a list of
parts, {"type": "text", "text": ...} and {"type": "image"}.
"""

import array
import base64
import binascii
import dataclasses
import itertools
import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import grain
import numpy as np

from kimi_jax.data.chat import ChatFormat, Turn, check_markers
from kimi_jax.data.images import decode_image
from kimi_jax.tasks.base import ANSWER_MARKER, SPLITS, Task, make_problems, split_of
from kimi_jax.types import IMAGE_MARKER, Example, Problem

_ROLES = ("system", "user", "assistant")
_DATA_URL = "base64,"


@dataclasses.dataclass(frozen=True, eq=False)
class Document:
    """A text to learn as it is; IMAGE_MARKER stands where an image belongs."""

    text: str
    images: tuple[np.ndarray, ...] = ()

    def encode(self, chat: ChatFormat) -> Example:
        return chat.encode_document(self.text, self.images)


@dataclasses.dataclass(frozen=True, eq=False)
class Conversation:
    """Turns of which those of the assistant are to be learnt."""

    turns: tuple[Turn, ...]
    images: tuple[np.ndarray, ...] = ()

    @property
    def text(self) -> str:
        return "\n".join(text for _, text in self.turns)

    def encode(self, chat: ChatFormat) -> Example:
        return chat.encode_conversation(self.turns, self.images)


Record = Document | Conversation


# --- from files -------------------------------------------------------------------------------------------------------


def read_files(files: Sequence[str | Path]) -> grain.MapDataset:
    """The records of all files, in their order. Raises FileNotFoundError or ValueError that names file and place."""
    readers = []
    for path in map(Path, files):
        if not path.is_file():
            raise FileNotFoundError(f"there is no file {path} of documents or conversations")
        if path.suffix not in _READERS:
            raise ValueError(f"{path}: records are read from {' and '.join(_READERS)}, not from {path.suffix!r}")
        readers.append(_File(path, _READERS[path.suffix](path)))
    ends = np.cumsum([len(reader.entries) for reader in readers])
    if not readers or not ends[-1]:
        raise ValueError(f"there are no records in {', '.join(map(str, files)) or 'no files'}")

    def read(index: int) -> Record:
        which = int(np.searchsorted(ends, index, side="right"))
        return readers[which].read(index - int(ends[which]) + len(readers[which].entries))

    return grain.MapDataset.range(int(ends[-1])).map(read)


class _Lines:
    """The lines of a text file that are not empty, found by their place in it."""

    def __init__(self, path: Path):
        self.path, self.starts, self.numbers = path, array.array("q"), array.array("q")
        with open(path, "rb") as file:
            at = 0
            for number, line in enumerate(file, start=1):
                if line.strip():
                    self.starts.append(at)
                    self.numbers.append(number)
                at += len(line)

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int) -> bytes:
        with open(self.path, "rb") as file:
            file.seek(self.starts[index])
            return file.readline()

    def name(self, index: int) -> str:
        return f"line {self.numbers[index]}"


class _Entries(grain.sources.ArrayRecordDataSource):
    def name(self, index: int) -> str:
        return f"entry {index}"


_READERS = {".jsonl": _Lines, ".array_record": lambda path: _Entries([str(path)])}


@dataclasses.dataclass(frozen=True, eq=False)
class _File:
    path: Path
    entries: Any

    def read(self, index: int) -> Record:
        try:
            return record_of(json.loads(self.entries[index]), folder=self.path.parent)
        except ValueError as error:  # json.JSONDecodeError is one
            raise ValueError(f"{self.path}, {self.entries.name(index)}: {error}") from error


def record_of(record: Mapping[str, Any], *, folder: str | Path = ".") -> Record:
    """Builds a record from JSON, or raises ValueError that says what is wrong with it."""
    if not isinstance(record, Mapping) or ("text" in record) == ("messages" in record):
        raise ValueError("a record is an object with either 'text' or 'messages', and perhaps 'images'")
    if unknown := record.keys() - {"text", "messages", "images", "id"}:
        raise ValueError(f"unknown field {min(unknown)!r}; allowed are id, text or messages, and images")
    images = record.get("images", [])
    if not isinstance(images, list):
        raise ValueError(f"'images' must be a list of file names or data URLs, got {images!r:.80}")
    pixels = tuple(_read_image(source, Path(folder)) for source in images)
    if "text" in record:
        if not isinstance(record["text"], str) or not record["text"].strip():
            raise ValueError(f"'text' must be a text that is not empty, got {record['text']!r:.80}")
        found: Record = Document(record["text"], pixels)
    else:
        if not isinstance(record["messages"], list):
            raise ValueError(f"'messages' must be a list, got {record['messages']!r:.80}")
        found = Conversation(tuple(_turn(message) for message in record["messages"]), pixels)
    check_markers(found.text, pixels)
    return found


def _turn(message: Any) -> Turn:
    if not isinstance(message, Mapping) or message.get("role") not in _ROLES or "content" not in message:
        raise ValueError(f"a message has a role ({', '.join(_ROLES)}) and content, got {message!r:.80}")
    content = message["content"]
    if isinstance(content, str):
        return message["role"], content
    if not isinstance(content, list) or not all(isinstance(part, Mapping) for part in content):
        raise ValueError(f"the content of a message is a text or a list of parts, got {content!r:.80}")
    parts = [IMAGE_MARKER if part.get("type") == "image" else part.get("text") for part in content]
    if not all(isinstance(part, str) for part in parts):
        raise ValueError(
            f"parts of a message are {{'type': 'text', 'text': ...}} or {{'type': 'image'}}: {content!r:.80}"
        )
    return message["role"], "".join(parts)


def _read_image(source: Any, folder: Path) -> np.ndarray:
    if not isinstance(source, str):
        raise ValueError(f"an image is a file name or a data URL, got {type(source).__name__}")
    if source.startswith("data:"):
        try:
            return decode_image(base64.b64decode(source.partition(_DATA_URL)[2], validate=True), name="in the record")
        except binascii.Error as error:
            raise ValueError(f"an image is no base64 behind {_DATA_URL!r}: {error}") from error
    path = folder / source
    if not path.is_file():
        raise ValueError(f"there is no image {path}; names of images are relative to {folder.resolve()}")
    return decode_image(path.read_bytes(), name=repr(str(path)))


# --- from tasks -------------------------------------------------------------------------------------------------------


def from_tasks(
    tasks: Sequence[Task], *, split: str, count: int, per_record: int, chat: bool, seed: int
) -> grain.MapDataset:
    """`count` records of worked solutions, the tasks taking turns; equal arguments give equal records.

    per_record: problems in each; of more than one a document is numbered and ends with a question about one of them, so
    that it takes the whole document to know the end (k1.5 App. B.4, synthetic long question answering), and a chat has
    so many turns. Then problems may come again in other records.
    """
    if per_record == 1:
        drawn = [make_problems(task, split=split, count=-(-count // len(tasks)), seed=seed) for task in tasks]
        groups = [[problem] for turn in zip(*drawn, strict=True) for problem in turn][:count]
        dataset = grain.MapDataset.source(groups)
    else:
        stream = lambda i: _draws(tasks, split, np.random.default_rng([seed, SPLITS.index(split), i]))  # noqa: E731
        dataset = grain.MapDataset.range(count).map(lambda i: list(itertools.islice(stream(i), per_record)))
    return dataset.map(conversation_of if chat else document_of)


def _draws(tasks: Sequence[Task], split: str, rng: np.random.Generator) -> Iterator[Problem]:
    for task in itertools.cycle(tasks):
        problem = task.draw(rng, task.difficulties[int(rng.integers(len(task.difficulties)))])
        if split_of(problem.id) == split:
            yield problem


def conversation_of(problems: Sequence[Problem]) -> Conversation:
    """Problem by problem, each with its worked solution."""
    turns = [turn for problem in problems for turn in (("user", problem.prompt), ("assistant", problem.solution))]
    return Conversation(tuple(turns), tuple(image for problem in problems for image in problem.images))


def document_of(problems: Sequence[Problem]) -> Document:
    """A problem and its worked solution; of several, numbered, with a question about one of them at the end."""
    images = tuple(image for problem in problems for image in problem.images)
    if len(problems) == 1:
        return Document(f"{problems[0].prompt}\n{problems[0].solution}", images)
    parts = [f"Problem {n}: {problem.prompt}\n{problem.solution}\n" for n, problem in enumerate(problems, start=1)]
    asked = zlib.crc32("".join(parts).encode()) % len(problems)  # drawn, by the text itself
    question = f"What was the answer to problem {asked + 1}?\n{ANSWER_MARKER}{problems[asked].answer}"
    return Document("".join(parts) + question, images)
