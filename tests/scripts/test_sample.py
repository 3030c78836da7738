"""A question to a checkpoint on disk: what the command prints is what the engine writes with the saved weights."""

import json
import re
import shutil
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
from scripts import import_weights, sample
from tests.trainers import miniature, published

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


def test_a_character_that_is_shown_is_not_shown_again():
    """Where bytes stand for characters (Llama 2), one unfinished character takes those beside it with it."""
    pieces = []
    texts = ["aé", "a\ufffd\ufffd\ufffd", "aé左", "a" + 6 * "\ufffd", "aé左b"]
    sample.write_as_it_comes([types.SimpleNamespace(text=text) for text in texts], pieces.append)
    assert "".join(pieces) == "aé左b" and pieces[0] == "aé"


# --- published models -----------------------------------------------------------------------------------------------

WRITTEN = 19  # tokens
RAW = "12 pips +3=? <|im_end|> \u00e9\u5de6 \U0001f642"


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    root = tmp_path_factory.mktemp("published")
    return {family: published.write(family, root / family) for family in ("qwen2", "qwen2.5-vl")}


def ask_model(capsys, directory, *arguments):
    options = ["--temperature=0", f"--max_tokens={WRITTEN}", "--ignore_end", "--json"]
    assert sample.main([f"--model={directory}", *options, *arguments]) == 0
    return json.loads(capsys.readouterr().out)


def generated(model, inputs):
    """What transformers writes, and log p of each of its tokens."""
    import torch

    model.generation_config = type(model.generation_config)(pad_token_id=0)
    length = inputs["input_ids"].shape[1]
    with torch.no_grad():
        out = model.generate(
            **inputs, do_sample=False, max_new_tokens=WRITTEN, output_logits=True, return_dict_in_generate=True
        )
    ids = out.sequences[0, length:]
    logprobs = torch.log_softmax(torch.cat(out.logits).float(), dim=-1)
    return ids.tolist(), logprobs[torch.arange(len(ids)), ids].numpy()


def assert_answers_as(printed, tokenizer, model, inputs):
    ids, logprobs = generated(model, inputs)
    assert printed["prompt_token_ids"] == inputs["input_ids"][0].tolist()
    assert printed["token_ids"] == ids and len(ids) == WRITTEN and len(set(ids)) > 3
    np.testing.assert_allclose(printed["logprobs"], logprobs, atol=1e-4)
    assert printed["text"] == tokenizer.decode(ids, skip_special_tokens=True)
    assert printed["stop"] == "length"


def test_a_text_is_continued_as_transformers_does(directories, capsys):
    transformers = pytest.importorskip("transformers")
    directory = directories["qwen2"]
    printed = ask_model(capsys, directory, "--raw", f"--prompt={RAW}")
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    model = transformers.AutoModelForCausalLM.from_pretrained(directory).eval()
    assert_answers_as(printed, tokenizer, model, tokenizer(RAW, return_tensors="pt"))


def test_a_question_about_a_picture_is_answered_as_transformers_does(directories, tmp_path, capsys):
    transformers = pytest.importorskip("transformers")
    import torch
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    directory, file = directories["qwen2.5-vl"], tmp_path / "noise.png"
    PIL.Image.fromarray(np.random.default_rng(0).integers(0, 256, (23, 11, 3), dtype=np.uint8)).save(file)
    printed = ask_model(
        capsys, directory, f"--prompt=How <image> many?{RAW[-3:]}", f"--image={file}", "--system=Reckon."
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    model = transformers.AutoModelForImageTextToText.from_pretrained(directory).eval()
    options = {k: v for k, v in published.PREPROCESSOR.items() if k != "image_processor_type"}
    pixels = Qwen2VLImageProcessorPil(**options)(PIL.Image.open(file), return_tensors="pt")
    content = [{"type": "text", "text": "How "}, {"type": "image"}, {"type": "text", "text": f" many?{RAW[-3:]}"}]
    messages = [{"role": "system", "content": "Reckon."}, {"role": "user", "content": content}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True).input_ids
    image = tokenizer.convert_tokens_to_ids("<|image_pad|>")
    count = int(pixels["image_grid_thw"].prod()) // 4
    ids = torch.tensor([[i for token in ids for i in [token] * (count if token == image else 1)]])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "mm_token_type_ids": (ids == image).int()}
    assert count == 8  # windows of 2 x 2 tokens: they are not read in order
    assert_answers_as(printed, tokenizer, model, inputs | dict(pixels))


def test_an_import_answers_as_its_source_and_dtype_is_that_of_the_directory(directories, tmp_path, capsys):
    source = directories["qwen2"]
    question = f"--prompt={RAW}"
    expected = ask_model(capsys, source, question)
    assert import_weights.main([f"--model={source}", f"--out={tmp_path / 'import'}"]) == 0
    capsys.readouterr()
    assert ask_model(capsys, tmp_path / "import", question) == expected
    halves = ask_model(capsys, source, question, "--dtype=bfloat16")
    assert 1e-4 < np.abs(np.subtract(halves["logprobs"][0], expected["logprobs"][0])) < 0.1
    config = json.loads((source / "config.json").read_text()) | {"torch_dtype": "bfloat16"}
    (tmp_path / "import" / "hf" / "config.json").write_text(json.dumps(config))
    assert ask_model(capsys, tmp_path / "import", question) == halves


@pytest.mark.parametrize(
    ("family", "arguments", "complaint"),
    [
        ("", [], "There is no .*config.json, so .* is no model in the Hugging Face layout"),
        ("no tokenizer", [], "no vocabulary in"),
        ("no template", [], "no chat template in.*raw text only .--raw."),
        ("unknown", [], "NewForCausalLM is not supported"),
        ("qwen2", ["--image={workdir}/circles.png"], "has no vision tower. Drop --image"),
        ("qwen2.5-vl", ["--image=absent.png"], "no image file at 'absent.png'"),
        ("qwen2", ["--prompt="], "question is empty"),
    ],
)
def test_what_is_wrong_with_a_published_model_is_one_line(
    directories, workdir, tmp_path, capsys, family, arguments, complaint
):
    directory = directories.get(family, tmp_path / "model")
    if family.startswith(("no ", "unknown")):
        shutil.copytree(directories["qwen2"], directory)
        if family == "no tokenizer":
            (directory / "tokenizer.json").unlink()
        if family == "no template":
            (directory / "tokenizer_config.json").write_text('{"eos_token": "<|im_end|>"}')
        if family == "unknown":
            config = json.loads((directory / "config.json").read_text())
            (directory / "config.json").write_text(json.dumps(config | {"architectures": ["NewForCausalLM"]}))
    arguments = [argument.format(workdir=workdir) for argument in arguments]
    assert sample.main([f"--model={directory}", f"--prompt={TEXT}", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("Error: ") and err.count("\n") == 1 and re.search(complaint, err)
