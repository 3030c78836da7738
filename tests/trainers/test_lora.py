"""Both loops with adapters on a frozen base in bfloat16 and a norm that is trained too: what moves, what does not, and
that a run which is stopped on the way ends as one which is not, bit for bit.
"""

import functools
import json
import re

import jax
import numpy as np
import pytest

from kimi_jax.models import lora, paths
from kimi_jax.trainers import pipeline, plan, rl, setup, supervised
from kimi_jax.trainers.config import check_config
from kimi_jax.trainers.interrupt import Interrupted
from kimi_jax.training.checkpoint import Checkpointer
from tests.trainers import miniature
from tests.trainers.helpers import text_config

CHANGES = {
    "model.lora.rank": 3,
    "model.lora.alpha": 4.0,
    "model.trainable": ("lora/.*/[ab]", "decoder/ends/norm/.*"),
    "model.base_dtype": "bfloat16",
    "data.image_tasks": (),
    "rows.patches": 0,
    "sampling.prompt_patches": 0,
    "sft.steps": 3,
    "sft.eval_problems": 0,
    "sft.eval_every": 3,
    "sft.checkpoint_every": 3,
    "rl.iterations": 3,
    "rewards.workers": 0,
}


class StopAt:
    """A request to stop that comes at the given step, counted from the beginning of the attempt."""

    def __init__(self, step=None):
        self.left = step

    @property
    def requested(self):
        self.left = self.left and self.left - 1
        return self.left == 0

    def requested_at(self, step):
        return self.requested


def run(workdir, *stops):
    """The Setup, and the parameters at the beginning, between the stages and at the end. Stopped in each at `stops`."""
    config = miniature.get_config()
    config.update_from_flattened_dict(CHANGES)
    check_config(config)
    pipeline.prepare_workdir(config, workdir)
    here = setup.build(config, workdir)
    copied = functools.partial(jax.tree.map, np.array)  # the originals are given away
    begin = copied(here.init_params())
    for at in stops:
        with pytest.raises(Interrupted):
            supervised.train(here, supervised.sft(here), StopAt(at))
    between = copied(supervised.train(here, supervised.sft(here), StopAt()))
    params = lambda: jax.device_put(between, jax.tree.map(lambda leaf: leaf.sharding, here.params_like))  # noqa: E731
    for at in stops:
        with pytest.raises(Interrupted):
            rl.train(here, params(), StopAt(at))
    final = copied(rl.train(here, params(), StopAt()))
    return here, begin, between, final


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        miniature.prepare(patch)
        straight, halting = (tmp_path_factory.mktemp(name) for name in ("straight", "halting"))
        yield run(straight), run(halting, 2)


def flat_arrays(workdir, stage):
    with Checkpointer.reader(workdir / "checkpoints" / stage) as checkpoints:
        step = checkpoints.latest_step()
        described = checkpoints._read_record(step)["arrays"]
        shapes = {path: re.fullmatch(r"(\w+)\[([\d,]*)\]", text).groups() for path, text in described.items()}
        like = {path: np.empty([int(n) for n in dims.split(",") if n], dtype) for path, (dtype, dims) in shapes.items()}
        return step, checkpoints.restore(like)[1]


def metrics(workdir):
    rows = [json.loads(line) for name in ("sft_metrics.jsonl", "metrics.jsonl") for line in open(workdir / name)]
    return [{k: v for k, v in row.items() if not k.startswith(("seconds", "tokens_per_second"))} for row in rows]


def is_trained(path):
    return bool(re.fullmatch(r"lora/.*/[ab]|decoder/ends/norm/.*", path))


@pytest.mark.slow
def test_only_what_is_trained_moves_and_only_that_has_moments(runs):
    (here, begin, between, final), _ = runs
    stages = [dict(paths.flatten(tree)) for tree in (begin, between, final)]
    for path in stages[0]:
        before, middle, after = (stage[path] for stage in stages)
        if is_trained(path):
            assert before.dtype == np.float32
            assert (before != middle).any() and (middle != after).any(), path
        else:
            assert before.dtype == (np.float32 if path == "lora/scale" else jax.numpy.bfloat16)
            np.testing.assert_array_equal(before, middle)
            np.testing.assert_array_equal(before, after)
    assert sum(map(is_trained, stages[0])) == 2 * 7 + 1
    assert stages[0]["lora/scale"] == np.float32(4 / 3)
    for stage, prefix in (("sft", ""), ("rl", "state/")):
        _, arrays = flat_arrays(here.workdir, stage)
        moments = {path for path in arrays if re.search("/(mu|nu)/", path)}
        assert moments == {
            f"{prefix}opt_state/0/{kind}/{path}" for kind in ("mu", "nu") for path in filter(is_trained, stages[0])
        }


@pytest.mark.slow
def test_sampler_and_trainer_see_the_same_merged_model(runs):
    (here, _, _, final), _ = runs
    rows = [row for row in metrics(here.workdir) if "max_logprob_gap" in row]
    assert len(rows) == 3
    assert all(0 < row["max_logprob_gap"] < 1e-5 for row in rows)
    handed_over = jax.device_get(here.to_rollout(final, None))
    exported = jax.device_get(here.to_rollout(lora.merge(final), None))
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)  # noqa: E731
    jax.tree.map(close, handed_over, exported)


@pytest.mark.slow
def test_a_run_that_is_stopped_ends_as_one_that_is_not(runs):
    (straight, *results), (halting, *other_results) = runs
    jax.tree.map(np.testing.assert_array_equal, other_results, results)
    for stage in ("sft", "rl"):
        (step, arrays), (other_step, other) = (flat_arrays(here.workdir, stage) for here in (straight, halting))
        assert step == other_step == 3 and arrays.keys() == other.keys()
        assert [path for path in arrays if arrays[path].tobytes() != other[path].tobytes()] == []
    assert metrics(halting.workdir) == metrics(straight.workdir)


# --- plans and refusals


def test_the_plan_counts_moments_and_gradients_of_adapters_alone():
    changes = {"mesh.data": 2, "model.lora.rank": 16, "model.base_dtype": "bfloat16"}
    config = text_config(**changes)
    policy = plan.Policy(plan.setup.model_config(config, 384))
    weights = plan.Weights.of(config, policy, plan.mesh_of_sizes(config, 8))
    # A layer: q and o 128 x 128, k and v 128 x 64, three of 128 x 384. Each adapter lies in halves over fsdp or tensor.
    adapters = 4 * 16 * (2 * (128 + 128) + 2 * (128 + 64) + 3 * (128 + 384))
    assert weights.trained_bytes == 4 * adapters // 2
    assert weights.moments("rl") == 2 * weights.trained_bytes + 4
    whole = plan.Weights.of(text_config(**{"mesh.data": 2}), policy, plan.mesh_of_sizes(config, 8))
    assert weights.masters == whole.masters // 2 + weights.trained_bytes + 4  # and the scale
    text = plan.describe(config)
    assert f"lora {adapters + 1:,}" in text and f"trained: {adapters:,}; frozen in bfloat16" in text
    assert "frozen parameters, bfloat16" in text and "kernels with adapters merged" in text


@pytest.mark.parametrize(
    "changes, told",
    [
        ({"model.trainable": ("vison/.*",)}, r"'vison/\.\*' of the parameters to train .*Near it are 'vision/\.\*'"),
        (
            {"model.lora.rank": 2, "model.lora.targets": ("decoder/q",)},
            "'decoder/q' of the kernels to adapt matches no",
        ),
        ({"model.lora.rank": 2, "model.trainable": ("vision/.*",)}, "makes adapters, but .*Add 'lora/"),
        ({"model.trainable": ()}, "trains nothing"),
        ({"model.base_dtype": "bfloat16"}, "but all are.*Set config.model.lora.rank"),
        ({"model.base_dtype": "int8", "model.lora.rank": 2}, "must be 'float32' or 'bfloat16'"),
        ({"model.lora.rank": 2, "model.lora.alpha": 0.0}, "lora.alpha=0.0 must be positive"),
        ({"model.lora.rank": -1}, "model.lora.rank=-1 must be at least 0"),
    ],
)
def test_what_cannot_be_trained_is_refused_before_anything_starts(changes, told):
    with pytest.raises(ValueError, match=told):
        plan.describe(text_config(**changes))
