"""What a run will need, before it runs: the arithmetic of its batches and its memory, from shapes alone.

`trainers.topology` asks the compiler of real TPUs the same question.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import ml_collections
import numpy as np
from jax.sharding import AbstractMesh

from kimi_jax.models import paths
from kimi_jax.models.policy import Policy
from kimi_jax.sampling.engine import Engine
from kimi_jax.trainers import setup
from kimi_jax.trainers.config import fields
from kimi_jax.training import sharding, trainable

GIB = 2**30


def describe(config: ml_collections.ConfigDict, devices=None) -> str:
    """The resolved config, parameters, batch arithmetic and memory plan. Allocates no parameters.

    devices: those to plan for, by default the ones of this machine. Raises ValueError for a bad model or mesh.
    """
    devices = jax.devices() if devices is None else devices
    shape = setup.model_config(config, config.tokenizer.vocab_size)
    policy = Policy(shape, remat=config.model.remat)
    mesh = mesh_of_sizes(config, len(devices))
    state = Weights.of(config, policy, mesh)
    count = lambda name: sum(leaf.size for leaf in jax.tree.leaves(state.params.get(name, ())))  # noqa: E731
    parts = [f"{name} {count(name):,}" for name in ("decoder", "vision", "lora") if name != "lora" or count(name)]
    frozen = sum(leaf.size for leaf in jax.tree.leaves(state.frozen))
    sizes = ", ".join(f"{name} {size}" for name, size in mesh.shape.items())
    lines = [
        "# Config",
        *(f"{path} = {value!r}" for path, value in fields(config)),
        "",
        "# Model",
        f"{config.model.path or config.model.size}, computing in {shape.dtype}; a vocabulary of at most "
        f"{shape.vocab_size:,} tokens",
        f"parameters: {' + '.join(parts)} = {state.count:,}",
        *([f"trained: {state.count - frozen:,}; frozen in {config.model.base_dtype}: {frozen:,}"] if frozen else []),
        "",
        "# Devices",
        f"{len(devices)} × {devices[0].device_kind}; mesh {sizes}",
    ]
    if mesh.size != len(devices):
        lines.append(f"The mesh needs {mesh.size} devices, which is what the plan below is for.")
    return "\n".join([*lines, "", *_batch_lines(config), "", *_memory_lines(config, policy, mesh, state)])


def _batch_lines(config):
    tokens = config.rows.tokens
    responses = config.rl.problems * config.rl.responses
    sampling = config.sampling
    longest = min(sampling.max_tokens, config.rl.segment_tokens or sampling.max_tokens)
    sft = (
        f"SFT update: {config.sft.rows} rows of {tokens:,} tokens in {config.sft.rows // config.sft.micro_rows} "
        f"micro-batches of {config.sft.micro_rows} = {config.sft.micro_rows * tokens:,} tokens"
    )
    lines = ["# Batches", sft if config.sft.steps else "no SFT"]
    if not config.rl.iterations:
        return [*lines, f"{config.sft.steps * config.sft.rows * tokens:,} tokens in all; no RL"]
    lines += [
        f"RL rollout: {config.rl.problems} problems × {config.rl.responses} = {responses:,} responses, each of at most "
        f"{longest:,} more tokens, {sampling.rows:,} at a time in chunks of {sampling.chunk} tokens; "
        f"prompts are read {sampling.prefill_tokens:,} tokens at a time",
        f"RL update: {config.rl.updates} mini-batches of {responses // config.rl.updates:,} responses, in "
        f"micro-batches of {config.rl.micro_rows} rows = {config.rl.micro_rows * tokens:,} tokens:",
    ]
    for name, share in (("if all have the most tokens", 1.0), ("if all are half as long", 0.5)):
        rows, micro_batches = rl_rows(config, share)
        lines.append(f"  {name + ':':28} {rows:,} rows, {micro_batches} micro-batches each")
    return lines


def rl_rows(config, share: float) -> tuple[int, int]:
    """Rows and micro-batches per mini-batch when each response, prompt included, has `share` of the most tokens."""
    longest = config.sampling.prompt_tokens + config.sampling.max_tokens
    per_row = config.rows.tokens // max(int(longest * share), 1)
    # A micro-batch has room for so many responses; more than that per row leave rows empty.
    per_micro = config.rl.micro_rows * min(per_row, config.rl.responses)
    responses = config.rl.problems // config.rl.updates * config.rl.responses
    return math.ceil(responses / per_row), math.ceil(responses / per_micro)


def _memory_lines(config, policy, mesh, state):
    """Estimates per device: what the large arrays take. Only the compiler knows the rest."""
    shape, tensor = policy.config, mesh.shape["tensor"]
    engine = plan_engine(config, dataclasses.replace(policy, mesh=mesh))
    itemsize = np.dtype(shape.dtype).itemsize
    split = lambda n, ways: n // ways if n % ways == 0 else n  # noqa: E731
    row_ways = mesh.shape["data"] * mesh.shape["fsdp"]
    trainer = config.rl if config.rl.iterations else config.sft
    rows, micro_rows = split(config.sampling.rows, row_ways), split(trainer.micro_rows, row_ways)
    vocab = split(shape.vocab_size, tensor)
    logits = 3 * np.dtype(np.float32).itemsize * vocab  # of a token: themselves, their softmax, their gradient

    def activations(tokens: int, tower, head_dim: int) -> int:
        """Values that the backward pass of a layer reads; with remat, of one layer beside the inputs of all."""
        heads, mlp_width = split(tower.num_heads, tensor), split(tower.mlp_width, tensor)
        width = 4 * tower.width + 3 * mlp_width + 3 * heads * head_dim
        kept, recomputed = (tower.width, width) if config.model.remat else (width, 0)
        return micro_rows * tokens * itemsize * (tower.num_layers * kept + recomputed)

    always = {"masters, float32": state.trained_bytes}
    if state.frozen:
        always[f"frozen parameters, {config.model.base_dtype}"] = state.masters - state.trained_bytes
    resets = config.rl.iterations and config.rl.reset_optimizer
    if not resets:
        always["optimizer moments"] = state.moments
    rollout = always | {
        "rollout copy of the weights": state.rollout,
        f"KV cache, {engine.shard_pages:,} pages of {engine.page} tokens": bytes_per_device(engine.page_shapes()),
        "logits of one decode step": rows * logits,
    }
    update = always | {
        **({"rollout copy of the weights": state.rollout} if config.rl.iterations else {}),
        "gradients, float32": state.trained_bytes,
        "optimizer moments": state.moments,
        f"activations, {micro_rows} rows × {config.rows.tokens:,} tokens": activations(
            config.rows.tokens, shape, shape.head_dim
        ),
        f"logits, {config.rows.logits_chunk} tokens per row": micro_rows * config.rows.logits_chunk * logits,
    }
    if shape.vision and config.rows.patches:
        update[f"activations, {micro_rows} rows × {config.rows.patches:,} patches"] = activations(
            config.rows.patches, shape.vision, shape.vision.width // shape.vision.num_heads
        )
    if "lora" in state.params:
        update["kernels with adapters merged, float32"] = state.merged(config.model.remat)
    lines = ["# Memory per device (estimate)"]
    for phase, parts in (("rollout", rollout), ("update", update)) if config.rl.iterations else (("update", update),):
        lines += [f"{phase} phase"]
        lines += [f"  {name:44} {_gib(size)}" for name, size in (parts | {"total": sum(parts.values())}).items()]
    if resets:
        lines += ["The moments exist in the update phase only."]
    return lines


def plan_engine(config: ml_collections.ConfigDict, policy: Policy) -> Engine:
    """The engine of the run for its shapes alone. Raises ValueError when its rows do not divide over the mesh."""
    return Engine(policy=policy, image_id=-1, decode_text=str, **setup.engine_options(config))


def mesh_of_sizes(config, num_devices: int) -> AbstractMesh:
    """The mesh of the config, or where these devices do not fit it, the smallest that does."""
    sizes = dict(config.mesh)
    known = math.prod(size for size in sizes.values() if size != -1)
    free = num_devices // known if num_devices % known == 0 else 1
    return AbstractMesh(tuple(free if size == -1 else size for size in sizes.values()), tuple(sizes))


@dataclasses.dataclass(frozen=True)
class Weights:
    """The copies of the parameters as shapes with shardings, and their bytes per device."""

    params: Any
    trained: Any  # those of them that are, and those that are not
    frozen: Any
    opt_state: Any
    rollout_params: Any

    @classmethod
    def of(cls, config, policy: Policy, mesh) -> "Weights":
        place = lambda tree, rules: setup.with_shardings(tree, sharding.shardings(mesh, tree, rules))  # noqa: E731
        params = setup.params_like(config, policy, mesh)
        trained, frozen = trainable.split(params, setup.trained_patterns(config))
        options = config.rl if config.rl.iterations else config.sft
        opt_state = jax.eval_shape(setup.make_optimizer(options.optimizer).init, trained)
        dtype = config.model.sampling_dtype or policy.config.dtype
        rollout_params = jax.eval_shape(functools.partial(policy.to_sampling_layout, dtype=dtype), params)
        return cls(
            params,
            trained,
            frozen,
            place(opt_state, sharding.TRAIN_RULES),
            place(rollout_params, sharding.SAMPLE_RULES),
        )

    @property
    def count(self) -> int:
        return sum(leaf.size for leaf in jax.tree.leaves(self.params))

    @property
    def masters(self) -> int:
        """The training copy: what is frozen included."""
        return bytes_per_device(self.params)

    @property
    def trained_bytes(self) -> int:
        return bytes_per_device(self.trained)

    def merged(self, remat: bool) -> int:
        """What a gradient needs for kernels with adapters: all of them, or with remat one layer and its gradients."""
        flat, sizes = dict(paths.flatten(self.params)), []
        for tower in self.params["lora"].keys() - {"scale"}:
            for run, adapters in self.params["lora"][tower]["runs"].items():
                modules = [path.removesuffix("/a") for path, _ in paths.flatten(adapters) if path.endswith("/a")]
                kernels = [flat[f"{tower}/runs/{run}/{module}/kernel"] for module in modules]
                size = 4 * sum(math.prod(k.sharding.shard_shape(k.shape)) for k in kernels)  # float32
                sizes.append(2 * size // kernels[0].shape[0] if remat else size)
        return max(sizes) if remat else sum(sizes)

    @property
    def moments(self) -> int:
        return bytes_per_device(self.opt_state)

    @property
    def rollout(self) -> int:
        return bytes_per_device(self.rollout_params)


def bytes_per_device(tree: Any) -> int:
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def _gib(size: float) -> str:
    return f"{size / GIB:9.3f} GiB"
