"""The main job once per seed, and how much the gains of RL vary between them.

    python scripts/seeds.py --config=configs/quickstart.py --workdir=runs/seeds [--seeds=0,1,2] [--config.rl.tau=0.1]

Each seed has its own data, weights and sampling, and its own DIR/seed-N. The same command again resumes, and skips the
seeds that are done. Writes DIR/seeds.json, and prints a table in Markdown. Exit status: as of scripts/train.py.
"""

import argparse
import json
import pathlib
import signal
import subprocess
import sys
from collections.abc import Sequence

_TRAIN = pathlib.Path(__file__).with_name("train.py")
_ROWS = (
    ("pass@1", "accuracy", 100, "{:.1f}%"),
    ("greedy", "greedy_accuracy", 100, "{:.1f}%"),
    ("mean tokens", "mean_tokens", 1, "{:.1f}"),
)  # label, key, factor, format


def parse(argv: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--config", required=True, help="as for scripts/train.py, as is --config.FIELD=VALUE")
    parser.add_argument("--workdir", type=pathlib.Path, required=True, help="one directory per seed goes in here")
    parser.add_argument("--seeds", default="0,1,2", type=lambda text: [int(seed) for seed in text.split(",")])
    args, overrides = parser.parse_known_args(argv)
    for flag in overrides:
        if not flag.startswith("--config.") or "=" not in flag or flag.startswith("--config.seed="):
            parser.error(f"unexpected {flag!r}: overrides are --config.FIELD=VALUE, and seeds are --seeds=0,1,2")
    return args, overrides


def train(config: str, directory: pathlib.Path, seed: int, overrides: Sequence[str]) -> tuple[int, bool]:
    """Runs or resumes one seed. Returns the exit status, and whether Ctrl-C was pressed, which the run acts on."""
    command = [sys.executable, str(_TRAIN), f"--config={config}", f"--workdir={directory}", f"--config.seed={seed}"]
    pressed: list[bool] = []
    previous = signal.signal(signal.SIGINT, lambda *_: pressed.append(True))
    try:
        return subprocess.run([*command, *overrides]).returncode, bool(pressed)
    finally:
        signal.signal(signal.SIGINT, previous)


def spread(summaries: Sequence[dict]) -> list[dict]:
    """Per kind and score: the means over seeds of SFT and RL, and the gain of each seed; accuracies in points."""
    rows = []
    for kind in summaries[0]["rl"]:
        for label, key, factor, _ in _ROWS:
            sft, rl = ([factor * summary[stage][kind][key] for summary in summaries] for stage in ("sft", "rl"))
            gains = [after - before for before, after in zip(sft, rl, strict=True)]
            mean = lambda values: sum(values) / len(values)  # noqa: E731
            rows.append({"kind": kind, "score": label, "sft": mean(sft), "rl": mean(rl), "gains": gains})
    return rows


def table(rows: Sequence[dict]) -> str:
    formats = {label: form for label, _, _, form in _ROWS}
    lines = ["| | SFT | RL | gain: mean (min to max) |", "|---|---:|---:|---:|"]
    for row in rows:
        before, after = (formats[row["score"]].format(row[stage]) for stage in ("sft", "rl"))
        gains = row["gains"]
        gain = f"{sum(gains) / len(gains):+.1f} ({min(gains):+.1f} to {max(gains):+.1f})"
        lines.append(f"| {row['kind']}, {row['score']} | {before} | {after} | {gain} |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    args, overrides = parse(argv)
    summaries = []
    for seed in args.seeds:
        path = args.workdir / f"seed-{seed}" / "summary.json"
        if not path.exists():
            print(f"--- seed {seed}", flush=True)
            status, stopped = train(args.config, path.parent, seed, overrides)
            if stopped or not path.exists():  # train.py has said why
                return status
        summaries.append(json.loads(path.read_text()))
    rows = spread(summaries)
    (args.workdir / "seeds.json").write_text(json.dumps({"seeds": args.seeds, "rows": rows}, indent=2) + "\n")
    minutes = sum(summary["seconds"] for summary in summaries) / 60 / len(summaries)
    print(f"\n{table(rows)}\n\nSeeds {', '.join(map(str, args.seeds))}; {minutes:.1f} minutes each on average.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
