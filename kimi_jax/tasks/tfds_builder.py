"""A visual task as a TensorFlow Datasets dataset: generated once, stored as ArrayRecord files, read by index.

TensorFlow itself is never imported: the files are in the ArrayRecord format, images are encoded here, and reading goes
through `as_data_source`, which gives random access and needs no `tf.data`.
"""

import dataclasses
import io
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from kimi_jax.tasks import get_task
from kimi_jax.tasks.base import make_problems
from kimi_jax.types import Problem


@dataclasses.dataclass(eq=False, kw_only=True)
class VisualProblemsConfig(tfds.core.BuilderConfig):
    """Which problems to store. All of it shows in the name, and so in the path: other settings never meet old files."""

    name: str = dataclasses.field(init=False)
    task: str
    train: int  # number of problems
    heldout: int
    seed: int

    def __post_init__(self):
        if get_task(self.task).kind != "image":
            raise ValueError(f"task {self.task!r} is a text task; this builder stores image tasks: name one of those")
        self.name = f"{self.task}-train{self.train}-heldout{self.heldout}-seed{self.seed}"


class VisualProblems(tfds.core.GeneratorBasedBuilder):
    """Problems of one task, splits "train" and "heldout", in the order in which `make_problems` draws them."""

    VERSION = tfds.core.Version("1.2.0")  # to be raised when a task draws other problems than before
    code_path = None  # nothing is downloaded: no checksums beside this file to look for

    def _info(self) -> tfds.core.DatasetInfo:
        features = {field: tfds.features.Text() for field in ("id", "task", "prompt", "answer", "solution")}
        features["difficulty"] = tfds.features.Scalar(np.int32)
        features["images"] = tfds.features.Sequence(tfds.features.Image(shape=(None, None, 3), encoding_format="png"))
        features = tfds.features.FeaturesDict(features)
        return tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=True)

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterator]:
        counts = {"train": self.builder_config.train, "heldout": self.builder_config.heldout}
        return {split: self._generate_examples(split, count) for split, count in counts.items() if count}

    def _generate_examples(self, split: str, count: int) -> Iterator[tuple[int, dict[str, Any]]]:
        config = self.builder_config
        problems = make_problems(get_task(config.task), split=split, count=count, seed=config.seed)
        for number, problem in enumerate(problems):
            yield number, {**vars(problem), "images": [io.BytesIO(encode_png(image)) for image in problem.images]}


def encode_png(image: np.ndarray) -> bytes:
    """Of uint8 [height, width, 3]."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG")
    return buffer.getvalue()


def prepare_visual_problems(
    task: str, *, train: int, heldout: int, seed: int, data_dir: str | Path
) -> tfds.core.DatasetBuilder:
    """Writes the dataset below `data_dir`, or finds it there; read it with `builder.as_data_source("train")`.

    Raises:
        ValueError: unknown task, or one without images.
    """
    config = VisualProblemsConfig(task=task, train=train, heldout=heldout, seed=seed)
    # The format is stated because the default one, TFRecord, cannot be read or written without TensorFlow.
    builder = VisualProblems(config=config, data_dir=str(data_dir), file_format="array_record")
    builder.download_and_prepare()
    return builder


def problem_from_example(example: Mapping[str, Any]) -> Problem:
    """An element of the data source as a problem. (Text is stored, and comes back, as bytes.)"""
    text = {name: value.decode() for name, value in example.items() if isinstance(value, bytes)}
    images = tuple(np.asarray(image) for image in example["images"])
    return Problem(**text, difficulty=int(example["difficulty"]), images=images)
