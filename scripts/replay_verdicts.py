"""Judges the responses of a run again, and says which verdicts come out otherwise.

    python scripts/replay_verdicts.py --workdir=runs/quickstart [--step=12] [--serial=3081]

DIR/verdicts.jsonl has every response that RL trained on, with its problem and verdict. Whatever judged them judges them
again, a verifier or a reward model. One that was changed, or that is not deterministic, shows here. Exit status: 0 all
as recorded; 1 some are not; 2 there is no such record.
"""

import argparse
import json
import os
import pathlib
import sys
from collections.abc import Sequence

from kimi_jax.rewards import audit
from kimi_jax.rewards.pool import VerifierPool


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--workdir", type=pathlib.Path, required=True, help="what scripts/train.py wrote to")
    parser.add_argument("--step", type=int, help="of this iteration alone")
    parser.add_argument("--serial", type=int, help="this response alone")
    return parser.parse_args(argv)


def replay(args: argparse.Namespace) -> list[tuple[dict, str, str]]:
    """[(record, outcome now, reason)] of those that differ. Raises FileNotFoundError, ValueError."""
    from kimi_jax.trainers import reward_models, rewards
    from kimi_jax.training import sharding
    from kimi_jax.training.metrics import MetricsWriter

    path = args.workdir / "verdicts.jsonl"
    if not path.is_file():
        raise FileNotFoundError(f"There is no {path}: a run writes it with config.rewards.audit=True.")
    config = json.loads((args.workdir / "config.json").read_text())
    options = config["rewards"]
    records = [
        record
        for record in MetricsWriter(path).read()
        if args.step in (None, record["step"]) and args.serial in (None, record["serial"])
    ]
    if not records:
        raise ValueError(f"{path} has no record of --step={args.step} and --serial={args.serial} (None: of any).")
    sys.path.append(os.getcwd())  # where config.rewards.verifiers may lie
    asked = [audit.question(record) for record in records]
    if options["judge"] == "policy":
        raise ValueError(
            "In this run the policy judged its own responses (config.rewards.judge='policy'), with weights that are no "
            "longer there: its verdicts cannot be replayed."
        )
    if options["judge"]:
        mesh = sharding.make_mesh(**config["mesh"])
        judge = reward_models.load_judge(pathlib.Path(options["judge"]), mesh, votes=options["votes"])
        verdicts = judge(asked)
    else:
        verify, workers = rewards.verifier(options), max(options["workers"], 1)
        with VerifierPool(verify, workers=workers, deadline_s=options["deadline_s"]) as pool:
            verdicts = pool.verdicts([pool.submit(*question) for question in asked])
    print(f"{len(records)} responses judged again", file=sys.stderr)
    return [
        (record, verdict.outcome.value, verdict.detail) for record, verdict in audit.disagreements(records, verdicts)
    ]


def main(argv: Sequence[str] | None = None) -> int:
    try:
        differing = replay(parse(argv))
    except (ValueError, OSError) as error:
        print(f"Error: {error}", file=sys.stderr)
        return 2
    for record, outcome, detail in differing:
        print(f"step {record['step']}, serial {record['serial']}: {record['outcome']} then, {outcome} now ({detail})")
        print(f"    {record['prompt']!r} wants {record['answer']!r}, got {record['response']!r}")
    return 1 if differing else 0


if __name__ == "__main__":
    sys.exit(main())
