"""The plan of a run: its arithmetic against numbers worked out by hand."""

import importlib.util
import pathlib
import re

import jax
import pytest

from kimi_jax.data.hf_images import ImageProcessor
from kimi_jax.models.config import named_size
from kimi_jax.tasks import verify
from kimi_jax.trainers import plan, setup
from kimi_jax.trainers.config import check_config, default_config
from kimi_jax.types import Outcome
from tests.trainers.helpers import text_config


def _line(text, name):
    [line] = {line for line in text.splitlines() if line.strip().startswith(name)}
    return line


def test_parameters_are_those_of_the_published_model():
    config = text_config(**{"model.size": "qwen2.5-1.5b", "tokenizer.vocab_size": 151_936})
    # 1.54B in the technical report; counted by hand: embedding, 28 layers, final norm
    width, kv, mlp = 1_536, 256, 8_960
    layer = 2 * width * width + width + 2 * (width * kv + kv) + 3 * width * mlp + 2 * width
    count = 151_936 * width + 28 * layer + width
    assert f"decoder {count:,} + vision 0 = {count:,}" in plan.describe(config)


def test_batches_of_an_iteration():
    text = plan.describe(text_config())
    # 32 × 8 responses of at most 48 + 64 = 112 tokens: one to a row of 128; two to a row when half as long
    rollout = _line(text, "RL rollout")
    assert "32 problems × 8 = 256 responses, each of at most 64 more tokens, 256 at a time in chunks of 32" in rollout
    assert "prompts are read 1,024 tokens at a time" in rollout
    assert "4 mini-batches of 64 responses, in micro-batches of 16 rows = 2,048 tokens" in text
    assert "64 rows, 4 micro-batches" in _line(text, "if all have the most tokens")
    assert "32 rows, 2 micro-batches" in _line(text, "if all are half as long")


@pytest.mark.parametrize("reset", [True, False])
def test_memory_adds_up_and_moments_come_and_go(reset):
    text = plan.describe(text_config(**{"rl.reset_optimizer": reset}))
    rollout, update = text.split("rollout phase\n")[1].split("update phase\n")
    for phase in (rollout, update):
        *parts, total = [float(size) for size in re.findall(r"([\d.]+) GiB", phase)]
        assert total == pytest.approx(sum(parts), abs=5e-3)
    assert ("optimizer moments" in rollout) == (not reset)
    assert "optimizer moments" in update


def test_what_layers_keep_takes_memory():
    def activations(**more):
        line = plan.describe(text_config(**{"model.size": "qwen2.5-1.5b"}, **more)).split("activations, ")[1]
        rows, tokens, gib = re.match(r"(\d+) rows? × ([\d,]+) tokens +([\d.]+) GiB", line).groups()
        return int(rows) * int(tokens.replace(",", "")), float(gib)

    (tokens, less), (_, more) = activations(), activations(**{"model.kept": ("mlp",)})
    mlp = 28 * tokens * 2 * (8_960 // 2) * 2 / 2**30  # layers × tokens × gate and up, over 2 devices × bytes
    assert more - less == pytest.approx(mlp, abs=0.0011)
    middle = 28 * tokens * 1_536 * 4 / 2**30  # of the stream, which is float32
    assert activations(**{"model.kept": ("middle",)})[1] - less == pytest.approx(middle, abs=0.0011)
    tokens, gib = activations(**{"rows.tokens": 65_536})
    assert tokens > 2 * 32_768  # of which the MLP sees so many at a time: gate, up and their product
    values = tokens * (28 * 1_536 + 4 * 1_536 + 3 * (12 // 2) * 128) + 32_768 * 3 * (8_960 // 2)
    assert gib == pytest.approx(2 * values / 2**30, abs=0.0011)
    with pytest.raises(ValueError, match="config.model.kept=.*: 'atention' is none of attention, qkv, middle, mlp"):
        check_config(text_config(**{"model.kept": ("mlp", "atention")}))


@pytest.mark.parametrize("pages, count", [(None, 1 + 64 * (7 + 1)), (999, 1 + 999 // 4)])
def test_pages_of_the_cache(pages, count):
    """7 pages of 16 tokens for 48 + 64, and one for a copy; one to throw away. 4 layers, 1 of 2 heads of 32 float32."""
    text = plan.describe(text_config(**{"mesh.data": 2, "sampling.pages": pages}))
    line = _line(text, f"KV cache, {count} pages of 16 tokens")
    size = 4 * 2 * 1 * count * 16 * 32 * 4
    assert float(re.search(r"([\d.]+) GiB", line).group(1)) == pytest.approx(size / 2**30, abs=5e-4)


def test_segments_bound_what_an_iteration_writes():
    assert "each of at most 24 more tokens" in plan.describe(text_config(**{"rl.segment_tokens": 24}))


def test_rows_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="sampling.rows=255 must be a multiple of 4"):
        plan.describe(text_config(**{"mesh.data": 2, "sampling.rows": 255}))


@pytest.mark.parametrize("micro_rows, told", [(8, []), (4, []), (6, ["rl"])])
def test_rows_of_a_micro_batch_that_do_not_divide_are_told(micro_rows, told):
    """They are computed everywhere, which gives the same in more time."""
    text = plan.describe(text_config(**{"mesh.data": 2, "rl.micro_rows": micro_rows}))
    assert re.findall(r"(\w+)\.micro_rows=\d is no multiple of 4, ", text) == told


def test_sharded_bytes():
    """4 of 8 devices share the masters: the embedding [384, 128] in both dimensions, a norm in none."""
    config = text_config(**{"mesh.data": 2})
    policy = plan.Policy(plan.setup.model_config(config, 384))
    weights = plan.Weights.of(config, policy, plan.mesh_of_sizes(config, 8))
    layer_matrices = 128 * 128 * 2 + 2 * 128 * 64 + 3 * 128 * 384
    layer_norms = 2 * 128 + 2 * 32
    vision = sum(leaf.size for leaf in jax.tree.leaves(weights.params["vision"]))
    whole = 384 * 128 + 4 * layer_matrices
    assert weights.count == whole + 4 * layer_norms + 128 + vision
    decoder = plan.bytes_per_device(weights.params["decoder"])
    assert decoder == 4 * (whole // 4 + 4 * layer_norms + 128)
    # Adam: two moments like the masters, and a counter
    assert weights.moments("sft") == weights.moments("rl") == 2 * weights.masters + 4


def test_a_mesh_that_is_not_here_is_planned_for():
    text = plan.describe(text_config(**{"mesh.fsdp": 16, "mesh.tensor": 3}))
    assert "The mesh needs 48 devices" in text


def test_text_model_refuses_image_tasks():
    config = default_config()
    config.model.size = "qwen2.5-0.5b"
    with pytest.raises(ValueError, match=r"image_tasks=\(\)"):
        plan.describe(config)


CONFIGS = sorted((pathlib.Path(__file__).parents[2] / "configs").glob("*.py"))


def config_of(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config()


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_works_out(path):
    config = config_of(path)
    check_config(config)
    text = plan.describe(config)
    count = int(re.search(r"^parameters: .* = ([\d,]+)$", text, re.M).group(1).replace(",", ""))
    least = named_size(config.model.size).width ** 2 * 12
    has_rl, evaluated = config.rl.iterations and not config.reward_model.kind, config.data.heldout_per_kind
    if path.stem == "rm_classic" or not (config.data.text_tasks or config.data.image_tasks):
        evaluated = 0  # by a score, or by the loss
    phases = ["SFT phase"] * (config.sft.steps > 0) + ["SFT evaluation"] * bool(config.sft.steps and evaluated)
    phases += ["rollout phase", "update phase"] * bool(has_rl)
    assert least < count < 10**10 and re.findall(r"^.* phase$|^SFT evaluation$", text, re.M) == phases
    assert text.count("  total") == len(phases) and ("no RL" in text) == (not has_rl)


def test_without_rl_the_plan_is_of_the_supervised_update():
    """Of 15M parameters the tower alone has gradients and moments; 4 of 16 rows are in memory at once."""
    [path] = [path for path in CONFIGS if path.stem == "pretrain_vision"]
    config = config_of(path)
    config.mesh.data = 1
    text = plan.describe(config, jax.devices()[:1])
    decoder, vision = (
        int(n.replace(",", "")) for n in re.search(r"decoder ([\d,]+) \+ vision ([\d,]+)", text).groups()
    )
    assert f"trained: {vision:,}; frozen in float32: {decoder:,}" in text
    assert f"{config.sft.steps * 16 * 4_096:,} tokens in all; no RL" in text and "4 rows × 4,096 tokens" in text
    assert float(_line(text, "gradients").split()[-2]) == pytest.approx(4 * vision / 2**30, abs=5e-4)
    assert float(_line(text, "optimizer moments").split()[-2]) == pytest.approx(8 * vision / 2**30, abs=5e-4)
    assert "rollout" not in text.partition("# Memory")[2] and "exist in the update" not in text


@pytest.mark.parametrize("name", ["rl_qwen25_1p5b_math", "rl_qwen25_vl_3b_vision"])
def test_a_config_says_what_it_takes_on_one_gpu(name):
    """In its docstring, and it is less than what JAX takes of 80 GB by itself."""
    [path] = [path for path in CONFIGS if path.stem == name]
    said = int(re.search(r"one GPU of 80 GB +(\d+) GiB", path.read_text()).group(1))
    totals = [
        float(size) for size in re.findall(r"total +([\d.]+) GiB", plan.describe(config_of(path), jax.devices()[:1]))
    ]
    assert max(totals) == pytest.approx(said, abs=0.5) and said < 59


@pytest.mark.parametrize("name", ["rl_qwen25_1p5b_math", "rl_qwen25_vl_3b_vision"])
def test_an_answer_in_the_form_that_is_asked_for_is_right_and_pictures_fit(name):
    [path] = [path for path in CONFIGS if path.stem == name]
    config = config_of(path)
    config.data.train_per_kind = config.data.heldout_per_kind = 60
    form = config.model.system.rpartition("\n")[2].partition("<")[0]
    process_image = ImageProcessor.from_config({}, {})  # what is left out is as in Qwen2-VL and Qwen2.5-VL
    patches = set()
    for problem in setup.make_problem_sets(config)[0]:
        assert verify(problem, f"First 7.\nThen 8.\n{form}{problem.answer}").outcome == Outcome.CORRECT
        patches |= {len(process_image(image).patches) for image in problem.images}
    assert max(patches, default=0) == config.sampling.prompt_patches


@pytest.mark.parametrize("name, logits", [("rm_classic", False), ("rm_cot", True)])
def test_a_reward_model_has_no_rl_and_the_classic_one_no_logits(name, logits):
    [path] = [path for path in CONFIGS if path.stem == name]
    memory = plan.describe(config_of(path)).partition("# Memory")[2]
    assert "6 rows × 192 tokens" in memory and "rollout phase" not in memory and "update phase" not in memory
    assert ("logits, 192 tokens per row" in memory) == ("KV cache" in memory) == logits


def test_moments_exist_while_sft_is_evaluated():
    """Then they lie beside the cache, which between the updates of RL they do not."""
    text = plan.describe(text_config()).partition("SFT evaluation\n")[2]
    evaluation, rollout = text.partition("rollout phase\n")[::2]
    assert "optimizer moments" in evaluation and "KV cache" in evaluation and "optimizer moments" not in rollout[:300]


def test_no_layer_of_a_frozen_tower_keeps_anything_for_the_backward_pass():
    config = default_config()
    config.mesh.data = 1
    config.model.trainable = ("decoder/.*",)
    values = 16 * 112 * (1 * 64 + 4 * 64 + 3 * 192 + 3 * 64)
    found = float(re.search(r"16 rows × 112 patches +([\d.]+) GiB", plan.describe(config)).group(1))
    assert found == pytest.approx(4 * values / 2**30, abs=5e-4)


def test_pictures_take_memory_in_an_update():
    """2 layers of width 64: 16 rows × 112 patches keep the input of each, and of one 4 · 64 + 3 · 192 + 3 · 64 more."""
    config = default_config()
    config.mesh.data = 1
    values = 16 * 112 * (2 * 64 + 4 * 64 + 3 * 192 + 3 * 64)
    found = float(re.search(r"16 rows × 112 patches +([\d.]+) GiB", plan.describe(config)).group(1))
    assert found == pytest.approx(4 * values / 2**30, abs=5e-4)
