"""Checkpoints: a tree of arrays and a dict of JSON per step, saved in the background by Orbax.

A step directory holds two items:

    arrays   every array of the tree under its path, e.g. "params/layers/0/kernel"
    record   JSON: {"meta": what the caller gave, "metrics": ..., "arrays": {path: "float32[3,5]"}}

Trees are stored by path, so containers (dicts, tuples, optimizer states, dataclasses) are only a matter of the target
that a restore is given. The list of arrays in the record lets a restore compare everything with its target before it
loads anything. Arrays without elements, which Orbax refuses, live in that list alone: their shape and dtype say all
there is to say.

A step counts once its directory has its final name, which Orbax gives it last. Killing the process earlier leaves
debris that is ignored, and replaced when the step is saved again. A step that goes loses that name first: it is moved
to the directory `.retired`, which is emptied before the next save, so that nobody ever finds half of a step.
"""

import json
import logging
import math
import os
import shutil
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

PyTree = Any

_MISMATCHES_SHOWN = 5
_RETIRED = ".retired"


class Checkpointer:
    """Saves and restores the steps of one run. Use it as a context manager, or call `close`.

    Keeps the newest `keep_last` steps and the `keep_best` steps with the highest `metrics[best_metric]`; others are
    deleted, an old one only after the new one is complete. Ties go to the newer step; a step without that metric, or
    with a non-finite one, is never among the best.

    Raises ValueError when the numbers make no sense or the directory cannot be written to. To only read, use `reader`.
    """

    def __init__(
        self,
        directory: str | os.PathLike,
        *,
        keep_last: int,
        keep_best: int,
        best_metric: str | None,
        read_only: bool = False,
    ):
        if keep_last < 1 or keep_best < 0:
            raise ValueError(f"keep_last={keep_last} must be at least 1 and keep_best={keep_best} at least 0.")
        if (keep_best > 0) != (best_metric is not None):
            raise ValueError(
                f"keep_best={keep_best} and best_metric={best_metric!r} contradict each other: give a positive "
                "keep_best with the name of a metric, or keep_best=0 with best_metric=None."
            )
        self.directory = epath.Path(directory).absolute()
        self._keep_last, self._keep_best, self._best_metric = keep_last, keep_best, best_metric
        self._read_only = read_only
        if not read_only:
            self._check_writable()
            self._empty_retired()
        self._manager = ocp.CheckpointManager(
            self.directory,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=_Policy(self._steps_to_keep),
                todelete_subdir=None if read_only else _RETIRED,
                read_only=read_only,
                create=not read_only,
            ),
            item_names=("arrays", "record"),
            item_handlers={"arrays": ocp.PyTreeCheckpointHandler(), "record": ocp.JsonCheckpointHandler()},
        )
        self._scores: dict[int, float] = {}  # best_metric by step
        for step in self._manager.all_steps() if best_metric else ():
            self._note_score(step, self._read_record(step)["metrics"])

    @classmethod
    def reader(cls, directory: str | os.PathLike) -> "Checkpointer":
        """Opens what another run wrote, or is writing. Creates and deletes nothing, and needs no right to write.

        Raises FileNotFoundError when there is no such directory.
        """
        if not epath.Path(directory).is_dir():
            raise FileNotFoundError(f"No checkpoints: there is no directory {epath.Path(directory).absolute()}.")
        return cls(directory, keep_last=1, keep_best=0, best_metric=None, read_only=True)

    def save(
        self, step: int, arrays: PyTree, meta: dict, metrics: dict[str, float] | None = None, *, wait: bool = False
    ) -> None:
        """Starts to save `arrays` (jax or NumPy arrays in any containers) and `meta` (JSON) as `step`.

        Returns as soon as the arrays are copied off the device: the caller may donate or overwrite them at once.
        Writing goes on in a thread; an error there is raised by the next call. `wait=True` returns when the step is
        complete.

        Raises ValueError when `step` is not newer than what is there, a leaf is not an array, `meta` is not JSON, or
        this is a reader.
        """
        if self._read_only:
            raise ValueError(f"Cannot save step {step}: {self.directory} was opened with Checkpointer.reader, to read.")
        flat = _flatten(arrays)
        metrics = {name: float(value) for name, value in (metrics or {}).items()}
        described = {path: _describe(x) for path, x in flat.items()}
        record = _to_json({"meta": meta, "metrics": metrics, "arrays": described})
        newest = self.latest_step()
        if newest is not None and step <= newest:
            raise ValueError(
                f"Cannot save step {step}: {self.directory} already holds step {newest}, and steps only grow. Continue "
                "from the newest step, delete the steps after the one you restored, or give the run its own directory."
            )
        self._check_writable()
        self._note_score(step, metrics)
        self._manager.save(
            step,
            args=ocp.args.Composite(
                arrays=ocp.args.PyTreeSave({path: x for path, x in flat.items() if x.size}),
                record=ocp.args.JsonSave(record),
            ),
            force=True,
        )
        if wait:
            self.wait()

    def latest_step(self) -> int | None:
        """The newest complete step, or None. Waits for a save under way."""
        self.wait()
        return self._manager.latest_step()

    def best_step(self) -> int | None:
        """The complete step with the highest `metrics[best_metric]`, or None. Waits for a save under way."""
        self.wait()
        return next(iter(self._best_first(self._manager.all_steps())), None)

    def restore(
        self, arrays_like: PyTree, step: int | None = None, *, partial: bool = False
    ) -> tuple[int, PyTree, dict]:
        """Loads (step, arrays, meta); the newest step if none is given.

        Each leaf of `arrays_like` says what is expected and what comes back: a `jax.ShapeDtypeStruct` with a sharding,
        or a `jax.Array`, becomes a `jax.Array` with that sharding, a NumPy array becomes a NumPy array. `partial=True`
        loads those leaves and nothing else: a checkpoint of {"params": ..., "opt_state": ...} also restores into
        {"params": ...}, and the moments are not read.

        Raises FileNotFoundError when there is no such step, and ValueError, before anything is loaded, when paths,
        shapes or dtypes differ from those of the checkpoint; if partial, arrays that were not asked for may differ.
        """
        step = self.check(arrays_like, step, partial=partial)
        targets = _flatten(arrays_like)
        for path, target in targets.items():
            if not isinstance(target, np.ndarray) and target.sharding is None:
                raise ValueError(
                    f"The restore target {path!r} has no sharding, so it is unknown where it should live. Give "
                    "jax.ShapeDtypeStruct(shape, dtype, sharding=...), or a NumPy array to get one back."
                )
        loaded = self._load(step, {path: target for path, target in targets.items() if target.size})
        leaves = [loaded[path] if target.size else _empty(target) for path, target in targets.items()]
        return step, jax.tree.unflatten(jax.tree.structure(arrays_like), leaves), self.read_meta(step)

    def check(self, arrays_like: PyTree, step: int | None = None, *, partial: bool = False) -> int:
        """The step that `restore` would load, after the comparison that it begins with. Raises as it does."""
        step = self._resolve(step)
        targets = {path: _describe(target) for path, target in _flatten(arrays_like).items()}
        saved = {path: x for path, x in self.arrays(step).items() if path in targets or not partial}
        self._check_targets(step, saved, targets)
        return step

    def arrays(self, step: int | None = None) -> dict[str, str]:
        """What arrays a step (the newest if none is given) has: {path: "float32[3,5]"}. Raises FileNotFoundError."""
        return self._read_record(self._resolve(step))["arrays"]

    def read_meta(self, step: int | None = None) -> dict:
        """The `meta` of a step (the newest if none is given), without its arrays. Raises FileNotFoundError."""
        return self._read_record(self._resolve(step))["meta"]

    def wait(self) -> None:
        """Returns when no save is under way. Raises RuntimeError when the last one failed."""
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            self._manager.reload()  # Orbax has already forgotten the steps that the failed one was to replace
            raise RuntimeError(
                f"The last save to {self.directory} failed; the complete steps there are {self._manager.all_steps()}. "
                f"Look for a full disk, or for other programs that change the directory. The cause: {error}"
            ) from error
        if not self._read_only:
            self._empty_retired()

    def close(self) -> None:
        """Finishes the save under way, raising as `wait` does, and ends the threads."""
        try:
            self.wait()
        finally:
            self._manager.close()

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(self, *exc_info) -> None:
        self.close()

    # --- which steps stay -------------------------------------------------------------------------------------------

    def _note_score(self, step: int, metrics: dict[str, float]) -> None:
        score = metrics.get(self._best_metric, math.nan)
        if math.isfinite(score):
            self._scores[step] = score

    def _best_first(self, steps: list[int]) -> list[int]:
        return sorted((s for s in steps if s in self._scores), key=lambda s: (self._scores[s], s), reverse=True)

    def _steps_to_keep(self, steps: list[int]) -> set[int]:
        return {*sorted(steps)[-self._keep_last :], *self._best_first(steps)[: self._keep_best]}

    def _empty_retired(self) -> None:
        """Deletes the steps that made room. Not while a save is under way, which may retire more of them."""
        if jax.process_index() == 0:
            shutil.rmtree(self.directory / _RETIRED, ignore_errors=True)

    # --- checks -----------------------------------------------------------------------------------------------------

    def _resolve(self, step: int | None) -> int:
        self.wait()
        steps = sorted(self._manager.all_steps())
        if not steps:
            raise FileNotFoundError(f"No complete checkpoint in {self.directory}.")
        if step is not None and step not in steps:
            raise FileNotFoundError(f"No complete checkpoint of step {step} in {self.directory}; it holds {steps}.")
        return steps[-1] if step is None else step

    def _load(self, step: int, targets: dict[str, Any]) -> dict[str, Any]:
        if not targets:
            return {}
        how = ocp.checkpoint_utils.construct_restore_args(targets)
        arrays = ocp.args.PyTreeRestore(targets, how, partial_restore=True)  # `_check_targets` has compared the rest
        return self._manager.restore(step, args=ocp.args.Composite(arrays=arrays))["arrays"]

    def _read_record(self, step: int) -> dict:
        return self._manager.restore(step, args=ocp.args.Composite(record=ocp.args.JsonRestore()))["record"]

    def _check_targets(self, step: int, saved: dict[str, str], expected: dict[str, str]) -> None:
        wrong = [path for path in sorted({*saved, *expected}) if saved.get(path) != expected.get(path)]
        if not wrong:
            return
        lines = [
            f"  {path}: checkpoint {saved.get(path, 'nothing')}, expected {expected.get(path, 'nothing')}"
            for path in wrong[:_MISMATCHES_SHOWN]
        ]
        if len(wrong) > _MISMATCHES_SHOWN:
            lines.append(f"  ... and {len(wrong) - _MISMATCHES_SHOWN} more")
        lines.append("Restore with the configuration that wrote it (its meta may say which) or use an empty directory.")
        raise ValueError(
            f"Step {step} of {self.directory} does not fit what it should be restored into ({len(wrong)} of "
            f"{len({*saved, *expected})} arrays differ):\n" + "\n".join(lines)
        )

    def _check_writable(self) -> None:
        if jax.process_index() != 0:
            return
        probe = self.directory / ".writable"
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            probe.write_text("")
            probe.unlink()
        except OSError as error:
            raise ValueError(
                f"Checkpoints cannot be written to {self.directory}: {error}. Choose a directory that this process may "
                "create files in, or correct its permissions."
            ) from error


class _Policy:
    """Adapts a function from the steps there are to the steps to keep to what Orbax calls."""

    def __init__(self, steps_to_keep):
        self._steps_to_keep = steps_to_keep

    def should_preserve(self, checkpoints, *, context) -> list[bool]:
        steps = [info.step for info in checkpoints]
        kept = self._steps_to_keep(steps)
        return [step in kept for step in steps]


def _flatten(tree: PyTree) -> dict[str, Any]:
    """Leaves by path, in the order of `jax.tree.leaves`."""
    flat: dict[str, Any] = {}
    for keys, leaf in jax.tree_util.tree_leaves_with_path(tree):
        path = jax.tree_util.keystr(keys, simple=True, separator="/")
        if not isinstance(leaf, jax.Array | jax.ShapeDtypeStruct | np.ndarray):
            raise ValueError(
                f"{path!r} is of type {type(leaf).__name__}, not an array. Put plain Python values into the meta of "
                "the checkpoint, or wrap numbers with np.asarray."
            )
        if path in flat:
            raise ValueError(f"Two arrays of the tree have the path {path!r}. Rename a key (avoid '/' in keys).")
        flat[path] = leaf
    if not any(leaf.size for leaf in flat.values()):
        raise ValueError("The tree of a checkpoint needs at least one array that is not empty.")
    return flat


def _describe(array: Any) -> str:
    return f"{array.dtype}[{','.join(map(str, array.shape))}]"


def _empty(target: Any) -> Any:
    zeros = np.zeros(target.shape, target.dtype)
    return zeros if isinstance(target, np.ndarray) else jax.device_put(zeros, target.sharding)


def _to_json(record: dict) -> dict:
    """A copy as JSON will give it back, so that nothing is found unserializable later, in a thread."""
    try:
        return json.loads(json.dumps(record))
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"The meta and metrics of a checkpoint must be JSON (dict, list, str, int, float, bool, None): {error}. "
            "Convert NumPy and jax scalars with float() or int(), and put arrays into `arrays`."
        ) from error


def _worth_showing(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR or not record.pathname.startswith(os.path.dirname(ocp.__file__))


logging.getLogger("absl").addFilter(_worth_showing)  # Orbax reports every stage of every save and restore
