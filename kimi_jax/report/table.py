"""The scores of SFT and RL side by side: as rows ready to print, and as plain text."""

_KINDS = ("text", "image")
_ROWS = (
    ("sampled accuracy", "accuracy", "{:.1%}", 100, " points"),
    ("greedy accuracy", "greedy_accuracy", "{:.1%}", 100, " points"),
    ("mean tokens", "mean_tokens", "{:.1f}", 1, ""),
    ("ungradable", "ungradable", "{:.1%}", None, ""),
    ("n", "n", "{:.0f}", None, ""),
)  # label, key, format, factor of the gain (None: has no gain), its unit


def score_rows(summary: dict) -> list[tuple[str, ...]]:
    """Rows (kind, label, SFT, RL, gain), ready to print, of the kinds that were evaluated. A missing score is –."""
    rows = []
    for kind in _KINDS:
        sft, rl = summary["sft"].get(kind), summary["rl"].get(kind)
        if sft is None and rl is None:
            continue
        for label, key, form, factor, unit in _ROWS:
            before, after = (sft or {}).get(key), (rl or {}).get(key)
            if key == "ungradable" and not (before or after):  # as it should be
                continue
            gain = "" if factor is None or None in (before, after) else f"{factor * (after - before):+z.1f}{unit}"
            rows.append((kind, label, *("–" if v is None else form.format(v) for v in (before, after)), gain))
    return rows


def results_table(summary: dict) -> str:
    """The scores of SFT and RL side by side with the gains, as plain text."""
    lines = [f"{'':<20}{'SFT':>9}{'RL':>9}   gain"]
    kind = None
    for row in score_rows(summary):
        if row[0] != kind:
            kind = row[0]
            lines.append(kind)
        lines.append(f"  {row[1]:<18}{row[2]:>9}{row[3]:>9}   {row[4]}".rstrip())
    return "\n".join([*lines, "", provenance(summary)])


def provenance(summary: dict) -> str:
    minutes, seconds = divmod(round(summary["seconds"]), 60)
    return f"{f'{minutes} min ' if minutes else ''}{seconds} s on {summary['device']}, seed {summary['seed']}"
