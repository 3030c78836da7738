"""The report as one HTML page that loads nothing: styles are inline, images are data URIs, all text is escaped, and its
content security policy forbids requests. Curves are embedded twice, for light and dark.
"""

import base64
import html
import io
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import PIL.Image

from kimi_jax.report import curves
from kimi_jax.report.curves import Metrics
from kimi_jax.report.table import provenance, score_rows
from kimi_jax.types import IMAGE_MARKER, Outcome, Rollout, RolloutGroup, StopReason, Verdict


def write_report(
    path: str | os.PathLike,
    *,
    title: str,
    summary: dict,
    metrics: Metrics,
    groups: dict[str, list[RolloutGroup]],
    config_text: str,
) -> None:
    """Writes the page. A problem that several stages tried is shown once, with the stages side by side.

    Raises ValueError when a group that is shown has no verdicts.
    """
    sections = [
        _header(title, summary),
        _results(summary),
        _training(metrics),
        _rollouts(groups),
        f"<section><h2>Configuration</h2><pre>{_text(config_text)}</pre></section>",
    ]
    page = _PAGE.format(title=_text(title), style=_STYLE, body="\n".join(sections))
    pathlib.Path(path).write_text(page, encoding="utf-8", errors="xmlcharrefreplace")


def _text(value: Any) -> str:
    return html.escape(str(value), quote=True)


def _header(title: str, summary: dict) -> str:
    headlines = "".join(
        f'<div class="headline"><span class="label">{_text(kind)}, {_text(label)}</span>'
        f'<span class="big">{_text(gain or rl)}</span><span class="label">{_text(sft)} → {_text(rl)}</span></div>'
        for kind, label, sft, rl, gain in score_rows(summary)
        if label == "sampled accuracy"
    )
    return f'<header><h1>{_text(title)}</h1><p class="quiet">{_text(provenance(summary))}</p>{headlines}</header>'


def _results(summary: dict) -> str:
    rows, previous = [], None
    for kind, *cells in score_rows(summary):
        first = "" if kind == previous else _text(kind)
        rows.append(
            f'<tr{" class=first" if first else ""}><th scope="row">{first}</th><td class="left">{_text(cells[0])}</td>'
            + "".join(f"<td>{_text(cell)}</td>" for cell in cells[1:])
            + "</tr>"
        )
        previous = kind
    head = '<tr><th></th><th></th><th scope="col">SFT</th><th scope="col">RL</th><th scope="col">gain</th></tr>'
    table = f"<table><thead>{head}</thead><tbody>{''.join(rows)}</tbody></table>"
    return f'<section><h2>Results</h2><div class="scroll">{table}</div></section>'


def _training(metrics: Metrics) -> str:
    if not metrics:
        return '<section><h2>Training</h2><p class="quiet">No iteration of RL was logged.</p></section>'
    return (
        "<section><h2>Training</h2>"
        + _picture(curves.overview, metrics, "Accuracy and response length over the iterations")
        + _picture(curves.details, metrics, "Other metrics over the iterations")
        + "</section>"
    )


def _picture(draw, metrics: Metrics, caption: str) -> str:
    figure = draw(metrics)
    if figure is None:
        return ""
    uri = _data_uri(curves.png(figure, transparent=True))
    return f'<div class="scroll curves"><img src="{uri}" alt="{_text(caption)}"></div>'


def _data_uri(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()


# --- rollouts -------------------------------------------------------------------------------------------------------

_IMAGE_SIDE = 240  # pixels that a small image is enlarged to, about
_STOPS = {
    StopReason.END: "ended by itself",
    StopReason.LENGTH: "cut at its budget",
    StopReason.REPETITION: "stopped: it repeated itself",
    StopReason.STRING: "stopped at a stop string",
}


def _accuracy(group: RolloutGroup) -> float | None:
    """Share of correct among the responses that could be graded; None if none could."""
    outcomes = [verdict.outcome for verdict in group.verdicts if verdict.outcome != Outcome.UNGRADABLE]
    return outcomes.count(Outcome.CORRECT) / len(outcomes) if outcomes else None


def _rollouts(groups: dict[str, list[RolloutGroup]]) -> str:
    by_problem: dict[str, dict[str, list[RolloutGroup]]] = {}
    marks: dict[int, str] = {}  # id of a group -> what is remarkable about it
    for stage, members in groups.items():
        for group in members:
            if len(group.verdicts) != len(group.rollouts):
                raise ValueError(
                    f"A group of stage {stage!r}, problem {group.problem.id!r}, has {len(group.rollouts)} rollouts but "
                    f"{len(group.verdicts)} verdicts. Verify it before it is reported."
                )
            by_problem.setdefault(group.problem.id, {}).setdefault(stage, []).append(group)
        ranked = sorted((group for group in members if _accuracy(group) is not None), key=_accuracy)
        if len(ranked) > 1 and _accuracy(ranked[0]) < _accuracy(ranked[-1]):
            marks |= {id(ranked[-1]): f"best of {stage}", id(ranked[0]): f"worst of {stage}"}
    cards, links = [], []
    for number, stages in enumerate(by_problem.values(), start=1):
        links += [
            f'<a href="#problem-{number}">{_text(marks[id(group)])}</a>'
            for members in stages.values() for group in members if id(group) in marks
        ]  # fmt: skip
        cards.append(_card(number, stages, marks))
    jump = f'<p class="quiet">Jump to {" · ".join(links)}</p>' if links else ""
    body = "".join(cards) or '<p class="quiet">None were kept.</p>'
    return f"<section><h2>Sampled rollouts</h2>{jump}{body}</section>"


def _card(number: int, stages: dict[str, list[RolloutGroup]], marks: dict[int, str]) -> str:
    problem = next(iter(stages.values()))[0].problem
    columns = []
    for stage, members in stages.items():
        body = "".join(_group(group, marks.get(id(group))) for group in members)
        columns.append(f'<div class="stage"><h4>{_text(stage)}</h4>{body}</div>')
    return (
        f'<article id="problem-{number}"><h3>Problem {number} <span class="quiet">{_text(problem.task)}, '
        f"difficulty {_text(problem.difficulty)}</span></h3>"
        f'<div class="prompt">{_prompt(problem.prompt, problem.images)}</div>'
        f'<p>Answer <code>{_text(problem.answer)}</code></p><div class="stages">{"".join(columns)}</div></article>'
    )


def _prompt(prompt: str, images: Sequence[np.ndarray]) -> str:
    """The text with each image where it belongs; images beyond the markers go to the end."""
    pieces = [_text(piece) for piece in prompt.split(IMAGE_MARKER)]
    uris = [_data_uri(_enlarged(image)) for image in images]
    shown = [f'<img class="pixels" src="{uri}" alt="image {i}">' for i, uri in enumerate(uris, start=1)]
    shown += [_text(IMAGE_MARKER)] * (len(pieces) - 1 - len(shown))  # a marker without its image stays visible
    body = pieces[0] + "".join(image + piece for image, piece in zip(shown, pieces[1:], strict=False))
    return body + "".join(shown[len(pieces) - 1 :])


def _enlarged(image: np.ndarray) -> bytes:
    factor = max(1, round(_IMAGE_SIDE / max(image.shape[:2])))  # whole, so that pixels stay equal squares
    buffer = io.BytesIO()
    PIL.Image.fromarray(np.repeat(np.repeat(image, factor, axis=0), factor, axis=1)).save(buffer, format="png")
    return buffer.getvalue()


def _group(group: RolloutGroup, mark: str | None) -> str:
    accuracy = _accuracy(group)
    score = "nothing could be graded" if accuracy is None else f"{accuracy:.0%} correct"
    tokens = f"{np.mean([len(rollout) for rollout in group.rollouts]):.0f} tokens on average" if group.rollouts else ""
    badge = f' <span class="mark {mark.split()[0]}">{_text(mark)}</span>' if mark else ""
    pairs = zip(group.rollouts, group.verdicts, strict=True)
    rollouts = "".join(_rollout(*pair, opened=i == 0) for i, pair in enumerate(pairs))
    return f'<div class="group"><p><b>{score}</b>{badge} <span class="quiet">{tokens}</span></p>{rollouts}</div>'


def _rollout(rollout: Rollout, verdict: Verdict, *, opened: bool) -> str:
    outcome = verdict.outcome.value
    detail = f' <code class="detail">{_text(verdict.detail)}</code>' if verdict.detail else ""
    stop = _STOPS[rollout.stop]
    return (
        f'<details{" open" if opened else ""}><summary><span class="badge {outcome}">{outcome}</span>{detail} '
        f'<span class="quiet">{len(rollout)} tokens, {stop}</span></summary><pre>{_text(rollout.text)}</pre></details>'
    )


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<main>
{body}
</main>
</body>
</html>
"""

_STYLE = """
:root { color-scheme: light dark; --ink: #1f2328; --quiet: #667080; --paper: #f7f7f5; --card: #ffffff; --line: #e3e5e8;
  --code: #f3f4f5; --accent: #1f6feb; --good: #0f7a4f; --good-bg: #dcf5e8; --bad: #b42318; --bad-bg: #fde7e4;
  --odd: #8a5a00; --odd-bg: #fbefd0; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e8eb; --quiet: #9aa3ae; --paper: #121416; --card: #1a1d21;
  --line: #2f353d; --code: #22262b; --accent: #6cabff; --good: #63d6a4; --good-bg: #15382a; --bad: #ff9d92;
  --bad-bg: #44211d; --odd: #f0c674; --odd-bg: #3b3015; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, "Segoe UI", Roboto, sans-serif; }
main { max-width: 72rem; margin: 0 auto; padding: 2.5rem 1.25rem 5rem; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0; letter-spacing: -0.01em; }
h2 { font-size: 1.25rem; margin: 3rem 0 1rem; }
h3 { font-size: 1.05rem; margin: 0 0 .75rem; }
h4 { font-size: .8rem; margin: 0 0 .5rem; letter-spacing: .06em; color: var(--quiet); }
h3 .quiet { font-weight: 400; }
p { margin: .4rem 0 .8rem; }
a { color: var(--accent); }
code, pre { font: .86em/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
code { background: var(--code); border-radius: 4px; padding: .1em .35em; overflow-wrap: anywhere; }
pre { background: var(--code); border-radius: 6px; padding: .8rem 1rem; margin: .5rem 0 .25rem; white-space: pre-wrap;
  overflow-wrap: anywhere; max-height: 32rem; overflow-y: auto; }
.quiet, .label { color: var(--quiet); font-size: .9rem; }
.headline { display: inline-grid; margin: 1.25rem 3rem 0 0; }
.big { font-size: 2.3rem; font-weight: 650; line-height: 1.25; letter-spacing: -0.02em;
  font-variant-numeric: tabular-nums; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem 1.1rem .35rem 0; text-align: right; white-space: nowrap; }
thead th { color: var(--quiet); font-weight: 500; font-size: .85rem; border-bottom: 1px solid var(--line); }
tbody th, td.left { text-align: left; }
tr.first > * { border-top: 1px solid var(--line); }
tbody tr.first:first-child > * { border-top: 0; }
.scroll { overflow-x: auto; }
.curves { border: 1px solid var(--line); border-radius: 10px; margin-bottom: 1rem; }
.curves img { display: block; width: 100%; min-width: 44rem; height: auto; }
@media (prefers-color-scheme: dark) { .curves img { filter: invert(1) hue-rotate(180deg); } }
article { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 1.25rem 1.4rem;
  margin-bottom: 1.25rem; }
.prompt { white-space: pre-wrap; overflow-wrap: anywhere; margin-bottom: .75rem; }
.pixels { display: block; image-rendering: pixelated; max-width: 100%; margin: .5rem 0; border: 1px solid var(--line);
  border-radius: 4px; }
.stages { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 22rem), 1fr)); gap: 1.5rem; }
.stage { min-width: 0; border-top: 1px solid var(--line); padding-top: .9rem; }
details { margin: .4rem 0; }
summary { cursor: pointer; overflow-wrap: anywhere; }
.badge, .mark { border-radius: 999px; padding: .1em .65em; font-size: .78rem; font-weight: 600; white-space: nowrap; }
.correct, .best { color: var(--good); background: var(--good-bg); }
.wrong, .worst { color: var(--bad); background: var(--bad-bg); }
.ungradable { color: var(--odd); background: var(--odd-bg); }
@media (max-width: 32rem) { th, td { padding-right: .45rem; font-size: .8rem; } article { padding: 1rem; } }
@media print { pre { max-height: none; } article { break-inside: avoid; } }
"""
