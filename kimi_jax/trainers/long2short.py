"""Long2short on runs (k1.5 §2.4): merging them, their problems, what they measured and what to measure still."""

import dataclasses
import hashlib
import io
import json
import os
import pathlib
import re
import shutil
from collections.abc import Sequence
from typing import Any

import ml_collections
from PIL import Image

from kimi_jax.long2short import merging
from kimi_jax.long2short.frontier import Point
from kimi_jax.models.hf.shards import INDEX, SINGLE
from kimi_jax.models.hf.writing import replaced
from kimi_jax.trainers import origin, pipeline
from kimi_jax.trainers import setup as setup_lib
from kimi_jax.trainers.config import default_config
from kimi_jax.training.metrics import MetricsWriter
from kimi_jax.types import Problem

MERGED = "merged"  # the stage of a run that merging made
_OF_A_RUN = ("config.json", "tokenizer.model")


def model_directory(path: pathlib.Path) -> pathlib.Path | None:
    """The directory in the Hugging Face layout that `path` is, or holds as an import; None for a run."""
    directory = setup_lib.hf_directory(path)
    return directory if any((directory / name).is_file() for name in (SINGLE, INDEX)) else None


def merge(sources: Sequence[pathlib.Path], out: pathlib.Path, *, weights: Sequence[float], shard_bytes: int) -> dict:
    """Averages models, or checkpoints of runs, into `out`; of the same kind. Returns what was done.

    sources: of checkpoints what `origin.find` takes. What comes out of checkpoints is a run with one stage, `merged`,
    for config.init and for scripts that take a workdir. Raises ValueError or FileNotFoundError before anything is
    written, FileExistsError when there is something at `out`.
    """
    merging.check_weights(weights, len(sources))
    models = {source: model_directory(source) for source in sources}
    done = {"sources": [str(source) for source in sources], "weights": list(weights)}
    if all(models.values()):
        directories = [directory for directory in map(models.get, sources) if directory]
        return done | merging.merge_models(directories, out, weights=weights, shard_bytes=shard_bytes)
    if any(models.values()):
        run = next(source for source, directory in models.items() if not directory)
        model = next(source for source, directory in models.items() if directory)
        raise ValueError(
            f"{model} is a model and {run} a run. Export the run first: python scripts/export_weights.py "
            f"--checkpoint={run} --out=DIR, and merge that."
        )
    found = [origin.find(source, option="RUN") for source in sources]
    _check_runs(found)
    done["sources"] = [str(one.stage / str(one.step)) for one in found]
    with replaced(out, overwrite=False) as workdir:
        for name in _OF_A_RUN:
            if (found[0].workdir / name).is_file():
                shutil.copyfile(found[0].workdir / name, workdir / name)
        if (found[0].workdir / "hf").is_dir():
            shutil.copytree(found[0].workdir / "hf", workdir / "hf")
        checkpoints = [(one.stage, one.step) for one in found]
        done |= merging.merge_checkpoints(checkpoints, workdir / "checkpoints" / MERGED, weights=weights, meta=done)
    return done


def _check_runs(found: Sequence[origin.Origin]) -> None:
    """Raises ValueError when the models or the tokenizers of two runs differ."""
    first, shapes = found[0].workdir, [_shape(one.workdir) for one in found]
    for one, shape in zip(found, shapes, strict=True):
        if (first / "hf").is_dir() and (one.workdir / "hf").is_dir():
            merging.check_vocabularies(first / "hf", one.workdir / "hf")
        elif _own_tokenizer(first) != _own_tokenizer(one.workdir):
            raise ValueError(
                f"{first} and {one.workdir} have different tokenizers. Rows of their embeddings that mean different "
                "tokens cannot be averaged: let the later run begin with the earlier one (config.init)."
            )
        if shape != shapes[0]:
            name = next(name for name in shape if shape[name] != shapes[0].get(name))
            raise ValueError(
                f"{first} and {one.workdir} are models of different shape: {name} is "
                f"{shapes[0].get(name)} and {shape[name]}. Only models of one shape can be averaged."
            )


def _own_tokenizer(workdir: pathlib.Path) -> bytes:
    path = workdir / "tokenizer.model"
    return path.read_bytes() if path.is_file() else b""


def _shape(workdir: pathlib.Path) -> dict:
    config = read_config(workdir)
    if config.model.path:
        config.model.path = str(workdir)
    shape = dataclasses.asdict(setup_lib.model_config(config, None))
    return {name: value for name, value in shape.items() if name != "dtype"}


def read_config(workdir: pathlib.Path) -> ml_collections.ConfigDict:
    """The config of a run, with the defaults of what it did not know yet. Raises FileNotFoundError, ValueError."""
    path = workdir / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{workdir} is no run: there is no {path}.")
    config = default_config().unlock()
    try:
        config.update(ml_collections.ConfigDict(json.loads(path.read_text())))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} is damaged: {error}.") from error
    config.model.attention = "auto"  # for whatever device is here
    return config


# --- problems of a run ------------------------------------------------------------------------------------------------


def problems_of(checkpoint: pathlib.Path) -> tuple[list[Problem], list[Problem]]:
    """(train, heldout) of the run that `origin.find` finds there, no two of which have one id, as in a file of them.

    The id that a task gives is about the content, which other tasks may draw as well: theirs comes after its name.
    """
    config = read_config(origin.find(checkpoint, option="--checkpoint").workdir)
    train, heldout = setup_lib.make_problem_sets(config)
    if config.data.train_file:
        return train, heldout
    named = lambda problem: dataclasses.replace(problem, id=f"{problem.task}/{problem.id}")  # noqa: E731
    return [named(problem) for problem in train], [named(problem) for problem in heldout]


def record(problem: Problem, folder: pathlib.Path) -> dict[str, Any]:
    """A problem for `tasks.base.problem_from_record`, in a file in `folder`, where its images are written."""
    names = []
    for pixels in problem.images:
        encoded = io.BytesIO()
        Image.fromarray(pixels).save(encoded, "PNG")
        names.append(f"images/{hashlib.blake2b(encoded.getvalue(), digest_size=12).hexdigest()}.png")
        (folder / "images").mkdir(exist_ok=True)
        if not (folder / names[-1]).exists():  # others may be reading it
            begun = folder / f"{names[-1]}.{os.getpid()}"
            begun.write_bytes(encoded.getvalue())
            begun.replace(folder / names[-1])
    values = {name: getattr(problem, name) for name in ("id", "task", "prompt", "answer", "difficulty", "solution")}
    return values | ({"images": names} if names else {})


# --- measuring and selecting ------------------------------------------------------------------------------------------


def evaluate(checkpoint: pathlib.Path) -> dict[str, Any]:
    """Measures a checkpoint on the held-out problems of its run, as the run itself does at its end.

    Returns {"checkpoint", "results"} and writes it to WORKDIR/evaluations.jsonl. Raises what `origin.find` raises.
    """
    found = origin.find(checkpoint, option="RUN")
    config = read_config(found.workdir)
    if config.model.path:
        config.model.path = str(found.workdir / "hf")
    config.init = str(found.stage / str(found.step))
    setup = setup_lib.build(config, found.workdir)
    if not setup.heldout:
        raise ValueError(f"{found.workdir} has no held-out problems to be measured on.")
    pipeline.check_prompts(setup)
    result = {"checkpoint": config.init, "results": pipeline.full_evaluation(setup, found.load(setup.params_like))}
    with open(found.workdir / "evaluations.jsonl", "a") as file:
        file.write(json.dumps(result) + "\n")
    return result


def points(workdir: pathlib.Path) -> list[Point]:
    """All that a run measured on held-out problems: at the end of its stages, while RL went on, and by `evaluate`.

    Accuracy and tokens are means over all held-out problems. Of a checkpoint that was measured several times the last
    measurement in this order counts. Raises ValueError, FileNotFoundError.
    """
    found: dict[str, Point] = {}

    def add(stage: str, step: int | None, results: dict[str, dict[str, float]]) -> None:
        if results:
            total = sum(result["n"] for result in results.values())
            mean = lambda name: sum(r[name] * r["n"] for r in results.values()) / total  # noqa: E731
            path = workdir / "checkpoints" / stage / str(step)
            there = str(path) if path.is_dir() else ""
            name = f"{workdir.name} {stage}" + ("" if step is None else f" {step}")
            found[name] = Point(name, mean("accuracy"), mean("mean_tokens"), there)

    if (workdir / "summary.json").is_file():
        summary = json.loads((workdir / "summary.json").read_text())
        for key, stages in (("sft", ("dpo", "sft")), ("rl", ("rl",))):
            stage = next((name for name in stages if _newest(workdir, name) is not None), None)
            if stage:  # without one the run was measured as it began, which is of another run
                add(stage, _newest(workdir, stage), summary.get(key, {}))
    if (workdir / "metrics.jsonl").is_file():
        last = _newest(workdir, "rl")
        for row in MetricsWriter(workdir / "metrics.jsonl").read():
            kinds = [k.removeprefix("eval_").removesuffix("_tokens") for k in row if re.fullmatch("eval_.*_tokens", k)]
            if row["step"] != last or not (workdir / "summary.json").is_file():
                of_kind = lambda k, row=row: (row[f"eval_{k}_accuracy"], row[f"eval_{k}_tokens"], 1)  # noqa: E731
                names = ("accuracy", "mean_tokens", "n")  # kinds have equal shares
                add("rl", row["step"], {k: dict(zip(names, of_kind(k), strict=True)) for k in kinds})
    if (workdir / "evaluations.jsonl").is_file():
        for line in (workdir / "evaluations.jsonl").read_text().splitlines():
            record = json.loads(line)
            checkpoint = pathlib.Path(record["checkpoint"])
            add(checkpoint.parent.name, int(checkpoint.name), record["results"])
    if not found:
        raise ValueError(
            f"{workdir} has no measurements on held-out problems: no summary.json, no evaluation in metrics.jsonl "
            f"(config.rl.eval_every). Make one: python scripts/long2short.py evaluate {workdir}"
        )
    return list(found.values())


def _newest(workdir: pathlib.Path, stage: str) -> int | None:
    steps = [int(path.name) for path in (workdir / "checkpoints" / stage).glob("*") if path.name.isdigit()]
    return max(steps, default=None)
