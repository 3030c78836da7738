"""A run that goes on from another: it has its parameters to the bit and its tokenizer, or is refused by name."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kimi_jax.models import paths
from kimi_jax.trainers import origin, pipeline, setup
from kimi_jax.training.checkpoint import Checkpointer
from tests.trainers import miniature, published

TEXT = {"data.image_tasks": (), "rows.patches": 0, "sampling.prompt_patches": 0, "sampling.prompt_tokens": 41}


@pytest.fixture(scope="module", autouse=True)
def prepared():
    with pytest.MonkeyPatch.context() as patch:
        miniature.prepare(patch)
        yield


def config_with(**changes):
    config = miniature.get_config()
    config.update_from_flattened_dict({name.replace("__", "."): value for name, value in changes.items()})
    return config


def begun(config, workdir):
    pipeline.prepare_workdir(config, workdir)
    return setup.build(config, workdir)


def save(workdir, stage, step, tree):
    with Checkpointer(workdir / "checkpoints" / stage, keep_last=9, keep_best=0, best_metric=None) as checkpoints:
        checkpoints.save(step, tree, {}, wait=True)


def drawn(like, seed):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jax.device_put(rng.normal(size=x.shape).astype(x.dtype), x.sharding), like)


@pytest.fixture(scope="module")
def earlier(tmp_path_factory):
    """(workdir, {(stage, step): parameters}) of a run with both stages, of RL two steps."""
    workdir = tmp_path_factory.mktemp("earlier")
    like = begun(miniature.get_config(), workdir).params_like
    params = {("sft", 5): drawn(like, 5), ("rl", 2): drawn(like, 2), ("rl", 11): drawn(like, 11)}
    save(workdir, "sft", 5, {"params": params["sft", 5], "step": np.zeros(())})
    for step in (2, 11):
        save(workdir, "rl", step, {"state": {"params": params["rl", step]}, "buffer": np.zeros(3)})
    return workdir, params


@pytest.mark.parametrize(
    "below, expected",
    [
        ("", ("rl", 11)),
        ("checkpoints/sft", ("sft", 5)),
        ("checkpoints/rl", ("rl", 11)),
        ("checkpoints/rl/2", ("rl", 2)),
    ],
)
def test_it_begins_with_the_parameters_and_the_tokenizer_of_the_checkpoint(below, expected, earlier, tmp_path):
    workdir, params = earlier
    # Other problems, on which another tokenizer would have been trained.
    here = begun(config_with(init=str(workdir / below), data__text_tasks=("countdown",)), tmp_path)
    assert (tmp_path / "tokenizer.model").read_bytes() == (workdir / "tokenizer.model").read_bytes()
    given, like = here.init_params(), here.params_like
    jax.tree.map(np.testing.assert_array_equal, given, params[expected])
    assert all(jax.tree.leaves(jax.tree.map(lambda x, y: x.sharding == y.sharding, given, like)))


def test_what_a_stage_adds_begins_as_in_any_run(earlier, tmp_path):
    workdir, params = earlier
    changes = {"model.lora.rank": 3, "model.base_dtype": "bfloat16", "model.scalar_head": True}
    given = dict(paths.flatten(begun(config_with(init=str(workdir), **changes), tmp_path).init_params()))
    expected = dict(paths.flatten(params["rl", 11]))
    for path, leaf in expected.items():
        np.testing.assert_array_equal(given[path], leaf.astype(jnp.bfloat16), err_msg=path)
    added = given.keys() - expected.keys()
    assert any("scalar_head" in path for path in added) and any(path.startswith("lora/") for path in added)
    plain = dict(paths.flatten(begun(config_with(**changes), tmp_path / "plain").init_params()))
    for path in added:
        np.testing.assert_array_equal(given[path], plain[path], err_msg=path)


def test_once_it_has_checkpoints_of_its_own_the_other_run_may_go(earlier, tmp_path):
    shutil.copytree(earlier[0], tmp_path / "copy")
    config = config_with(init=str(tmp_path / "copy"))
    here = begun(config, tmp_path / "run")
    save(tmp_path / "run", "sft", 1, {"params": here.init_params()})
    shutil.rmtree(tmp_path / "copy")
    assert begun(config, tmp_path / "run").chat.tokenizer.vocab_size == here.chat.tokenizer.vocab_size


@pytest.fixture
def no_problems(monkeypatch):
    def refuse(config):
        raise AssertionError("problems were drawn")

    monkeypatch.setattr(setup, "make_problem_sets", refuse)


def refused(config, workdir, told, error=ValueError):
    with pytest.raises(error, match=told):
        pipeline.run(config, workdir)
    assert not (workdir / "checkpoints").exists()


def test_another_shape(earlier, tmp_path, monkeypatch, no_problems):
    monkeypatch.setattr(miniature, "SIZE", dataclasses.replace(miniature.SIZE, mlp_width=44))
    config = config_with(init=str(earlier[0]))
    refused(
        config, tmp_path, r"(?s)another shape\. Step 11 of .*gate_proj.*checkpoint float32\[1,24,40\], expected .*44"
    )


def test_a_model_that_would_leave_something_out(earlier, tmp_path, monkeypatch, no_problems):
    monkeypatch.setattr(miniature, "SIZE", dataclasses.replace(miniature.SIZE, vision=None))
    refused(
        config_with(init=str(earlier[0]), **TEXT), tmp_path, "has parameters that this model lacks, '.*vision/.*' for"
    )


def test_another_tokenizer(earlier, tmp_path):
    config = config_with(init=str(earlier[0]))
    pipeline.prepare_workdir(config, tmp_path)
    setup.Tokenizer.train(["other words, other pieces"] * 3, tmp_path / "tokenizer.model", vocab_size=281)
    refused(config, tmp_path, "has another tokenizer: .*tokenizer.model and .* differ.*new --workdir")


def test_a_published_model_and_one_of_our_own(earlier, tmp_path, no_problems):
    directory = published.write("qwen2", tmp_path / "model")
    config = config_with(init=str(earlier[0]), model__path=str(directory), **TEXT)
    refused(config, tmp_path / "run", "began with one of our own sizes. Go on from it without config.model.path=")


def test_from_a_run_that_began_with_a_published_model(tmp_path):
    directory = published.write("qwen2", tmp_path / "model")
    first = begun(config_with(model__path=str(directory), **TEXT), tmp_path / "first")
    params = drawn(first.params_like, 7)
    save(tmp_path / "first", "sft", 3, {"params": params})
    # The weights of the published model are no longer needed: what the run kept of it is enough.
    for path in (str(directory), str(tmp_path / "first")):
        config = config_with(init=str(tmp_path / "first"), model__path=path, **TEXT)
        jax.tree.map(np.testing.assert_array_equal, begun(config, tmp_path / path[-3:]).init_params(), params)
    refused(config_with(init=str(tmp_path / "first"), **TEXT), tmp_path / "own", "began with a published model. Go on")
    (tmp_path / "first/hf/tokenizer.json").write_text("{}")
    refused(
        config_with(init=str(tmp_path / "first"), model__path=str(directory), **TEXT), tmp_path / "x", "hf/tok.*.json"
    )


def test_a_base_of_the_rotary_embedding_that_was_changed_is_not_forgotten(earlier, tmp_path, no_problems):
    """It is no parameter, so that no shape would tell."""
    shutil.copytree(earlier[0], tmp_path / "long")
    record = json.loads((tmp_path / "long/config.json").read_text())
    record["model"]["rope_base"] = 1e6
    (tmp_path / "long/config.json").write_text(json.dumps(record))
    told = r"was trained with model\.rope_base=1e\+06\. Set config\.model\.rope_base=1e\+06 here as well, or another"
    refused(config_with(init=str(tmp_path / "long")), tmp_path / "run", told)
    with pytest.raises(AssertionError, match="problems were drawn"):
        pipeline.run(config_with(init=str(tmp_path / "long"), model__rope_base=1e6), tmp_path / "run")
    assert setup.model_config(config_with(model__rope_base=3e5), 281).rope_base == 3e5


@pytest.mark.parametrize(
    "path, told",
    [
        ("nowhere", "holds no complete checkpoint. Give the workdir of an earlier run"),
        ("run/checkpoints/rl", "no such checkpoint; .* holds the steps none"),
        ("run/checkpoints/sft/4", r"no such checkpoint; .* holds the steps \[3\]"),
    ],
)
def test_nothing_to_begin_with(path, told, tmp_path, no_problems):
    (tmp_path / "run/checkpoints/sft/3").mkdir(parents=True)
    refused(config_with(init=str(tmp_path / path)), tmp_path / "new", told, FileNotFoundError)


def test_several_stages_none_of_them_rl(tmp_path):
    for stage in ("sft", "rm"):
        (tmp_path / f"checkpoints/{stage}/3").mkdir(parents=True)
    with pytest.raises(ValueError, match="holds the stages rm, sft. Say which: .*/checkpoints/rm, for example"):
        origin.find(tmp_path)
    assert origin.find(tmp_path / "checkpoints/sft").step == 3
