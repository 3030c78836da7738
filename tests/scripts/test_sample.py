"""A question to a checkpoint on disk: what the command prints is what the engine writes with the saved weights."""

import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest

from kimi_jax.arrays import TrainState
from kimi_jax.data.chat import encode_prompt
from kimi_jax.data.images import load_image
from kimi_jax.data.tokenizer import Tokenizer
from kimi_jax.sampling.handover import make_handover
from kimi_jax.sampling.logits import SamplingSettings
from kimi_jax.trainers import setup
from kimi_jax.training import sharding
from kimi_jax.training.checkpoint import Checkpointer
from scripts import sample
from tests.trainers import miniature

VOCABULARY = 293
TEXT = "Compute 3 + 4 * 5."
PICTURE = "How many circles?"


@pytest.fixture(scope="module", autouse=True)
def miniature_size():
    with pytest.MonkeyPatch.context() as patch:
        miniature.prepare(patch)
        yield


@pytest.fixture(scope="module")
def weights():
    """By stage."""
    config = miniature.get_config()
    policy = setup.make_policy(config, one_device(), setup.model_config(config, vocab_size=VOCABULARY))
    params = jax.jit(policy.init)(jax.random.key(0))
    return {"sft": params, "rl": jax.tree.map(lambda x: 2 * x, params)}


@pytest.fixture(scope="module")
def workdir(tmp_path_factory, weights):
    """What a run leaves behind."""
    path = tmp_path_factory.mktemp("run")
    config = miniature.get_config()
    config.sampling.prompt_tokens, config.sampling.prompt_patches, config.sampling.max_tokens = 13, 4, 29
    (path / "config.json").write_text(config.to_json_best_effort())
    assert Tokenizer.train([TEXT, PICTURE], path / "tokenizer.model", vocab_size=VOCABULARY).vocab_size == VOCABULARY
    for stage, step in (("sft", 7), ("rl", 11)):
        params = weights[stage]
        state = TrainState(params, {"mu": jax.tree.map(jnp.zeros_like, params)}, jnp.asarray(step))
        arrays = {"state": state, "prompts": {"correct": np.arange(5)}} if stage == "rl" else state
        with Checkpointer(path / "checkpoints" / stage, keep_last=1, keep_best=0, best_metric=None) as checkpoints:
            checkpoints.save(step, arrays, {}, wait=True)
    pixels = np.random.default_rng(0).integers(0, 256, (9, 14, 3), dtype=np.uint8)
    PIL.Image.fromarray(pixels).save(path / "circles.png")
    return path


def one_device():
    return sharding.make_mesh(data=1, fsdp=1, tensor=1, devices=jax.devices()[:1])


def expected(workdir, params, prompt, images, *, max_tokens=29, **settings):
    """The same by Engine.generate, beside another prompt, on one device, in roomier buckets."""
    config = miniature.get_config()
    tokenizer = Tokenizer.load(workdir / "tokenizer.model")
    policy = setup.make_policy(config, one_device(), setup.model_config(config, tokenizer.vocab_size))
    vision = policy.config.vision
    prompts = [
        encode_prompt(text, shown, tokenizer=tokenizer, patch_size=vision.patch_size, merge=vision.merge_size)
        for text, shown in ((prompt, images), ("another", []))
    ]
    chat = setup.native_chat(tokenizer, policy.config)
    engine = setup.make_engine(config, one_device(), policy, chat, rows=2, max_tokens=29, prompt_tokens=67)
    params = make_handover(policy, one_device(), dtype="float32")(params, None)
    settings = SamplingSettings.of(end_ids=[tokenizer.end_id], **{"temperature": 1.0} | settings)
    groups = engine.generate(
        params,
        prompts,
        k=1,
        first_serial=0,
        run_key=jax.random.key(4),
        settings=settings,
        policy_version=0,
        budget=max_tokens,
    )
    return groups[0][0]


def ask(workdir, *arguments):
    return sample.main([f"--workdir={workdir}", "--seed=4", *arguments])


def test_the_text_is_that_of_the_engine(workdir, weights, capsys):
    assert ask(workdir, f"--prompt={TEXT}") == 0
    out, err = capsys.readouterr()
    rollout = expected(workdir, weights["rl"], TEXT, [])
    assert out == rollout.text + "\n" and len(rollout) > 8
    assert "[rl, step 11," in err


def test_images_settings_stage_stdin_and_json(workdir, weights, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", types.SimpleNamespace(read=lambda: PICTURE + "\n"))
    file = workdir / "circles.png"
    options = [f"--image={file}", "--stage=sft", "--temperature=0.7", "--top_k=17", "--max_tokens=11", "--json"]
    assert ask(workdir, *options) == 0
    printed = json.loads(capsys.readouterr().out)
    prompt = "<image>" + PICTURE  # the marker was missing
    rollout = expected(workdir, weights["sft"], prompt, [load_image(file)], max_tokens=11, temperature=0.7, top_k=17)
    assert (printed["text"], printed["tokens"], printed["stop"]) == (rollout.text, len(rollout), rollout.stop.value)
    assert printed["logprob"] == pytest.approx(rollout.logprobs.sum(), abs=1e-3)
    assert (printed["stage"], printed["step"], printed["prompt"]) == ("sft", 7, prompt)


def test_a_run_of_an_earlier_version_answers_too(workdir, weights, capsys, monkeypatch):
    """Its config knows nothing of pages."""
    path = workdir / "config.json"
    whole = path.read_text()
    config = json.loads(whole)
    for name in ("page", "pages", "prefill_tokens", "repetition"):
        del config["sampling"][name]
    try:
        path.write_text(json.dumps(config))
        assert ask(workdir, f"--prompt={TEXT}", "--max_tokens=5") == 0
    finally:
        path.write_text(whole)
    assert capsys.readouterr().out == expected(workdir, weights["rl"], TEXT, [], max_tokens=5).text + "\n"


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--image=absent.png"], "no image file at 'absent.png'"),
        (["--image={workdir}/config.json"], "cannot be decoded"),
        (["--prompt=<image> and <image>", "--image={workdir}/circles.png"], "2 <image> markers but 1 images"),
        (["--prompt="], "question is empty"),
        (["--max_tokens=0"], "--max_tokens=0"),
        (["--top_p=0"], "top_p=0.0 must lie in"),
        (["--workdir={workdir}/typo"], "holds no run: there is no"),
        (["--workdir={empty}"], "no complete checkpoint yet"),
        (["--workdir={sft}", "--stage=rl"], "no complete checkpoint of --stage=rl, only of sft"),
    ],
)
def test_errors_are_one_line_and_leave_no_trace(workdir, tmp_path, capsys, arguments, complaint):
    for name in ("empty", "sft"):
        (tmp_path / name / "checkpoints").mkdir(parents=True)
        for file in ("config.json", "tokenizer.model"):
            (tmp_path / name / file).write_bytes((workdir / file).read_bytes())
    (tmp_path / "sft" / "checkpoints" / "sft").symlink_to(workdir / "checkpoints" / "sft")
    before = sorted(workdir.rglob("*")), sorted(tmp_path.rglob("*"))
    places = {"workdir": workdir, "empty": tmp_path / "empty", "sft": tmp_path / "sft"}
    assert ask(workdir, f"--prompt={TEXT}", *(argument.format(**places) for argument in arguments)) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("Error: ") and err.count("\n") == 1 and complaint in err
    assert (sorted(workdir.rglob("*")), sorted(tmp_path.rglob("*"))) == before


def test_only_finished_characters_are_shown():
    pieces = []
    texts = ["a\ufffd", "aé", "aé", "aéb\ufffd\ufffd", "aéb\ufffd\ufffd"]
    rollouts = [types.SimpleNamespace(text=text) for text in texts]
    assert sample.write_as_it_comes(rollouts, pieces.append) is rollouts[-1]
    assert [piece for piece in pieces if piece] == ["a", "é", "b", "\ufffd\ufffd"]
