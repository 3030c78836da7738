"""What the runs of scripts/climb.py came to: numbers, the bars they are held to, a table and a figure."""

import json
import math
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import matplotlib.figure
import matplotlib.ticker

METHODS = {
    "short_rl": "long2short RL",
    "dpo": "DPO",
    "merge_shortest": "merge + shortest rejection sampling",
    "shortest": "shortest rejection sampling",
    "brief": "SFT on own answers, abridged",
    "merge": "merge",
}  # by their steps
# From the best to the worst, as far as the report orders them: RL in its text, the others in its Fig. 7.
FIG7 = ("short_rl", "dpo", "merge_shortest", "merge")
GAIN, KEPT, SHARE, DROP = 20.0, 0.95, 0.5, 10.0  # the bars: points, shares of the long model's, points

Scores = dict[str, dict[str, float]]  # by kind, as `kimi_jax.evals.evaluate` gives them


def write(
    workdir: pathlib.Path,
    seeds: Sequence[int],
    rates: Sequence[str],
    objectives: Sequence[str],
    missing: Sequence[str],
) -> str:
    """climb.json, climb.md, which is returned, and climb.png, of the steps that are done. missing: those that are not.

    Raises ValueError if none of the seeds has finished its start.
    """
    result = collect(workdir, seeds, rates, objectives) | {"missing": list(missing)}
    (workdir / "climb.json").write_text(json.dumps(result, indent=2) + "\n")
    text = markdown(result)
    (workdir / "climb.md").write_text(text + "\n")
    draw(workdir, result, workdir / "climb.png")
    return text


# --- numbers ----------------------------------------------------------------------------------------------------------


def collect(workdir: pathlib.Path, seeds: Sequence[int], rates: Sequence[str], objectives: Sequence[str]) -> dict:
    """All numbers. Methods are compared with the long models, RL, of their own seeds."""
    starts = {seed: summary for seed in seeds if (summary := _json(workdir / f"start-{seed}" / "summary.json"))}
    if not starts:
        raise ValueError(f"{workdir} has no finished start-{seeds[0]}: there is nothing to put into a table yet.")
    long = {seed: totals(summary["rl"]) for seed, summary in starts.items()}
    methods: dict[str, Any] = {}
    for method in METHODS:
        own = dict(_measured(workdir, method, seeds))
        own = {seed: scores for seed, scores in own.items() if seed in starts}
        if own:
            long_ones = [starts[seed]["rl"] for seed in own]
            methods[method] = {"seeds": list(own), **_versus(list(own.values()), long_ones)}
    result: dict[str, Any] = {
        "seeds": list(starts),
        "sft": mean_scores([summary["sft"] for summary in starts.values()]),
        "rl": mean_scores([summary["rl"] for summary in starts.values()]),
        "gains": {seed: 100 * (long[seed]["accuracy"] - totals(starts[seed]["sft"])["accuracy"]) for seed in starts},
        "methods": methods,
        "half": _json(workdir / f"start-{seeds[0]}" / "half.json"),
        "objectives": {},
    }
    for objective in objectives:
        found = {rate: _json(workdir / f"{objective}-{rate}" / "summary.json") for rate in rates}
        own = {rate: totals(summary["rl"]) for rate, summary in found.items() if summary}
        if own:
            result["objectives"][objective] = own
    return result | {"bars": bars(result), "order": order(methods), "comparison": compare(result["objectives"])}


def totals(scores: Scores) -> dict[str, float]:
    """Accuracy and tokens over the problems of all kinds, and how many they are."""
    n = sum(own["n"] for own in scores.values())
    mean = lambda name: sum(own[name] * own["n"] for own in scores.values()) / n  # noqa: E731
    return {"accuracy": mean("accuracy"), "tokens": mean("mean_tokens"), "n": n}


def mean_scores(runs: Sequence[Scores]) -> Scores:
    """Over runs: per kind, and of all kinds under "all"."""
    names = {"accuracy": "accuracy", "mean_tokens": "tokens"}
    found = {kind: {ours: _mean([run[kind][name] for run in runs]) for name, ours in names.items()} for kind in runs[0]}
    each = [totals(run) for run in runs]
    return found | {"all": {name: _mean([one[name] for one in each]) for name in ("accuracy", "tokens")}}


def _versus(runs: Sequence[Scores], long: Sequence[Scores]) -> dict[str, Any]:
    """kept, share: of the long models' accuracy and tokens, means over seeds before they are divided."""
    scores, others = mean_scores(runs), mean_scores(long)
    ratio = lambda name: scores["all"][name] / others["all"][name] if others["all"][name] else 0.0  # noqa: E731
    return {"scores": scores, "kept": ratio("accuracy"), "share": ratio("tokens")}


def _measured(workdir: pathlib.Path, method: str, seeds: Sequence[int]) -> Iterator[tuple[int, Scores]]:
    if stage := {"short_rl": "rl", "brief": "sft"}.get(method):  # of which each seed has one
        for seed in seeds:
            if summary := _json(workdir / f"{method}-{seed}" / "summary.json"):
                yield seed, summary[stage]
    elif method == "merge":
        path = workdir / "merge" / "evaluations.jsonl"
        if path.exists():
            yield seeds[0], json.loads(path.read_text().splitlines()[-1])["results"]
    elif summary := _json(workdir / method / "summary.json"):
        yield seeds[0], summary["sft"]


def bars(result: dict) -> list[dict[str, Any]]:
    """What is asked for, what was found, and whether that is enough, of what was measured."""
    gain = _mean(list(result["gains"].values()))
    found = [{"what": "points that RL gains over SFT", "at_least": GAIN, "found": gain, "holds": gain >= GAIN}]
    if result["methods"]:
        enough = {m: own for m, own in result["methods"].items() if own["share"] <= SHARE}
        best = max(enough, key=lambda m: enough[m]["kept"], default=None)
        kept = enough[best]["kept"] if best else None
        what = f"share of RL's accuracy that a method keeps at {SHARE:.0%} of its tokens or fewer"
        found.append({"what": what, "at_least": KEPT, "found": kept, "by": best, "holds": bool(best) and kept >= KEPT})
    if half := result["half"]:
        total = sum(own["n"] for own in half.values())
        drop = 100 * sum((own["own"] - own["half"]) * own["n"] for own in half.values()) / total
        what = "points that half of each chain of thought costs RL"
        found.append({"what": what, "at_least": DROP, "found": drop, "holds": drop >= DROP})
    return found


def order(methods: dict[str, Any]) -> list[dict[str, str]]:
    """Of each two methods that the report puts in an order, which is better here: the one that keeps at least as much
    accuracy with at most as many tokens, or neither. There is no weighing of accuracy against tokens."""

    def better(a: str, b: str) -> bool:
        a, b = methods[a], methods[b]
        return a["kept"] >= b["kept"] and a["share"] <= b["share"]

    there = [method for method in FIG7 if method in methods]
    return [
        {"report": a, "before": b, "here": "agrees" if better(a, b) else "the reverse" if better(b, a) else "neither"}
        for i, a in enumerate(there)
        for b in there[i + 1 :]
    ]


def compare(objectives: dict[str, dict[str, dict[str, float]]]) -> list[dict[str, Any]]:
    """Mirror descent against each of the others, both at their best rate: the difference in points, and two standard
    errors of a difference of two samples (problems are the same, so that is rather more than it is)."""
    best = {name: max(own.values(), key=lambda scores: scores["accuracy"]) for name, own in objectives.items()}
    ours, found = best.pop("mirror_descent", None), []
    for name, other in best.items() if ours else ():
        variance = sum(one["accuracy"] * (1 - one["accuracy"]) / one["n"] for one in (ours, other))
        points = 100 * (ours["accuracy"] - other["accuracy"])
        found.append({"objective": name, "points": points, "two_standard_errors": 200 * math.sqrt(variance)})
    return found


# --- table ------------------------------------------------------------------------------------------------------------


def markdown(result: dict) -> str:
    """Tables and what they say about the bars."""
    kinds = [kind for kind in result["rl"] if kind != "all"]
    lines = [
        f"| model | seeds | {' | '.join(f'{k}, pass@1' for k in kinds)} | {' | '.join(f'{k}, tokens' for k in kinds)} "
        "| of RL's accuracy | of its tokens |",
        "|---|---:|" + "---:|" * (2 * len(kinds) + 2),
    ]

    def row(name: str, seeds: int, scores: dict, kept: float | None, share: float | None) -> None:
        cells = [f"{scores[kind]['accuracy']:.1%}" for kind in kinds]
        cells += [f"{scores[kind]['tokens']:.1f}" for kind in kinds]
        cells += ["" if x is None else f"{x:.1%}" for x in (kept, share)]
        lines.append(f"| {name} | {seeds} | {' | '.join(cells)} |")

    row("SFT", len(result["seeds"]), result["sft"], None, None)
    row("RL", len(result["seeds"]), result["rl"], 1.0, 1.0)
    for method in sorted(result["methods"], key=lambda m: result["methods"][m]["share"]):
        own = result["methods"][method]
        row(METHODS[method], len(own["seeds"]), own["scores"], own["kept"], own["share"])
    gains = ", ".join(f"{gain:+.1f}" for gain in result["gains"].values())
    lines += ["", f"Gain of RL, in points, seed by seed: {gains}.", ""]
    for bar in result["bars"]:
        said = "nothing" if bar["found"] is None else f"{bar['found']:.3g}"
        by = f" ({METHODS[bar['by']]})" if bar.get("by") else ""
        lines.append(f"* {bar['what']}: {said}{by}, at least {bar['at_least']:g}: {_held(bar['holds'])}")
    if result["half"]:
        names = ("own", "whole", "half", "none")
        lines += ["", "| chains of thought of RL | as sampled | whole, answer forced | half | none |"]
        lines.append("|---|" + "---:|" * len(names))
        lines += [f"| {k} | {' | '.join(f'{own[n]:.1%}' for n in names)} |" for k, own in result["half"].items()]
    if result["order"]:
        lines += ["", "| the report puts | before | here |", "|---|---|---|"]
        lines += [f"| {METHODS[o['report']]} | {METHODS[o['before']]} | {o['here']} |" for o in result["order"]]
    if result["objectives"]:
        rates = list(dict.fromkeys(rate for own in result["objectives"].values() for rate in own))
        lines += ["", f"| pass@1 at a rate of | {' | '.join(rates)} |", "|---|" + "---:|" * len(rates)]
        for name, own in result["objectives"].items():
            cells = [f"{own[rate]['accuracy']:.1%}" if rate in own else "" for rate in rates]
            lines.append(f"| {name} | {' | '.join(cells)} |")
        lines.append("")
    for one in result["comparison"]:
        clear = "beyond" if abs(one["points"]) > one["two_standard_errors"] else "within"
        lines.append(
            f"* mirror descent − {one['objective']}, each at its best rate: {one['points']:+.1f} points, {clear} two "
            f"standard errors ({one['two_standard_errors']:.1f})"
        )
    if result["missing"]:
        lines += ["", f"Not done yet: {', '.join(result['missing'])}."]
    return "\n".join(lines)


def _held(holds: bool) -> str:
    return "holds" if holds else "does not hold"


# --- figure -----------------------------------------------------------------------------------------------------------


def draw(workdir: pathlib.Path, result: dict, path: pathlib.Path) -> None:
    """A PNG: accuracy against tokens of all models; held-out accuracy of each objective as it learns."""
    figure = matplotlib.figure.Figure(figsize=(11, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    points = {"SFT": result["sft"], "RL": result["rl"]}
    points |= {METHODS[method]: own["scores"] for method, own in result["methods"].items()}
    for i, (name, scores) in enumerate(points.items()):  # points lie near each other: a legend, no labels beside them
        where = scores["all"]["tokens"], scores["all"]["accuracy"]
        ends = {"SFT": "s", "RL": "D"}
        colour = "#667080" if name in ends else f"C{i - len(ends)}"
        left.scatter(*where, s=45, color=colour, marker=ends.get(name, "o"), label=name, zorder=2)
    left.legend(frameon=False, fontsize=8)
    long = result["rl"]["all"]
    left.plot([0, SHARE * long["tokens"]], [KEPT * long["accuracy"]] * 2, "--", color="#9aa3ae", linewidth=1)
    left.plot([SHARE * long["tokens"]] * 2, [KEPT * long["accuracy"], 1], "--", color="#9aa3ae", linewidth=1)
    highest = max(scores["all"]["accuracy"] for scores in points.values())
    left.set(xlim=(0, None), ylim=(None, min(1.0, highest + 0.08)), xlabel="Mean tokens per response")
    for i, (name, own) in enumerate(result["objectives"].items()):
        rate = max(own, key=lambda rate: own[rate]["accuracy"])
        right.plot(*_curve(workdir / f"{name}-{rate}"), "o-", markersize=3, color=f"C{i}", label=f"{name}, {rate}")
    if result["objectives"]:
        right.legend(frameon=False, fontsize=8)
    right.set_xlabel("Iteration of RL")
    for panel in (left, right):
        panel.set_ylabel("Held-out accuracy, pass@1")
        panel.yaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1.0))
        panel.spines[["top", "right"]].set_visible(False)
        panel.margins(0.1)
    figure.savefig(path, dpi=150)


def _curve(run: pathlib.Path) -> tuple[list[int], list[float]]:
    """(iterations, accuracies): after SFT on all held-out problems, then on those that RL is evaluated on."""
    steps, accuracies = [0], [totals(json.loads((run / "eval_sft.json").read_text()))["accuracy"]]
    for line in (run / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        found = [row[key] for key in row if key.startswith("eval_") and key.endswith("_accuracy")]
        if found:
            steps.append(row["step"])
            accuracies.append(_mean(found))
    return steps, accuracies


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _json(path: pathlib.Path) -> Any:
    return json.loads(path.read_text()) if path.exists() else None
