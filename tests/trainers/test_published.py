"""The whole job from a published model of each family: it begins with those weights, resumes, and is exported midway.

One of them is taught first, one trains adapters on a base in bfloat16, two look at images.
"""

import dataclasses
import json
import types

import jax
import numpy as np
import pytest

from kimi_jax.data.packing import pack_rows
from kimi_jax.models import hf, lora, paths
from kimi_jax.models.hf.shards import read_directory
from kimi_jax.trainers import pipeline, setup
from kimi_jax.training.checkpoint import Checkpointer
from scripts import export_weights
from tests.trainers import miniature, published

pytestmark = pytest.mark.slow

SHARED = {
    "model.system": "Reckon.",
    "model.dtype": "float32",
    "rl.iterations": 1,
    "rl.optimizer.peak": 1e-3,
    "rewards.workers": 0,
    "rows.tokens": 96,
    "rows.logits_chunk": 96,
    "sampling.prompt_tokens": 61,
    "sft.steps": 0,
}
TEXT = {"data.image_tasks": (), "rows.patches": 0, "sampling.prompt_patches": 0}
IMAGE = {"data.text_tasks": (), "rows.patches": 132, "sampling.prompt_patches": 44}
QUICK = {"rl.updates": 1, "rl.optimizer.name": "sgd"}  # to compile
TAUGHT = {"sft.steps": 2, "sft.rows": 8, "sft.eval_every": 2, "sft.checkpoint_every": 2}
ADAPTED = {"model.lora.rank": 3, "model.base_dtype": "bfloat16"}
CHANGES = {
    "qwen2": SHARED | TEXT,
    "qwen3": SHARED | TEXT | TAUGHT | QUICK,
    "llama": SHARED | TEXT | ADAPTED | QUICK,
    "qwen2.5-vl": SHARED | IMAGE | QUICK,
    "qwen3-vl": SHARED | IMAGE | QUICK,
}


@pytest.fixture(scope="module", params=CHANGES)
def run(request, tmp_path_factory):
    """A run of one iteration, exported, and of one model then one more."""
    family, root = request.param, tmp_path_factory.mktemp(request.param)
    source = published.write(family, root / "model", dtype="BF16" if family == "llama" else "F32")
    config = miniature.get_config()
    config.update_from_flattened_dict(CHANGES[family] | {"model.path": str(source)})
    workdir, out, rows, params = root / "run", root / "exported", [], []
    with pytest.MonkeyPatch.context() as patch:
        miniature.prepare(patch)
        for iterations in (1, 2) if family == "qwen2" else (1,):
            config.rl.iterations = iterations
            built = []
            patch.setattr(pipeline, "build", lambda *args, into=built: into.append(setup.build(*args)) or into[0])
            pipeline.run(config, workdir)
            here = built[0]
            like = {"state": {"params": here.params_like}}
            with Checkpointer.reader(workdir / "checkpoints" / "rl") as checkpoints:
                step, arrays, _ = checkpoints.restore(like, partial=True)
            assert step == iterations
            params.append(arrays["state"]["params"])
            rows.append([json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()])
            if iterations == 1:
                assert export_weights.main([f"--checkpoint={workdir}", f"--out={out}"]) == 0
    return types.SimpleNamespace(family=family, source=source, out=out, here=here, params=params, rows=rows)


def test_sampler_and_trainer_see_the_same_model(run):
    assert [row["step"] for row in run.rows[-1]] == [1, 2][: len(run.params)]
    assert run.rows[0] == run.rows[-1][:1]
    for row in run.rows[-1]:
        assert row["updates"] == run.here.config.rl.updates and row["grad_norm"] > 0
        assert 0 < row["max_logprob_gap"] < 1e-5
        assert row["entropy"] < np.log(published.VOCAB) - 0.1  # they agree on something


def test_it_begins_with_the_published_weights_and_moves_on(run):
    begin = hf.load_params(run.source, {k: v for k, v in run.here.params_like.items() if k != "lora"})
    begin, *later = (dict(paths.flatten(jax.device_get(lora.merge(params)))) for params in (begin, *run.params))
    assert begin.keys() == later[0].keys()
    adapted = {path for path in begin if path.startswith("decoder/runs") and path.endswith("_proj/kernel")}
    for path, start in begin.items():
        moved = [np.abs(params[path] - start).max() for params in later]
        if run.family == "llama" and path not in adapted:
            assert moved == [0]
        else:  # an update moves a value by about the learning rate, which is 1e-3, and 1e-2 in SFT
            assert 0 < moved[0] < 0.05 and len({0, *moved}) == 1 + len(moved), path


def test_the_export_holds_the_parameters_of_the_checkpoint(run):
    merged = lora.merge(run.params[0])
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, np.float32, sharding=x.sharding), merged)
    exported = hf.load_params(run.out, like)
    relative = 2**-8 if run.family == "llama" else 0  # written as it came, in bfloat16
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=relative)  # noqa: E731
    jax.tree.map(close, exported, merged)
    before, after = (
        {name: (entry.dtype, entry.read().tobytes()) for name, entry in read_directory(path).items()}
        for path in (run.source, run.out)
    )
    assert before.keys() == after.keys()
    same = {name for name in before if before[name] == after[name]}
    assert same == ({name for name in before if "_proj" not in name} if run.family == "llama" else set())


def test_transformers_computes_the_same_from_the_export(run):
    transformers = pytest.importorskip("transformers")
    import torch

    from tests.models.hf import oracle

    kind = "AutoModelForCausalLM" if run.family in published.TEXT else "AutoModelForImageTextToText"
    model, info = getattr(transformers, kind).from_pretrained(
        run.out, dtype=torch.float32, output_loading_info=True, attn_implementation="eager"
    )
    assert not any(info[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    problem = run.here.heldout[0]
    chat = run.here.chat
    prompt = chat.encode_problem(problem)
    example = chat.encode_example(prompt, problem.solution)
    inputs = {"input_ids": torch.from_numpy(example.tokens).long()[None]}
    if prompt.images:
        reading_order = dataclasses.replace(chat.process_image, window=None)
        images = [reading_order(pixels) for pixels in problem.images]
        inputs["pixel_values"] = torch.from_numpy(np.concatenate([image.patches for image in images]))
        inputs["image_grid_thw"] = torch.tensor([(1, *image.grid) for image in images])
        inputs["mm_token_type_ids"] = (inputs["input_ids"] == chat.image_id).int()
    with torch.no_grad():
        expected = model(**inputs).logits[0].numpy()
    rows, _ = pack_rows([example], [[0]], num_rows=1, **run.here.packing)
    merged = lora.merge(run.params[0])
    if run.family == "llama":
        merged = jax.tree.map(lambda x: x.astype("bfloat16").astype("float32"), merged)
    found = np.asarray(oracle.our_logits(run.here.policy, merged, rows))[0, : len(example.tokens)]
    np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max())
