"""Models in the Hugging Face layout, in and out: config.json, safetensors shards, and the files beside them.

`family` says what a family is; each has a file of its own. Nothing here needs torch or transformers.
"""

import difflib
import json
import os
import pathlib
from collections.abc import Iterable

import jax

from kimi_jax.models import paths
from kimi_jax.models.config import ModelConfig
from kimi_jax.models.hf import llama, qwen2, qwen2_5_vl, qwen3, qwen3_vl, reading, writing
from kimi_jax.models.hf.family import Family, Options
from kimi_jax.models.hf.shards import read_directory
from kimi_jax.models.hf.writing import TENSORS, copy_side_files
from kimi_jax.models.policy import Policy

__all__ = [
    "FAMILIES",
    "TENSORS",
    "UNUSED",
    "check_weights",
    "copy_side_files",
    "load_params",
    "read_config",
    "save_params",
]

UNUSED = "unused_options.json"  # beside config.json: a list of globs, what may be left unread

FAMILIES: dict[str, Family] = {
    family.architecture: family
    for family in (qwen2.FAMILY, qwen3.FAMILY, llama.FAMILY, qwen2_5_vl.FAMILY, qwen3_vl.FAMILY)
}


def read_config(directory: str | os.PathLike, *, unused: Iterable[str] = ()) -> tuple[Family, ModelConfig]:
    """The family of a directory and the shape of its model.

    unused: globs of options that may be left unread, besides those in a file UNUSED, which an import leaves there.

    Raises FileNotFoundError without config.json, ValueError for an architecture or an option that is not supported.
    """
    path = pathlib.Path(directory) / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"There is no {path}, so {directory} is no model in the Hugging Face layout.")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}.") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds no options, but {values!r:.60}.")
    named = values.get("architectures") or [f"none (model_type={values.get('model_type')!r})"]
    if len(named) != 1 or named[0] not in FAMILIES:
        near = difflib.get_close_matches(str(named[0]), FAMILIES, n=1, cutoff=0.0)[0]
        raise ValueError(
            f"{path}: architecture {', '.join(map(str, named))} is not supported; the nearest that is, is {near}. "
            f"Supported: {', '.join(FAMILIES)}."
        )
    family = FAMILIES[named[0]]
    declared = path.with_name(UNUSED)
    declared = json.loads(declared.read_text(encoding="utf-8")) if declared.is_file() else []
    options = Options(values, where=str(path), unused=(*unused, *declared))
    try:
        config = family.config(options)
    except (TypeError, AttributeError, ArithmeticError) as error:
        raise ValueError(f"{path} has an option of the wrong kind, or a size that is 0: {error}.") from error
    options.finish()
    return family, config


def load_params(directory: str | os.PathLike, params_like: dict, *, unused: Iterable[str] = ()) -> dict:
    """The weights of a directory as parameters in the training layout.

    params_like: what comes back, as shapes with dtypes and shardings (`trainers.setup.params_like`). Tensors are read
    one after the other into their place on the devices; the host holds no more than one at a time. unused: globs of
    options and tensors that may be left unread.

    Raises ValueError or FileNotFoundError that names the first thing which does not fit: files that are damaged or
    missing, pickled or quantized weights, tensors that are missing, unknown or of another shape.
    """
    directory, unused = pathlib.Path(directory), tuple(unused)
    family, config = read_config(directory, unused=unused)
    return reading.load(family, family.tensors(config), read_directory(directory), params_like, unused=unused)


def check_weights(directory: str | os.PathLike, params_like: dict, *, unused: Iterable[str] = ()) -> None:
    """Raises what `load_params` would, as far as config.json and the headers of the files tell."""
    directory, unused = pathlib.Path(directory), tuple(unused)
    family, config = read_config(directory, unused=unused)
    reading.check(family, family.tensors(config), read_directory(directory), params_like, unused=unused)


def save_params(
    params: dict, out: str | os.PathLike, *, source: str | os.PathLike, shard_bytes: int, overwrite: bool = False
) -> None:
    """Writes parameters in the training layout as a directory that other programs load: the inverse of `load_params`.

    source: where the model came from, the directory or what `copy_side_files` kept of it. It gives config.json,
    tokenizer and so on, and each tensor's name and dtype, so that what was not trained comes out byte for byte. Nothing
    appears at `out` before it is complete. Every process calls it; the first one writes.

    Raises FileExistsError when there is something at `out`, unless overwrite; ValueError when params are not of the
    model that source speaks of.
    """
    source = pathlib.Path(source)
    family, config = read_config(source, unused=("*",))  # the options were judged on import
    expected = dict(paths.flatten(jax.eval_shape(Policy(config).init, jax.random.key(0))))
    given = dict(paths.flatten(params))
    for path in (*given, *expected):
        ours, theirs = (str(tree[path].shape) if path in tree else "nothing" for tree in (given, expected))
        if ours != theirs:
            raise ValueError(
                f"These are not parameters of the model of {source}: {path!r} is {ours} here and {theirs} there. "
                "(Heads of reward models cannot be exported; adapters are merged first.)"
            )
    writing.save(
        family, family.tensors(config), params, pathlib.Path(out), source, shard_bytes=shard_bytes, overwrite=overwrite
    )
