"""Controls on a finished run: does the model look at its images, does it need the length of its chains of thought, is
it the rewards that it learns from, and what if they fail?

    python scripts/controls.py --workdir=runs/quickstart swapped_images
    python scripts/controls.py --workdir=runs/quickstart half
    python scripts/controls.py --workdir=runs/quickstart permuted
    python scripts/controls.py --workdir=runs/quickstart faulty

swapped_images: every held-out image problem is shown the image of another problem of the same task and image size, and
keeps its own question and answer. What is left of the accuracy did not come from the image: it should be no more than
the best constant guess per question and image size, which is printed beside it.

half: what of the accuracy is left when the second half of each chain of thought is deleted and the answer has to follow
at once. The whole chain with the answer forced in the same way shows that forcing costs nothing; no chain at all is the
lower end. Written to DIR/half.json.

permuted: RL once more from the same SFT checkpoint, with the advantages shuffled within each group. Everything is as
before but which response is rewarded, so the gain must vanish. Goes to DIR-permuted; the same command again resumes.

faulty: RL once more from the same SFT checkpoint, with verifiers that hang in 2% of judgements and crash in 1%.
Accuracy and seconds per iteration must stay what they were. Goes to DIR-faulty; the last evaluation is that of the
verifiers of the run, and written to DIR-faulty/faulty.json.
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
import numpy as np

from kimi_jax import evals, report
from kimi_jax.sampling.logits import SamplingSettings
from kimi_jax.tasks import faulty as faulty_verifier
from kimi_jax.tasks.base import ANSWER_MARKER
from kimi_jax.tasks.visual import COLOURS, SHAPES
from kimi_jax.trainers import pipeline
from kimi_jax.trainers import setup as setup_lib
from kimi_jax.trainers.interrupt import Interrupted
from kimi_jax.training.checkpoint import Checkpointer
from kimi_jax.training.metrics import MetricsWriter
from kimi_jax.types import Outcome, Problem, Request

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
    params = _trained(setup, workdir)
    rows = {}
    print(f"{'':20}{'problems':>10}{'own image':>18}{'image of another':>18}{'constant':>10}\n{'':30}", end="")
    print(f"{'sampled':>9}{'greedy':>9}" * 2 + f"{'guess':>10}")
    for task in dict.fromkeys(problem.task for problem in setup.heldout if problem.images):
        pair = swapped([problem for problem in setup.heldout if problem.task == task])
        if not pair[0]:
            continue
        row = {"n": len(pair[0]), "constant_guess": constant_guess(pair[0])}
        for name, problems in zip(("own", "swapped"), pair, strict=True):
            scores = pipeline.full_evaluation(dataclasses.replace(setup, heldout=problems), params)
            row |= {f"{name}_{key}": scores["image"][key] for key in ("accuracy", "greedy_accuracy")}
        rows[task] = row
        shares = [row[f"{name}_{key}"] for name in ("own", "swapped") for key in ("accuracy", "greedy_accuracy")]
        print(f"{task:20}{row['n']:10}" + "".join(f"{s:9.1%}" for s in shares) + f"{row['constant_guess']:10.1%}")
    pipeline.write_json(workdir / "swapped_images.json", rows)
    return rows


_ANSWER_TOKENS = 32  # room for an answer after a chain of any length


def shortened(tokenizer, text: str, share: float) -> str:
    """What is before the answer in a response, the first `share` of its tokens, and the request for an answer."""
    chain = tokenizer.encode(text.partition(ANSWER_MARKER)[0].strip())
    kept = tokenizer.decode(chain[: round(share * len(chain))]).strip()
    return f"{kept} {ANSWER_MARKER}".strip()


def half(workdir: pathlib.Path) -> dict[str, dict[str, float]]:
    """Prints, writes and returns, per kind, accuracies with chains of thought as sampled, whole, half and none."""
    setup = setup_lib.build(_config(workdir), workdir)
    params = setup.to_rollout(_trained(setup, workdir), None)
    tokenizer, prompts = setup.chat.tokenizer, list(setup.prompts(setup.heldout))
    draws = {"key": setup.key(setup_lib.EVALUATION)}
    draws["settings"] = SamplingSettings.of(temperature=1.0, end_ids=setup.chat.end_ids)
    groups = evals.sample_groups(setup.engine, params, setup.heldout, prompts, k=1, judge=setup.judge, **draws)
    verdicts = {"own": [group.verdicts[0] for group in groups]}

    begun = {
        name: [shortened(tokenizer, group.rollouts[0].text, share) for group in groups]
        for name, share in (("whole", 1.0), ("half", 0.5), ("none", 0.0))
    }
    prefixes = {name: [np.array(tokenizer.encode(text), np.int32) for text in texts] for name, texts in begun.items()}
    longest = max(len(prefix) for own in prefixes.values() for prefix in own)
    engine = dataclasses.replace(setup.engine, max_tokens=longest + _ANSWER_TOKENS)
    for name, texts in begun.items():
        pairs = zip(prompts, prefixes[name], strict=True)
        requests = [Request(prompt, i, _ANSWER_TOKENS, prefix) for i, (prompt, prefix) in enumerate(pairs)]
        flight = engine.start(params, requests, run_key=draws["key"], settings=draws["settings"])
        while not flight.done:
            for i, segment in flight.advance():
                texts[i] += engine.decode_text(segment.tokens)
        verdicts[name] = setup.judge(list(zip(setup.heldout, texts, strict=True)))

    rows = {}
    print(f"{'':10}" + "".join(f"{name:>9}" for name in verdicts))
    for kind in dict.fromkeys(problem.kind for problem in setup.heldout):
        members = [i for i, problem in enumerate(setup.heldout) if problem.kind == kind]
        right = lambda of: float(np.mean([of[i].outcome == Outcome.CORRECT for i in members]))  # noqa: B023, E731
        rows[kind] = {"n": len(members)} | {name: right(of) for name, of in verdicts.items()}
        print(f"{kind:10}" + "".join(f"{rows[kind][name]:9.1%}" for name in verdicts))
    pipeline.write_json(workdir / "half.json", rows)
    return rows


def permuted(workdir: pathlib.Path) -> dict:
    """Runs or resumes the control, and prints its table after that of the run. Returns its summary."""
    config = _config(workdir)
    if config.rl.permute_advantages:
        raise ValueError(f"--workdir={workdir} is such a control already. Give the run itself.")
    config.rl.permute_advantages = True
    summary = pipeline.run(config, _after_sft(workdir, "permuted"))
    print(f"\nThat was with permuted advantages. The run itself:\n{report.results_table(_summary(workdir))}")
    return summary


FAULTY_DEADLINE_S = 1.0  # thousands of times what the verifiers of the tasks take


def faulty(workdir: pathlib.Path) -> dict:
    """Runs or resumes the drill. Returns and writes what it and the run came to: accuracies, pace, failures."""
    config = _config(workdir)
    if config.rewards.verifiers:
        raise ValueError(f"--workdir={workdir} has verifiers of its own. Give a run with those of the tasks.")
    tasks = (*config.data.text_tasks, *config.data.image_tasks)
    with config.unlocked():
        config.rewards.verifiers = tuple(f"{task}={faulty_verifier.__name__}:verify" for task in tasks)
        config.rewards.deadline_s = FAULTY_DEADLINE_S
        config.rewards.workers = max(config.rewards.workers, 1)
    target = _after_sft(workdir, "faulty")
    pipeline.run(config, target)
    setup = setup_lib.build(_config(workdir), target)  # whose verifiers do not fail
    result = {
        "faulty": {"rl": pipeline.full_evaluation(setup, _trained(setup, target))} | _pace(target),
        "run": {"rl": _summary(workdir)["rl"]} | _pace(workdir),
    }
    pipeline.write_json(target / "faulty.json", result)
    print("\nEvaluated by verifiers that do not fail:")
    for name, values in result.items():
        accuracies = " ".join(f"{kind} {scores['accuracy']:.1%}" for kind, scores in values["rl"].items())
        print(
            f"{name:8}{accuracies}   " + "  ".join(f"{key} {value:.3g}" for key, value in values.items() if key != "rl")
        )
    return result


def _pace(workdir: pathlib.Path) -> dict[str, float]:
    """Medians of an iteration's seconds; how often verification failed, and the share of responses that it cost."""
    rows = MetricsWriter(workdir / "metrics.jsonl").read()
    phases = ("rollout", "verification", "update")
    seconds = {f"seconds_{phase}": float(np.median([row[f"seconds_{phase}"] for row in rows])) for phase in phases}
    counts = {name: sum(row[name] for row in rows) for name in ("missed_deadlines", "verifier_crashes")}
    return seconds | counts | {"ungradable": float(np.mean([row["ungradable"] for row in rows]))}


def _after_sft(workdir: pathlib.Path, name: str) -> pathlib.Path:
    """DIR-name, which has what the run had when its RL began."""
    target = workdir.with_name(f"{workdir.name}-{name}")
    if not (target / "config.json").exists():  # which is written next
        stages = [path for path in (workdir / "checkpoints").iterdir() if path.name != "rl"]  # none: it had config.init
        for path in (*stages, workdir / "hf"):
            if path.is_dir():
                shutil.copytree(path, target / path.relative_to(workdir), dirs_exist_ok=True)
        target.mkdir(exist_ok=True)
        for file in ("tokenizer.model", "eval_sft.json"):
            if (workdir / file).is_file():
                shutil.copyfile(workdir / file, target / file)
    return target


def _trained(setup: setup_lib.Setup, workdir: pathlib.Path) -> dict:
    """The parameters of the last RL checkpoint there."""
    like = {"state": {"params": setup_lib.params_like(setup.config, setup.policy, setup.mesh)}}
    with Checkpointer.reader(workdir / "checkpoints" / "rl") as checkpoints:
        return checkpoints.restore(like, partial=True)[1]["state"]["params"]


def _summary(workdir: pathlib.Path) -> dict:
    path = workdir / "summary.json"
    if not path.is_file():
        raise FileNotFoundError(f"--workdir={workdir} holds no finished run: there is no {path}. Let train.py finish.")
    return json.loads(path.read_text())


def _config(workdir: pathlib.Path) -> ml_collections.ConfigDict:
    _summary(workdir)
    return ml_collections.ConfigDict(json.loads((workdir / "config.json").read_text()))


CONTROLS = {"swapped_images": swapped_images, "half": half, "permuted": permuted, "faulty": faulty}


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
