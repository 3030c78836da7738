"""Tiny models, prompts and groups that several tests share. Sizes are odd and distinct: a swapped axis is noticed."""

import dataclasses
import functools
import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from kimi_jax.arrays import PackedRows, RLBatch, TrainState
from kimi_jax.data.images import patchify
from kimi_jax.data.packing import pack_rows
from kimi_jax.models import lora
from kimi_jax.models.config import ModelConfig, VisionConfig
from kimi_jax.models.policy import Policy
from kimi_jax.sampling.engine import Engine
from kimi_jax.training.step import Stepper
from kimi_jax.types import Example, Problem, Prompt, Rollout, RolloutGroup, StopReason

IMAGE_ID = 5
VISION = VisionConfig(patch_size=3, merge_size=2, width=24, num_layers=2, num_heads=3, mlp_width=29)
CONFIG = ModelConfig(
    vocab_size=61,
    width=23,
    num_layers=3,
    num_heads=6,
    num_kv_heads=2,
    head_dim=10,
    mlp_width=37,
    rope_base=1_000.0,
    tie_embeddings=True,
    qk_norm=True,
    vision=VISION,
)
# As for users, whatever the other programs of the tests are compiled with.
OPTIMIZED = {"xla_backend_optimization_level": 3, "xla_llvm_disable_expensive_passes": False}
PACKING = dict(patch_dim=VISION.patch_dim, merge=VISION.merge_size, image_id=IMAGE_ID)


def one_device() -> dict[str, str]:
    """The environment of a process on one device that imports this code."""
    flags = os.environ["XLA_FLAGS"].replace("--xla_force_host_platform_device_count=8", "")
    root = str(pathlib.Path(__file__).parents[1])
    return os.environ | {"PYTHONPATH": root, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}


def random_params(config: ModelConfig, seed: int = 0) -> dict:
    """Float32 parameters in which every bias and scale counts, and predictions are far from uniform."""
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(Policy(config).init, jax.random.key(0))

    def draw(path, leaf):
        kind = path[-1].key
        mean = 1.0 if kind == "scale" else 0.0
        std = 1.3 * leaf.shape[-2] ** -0.5 if kind == "kernel" else {"embedding": 0.2, "scale": 0.3, "bias": 0.3}[kind]
        return (mean + std * rng.normal(size=leaf.shape)).astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def random_adapters(params: dict, targets=(".*",), *, rank: int = 5, seed: int = 0) -> dict:
    """What belongs under params["lora"], with B so large that it matters, and α / r = 1.4."""
    adapters = lora.init(params, jax.random.key(seed), rank=rank, alpha=1.4 * rank, targets=targets)
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        return (0.2 * rng.normal(size=leaf.shape)).astype(np.float32) if path[-1].key == "b" else np.asarray(leaf)

    return jax.tree_util.tree_map_with_path(draw, adapters)


def random_prompt(rng: np.random.Generator, length: int, image_sizes=()) -> Prompt:
    """`length` text tokens, and images (height, width in pixels) at random places after the first of them."""
    pixels = [rng.integers(0, 256, (*size, 3), dtype=np.uint8) for size in image_sizes]
    images = [patchify(image, patch_size=VISION.patch_size, merge=VISION.merge_size) for image in pixels]
    pieces = [rng.integers(IMAGE_ID + 1, CONFIG.vocab_size, 1) for _ in range(length - 1)]
    for image in images:
        pieces.insert(rng.integers(0, len(pieces) + 1), np.full(image.num_tokens, IMAGE_ID))
    first = rng.integers(IMAGE_ID + 1, CONFIG.vocab_size, 1)
    return Prompt(np.concatenate([first, *pieces]).astype(np.int32), tuple(images))


def random_prompts(seed: int = 0) -> list[Prompt]:
    """Text and images, from one token to a full bucket of 19 tokens and 32 patches."""
    rng = np.random.default_rng(seed)
    return [
        random_prompt(rng, 3),
        random_prompt(rng, 5, [(7, 13)]),
        random_prompt(rng, 19),
        random_prompt(rng, 1),
        random_prompt(rng, 7, [(5, 11), (6, 4)]),
        random_prompt(rng, 11, [(11, 20)]),
    ]


def with_response(prompt: Prompt, response) -> Example:
    """The example in which exactly the response is trained."""
    tokens = np.concatenate([prompt.tokens, response]).astype(np.int32)
    return Example(tokens, np.repeat([False, True], [len(prompt.tokens), len(response)]), prompt.images)


def pack(examples, plan, *, row_tokens: int, row_patches: int) -> tuple[PackedRows, dict[int, tuple[int, int]]]:
    return pack_rows(examples, plan, num_rows=len(plan), row_tokens=row_tokens, row_patches=row_patches, **PACKING)


def random_groups(seed: int, sizes, *, max_response: int = 11) -> list[RolloutGroup]:
    """One group per size k, with responses of random tokens (some of them the image token) and behaviour log-probs."""
    rng = np.random.default_rng(seed)
    groups, serial = [], 0
    for i, k in enumerate(sizes):
        prompt = random_prompt(rng, int(rng.integers(2, 8)), [(7, 13)] if i % 2 else [])
        rollouts = []
        for _ in range(k):
            n = int(rng.integers(1, max_response + 1))
            rollouts.append(
                Rollout(
                    serial=serial,
                    tokens=rng.integers(IMAGE_ID, CONFIG.vocab_size, n).astype(np.int32),
                    logprobs=-rng.exponential(size=n).astype(np.float32),
                    stop=StopReason.END,
                    versions=np.full(n, i + 3, np.int32),
                )
            )
            serial += 1
        problem = Problem(id=f"problem {i}", task="none", prompt="", answer="")
        groups.append(RolloutGroup(problem, prompt, tuple(rollouts)))
    return groups


def random_rewards(seed: int, groups) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Rewards of every response, and advantages r - mean(r)."""
    rng = np.random.default_rng(seed)
    rewards = [rng.integers(0, 2, len(g.rollouts)) + 0.3 * rng.normal(size=len(g.rollouts)) for g in groups]
    return rewards, [r - r.mean() for r in rewards]


def make_engine(**changes) -> Engine:
    engine = Engine(
        policy=Policy(CONFIG),
        image_id=IMAGE_ID,
        decode_text=lambda tokens: " ".join(map(str, tokens)),
        rows=6,
        prompt_tokens=19,
        prompt_patches=32,
        max_tokens=13,
        page=4,
        pages=None,
        prefill_tokens=64,
        chunk=5,
    )
    return dataclasses.replace(engine, **changes)


def sampling_params(params: dict, config: ModelConfig = CONFIG) -> dict:
    """The float32 sampling copy."""
    return Policy(config).to_sampling_layout(jax.tree.map(np.asarray, params), "float32")


def assert_trees_close(actual, expected, *, relative: float) -> None:
    """Every leaf within `relative` of the largest value of that leaf."""
    expected_leaves = dict(jax.tree_util.tree_leaves_with_path(expected))
    actual_leaves = dict(jax.tree_util.tree_leaves_with_path(actual))
    assert actual_leaves.keys() == expected_leaves.keys()
    for path, leaf in expected_leaves.items():
        scale = np.abs(np.asarray(leaf)).max()
        name = jax.tree_util.keystr(path)
        np.testing.assert_allclose(actual_leaves[path], leaf, rtol=0, atol=relative * scale, err_msg=name)


def rl_stepper(
    policy: Policy, *, optimizer, rate: float, clip_norm=1e6, moments_sharding=lambda tree: None, trained=(".*",)
) -> Stepper:
    """The update of RL, with a constant learning rate."""
    from kimi_jax.trainers import objectives
    from kimi_jax.trainers.config import default_config
    from kimi_jax.trainers.rl import loss_fn

    return Stepper(
        policy=policy,
        loss_fn=functools.partial(loss_fn, objective=objectives.find(default_config().rl)),
        optimizer=optimizer,
        schedule=lambda step: jnp.float32(rate),
        clip_norm=clip_norm,
        logits_chunk=16,
        moments_sharding=moments_sharding,
        trained=trained,
    )


def run_updates(
    stepper: Stepper, params: dict, minibatch: list[RLBatch], *, updates: int, step=0, temperature=0.7, tau=0.3
):
    """Updates on one mini-batch, scored under the first parameters. Returns (first gradients, state, metrics)."""
    params = jax.tree.map(jnp.array, params)  # an update gives its input away
    state = TrainState(params, stepper.init_optimizer(params), jnp.asarray(step, jnp.int32))
    hyper = {"temperature": np.float32(temperature), "tau": np.float32(tau), "is_pi_i": True}
    minibatch = [
        dataclasses.replace(batch, reference_logprobs=stepper.score(params, batch.rows, hyper["temperature"]))
        for batch in minibatch
    ]
    first_grads, metrics = None, []
    for _ in range(updates):
        acc = None
        for batch in minibatch:
            acc = stepper.accumulate(acc, state.params, batch, hyper)
        first_grads = first_grads or jax.device_get(acc["grads"])
        state, update = stepper.apply(state, acc)
        metrics.append(jax.device_get(update))
        hyper |= {"is_pi_i": False}
    return first_grads, state, metrics


def lower_for_gpu(function, *args) -> str:
    """What is handed to the compiler for an H100, kernels in Triton's code included. Needs no GPU."""
    device = jax.sharding.AbstractDevice("NVIDIA H100 80GB HBM3", 132, "gpu")
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((1,), ("x",), abstract_device=device)):
        return jax.jit(function).trace(*args).lower(lowering_platforms=("cuda",)).as_text()
