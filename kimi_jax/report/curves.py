"""Curves over the iterations of RL, drawn by matplotlib."""

import collections
import io
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import matplotlib.figure
import matplotlib.layout_engine
import matplotlib.ticker
import numpy as np

Metrics = Sequence[dict[str, Any]]

_INK, _FAINT, _GRID = "#1f2328", "#6b7280", "#d5d9de"
_SERIES = ("#1f6feb", "#d9730d", "#4b5563", "#0f8a5f", "#8250df", "#c2255c", "#0891b2", "#8a6d1a", "#111827")

_PERCENT = matplotlib.ticker.FuncFormatter(lambda share, _: f"{100 * share:.3g}%")
_NUMBER = matplotlib.ticker.FuncFormatter(lambda x, _: f"{x:.4g}" if abs(x) < 1_000 else f"{x:,.0f}")

_ACCURACIES = (  # key while training, key of the held-out evaluation, label, index of its colour
    ("accuracy", None, "all", 2),
    ("accuracy_text", "eval_text_accuracy", "text", 0),
    ("accuracy_image", "eval_image_accuracy", "image", 1),
)
_FAMILIES = {  # how a name begins: the panel it shares with others; any other metric gets its own
    "entropy": "Entropy (nats per token)",
    "kl": "KL divergence to the reference",
    "logprob_gap": "Log-prob gap to the sampler, mean",
    "max_logprob_gap": "Log-prob gap to the sampler, max",
    "truncated": "Share of responses",
    "ungradable_alarm": "Alarm: too many are ungradable",
    "ungradable": "Share of responses",
    "repetitive": "Share of responses",
    "groups_": "Share of groups",
    "tokens_masked": "Share without loss",
    "responses_masked": "Share without loss",
    "tokens_released": "Tokens per response",
    "tokens_open": "Tokens per response",
    "buffer_groups": "Replay buffer",
    "buffer_responses": "Replay buffer",
    "seconds": "Seconds per phase",
}


def write_curves(metrics: Metrics, path: str | os.PathLike) -> None:
    """A PNG with two panels over the iterations: accuracy (text, image, all) and response length.

    Faint lines are the measurements, strong lines their running mean, markers the held-out evaluations. Where there was
    nothing to measure, a line has a gap. Raises ValueError without any row.
    """
    pathlib.Path(path).write_bytes(png(overview(metrics)))


def overview(metrics: Metrics) -> matplotlib.figure.Figure:
    if not metrics:
        raise ValueError("There are no rows of metrics to draw. Log at least one iteration first.")
    figure, (left, right) = _panels(2, 2, width=11.0, height=4.2)
    for key, eval_key, label, color in _ACCURACIES:
        _draw(left, *_series(metrics, key), color=_SERIES[color], label=label)
        x, y = _series(metrics, eval_key)
        if len(x):
            style = {"marker": "o", "markersize": 7, "markeredgecolor": "white", "markeredgewidth": 1.2}
            left.plot(x, y, linestyle="", color=_SERIES[color], label=f"{label}, held out", zorder=4, **style)
    _draw(right, *_series(metrics, "response_length"), color=_SERIES[3], label="")
    left.set_ylim(bottom=max(left.get_ylim()[0], 0), top=min(left.get_ylim()[1], 1.03))
    left.yaxis.set_major_formatter(_PERCENT)
    _title(left, "Accuracy")
    _title(right, "Response length (tokens)")
    right.set_ylim(bottom=0, top=1.1 * right.get_ylim()[1])
    _legend(left, ncols=1)
    return figure


def details(metrics: Metrics) -> matplotlib.figure.Figure | None:
    """Small panels for all metrics that `overview` does not show."""
    shown = {"step", "iteration", "response_length", *(key for row in _ACCURACIES for key in row[:2])}
    families = collections.defaultdict(list)
    for key in dict.fromkeys(key for row in metrics for key in row):
        if key not in shown and len(_series(metrics, key)[0]):
            stem = next((stem for stem in _FAMILIES if key.startswith(stem)), key)
            families[_FAMILIES.get(stem, stem)].append((key, key.removeprefix(stem).strip("_/. ") or key))
    if not families:
        return None
    order = {name: i for i, name in enumerate(_FAMILIES.values())}
    figure, panels = _panels(len(families), 3, width=11.0, height=2.9)
    for panel, name in zip(panels, sorted(families, key=lambda name: order.get(name, len(_FAMILIES))), strict=True):
        for i, (key, label) in enumerate(families[name]):
            color = _SERIES[i % len(_SERIES)]
            _draw(panel, *_series(metrics, key), color=color, label=label if len(families[name]) > 1 else "")
        if name.startswith("Share"):
            panel.set_ylim(bottom=-0.02 * panel.get_ylim()[1])  # a line at 0% is still seen
            panel.yaxis.set_major_formatter(_PERCENT)
        else:  # matplotlib's own would put a common factor above the panel, and push its title up
            panel.yaxis.set_major_formatter(_NUMBER)
        _title(panel, name, size=9.5)
        _legend(panel, ncols=2)
    return figure


def _series(metrics: Metrics, key: str | None) -> tuple[np.ndarray, np.ndarray]:
    """(iterations, values) of the rows that have the key, nan where it is null; empty if it is so everywhere."""
    rows = [(row.get("iteration", row.get("step", i)), row[key]) for i, row in enumerate(metrics) if key in row]
    y = np.array([value if isinstance(value, int | float) else np.nan for _, value in rows], float)
    y[~np.isfinite(y)] = np.nan
    if np.isnan(y).all():
        return np.zeros(0), np.zeros(0)
    return np.array([x for x, _ in rows], float), y


def _smooth(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Mean of y under a Gaussian window over x, 1/30 of the range wide; no lag, and fair to the ends and to gaps."""
    width = max(np.ptp(x) / 30, 1e-9)
    weights = np.exp(-0.5 * ((x[:, None] - x[None, :]) / width) ** 2)
    return weights @ y / weights.sum(axis=1)


def _draw(panel, x: np.ndarray, y: np.ndarray, *, color: str, label: str) -> None:
    if len(x) == 0:
        return
    label, there = label or "_nolegend_", np.isfinite(y)
    if there.sum() < 5:  # too few for a trend
        panel.plot(x, y, color=color, label=label, marker="o", markersize=4, linewidth=1.2)
        return
    trend = np.full_like(y, np.nan)
    trend[there] = _smooth(x[there], y[there])
    panel.plot(x, y, color=color, alpha=0.25, linewidth=1.0)
    panel.plot(x, trend, color=color, linewidth=2.0, label=label)
    gaps = np.concatenate([[True], ~there, [True]])
    alone = there & gaps[:-2] & gaps[2:]  # between two gaps: no line goes through it
    panel.plot(x[alone], trend[alone], color=color, marker="o", markersize=2.5, linestyle="")


def _panels(count: int, columns: int, *, width: float, height: float):
    """A figure with `count` empty panels in rows of `columns`; `width` of the whole, `height` of a row, in inches."""
    rows = -(-count // columns)
    layout = matplotlib.layout_engine.ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.1)
    figure = matplotlib.figure.Figure(figsize=(width, height * rows), layout=layout, facecolor="white")
    panels = [figure.add_subplot(rows, columns, i + 1) for i in range(count)]
    for panel in panels:
        panel.set_facecolor("white")
        panel.spines[["top", "right"]].set_visible(False)
        panel.spines[["left", "bottom"]].set_color(_GRID)
        panel.grid(axis="y", color=_GRID, linewidth=0.8)
        panel.set_axisbelow(True)
        panel.tick_params(colors=_FAINT, labelsize=9, length=0)
        panel.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(nbins=6, integer=True))
        panel.set_xlabel("iteration", color=_FAINT, fontsize=9)
    return figure, panels


def _title(panel, text: str, size: float = 12) -> None:
    panel.set_title(text, loc="left", color=_INK, fontsize=size, fontweight="bold", pad=8)


def _legend(panel, *, ncols: int) -> None:
    if panel.get_legend_handles_labels()[0]:
        panel.legend(frameon=False, labelcolor=_INK, fontsize=8.5, handlelength=1.2, columnspacing=1.0, ncols=ncols)


def png(figure: matplotlib.figure.Figure, *, transparent: bool = False) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150, transparent=transparent)
    return buffer.getvalue()
