"""What a run writes down and shows while it runs: a file of metrics, a progress bar, seconds per phase."""

import collections
import contextlib
import json
import math
import os
import pathlib
import sys
import time
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import tqdm

from kimi_jax.training import distributed

# Seconds between two drawings of a bar: a terminal redraws one line, a log file gets a new one each time.
_SECONDS_PER_REDRAW_TTY = 0.3
_SECONDS_PER_REDRAW_LOG = 60.0


class MetricsWriter:
    """One JSON object per line: {"step": 12, "accuracy": 0.53, ...}.

    A line is handed to the operating system whole and at once, so killing the process loses nothing that was written.
    Only a crash of the machine, or a full disk, can tear the last line; a torn line is one without a line break, and is
    ignored.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = pathlib.Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._tail_checked = False

    def write(self, step: int, metrics: dict[str, Any]) -> None:
        """Appends a line, in the first of several processes. Floats keep every digit; NaN and infinities become null.

        Values are numbers, strings, booleans, None, or scalars of NumPy and jax; anything else raises ValueError.
        """
        self.write_all(step, [metrics])

    def write_all(self, step: int, rows: Iterable[dict[str, Any]]) -> None:
        """Appends a line per row, all of the same step."""
        if not distributed.is_first():
            return
        lines = []
        for metrics in rows:
            if "step" in metrics:
                raise ValueError("The metric name 'step' is taken by the first argument of `write`. Rename the metric.")
            lines.append(
                json.dumps({"step": int(step)} | {name: _plain(name, x) for name, x in metrics.items()}) + "\n"
            )
        if not self._tail_checked:  # else the new line would be glued to a torn one
            if self.path.exists() and not self.path.read_bytes().endswith(b"\n"):
                self._replace(self._lines())
            self._tail_checked = True
        with open(self.path, "ab", buffering=0) as file:
            file.write("".join(lines).encode())

    def cut_back(self, step: int) -> None:
        """Drops the lines after `step`, and a torn last line: for a run that resumes from the checkpoint of `step`.

        The file is replaced as a whole: whenever the process is killed, the old one or the new one is there.
        """
        if not distributed.is_first():
            return
        self._replace([line for line, row in zip(self._lines(), self.read(), strict=True) if row["step"] <= step])

    def read(self) -> list[dict[str, Any]]:
        """All whole lines, in order; null is None. Raises ValueError for a line that is not one of ours."""
        rows = []
        for number, line in enumerate(self._lines(), start=1):
            try:
                rows.append(json.loads(line))
                rows[-1]["step"] + 0
            except (ValueError, TypeError, KeyError) as error:
                raise ValueError(
                    f'{self.path}, line {number} is not a JSON object with a "step": {line[:80]!r}. Delete it.'
                ) from error
        return rows

    def _lines(self) -> list[bytes]:
        if not self.path.exists():
            return []
        return [line for line in self.path.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]

    def _replace(self, lines: list[bytes]) -> None:
        temporary = self.path.with_name(self.path.name + ".tmp")
        with open(temporary, "wb") as file:
            file.writelines(lines)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, self.path)


def _plain(name: str, value: Any) -> Any:
    if hasattr(value, "item") and getattr(value, "size", None) == 1:
        value = value.item()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, bool | int | str):
        return value
    raise ValueError(
        f"The metric {name!r} is a {type(value).__name__}, but a metric is a number, string, boolean, None or an array "
        "of one element. Reduce arrays first; spread dicts over several names."
    )


def progress(iterable: Iterable | None = None, *, desc: str, total: int | None = None, initial: int = 0) -> tqdm.tqdm:
    """A progress bar with the time left, on stderr. Iterate over it, or give `total` and call `.update(n)`.

    `initial` is how much was done before (a resumed run), so that the time left counts only what is left. Where stderr
    is a file, it prints about a line per minute.
    """
    interval = _SECONDS_PER_REDRAW_TTY if sys.stderr.isatty() else _SECONDS_PER_REDRAW_LOG
    return tqdm.tqdm(
        iterable,
        disable=not distributed.is_first(),
        desc=desc,
        total=total,
        initial=initial,
        mininterval=interval,
        maxinterval=interval,
        dynamic_ncols=True,
    )


def peak_memory() -> int | None:
    """Most bytes that device 0 held since the process started; None where the backend does not say."""
    return (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")


class Stopwatch:
    """Adds up wall-clock seconds per phase.

        with watch("rollout"):
            ...
        watch.pop()  # {"rollout": 12.7}, and starts over

    jax returns before the device has finished: wait for results inside the phase that is to pay for them.
    """

    def __init__(self) -> None:
        self._seconds: dict[str, float] = collections.defaultdict(float)

    @contextlib.contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[phase] += time.perf_counter() - start

    def pop(self) -> dict[str, float]:
        """Seconds per phase since the last `pop`."""
        seconds = dict(self._seconds)
        self._seconds.clear()
        return seconds
