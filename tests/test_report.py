import base64
import dataclasses
import html.parser
import io
import os

import numpy as np
import PIL.Image
import pytest

from kimi_jax import report
from kimi_jax.report import curves
from kimi_jax.report.page import _STOPS
from kimi_jax.types import IMAGE_MARKER, Outcome, Problem, Prompt, Rollout, RolloutGroup, StopReason, Verdict

EVIL = "<script>alert(1)</script> & <img src='http://example.org/x.png'> {title}"
SUMMARY = {
    "seconds": 812.3,
    "device": "one <GPU>",
    "seed": 3,
    "sft": {
        "text": {"accuracy": 0.521, "greedy_accuracy": 0.55, "mean_tokens": 143.21, "n": 512},
        "image": {"accuracy": 0.4, "greedy_accuracy": None, "mean_tokens": 88.0, "n": 256},
    },
    "rl": {
        "text": {"accuracy": 0.713, "greedy_accuracy": 0.5, "mean_tokens": 171.08, "n": 512},
        "image": {"accuracy": 0.6, "greedy_accuracy": 0.61, "mean_tokens": 81.0, "n": 256},
    },
}


def metric_rows(n):
    rng = np.random.default_rng(0)
    rows = []
    for i in range(1, n + 1):
        rows.append(
            {"step": 3 * i, "iteration": i, "accuracy": 0.5, "accuracy_text": rng.random(), "accuracy_image": None}
        )
        rows[-1] |= {
            "response_length": 100.0 + i,
            "entropy": 1 / i,
            "kl": 0.01 * i,
            "groups_all_wrong": 0.25,
            "seconds_rollout": 5.0,
        }
        if i % 5 == 0:
            rows[-1] |= {"eval_text_accuracy": 0.7, "eval_image_accuracy": 0.3}
    return rows


def group(problem_id, outcomes, *, images=(), prompt="What is 3 * 8?"):
    problem = Problem(problem_id, "count<down>", prompt, "24", 2, images)
    rollouts = tuple(
        Rollout(
            i,
            np.arange(41 + i),
            np.zeros(41 + i, np.float32),
            np.zeros(41 + i, np.int32),
            list(StopReason)[i],
            f"#{i} {EVIL}",
        )
        for i in range(len(outcomes))
    )
    verdicts = tuple(Verdict(outcome, f"got {EVIL}") for outcome in outcomes)
    return RolloutGroup(problem, Prompt(np.arange(3)), rollouts, verdicts)


class Page(html.parser.HTMLParser):
    """Tags with their attributes, text by enclosing tag, and a check that what is opened is closed."""

    VOID = {"meta", "img", "source", "br"}

    def __init__(self, text):
        super().__init__()
        self.tags, self.texts, self.open = [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append((self.open[-1] if self.open else None, data))

    def images(self):
        uris = [a["src"] for _, a in self.tags if "src" in a]
        assert all(uri.startswith("data:image/png;base64,") for uri in uris)
        return [PIL.Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2], validate=True))) for uri in uris]


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    pixels = np.random.default_rng(1).integers(0, 256, (7, 5, 3), dtype=np.uint8)
    easy = {"images": (pixels,), "prompt": f"Before {IMAGE_MARKER} after"}
    right, wrong, failed = Outcome.CORRECT, Outcome.WRONG, Outcome.UNGRADABLE
    groups = {
        "SFT": [group("a", [wrong, wrong, right], **easy), group("b", [wrong, wrong])],
        "RL": [group("b", [wrong, failed]), group("a", [right, failed, right], **easy), group("c", [failed])],
    }
    path = tmp_path_factory.mktemp("report") / "report.html"
    report.write_report(
        path,
        title=f"Run {EVIL}",
        summary=SUMMARY,
        metrics=metric_rows(12),
        groups=groups,
        config_text=f"lr = 1 # {EVIL}",
    )
    return path.read_text(encoding="utf-8"), pixels


def test_the_page_is_well_formed_and_loads_nothing(page):
    parsed = Page(page[0])
    assert parsed.open == []
    names = {tag for tag, _ in parsed.tags}
    assert not names & {"script", "link", "iframe", "object", "base", "form"}
    for _, attributes in parsed.tags:
        assert all(not name.startswith("on") for name in attributes)
        assert attributes.get("href", "#").startswith("#")
    style = "".join(text for tag, text in parsed.texts if tag == "style")
    assert "url(" not in style and "@import" not in style
    anchors = {a["href"][1:] for tag, a in parsed.tags if tag == "a"}
    assert anchors and anchors <= {a["id"] for _, a in parsed.tags if "id" in a}


def test_text_of_model_config_and_title_is_shown_not_run(page):
    text, _ = page
    assert "<script" not in text and "<img src='http" not in text
    parsed = Page(text)
    shown = [data for tag, data in parsed.texts if tag == "pre"]
    assert shown.count(f"#0 {EVIL}") == 5 and f"lr = 1 # {EVIL}" in shown
    assert [data for tag, data in parsed.texts if tag in ("h1", "title")] == [f"Run {EVIL}"] * 2


def test_images_are_embedded_where_they_belong_and_enlarged_exactly(page):
    text, pixels = page
    images = Page(text).images()
    assert len(images) == 3  # two pictures, one image of the one problem that has any
    for picture in images[:2]:  # on a page that may be light or dark
        assert np.asarray(picture.convert("RGBA"))[0, 0, 3] == 0
    enlarged = np.asarray(images[-1])
    factor = enlarged.shape[0] // 7
    assert factor > 10
    np.testing.assert_array_equal(enlarged, np.kron(pixels, np.ones((factor, factor, 1), np.uint8)))
    before, after = text.index("Before "), text.index(" after")
    assert '<img class="pixels"' in text[before:after] and IMAGE_MARKER not in text


def test_groups_are_joined_by_problem_and_marked(page):
    parsed = Page(page[0])
    articles = [data for tag, data in parsed.texts if tag == "h3"]
    assert articles == ["Problem 1 ", "Problem 2 ", "Problem 3 "]
    assert [data for tag, data in parsed.texts if tag == "h4"] == ["SFT", "RL", "SFT", "RL", "RL"]
    scores = [data for tag, data in parsed.texts if tag == "b"]
    assert scores == ["33% correct", "100% correct", "0% correct", "0% correct", "nothing could be graded"]
    spans = [data for tag, data in parsed.texts if tag == "span"]
    assert [s for s in spans if s.startswith(("best", "worst"))] == [
        "best of SFT",
        "best of RL",
        "worst of SFT",
        "worst of RL",
    ]
    badges = [data for data in spans if data in set(Outcome)]
    assert [badges.count(outcome) for outcome in Outcome] == [3, 5, 3]
    stops = ("ended by itself", "cut at its budget", "stopped: it repeated itself")
    assert {f"{41 + i} tokens, {stop}" for i, stop in enumerate(stops)} <= set(spans)
    assert _STOPS.keys() == set(StopReason)


def test_the_page_has_the_numbers_of_the_table(page):
    cells = [data for tag, data in Page(page[0]).texts if tag == "td"]
    assert cells[:4] == ["sampled accuracy", "52.1%", "71.3%", "+19.2 points"]
    assert "+20.0 points" in [data for tag, data in Page(page[0]).texts if tag == "span"]  # headline, image


def test_table_numbers():
    rows = [line.split() for line in report.results_table(SUMMARY).splitlines()]
    assert rows[1:6] == [
        ["text"],
        ["sampled", "accuracy", "52.1%", "71.3%", "+19.2", "points"],
        ["greedy", "accuracy", "55.0%", "50.0%", "-5.0", "points"],
        ["mean", "tokens", "143.2", "171.1", "+27.9"],
        ["n", "512", "512"],
    ]
    assert rows[6:9] == [["image"], ["sampled", "accuracy", "40.0%", "60.0%", "+20.0", "points"], ["greedy", "accuracy", "–", "61.0%"]]  # fmt: skip # noqa: E501
    assert " ".join(rows[-1]) == "13 min 32 s on one <GPU>, seed 3"
    text_only = SUMMARY | {"sft": {"text": SUMMARY["sft"]["text"]}, "rl": {"text": SUMMARY["rl"]["text"]}}
    assert "image" not in report.results_table(text_only)
    shorter = {"sft": {"text": {"mean_tokens": 22.34}}, "rl": {"text": {"mean_tokens": 22.31}}}
    assert "+0.0" in report.results_table(SUMMARY | shorter)  # not -0.0
    nothing = report.results_table(SUMMARY | {"sft": {}, "rl": {}})  # a run without held-out problems
    assert len(nothing.splitlines()) == 3 and nothing.endswith("seed 3")


@pytest.mark.parametrize("n", [1, 4, 60])
def test_curves_are_a_png(tmp_path, n):
    report.write_curves(metric_rows(n), tmp_path / "curves.png")
    image = PIL.Image.open(tmp_path / "curves.png")
    image.load()
    assert image.format == "PNG" and image.width > 1000 and image.width > 2 * image.height


def test_curves_show_both_kinds_all_and_the_held_out_points():
    left, right = curves.overview(metric_rows(60)).axes
    labels = left.get_legend_handles_labels()[1]
    assert labels == ["all", "text", "text, held out", "image, held out"]  # no image accuracy but null was measured
    held_out = next(line for line in left.lines if line.get_label() == "text, held out")
    np.testing.assert_array_equal(held_out.get_xdata(), np.arange(5, 61, 5))
    np.testing.assert_array_equal(right.lines[0].get_ydata(), 100.0 + np.arange(1, 61))


@pytest.mark.parametrize("n", [4, 23])
def test_an_iteration_without_a_measurement_is_a_gap(n):
    """Nothing complete, nothing measured: the line must not pretend that it knows what was between."""
    rows = metric_rows(n)
    for i in (0, 2, 11, 12):
        if i < n:
            rows[i] |= {"accuracy": None, "response_length": None, "kl": None, "truncated": None}
        if i + 1 < n:
            rows[i + 1] |= {"truncated": 0.5}
    panels = [*curves.overview(rows).axes, *curves.details(rows).axes]
    lines = {panel.get_title(loc="left"): panel.lines for panel in panels}
    missing = np.isin(np.arange(n), (0, 2, 11, 12))
    for title in ("Response length (tokens)", "KL divergence to the reference"):
        whole = [line.get_ydata() for line in lines[title] if len(line.get_xdata()) == n]
        assert len(whole) == (2 if n > 4 else 1)  # what was measured, and the trend
        for y in whole:
            np.testing.assert_array_equal(np.isnan(y), missing)
        dots = [line for line in lines[title] if line.get_marker() == "o"]
        # Iteration 2 is alone between two gaps: as a line it would be invisible.
        assert 2 in np.concatenate([line.get_xdata()[np.isfinite(line.get_ydata())] for line in dots])
    report.write_curves([row | {"accuracy": None, "response_length": None} for row in rows], os.devnull)


def test_other_metrics_share_panels_by_family_and_none_is_lost():
    more = {"groups_all_right": 0.1, "truncated": 0.2, "ungradable": 0.0, "zeta": 4, "groups": 32, "tokens_open": 7.0}
    rows = [row | more for row in metric_rows(7)]
    panels = curves.details(rows).axes
    titles = [panel.get_title(loc="left") for panel in panels]
    assert len(titles) == len(set(titles)) == 8 and titles[-2:] == ["zeta", "groups"]
    shared = {title: panel.get_legend_handles_labels()[1] for title, panel in zip(titles, panels, strict=True)}
    assert shared["Share of responses"] == ["truncated", "ungradable"]
    assert shared["Share of groups"] == ["all_wrong", "all_right"]
    assert shared["zeta"] == []


def test_no_two_lines_of_a_panel_have_one_colour():
    phases = "rollout verification prefill reprefill handover judge components update evaluation".split()
    [panel] = curves.details([{"step": i} | {f"seconds_{phase}": i for phase in phases} for i in range(7)]).axes
    lines, labels = panel.get_legend_handles_labels()
    assert labels == phases and len({line.get_color() for line in lines}) == len(phases)


def test_an_alarm_is_no_share_of_responses():
    rows = [{"step": i, "ungradable": 0.01, "ungradable_alarm": 1.0, "truncated": 0.02} for i in range(7)]
    alarm, share = curves.details(rows).axes
    assert share.get_legend_handles_labels()[1] == ["ungradable", "truncated"] and alarm.get_ylim()[1] >= 1


def test_small_and_large_numbers_stand_at_the_axes_in_full():
    rows = [{"step": i, "learning_rate": 1e-5 * i, "bytes": 4_100_000 + 13_000 * i, "truncated": 0.0} for i in range(9)]
    figure = curves.details(rows)
    figure.draw_without_rendering()
    labels = {panel.get_title("left"): [t.get_text() for t in panel.get_yticklabels()] for panel in figure.axes}
    assert "4e-05" in labels["learning_rate"] and "4,140,000" in labels["bytes"]
    assert all(panel.yaxis.get_offset_text().get_text() == "" for panel in figure.axes)
    [shares] = [panel for panel in figure.axes if panel.get_title("left") == "Share of responses"]
    assert 0 > shares.get_ylim()[0] > -0.01  # a line at 0% is seen, and no share is negative


def test_smoothing_against_a_loop():
    rng = np.random.default_rng(2)
    x, y = np.sort(rng.random(23)) * 90, rng.normal(size=23)
    width = (x.max() - x.min()) / 30
    for i, smooth in enumerate(curves._smooth(x, y)):
        weights = [np.exp(-((x[i] - other) ** 2) / (2 * width**2)) for other in x]
        np.testing.assert_allclose(
            smooth, sum(w * v for w, v in zip(weights, y, strict=True)) / sum(weights), rtol=1e-12
        )


def test_errors(tmp_path):
    with pytest.raises(ValueError, match="no rows"):
        report.write_curves([], tmp_path / "x.png")
    unjudged = dataclasses.replace(group("a", [Outcome.CORRECT]), verdicts=())
    with pytest.raises(ValueError, match="'RL', problem 'a', has 1 rollouts but 0 verdicts"):
        report.write_report(
            tmp_path / "x.html", title="", summary=SUMMARY, metrics=[], groups={"RL": [unjudged]}, config_text=""
        )
