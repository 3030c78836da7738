"""The stages of pretraining and SFT, as their configs say but tiny, each from the one before: what moves, what does
not, and that one which is stopped on the way ends as one which is not, bit for bit.
"""

import dataclasses
import importlib.util
import json
import pathlib

import jax
import numpy as np
import pytest

from kimi_jax.data.loaders import trained_tokens
from kimi_jax.models import paths
from kimi_jax.trainers import pipeline, supervised
from kimi_jax.trainers.config import check_config
from kimi_jax.trainers.interrupt import Interrupted
from kimi_jax.trainers.setup import Setup, build
from kimi_jax.training.checkpoint import Checkpointer
from tests.trainers import miniature
from tests.trainers.test_lora import StopAt

CONFIGS = pathlib.Path(__file__).parents[2] / "configs"
CHAIN = (
    "pretrain_language",
    "pretrain_vision",
    "pretrain_joint",
    "pretrain_cooldown",
    "pretrain_long_32k",
    "pretrain_long_131k",
    "sft_vanilla_32k",
    "sft_vanilla_131k",
)
PLAIN = {"text_image_rich": "text_image", "scene_count_rich": "scene_count", "bar_chart_rich": "bar_chart"}


def config_of(name, origin=None):
    """As in the file, but in tasks with small pictures, three updates of a miniature, and documents as long as rows."""
    spec = importlib.util.spec_from_file_location(name, CONFIGS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config()
    changes = {
        "init": str(origin) if origin else None,
        "model.size": "miniature",
        "model.remat": False,
        "rows.tokens": 608,
        "rows.patches": 448,
        "rows.logits_chunk": 304,
        "sft.steps": 3,
        "sft.rows": 4,
        "sft.micro_rows": 2,
        "sft.eval_every": 2,
        "sft.eval_problems": 3,
        "sft.checkpoint_every": 2,
        "sft.optimizer.warmup_steps": 1,
    }
    for name, options in config.data.mixture.items():
        own = {
            "records": min(options.records, 23),
            "problems": min(options.problems, 2 if options.form == "chat" else 7),
        }
        own["tasks"] = tuple(PLAIN.get(task, task.removesuffix("_rich")) for task in options.tasks)
        own["weight"] = tuple((step // 125, weight) for step, weight in options.weight)
        changes |= {f"data.mixture.{name}.{key}": value for key, value in own.items()}
    with config.unlocked():
        config.update_from_flattened_dict(changes)
    check_config(config)
    return config


def train(here, *stops):
    """The parameters at the beginning and at the end; stopped on the way after so many steps of an attempt."""
    begin = jax.tree.map(np.array, here.init_params())
    for at in stops:
        with pytest.raises(Interrupted):
            supervised.train(here, supervised.sft(here), StopAt(at))
    return begin, jax.tree.map(np.array, supervised.train(here, supervised.sft(here), StopAt()))


def metrics(here):
    rows = [json.loads(line) for line in open(here.workdir / "sft_metrics.jsonl")]
    return [{k: v for k, v in row.items() if not k.startswith(("seconds", "tokens_per_second"))} for row in rows]


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    """{stage: (Setup, parameters at the beginning, at the end)}"""
    with pytest.MonkeyPatch.context() as patch:
        miniature.prepare(patch)
        made, make = {}, Setup.stepper

        def stepper(self, *args):  # compiled once for all attempts at a stage
            if id(self.config) not in made:
                made[id(self.config)] = make(self, *args)
            return made[id(self.config)]

        patch.setattr(Setup, "stepper", stepper)
        found, origin = {}, None
        for name in CHAIN:
            config, workdir = config_of(name, origin), tmp_path_factory.mktemp(name)
            pipeline.prepare_workdir(config, workdir)
            here = build(config, workdir)
            found[name] = (here, *train(here))
            origin = workdir
        yield found


@pytest.mark.slow
def test_each_stage_begins_where_the_one_before_ended(chain):
    stages = list(chain.values())
    for (before, _, end), (here, begin, _) in zip(stages, stages[1:], strict=False):
        jax.tree.map(np.testing.assert_array_equal, begin, end)
        tokenizers = {(each.workdir / "tokenizer.model").read_bytes() for each in (before, here)}
        assert len(tokenizers) == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", CHAIN)
def test_what_is_frozen_stays_to_the_bit_and_has_no_moments(name, chain):
    here, begin, end = chain[name]
    begin, end = dict(paths.flatten(begin)), dict(paths.flatten(end))
    frozen = {"pretrain_language": "vision/", "pretrain_vision": "decoder/"}.get(name, "none")
    with Checkpointer.reader(here.workdir / "checkpoints/sft") as checkpoints:
        moments = {path.partition("/mu/")[2] for path in checkpoints.arrays() if "/mu/" in path}
    for path, leaf in begin.items():
        same = leaf.tobytes() == end[path].tobytes()
        assert same == path.startswith(frozen) == (path not in moments), path


@pytest.mark.slow
@pytest.mark.parametrize("name", CHAIN)
def test_a_stage_that_is_stopped_ends_as_one_that_is_not(name, chain, tmp_path):
    straight, begin, end = chain[name]
    here = dataclasses.replace(straight, workdir=tmp_path)
    jax.tree.map(np.testing.assert_array_equal, train(here, 1, 1), (begin, end))
    assert metrics(here) == metrics(straight)
    with open(tmp_path / "sft_metrics.jsonl") as file:  # the first line is of updates 1 and 2, of two attempts
        first = json.loads(file.readline())
    timed = first["tokens_per_second"] * first["seconds_update"]
    assert timed == pytest.approx(trained_tokens(supervised.sft(here).batches[1].rows))


@pytest.mark.slow
def test_losses_are_measured_by_source(chain):
    for here, *_ in chain.values():
        rows = metrics(here)
        measured = {name for name in rows[-1] if name.endswith("_heldout_loss")}
        assert measured == {f"{source}_heldout_loss" for source in here.config.data.mixture}
        assert all(0 < row[name] < 9 for row in rows for name in measured)


@pytest.mark.slow
def test_without_rl_the_run_ends_with_what_was_measured_last(chain):
    here = chain["sft_vanilla_131k"][0]
    summary = pipeline.run(here.config, here.workdir)  # it is trained already
    assert summary["sft"] == {} and summary["last"]["step"] == 3
    assert json.loads((here.workdir / "summary.json").read_text())["last"] == summary["last"]
    assert not (here.workdir / "checkpoints/rl").exists()
