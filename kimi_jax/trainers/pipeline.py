"""The main job: tokenizer -> SFT -> evaluation -> RL -> evaluation -> table, curves, report. Every part can be resumed.

What a workdir holds:

    config.json         the resolved config; a run is resumed only with the same one
    tokenizer.model     SentencePiece, trained on the task text; or hf/, what a published model has besides weights
    checkpoints/sft/    checkpoints/rl/
    sft_metrics.jsonl   metrics.jsonl (one object per RL iteration)
    summary.json        curves.png        report.html
    verdicts.jsonl      every verdict of RL, with all that judging again needs
    eval_sft.json       seconds.json (so far, over all attempts)
"""

import functools
import json
import os
import pathlib
import shutil
import threading
import time
from collections.abc import Callable

import jax
import ml_collections

from kimi_jax import evals, report
from kimi_jax.sampling.logits import SamplingSettings
from kimi_jax.trainers import config as config_lib
from kimi_jax.trainers import dpo, origin, reward_models, rl, supervised
from kimi_jax.trainers.interrupt import Interrupted, StopRequest
from kimi_jax.trainers.setup import EVALUATION, REPORT, Setup, build
from kimi_jax.training import distributed
from kimi_jax.training.metrics import MetricsWriter
from kimi_jax.types import RolloutGroup

_MAY_CHANGE = ("rl.iterations",)  # on resume; anything else would make another run of it


def run(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> dict:
    """Runs or resumes the job and returns the summary. Raises ValueError, before anything expensive, if it cannot."""
    started = time.time()
    config_lib.check_config(config)
    if config.model.system and not config.model.path:
        raise ValueError(
            "config.model.system is a message to a published model, but config.model.path names none (a size alone is "
            "enough for --dry_run). Give --config.model.path=DIR, a directory in the Hugging Face layout."
        )
    prepare_workdir(config, workdir)
    clock = _Clock(workdir / "seconds.json", started)
    setup = build(config, workdir)
    check_prompts(setup)
    if config_lib.has_rl(config):
        rl.make_prompt_sampler(setup)  # it may have too few problems
    problems = f"{len(setup.train)} train and {len(setup.heldout)} held-out problems"
    if config.data.mixture:
        problems = f"{problems}, a mixture of {', '.join(config.data.mixture)}"
    if distributed.is_first():
        print(f"{problems}, {setup.chat.tokenizer.vocab_size} tokens, {device_name()}")

    with StopRequest() as stop, clock:
        if config.reward_model.kind:
            heldout = reward_models.train(setup, stop)
            summary = {"seconds": round(clock.seconds(), 1), "device": device_name(), "seed": config.seed}
            summary |= {"reward_model": config.reward_model.kind, "heldout": heldout}
            if distributed.is_first():
                write_json(workdir / "summary.json", summary)
                print(f"Accuracy on {heldout['n']} held-out judgements: {heldout['accuracy']:.1%}")
            return summary
        judge = load_judge(setup)
        params = _supervised(setup, stop) if config.sft.steps else setup.init_params()
        sft = _stored(workdir / "eval_sft.json", functools.partial(full_evaluation, setup, params))
        if not config_lib.has_rl(config):
            summary = {"seconds": round(clock.seconds(), 1), "device": device_name(), "seed": config.seed, "sft": sft}
            stage = "dpo" if config.dpo.pairs else "sft"
            summary["last"] = MetricsWriter(workdir / f"{stage}_metrics.jsonl").read()[-1]
            if distributed.is_first():
                write_json(workdir / "summary.json", summary)
                print(json.dumps(summary))
            return summary
        if stop.requested:
            raise Interrupted("Stopped before RL; what comes before it is saved")
        sft_groups = report_groups(setup, params)
        params = rl.train(setup, params, stop, judge)
        summary = {
            "seconds": round(clock.seconds(), 1),
            "device": device_name(),
            "seed": config.seed,
            "sft": sft,
            "rl": full_evaluation(setup, params),
        }
    rl_groups = report_groups(setup, params)
    if not distributed.is_first():
        return summary
    metrics = MetricsWriter(workdir / "metrics.jsonl").read()
    report.write_curves(metrics, workdir / "curves.png")
    report.write_report(
        workdir / "report.html",
        title="kimi_jax: learning by online policy mirror descent",
        summary=summary,
        metrics=metrics,
        groups={"SFT": sft_groups, "RL": rl_groups},
        config_text=str(config),
    )
    write_json(workdir / "summary.json", summary)
    print(report.results_table(summary))
    return summary


def _supervised(setup: Setup, stop: StopRequest) -> dict:
    stage = dpo.stage(setup) if setup.config.dpo.pairs else supervised.sft(setup)
    return supervised.train(setup, stage, stop)


def prepare_workdir(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> None:
    """Creates it, or checks that it holds a run of the same config. Raises ValueError or PermissionError."""
    path = workdir / "config.json"
    resolved = json.loads(config.to_json_best_effort())
    if any((workdir / "hf").glob("*.safetensors")):
        raise ValueError(f"{workdir} is an import of scripts/import_weights.py. Use another --workdir.")
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        if path.exists():
            differences = _differences(json.loads(path.read_text()), resolved)
            if differences and origin.has_checkpoint(workdir):
                raise ValueError(
                    f"{workdir} holds a run of another config:\n  "
                    + "\n  ".join(f"{name}: there {a!r}, now {b!r}" for name, (a, b) in differences.items())
                    + "\nUse the same settings to resume it, or another --workdir."
                )
            if differences:  # nothing is trained yet but a tokenizer, on what may be other problems now
                for name in ("tokenizer.model", "eval_sft.json"):
                    (workdir / name).unlink(missing_ok=True)
                shutil.rmtree(workdir / "hf", ignore_errors=True)  # the side files of what may be another model
        distributed.meet("config compared")
        if distributed.is_first():
            write_json(path, resolved)
    except OSError as error:
        raise PermissionError(f"Cannot write to the workdir {workdir}: {error}. Choose another --workdir.") from error


def check_prompts(setup: Setup) -> None:
    """Refuses problems whose prompts do not fit the sampling bucket, before the first update."""
    for problems in (setup.train, setup.heldout):
        prompts = setup.prompts(problems)
        for index in range(len(problems)):  # every one: a single long prompt would stop the run hours later
            setup.engine.check(prompts[index], f"problem {problems[index].id!r}")


def load_judge(setup: Setup) -> Callable[[dict], evals.Judge] | None:
    """From the rollout copy of the policy to the reward model that gives the reward; None if the verifiers do."""
    options = setup.config.rewards
    if not options.judge:
        return None
    if options.judge == "policy":
        return functools.partial(reward_models.policy_judge, setup, votes=options.votes)
    judge = reward_models.load_judge(pathlib.Path(options.judge), setup.mesh, votes=options.votes)
    return lambda params: judge


def full_evaluation(setup: Setup, params: dict) -> dict:
    """All held-out problems, sampled and greedy, per kind."""
    if not setup.heldout:
        return {}
    return evals.evaluate(
        setup.engine,
        setup.to_rollout(params, None),
        setup.heldout,
        list(setup.prompts(setup.heldout)),
        kinds=[problem.kind for problem in setup.heldout],
        end_ids=setup.chat.end_ids,
        key=setup.key(EVALUATION),
        judge=setup.judge,
    )


def report_groups(setup: Setup, params: dict) -> list[RolloutGroup]:
    """Responses to the same few held-out problems, for a person to read."""
    problems = supervised.first_per_kind(setup.heldout, setup.config.eval.report_groups)
    return evals.sample_groups(
        setup.engine,
        setup.to_rollout(params, None),
        problems,
        list(setup.prompts(problems)),
        k=setup.config.rl.responses,
        settings=SamplingSettings.of(temperature=setup.config.rl.temperature, end_ids=setup.chat.end_ids),
        key=setup.key(REPORT),
        judge=setup.judge,
    )


def device_name() -> str:
    """For example "8 x TPU v5 lite" or "cpu (2 cores)"."""
    devices = jax.devices()
    name = devices[0].device_kind
    if devices[0].platform == "cpu":
        name += f" ({os.cpu_count()} cores)"
    return name if len(devices) == 1 else f"{len(devices)} x {name}"


def write_json(path: pathlib.Path, value) -> None:
    """Atomically: a reader sees the old file or the new one."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(value, indent=2) + "\n")
    temporary.replace(path)


def _stored(path: pathlib.Path, compute) -> dict:
    """The result of an earlier attempt, if there is one."""
    if not distributed.agreed(path.exists()):
        result = compute()
        if distributed.is_first():
            write_json(path, result)
        distributed.meet(path.name)
    return json.loads(path.read_text())


def _differences(old: dict, new: dict, prefix: str = "") -> dict[str, tuple]:
    found: dict[str, tuple] = {}
    for name in sorted({*old, *new}):
        a, b = old.get(name), new.get(name)
        if isinstance(a, dict) and isinstance(b, dict):
            found |= _differences(a, b, f"{prefix}{name}.")
        elif a != b and prefix + name not in _MAY_CHANGE:
            found[prefix + name] = (a, b)
    return found


class _Clock:
    """Seconds that the job took, over all attempts. Noted every second: who is killed has no time for last words."""

    def __init__(self, path: pathlib.Path, started: float):
        self.path, self.started = path, started
        self.before = json.loads(path.read_text()) if path.exists() else 0.0
        self._left = threading.Event()
        self._thread = threading.Thread(target=self._note, daemon=True)

    def seconds(self) -> float:
        return self.before + time.time() - self.started

    def __enter__(self) -> "_Clock":
        self._thread.start()
        return self

    def __exit__(self, *exc_info) -> None:
        self._left.set()
        self._thread.join()
        if distributed.is_first():
            write_json(self.path, self.seconds())

    def _note(self) -> None:
        while distributed.is_first():
            write_json(self.path, self.seconds())
            if self._left.wait(1.0):
                return
