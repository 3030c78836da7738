"""What a stage goes on from: parameters and tokenizer of an earlier run (`config.init`), found, compared and loaded."""

import dataclasses
import json
import pathlib

import jax
import numpy as np

from kimi_jax.models import paths
from kimi_jax.training.checkpoint import Checkpointer

_VOCABULARY = ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt", "tiktoken.model")  # of side files
_HEADS = ("lora", "scalar_head")  # parts that a stage may add to the model, which then begin as in any run


@dataclasses.dataclass(frozen=True)
class Origin:
    """One checkpoint: a step of a stage of a run."""

    workdir: pathlib.Path
    stage: pathlib.Path  # workdir/checkpoints/NAME
    step: int

    def check(self, params_like: dict) -> None:
        """Raises ValueError, with names and shapes, when the parameters are not those of this model."""
        with Checkpointer.reader(self.stage) as checkpoints:
            target, unused = self._target(checkpoints, params_like)
            if unused:
                raise ValueError(
                    f"config.init={str(self.workdir)!r} has parameters that this model lacks, {unused[0]!r} for one. "
                    "Set config.model as it is there (its config.json says how)."
                )
            try:
                checkpoints.check(target, self.step, partial=True)
            except ValueError as error:
                raise ValueError(f"config.init={str(self.workdir)!r} holds a model of another shape. {error}") from None

    def load(self, params_like: dict) -> dict:
        """Those of the parameters that are there, laid out and typed as `params_like` says: all that is not new."""
        with Checkpointer.reader(self.stage) as checkpoints:
            target, _ = self._target(checkpoints, params_like)
            loaded = checkpoints.restore(target, self.step, partial=True)[1]
        params = loaded["state"]["params"] if "state" in loaded else loaded["params"]
        like = dict(paths.flatten(params_like))
        return paths.nest((path, leaf.astype(like[path].dtype)) for path, leaf in paths.flatten(params))

    def check_family(self, published: str | None) -> None:
        """published: config.model.path. Raises ValueError unless both or neither began with a published model."""
        if (self.workdir / "hf").is_dir() != bool(published):
            theirs, ours = "a published model", "with --config.model.path=DIR, its directory"
            if published:
                theirs, ours = "one of our own sizes", f"without config.model.path={published!r}"
            raise ValueError(f"config.init={str(self.workdir)!r} began with {theirs}. Go on from it {ours}.")

    def check_rope_base(self, own: float | None) -> None:
        """own: config.model.rope_base. Raises ValueError when the earlier run changed it and this one says nothing."""
        record = self.workdir / "config.json"
        theirs = json.loads(record.read_text())["model"].get("rope_base") if record.is_file() else None
        if theirs and not own:
            raise ValueError(
                f"config.init={str(self.workdir)!r} was trained with model.rope_base={theirs:g}. Set "
                f"config.model.rope_base={theirs:g} here as well, or another value if it is to change."
            )

    def check_vocabulary(self, own: pathlib.Path) -> None:
        """own: a workdir. Raises ValueError that names the file when tokens have other meanings there."""
        for name in ("tokenizer.model", *(f"hf/{name}" for name in _VOCABULARY)):
            a, b = self.workdir / name, own / name
            if a.is_file() != b.is_file() or a.is_file() and a.read_bytes() != b.read_bytes():
                raise ValueError(
                    f"config.init={str(self.workdir)!r} has another tokenizer: {a} and {b} differ, so its parameters "
                    "would read other tokens than were written. Use a new --workdir, and the config.model.path of "
                    "the earlier run, if it had one."
                )

    def _target(self, checkpoints: Checkpointer, params_like: dict) -> tuple[dict, list[str]]:
        """What to restore into, in the dtypes of the checkpoint, and its parameters that this leaves out."""
        saved = checkpoints.arrays(self.step)
        prefix = "state/params/" if any(path.startswith("state/params/") for path in saved) else "params/"
        target = {}
        for path, leaf in paths.flatten(params_like):
            there = saved.get(prefix + path)
            if there or not set(_HEADS) & set(path.split("/")):
                dtype = np.dtype(there.partition("[")[0]) if there else leaf.dtype  # a frozen one may be in 16 bits
                target[prefix + path] = jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=leaf.sharding)
        unused = [path for path in saved if path.startswith(prefix) and path not in target]
        return paths.nest(target.items()), [path for path in unused if "scalar_head" not in path]


def find(path: str | pathlib.Path, *, option: str = "config.init") -> Origin:
    """The checkpoint that `path` names: a step of a stage, a stage (its newest step), or a run (of its last stage).

        runs/long/checkpoints/rl/40        runs/long/checkpoints/rl        runs/long

    option: what the path was given as, for messages.

    Raises FileNotFoundError when there is none, ValueError when a run has several stages and none of them is RL.
    """
    path = pathlib.Path(path).absolute()
    if path.parent.parent.name == "checkpoints" and path.name.isdigit():
        stage, step = path.parent, int(path.name)
    elif path.parent.name == "checkpoints":
        stage, step = path, None
    else:
        stages = {p.name: p for p in sorted(path.glob("checkpoints/*")) if _steps(p)}
        if not stages:
            raise FileNotFoundError(
                f"{option}={str(path)!r} holds no complete checkpoint. Give the workdir of an earlier run, or one "
                "of its checkpoints: WORKDIR/checkpoints/STAGE or WORKDIR/checkpoints/STAGE/STEP."
            )
        if len(stages) > 1 and "rl" not in stages:
            raise ValueError(
                f"{option}={str(path)!r} holds the stages {', '.join(stages)}. Say which: "
                f"{path}/checkpoints/{next(iter(stages))}, for example."
            )
        stage, step = stages.get("rl", next(iter(stages.values()))), None
    steps = _steps(stage)
    if not steps or step not in (None, *steps):
        raise FileNotFoundError(
            f"{option}={str(path)!r}: there is no such checkpoint; {stage} holds the steps {steps or 'none'}."
        )
    return Origin(stage.parent.parent, stage, steps[-1] if step is None else step)


def has_checkpoint(workdir: pathlib.Path) -> bool:
    """Whether a run has saved a step there, so that it is resumed rather than begun."""
    return any(_steps(stage) for stage in workdir.glob("checkpoints/*"))


def _steps(stage: pathlib.Path) -> list[int]:
    """Complete steps, the newest last: a step has its final name once it is complete."""
    return sorted(int(path.name) for path in stage.glob("*") if path.name.isdigit()) if stage.is_dir() else []
