"""Controls on a finished run: does the model look at its images, and is it the rewards that it learns from?

    python scripts/controls.py --workdir=runs/quickstart swapped_images
    python scripts/controls.py --workdir=runs/quickstart permuted

swapped_images: every held-out image problem is shown the image of another problem of the same task and image size, and
keeps its own question and answer. What is left of the accuracy did not come from the image: it should be no more than
the best constant guess per question and image size, which is printed beside it.

permuted: RL once more from the same SFT checkpoint, with the advantages shuffled within each group. Everything is as
before but which response is rewarded, so the gain must vanish. Goes to DIR-permuted; the same command again resumes.
"""

import argparse
import collections
import dataclasses
import json
import pathlib
import re
import shutil
import sys
from collections.abc import Sequence

import ml_collections

from kimi_jax import report
from kimi_jax.tasks.visual import COLOURS, SHAPES
from kimi_jax.trainers import pipeline
from kimi_jax.trainers import setup as setup_lib
from kimi_jax.trainers.interrupt import Interrupted
from kimi_jax.training.checkpoint import Checkpointer
from kimi_jax.types import Problem

_NAMES = re.compile(rf"\b({'|'.join([*COLOURS, *SHAPES])})(es|s)?\b")


def swapped(problems: Sequence[Problem]) -> tuple[list[Problem], list[Problem]]:
    """(problems, the same with the images of others): the next of the same task and sizes, the first after the last.

    A problem without such a neighbour is left out of both.
    """
    alike = collections.defaultdict(list)
    for problem in problems:
        alike[problem.task, *(image.shape for image in problem.images)].append(problem)
    own, others = [], []
    for members in alike.values():
        if len(members) > 1:
            own += members
            next_ones = members[1:] + members[:1]
            others += [dataclasses.replace(p, images=n.images) for p, n in zip(members, next_ones, strict=True)]
    return own, others


def constant_guess(problems: Sequence[Problem]) -> float:
    """The accuracy of the best answer per form of the question and image size, with names of things left out."""
    answers = collections.defaultdict(collections.Counter)
    for problem in problems:
        form = _NAMES.sub("_", problem.prompt)
        answers[problem.task, form, *(image.shape for image in problem.images)][problem.answer] += 1
    return sum(max(counts.values()) for counts in answers.values()) / len(problems)


def swapped_images(workdir: pathlib.Path) -> dict[str, dict[str, float]]:
    """Prints and writes DIR/swapped_images.json: per task, accuracies with the own images and with those of others."""
    setup = setup_lib.build(_config(workdir), workdir)
    like = {"state": {"params": setup_lib.params_like(setup.config, setup.policy, setup.mesh)}}
    with Checkpointer.reader(workdir / "checkpoints" / "rl") as checkpoints:
        _, loaded, _ = checkpoints.restore(like, partial=True)
    rows = {}
    print(f"{'':20}{'problems':>10}{'own image':>18}{'image of another':>18}{'constant':>10}\n{'':30}", end="")
    print(f"{'sampled':>9}{'greedy':>9}" * 2 + f"{'guess':>10}")
    for task in dict.fromkeys(problem.task for problem in setup.heldout if problem.images):
        pair = swapped([problem for problem in setup.heldout if problem.task == task])
        if not pair[0]:
            continue
        row = {"n": len(pair[0]), "constant_guess": constant_guess(pair[0])}
        for name, problems in zip(("own", "swapped"), pair, strict=True):
            scores = pipeline.full_evaluation(dataclasses.replace(setup, heldout=problems), loaded["state"]["params"])
            row |= {f"{name}_{key}": scores["image"][key] for key in ("accuracy", "greedy_accuracy")}
        rows[task] = row
        shares = [row[f"{name}_{key}"] for name in ("own", "swapped") for key in ("accuracy", "greedy_accuracy")]
        print(f"{task:20}{row['n']:10}" + "".join(f"{s:9.1%}" for s in shares) + f"{row['constant_guess']:10.1%}")
    pipeline.write_json(workdir / "swapped_images.json", rows)
    return rows


def permuted(workdir: pathlib.Path) -> dict:
    """Runs or resumes the control, and prints its table after that of the run. Returns its summary."""
    config = _config(workdir)
    if config.rl.permute_advantages:
        raise ValueError(f"--workdir={workdir} is such a control already. Give the run itself.")
    config.rl.permute_advantages = True
    target = workdir.with_name(f"{workdir.name}-permuted")
    if not (target / "config.json").exists():  # which is written next
        shutil.copytree(workdir / "checkpoints" / "sft", target / "checkpoints" / "sft", dirs_exist_ok=True)
        for name in ("tokenizer.model", "eval_sft.json"):
            shutil.copyfile(workdir / name, target / name)
    summary = pipeline.run(config, target)
    print(f"\nThat was with permuted advantages. The run itself:\n{report.results_table(_summary(workdir))}")
    return summary


def _summary(workdir: pathlib.Path) -> dict:
    path = workdir / "summary.json"
    if not path.is_file():
        raise FileNotFoundError(f"--workdir={workdir} holds no finished run: there is no {path}. Let train.py finish.")
    return json.loads(path.read_text())


def _config(workdir: pathlib.Path) -> ml_collections.ConfigDict:
    _summary(workdir)
    return ml_collections.ConfigDict(json.loads((workdir / "config.json").read_text()))


CONTROLS = {"swapped_images": swapped_images, "permuted": permuted}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("control", choices=CONTROLS)
    parser.add_argument("--workdir", type=pathlib.Path, required=True, help="of a finished scripts/train.py")
    args = parser.parse_args(argv)
    try:
        CONTROLS[args.control](args.workdir.absolute())
    except Interrupted as stopped:
        print(f"{stopped}. The same command resumes.")
    except (ValueError, OSError) as error:
        print(f"Error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
