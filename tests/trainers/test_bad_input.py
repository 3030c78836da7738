"""What cannot work is refused in one clear message, before it costs anything, and damages nothing that is saved."""

import dataclasses
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kimi_jax.models import hf
from kimi_jax.trainers import objectives, pipeline, rl, setup, supervised
from kimi_jax.trainers.interrupt import StopRequest
from kimi_jax.training.checkpoint import Checkpointer
from kimi_jax.training.metrics import MetricsWriter
from kimi_jax.training.step import NonFiniteError
from kimi_jax.types import Problem
from tests.trainers import miniature, published


@pytest.fixture(autouse=True)
def prepared(monkeypatch):
    miniature.prepare(monkeypatch)


@pytest.fixture
def nothing_expensive(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("training began")

    monkeypatch.setattr(supervised, "train", refuse)


@pytest.fixture
def not_even_built(monkeypatch, nothing_expensive):
    def refuse(*args, **kwargs):
        raise AssertionError("problems were drawn")

    monkeypatch.setattr(pipeline, "build", refuse)


def config_with(**changes):
    """Names with two underscores where a dot belongs: rl__tau."""
    config = miniature.get_config()
    config.update_from_flattened_dict({name.replace("__", "."): value for name, value in changes.items()})
    return config


def contents(directory: pathlib.Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


# --- the config -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes, told",
    [
        ({"sft__rows": 13}, r"sft\.rows=13 must be a multiple of config\.sft\.micro_rows=8"),
        ({"rl__updates": 5}, r"rl\.problems=6 must be a multiple of config\.rl\.updates=5"),
        ({"rows__logits_chunk": 7}, r"rows\.tokens=64 must be a multiple of config\.rows\.logits_chunk=7"),
        ({"rows__logits_chunk": 0}, r"rows\.logits_chunk=0"),
        ({"rl__responses": 1}, r"rl\.responses=1: a group needs at least 2"),
        ({"sampling__chunk": 0}, r"sampling\.chunk=0 must be at least 1"),
        ({"sampling__max_tokens": 61}, r"rows\.tokens=64.* = 92"),
        ({"sampling__prompt_patches": 99}, r"rows\.patches=64.*sampling\.prompt_patches = 99"),
        ({"data__image_tasks": ("pips", "text_image")}, r"multiples of the number of image tasks, 2"),
        ({"sft__examples_per_kind": 31}, r"sft\.examples_per_kind=31 exceeds config\.data\.train_per_kind=29"),
        ({"model__dtype": "float8"}, r"model\.dtype='float8' must be one of float32, bfloat16, float16"),
        ({"rl__tau": 0.0}, r"rl\.tau=0\.0 must be positive"),
        ({"rl__temperature": float("nan")}, r"rl\.temperature=nan must be positive"),
        ({"rl__optimizer__clip_norm": 0.0}, r"rl\.optimizer\.clip_norm=0\.0 must be positive"),
        ({"rl__optimizer__name": "adamw"}, r"rl\.optimizer\.name='adamw' .* Did you mean 'adam'"),
        ({"rl__optimizer__schedule": "cosin"}, r"rl\.optimizer\.schedule='cosin' .* Did you mean 'cosine'"),
        ({"rl__curriculum": "hard"}, r"rl\.curriculum='hard' .* Did you mean 'hard_after'"),
        ({"rl__checkpoint_every": 0}, r"rl\.checkpoint_every=0 must be at least 1"),
        ({"rl__keep_last": 0}, r"rl\.keep_last=0 must be at least 1"),
        ({"sft__eval_every": 0}, r"sft\.eval_every=0 must be at least 1"),
        ({"seed": -1}, r"seed=-1 must be at least 0"),
        ({"rl__oversubscribe": float("nan")}, r"rl\.oversubscribe=nan must be at least 0"),
        (
            {"data__text_tasks": ("chain", "chain"), "data__train_per_kind": 30, "data__heldout_per_kind": 10},
            "names a task twice",
        ),
        ({"sft__steps": 0, "rl__iterations": 0}, "there is nothing to do"),
        ({"sft__steps": 0, "reward_model__kind": "chain_of_thought"}, "reward model: there is nothing to do"),
        ({"rl__segment_tokens": 0}, r"rl\.segment_tokens=0 must be at least 1"),
        ({"rl__max_segment_lag": -1}, r"rl\.max_segment_lag=-1 must be at least 0"),
        ({"rl__max_age": -1}, r"rl\.max_age=-1 must be at least 0"),
        ({"rl__oversubscribe": -0.5}, r"rl\.oversubscribe=-0\.5 must be at least 0"),
        ({"rl__oversubscribe": 9.0}, r"rl\.oversubscribe=9\.0 begins with 60 problems, but there are 58\. Raise"),
        ({"rewards__workers": -1}, r"rewards\.workers=-1 must be at least 0"),
        ({"rewards__deadline_s": 0.0}, r"rewards\.deadline_s=0\.0 must be positive"),
        ({"rewards__weights__repetition": -0.1}, r"rewards\.weights\.repetition=-0\.1 must be at least 0"),
        ({"sampling__repetition__window": -1}, r"sampling\.repetition\.window=-1 must be at least 0"),
    ],
)
def test_arithmetic_that_does_not_work_out(changes, told, tmp_path, not_even_built):
    with pytest.raises(ValueError, match=told):
        pipeline.run(config_with(**changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_misspelt_key(tmp_path, not_even_built):
    config = miniature.get_config()
    with pytest.raises((AttributeError, KeyError), match="tau"):  # the tree is locked
        config.rl.taus = 0.1
    with config.unlocked():
        config.rl.taus = 0.1
    with pytest.raises(ValueError, match=r"'rl\.taus'.*Did you mean 'rl\.tau'"):
        pipeline.run(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "changes, told",
    [
        ({"data__image_tasks": ("pipps",)}, "did you mean 'pips'"),
        ({"sampling__prompt_tokens": 5}, r"problem '(chain|pips):.* the limit is sampling\.prompt_tokens=5\. Raise"),
        ({"sampling__prompt_patches": 8}, r"problem 'pips:.* the limit is sampling\.prompt_patches=8\. Raise"),
        ({"tokenizer__vocab_size": 9}, "vocab_size=9 is too small"),
        ({"mesh__fsdp": 17}, "does not cover"),
        ({"model__size": "huge"}, "Choose one of"),
        ({"model__attention": "fast"}, "'auto' or one of"),
        ({"sampling__repetition__repeats": 1}, r"repetition repeats=1 must lie in 2\.\.1000"),
        ({"rl__curriculum": "hard_after", "rl__hard_difficulty": 9}, "the hardest problem has difficulty 3"),
        (
            {"rl__curriculum": "hard_after", "rl__curriculum_iterations": 9, "rl__problems": 20},
            "Cannot draw 20 distinct problems in iteration 9: curriculum 'hard_after' has 18 of 58",
        ),
    ],
)
def test_settings_that_do_not_fit_the_data_or_the_machine(changes, told, tmp_path, nothing_expensive):
    with pytest.raises(ValueError, match=told):
        pipeline.run(config_with(**changes), tmp_path / "run")
    # The way out that the message shows is open: the same workdir, before anything was trained.
    pipeline.prepare_workdir(miniature.get_config(), tmp_path / "run")


# --- the workdir ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("below", ["", "deeper"])
def test_a_workdir_that_cannot_be_written_to(below, tmp_path, not_even_built):
    file = tmp_path / "file"
    file.write_text("mine")
    with pytest.raises(PermissionError, match=r"Cannot write to the workdir .*file.*Choose another --workdir"):
        pipeline.run(miniature.get_config(), file / below)
    assert file.read_text() == "mine"


def test_a_workdir_of_another_config(tmp_path, not_even_built):
    pipeline.prepare_workdir(miniature.get_config(), tmp_path)
    (tmp_path / "checkpoints/sft/4").mkdir(parents=True)
    before = contents(tmp_path)
    told = r"another config:\n  rl\.tau: there 0\.\d+, now 0\.7\nUse the same settings .* another --workdir"
    with pytest.raises(ValueError, match=told):
        pipeline.run(config_with(rl__tau=0.7), tmp_path)
    assert contents(tmp_path) == before
    pipeline.prepare_workdir(config_with(rl__iterations=99), tmp_path)  # a longer run of the same is allowed


def test_before_anything_is_saved_another_config_begins_anew(tmp_path):
    """Such as one with less memory or a lower rate, which a first attempt asked for."""
    pipeline.prepare_workdir(miniature.get_config(), tmp_path)
    made = [tmp_path / "tokenizer.model", tmp_path / "eval_sft.json"]
    for path in made:
        path.write_text("of other problems, or another model")
    (tmp_path / "checkpoints/sft/4.orbax-checkpoint-tmp").mkdir(parents=True)  # a save that was not finished
    pipeline.prepare_workdir(miniature.get_config(), tmp_path)
    assert all(path.exists() for path in made)
    pipeline.prepare_workdir(config_with(seed=7), tmp_path)
    assert not any(path.exists() for path in made)
    assert json.loads((tmp_path / "config.json").read_text())["seed"] == 7


def test_a_checkpoint_of_another_shape(tmp_path, monkeypatch):
    config = miniature.get_config()
    pipeline.prepare_workdir(config, tmp_path)
    here = setup.build(config, tmp_path)
    like = setup.params_like(here.config, here.policy, here.mesh)
    params = jax.tree.map(lambda x: jax.device_put(np.zeros(x.shape, x.dtype), x.sharding), like)
    state = here.new_state(params, here.stepper(supervised.loss_fn, config.sft.optimizer, 12).init_optimizer(params))
    with Checkpointer(tmp_path / "checkpoints/sft", keep_last=1, keep_best=0, best_metric=None) as checkpoints:
        checkpoints.save(4, state, {"waiting": []}, wait=True)
    before = contents(tmp_path / "checkpoints")
    monkeypatch.setattr(miniature, "SIZE", dataclasses.replace(miniature.SIZE, mlp_width=44))
    with pytest.raises(ValueError, match=r"Step 4 of .*\n.*checkpoint float32\[1,\d*40.*, expected float32\[1,\d*44"):
        pipeline.run(miniature.get_config(), tmp_path)
    assert contents(tmp_path / "checkpoints") == before


# --- a published model ----------------------------------------------------------------------------------------------


def cut_short(directory):
    shard = sorted(directory.glob("*.safetensors"))[-1]
    shard.write_bytes(shard.read_bytes()[:-3])


def change(name, **values):
    def edit(directory):
        options = json.loads((directory / name).read_text())
        (directory / name).write_text(json.dumps(options | values))

    return edit


def remove(pattern):
    return lambda directory: [path.unlink() for path in sorted(directory.glob(pattern))[:1]]


@pytest.mark.parametrize(
    "family, damage, told",
    [
        ("qwen2", remove("config.json"), "There is no .*config.json, so .* is no model in the Hugging Face layout"),
        ("qwen2", change("config.json", architectures=["Qwen9ForCausalLM"]), "Qwen9ForCausalLM is not supported"),
        ("qwen2", change("config.json", vocab_size=290), "tokenizer has ids up to 298, but the embedding .* 290 rows"),
        ("qwen2", change("config.json", intermediate_size=38), "has shape .*, but config.json makes it"),
        ("qwen2", change("config.json", num_hidden_layers=2), "lacks the tensor 'model.layers.1"),
        ("qwen2", cut_short, r"model-\d+-of-\d+.safetensors is no sound safetensors file"),
        ("qwen2", remove("model-*.safetensors"), r"model-00001-of-\d+.safetensors"),
        ("qwen2", remove("tokenizer.json"), "no vocabulary in"),
        ("qwen2", change("tokenizer_config.json", chat_template="{% if"), "chat template has a syntax error in line 1"),
        ("qwen2", change("tokenizer_config.json", chat_template=None), "no chat template in"),
        ("qwen3-vl", remove("preprocessor_config.json"), "no image processor in"),
        ("qwen3-vl", change("preprocessor_config.json", patch_size=4), "patch_size=4, but the vision tower .* has 3"),
    ],
)
def test_a_directory_that_is_not_sound_is_refused_before_problems_are_drawn(
    family, damage, told, tmp_path, monkeypatch, nothing_expensive
):
    def refuse(config):
        raise AssertionError("problems were drawn")

    monkeypatch.setattr(setup, "make_problem_sets", refuse)
    directory = published.write(family, tmp_path / "model")
    damage(directory)
    no_images = {"data__image_tasks": (), "sampling__prompt_patches": 0, "rows__patches": 0}
    config = config_with(model__path=str(directory), **no_images)
    with pytest.raises((ValueError, FileNotFoundError), match=told) as caught:
        pipeline.run(config, tmp_path / "run")
    assert len(str(caught.value).splitlines()) == 1
    assert not (tmp_path / "run" / "hf").exists()


def test_a_text_model_is_not_asked_about_pictures(tmp_path, nothing_expensive):
    directory = published.write("llama", tmp_path / "model")
    with pytest.raises(ValueError, match="reads text alone, but config.data.image_tasks=.'pips',.*Set"):
        pipeline.run(config_with(model__path=str(directory)), tmp_path / "run")


def test_a_picture_without_pixels_is_named(tmp_path, monkeypatch, nothing_expensive):
    directory = published.write("qwen2.5-vl", tmp_path / "model")
    problem = Problem(
        id="7", task="pips", prompt="How many? <image>", answer="0", images=(np.zeros((0, 5, 3), "uint8"),)
    )
    monkeypatch.setattr(setup, "make_problem_sets", lambda config: ([problem], []))
    with pytest.raises(
        ValueError, match=r"problem '7' of task 'pips': an image must be .*non-empty.*got .*\[0, 5, 3\]"
    ):
        pipeline.run(config_with(model__path=str(directory)), tmp_path / "run")


def test_a_message_to_a_published_model_needs_one(tmp_path, not_even_built):
    with pytest.raises(ValueError, match="config.model.path names none .*Give --config.model.path=DIR"):
        pipeline.run(config_with(model__system="Reckon."), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_run_does_not_write_into_an_import(tmp_path, not_even_built):
    published.write("qwen2", tmp_path / "hf")
    before = contents(tmp_path)
    with pytest.raises(ValueError, match="is an import of .*Use another --workdir"):
        pipeline.run(config_with(model__path=str(tmp_path)), tmp_path)
    assert contents(tmp_path) == before


def test_before_training_another_model_brings_its_own_side_files(tmp_path, nothing_expensive):
    changes = {
        "data__image_tasks": (),
        "sampling__prompt_patches": 0,
        "rows__patches": 0,
        "sampling__prompt_tokens": 41,
    }
    for family, extra in (("qwen2", "merges.txt"), ("llama", None)):
        directory = published.write(family, tmp_path / family)
        if extra:
            (directory / extra).write_text("#version")
        with pytest.raises(AssertionError, match="training began"):
            pipeline.run(config_with(model__path=str(directory), **changes), tmp_path / "run")
        copied = {path.name for path in (tmp_path / "run" / "hf").iterdir()}
        assert (extra in copied) == bool(extra) and hf.TENSORS in copied
        assert (tmp_path / "run/hf/config.json").read_bytes() == (directory / "config.json").read_bytes()


# --- numbers that are none ------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_loss_that_is_not_finite_stops_the_run_and_the_last_checkpoint_is_good(tmp_path, monkeypatch):
    pipeline.prepare_workdir(miniature.get_config(), tmp_path)
    here = setup.build(miniature.get_config(), tmp_path)
    first = here.init_params()

    def train(iterations):
        config = config_with(rl__iterations=iterations, rl__checkpoint_every=1)
        with StopRequest() as stop:
            rl.train(dataclasses.replace(here, config=config), jax.tree.map(jnp.copy, first), stop)

    def checkpoint():
        like = {"state": {"params": setup.params_like(here.config, here.policy, here.mesh)}}
        with Checkpointer.reader(tmp_path / "checkpoints/rl") as checkpoints:
            step, arrays, _ = checkpoints.restore(like, partial=True)
        return step, jax.device_get(arrays)

    train(2)
    before = checkpoint()
    real = objectives.surrogate_loss
    with monkeypatch.context() as patch:
        patch.setattr(objectives, "surrogate_loss", lambda *args, **kwargs: (real(*args, **kwargs)[0] * np.nan, {}))
        with pytest.raises(NonFiniteError, match=r"RL iteration 3: not finite: .*loss=nan.*last checkpoint is intact"):
            train(3)
    step, arrays = checkpoint()
    assert step == before[0] == 2
    jax.tree.map(np.testing.assert_array_equal, arrays, before[1])
    assert [row["step"] for row in MetricsWriter(tmp_path / "metrics.jsonl").read()] == [1, 2]


@pytest.mark.slow
def test_a_learning_rate_that_is_absurd_stops_sft(tmp_path):
    with pytest.raises(NonFiniteError, match=r"SFT, update \d+ or shortly before: not finite: .*Lower the learning"):
        pipeline.run(config_with(sft__optimizer__peak=1e30), tmp_path)
    assert not (tmp_path / "eval_sft.json").exists()
    with Checkpointer.reader(tmp_path / "checkpoints/sft") as checkpoints:
        assert checkpoints.latest_step() is None
