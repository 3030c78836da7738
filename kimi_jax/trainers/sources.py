"""From config.data.mixture to batches: records of each source, encoded, packed into rows, and rows of all, mixed."""

import itertools
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import grain
import ml_collections

from kimi_jax.arrays import PackedRows
from kimi_jax.data import documents
from kimi_jax.data.chat import ChatFormat
from kimi_jax.data.documents import Record
from kimi_jax.data.loaders import document_rows, endless, in_batches
from kimi_jax.data.mixture import Schedule, mixed, shares
from kimi_jax.tasks import get_task
from kimi_jax.training import distributed
from kimi_jax.types import Example

_READ_FOR_THE_TOKENIZER = 10_000  # records of each source


def check(config: ml_collections.ConfigDict) -> None:
    """Refuses, before anything is encoded, tasks and files that there are not, and weights that make no mixture."""
    for name, options in config.data.mixture.items():
        with _naming(name):
            for task in options.tasks:
                get_task(task)
            for files in (options.files, options.heldout_files):
                if files:
                    documents.read_files(files)
    if config.data.mixture:
        shares(_weights(config), config.sft.steps)


def batches(config: ml_collections.ConfigDict, chat: ChatFormat, layout: dict[str, Any]) -> grain.MapDataset:
    """Element i is the PackedRows of update i + 1. layout: `setup.packing`.

    Raises ValueError or FileNotFoundError that names the source.
    """
    rows = {}
    for name, options in config.data.mixture.items():
        examples = records(config, name).map(_encoder(name, chat, layout))
        seed = zlib.crc32(f"{config.seed} {name}".encode())
        with _naming(name):
            made = document_rows(
                examples,
                seed=seed,
                row_tokens=layout["row_tokens"],
                row_patches=layout["row_patches"],
                image_id=layout["image_id"],
                whole=options.form == "chat",
                attention=options.attention,
            )
        if distributed.is_first():
            print(f"{name}: {len(examples):,} records fill {len(made):,} rows, one epoch")
        rows[name] = endless(made, seed).map(lambda make: make())
    return in_batches(
        mixed(
            rows,
            _weights(config),
            steps=config.sft.steps,
            rows_per_step=config.sft.rows,
            seed=config.seed,
        ),
        rows_per_batch=config.sft.rows,
        **layout,
    )


def heldout(config: ml_collections.ConfigDict, chat: ChatFormat, layout: dict[str, Any]) -> dict[str, list[PackedRows]]:
    """By source, batches of sft.micro_rows rows with its first sft.eval_problems held-out records, if it has any."""
    found = {}
    for name, options in config.data.mixture.items():
        if not (options.tasks or options.heldout_files):
            continue
        encode, given = _encoder(name, chat, layout), records(config, name, heldout=True)
        examples = [encode(given[i]) for i in range(min(len(given), config.sft.eval_problems))]
        sizes = {key: layout[key] for key in ("row_tokens", "row_patches", "image_id")}
        with _naming(name):
            rows = document_rows(examples, seed=0, whole=options.form == "chat", attention=options.attention, **sizes)
        batch = config.sft.micro_rows
        padded = [make() for make in rows] + [[]] * (-len(rows) % batch)
        found[name] = list(in_batches(grain.MapDataset.source(padded), rows_per_batch=batch, **layout))
    return found


def texts(config: ml_collections.ConfigDict) -> Iterator[str]:
    """What a tokenizer can be trained on."""
    for name in config.data.mixture:
        given = records(config, name)
        for record in itertools.islice((given[i] for i in range(len(given))), _READ_FOR_THE_TOKENIZER):
            yield record.text


def records(config: ml_collections.ConfigDict, name: str, *, heldout: bool = False) -> grain.MapDataset:
    """The records of a source, or those that it is measured on. Raises ValueError, FileNotFoundError with its name."""
    options = config.data.mixture[name]
    with _naming(name):
        if options.tasks:
            return documents.from_tasks(
                [get_task(task) for task in options.tasks],
                split="heldout" if heldout else "train",
                count=config.sft.eval_problems if heldout else options.records,
                per_record=options.problems,
                chat=options.form == "chat",
                seed=config.seed,
            )
        return documents.read_files(options.heldout_files if heldout else options.files)


def _weights(config: ml_collections.ConfigDict) -> dict[str, Schedule]:
    return {name: options.weight for name, options in config.data.mixture.items()}


def _encoder(name: str, chat: ChatFormat, layout: dict[str, Any]) -> Callable[[Record], Example]:
    def encode(record: Record) -> Example:
        with _naming(name):
            if record.images and not layout["patch_dim"]:
                raise ValueError("it has images, but the model has no vision tower that could read them")
            return record.encode(chat)

    return encode


class _naming:
    """Puts the name of a source before the message of an error."""

    def __init__(self, name: str):
        self.name = name

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind, error, traceback) -> None:
        if isinstance(error, ValueError | FileNotFoundError) and "config.data.mixture." not in str(error):
            raise kind(f"config.data.mixture.{self.name}: {error}") from error
