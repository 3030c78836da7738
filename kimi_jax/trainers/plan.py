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

from kimi_jax.arrays import RLBatch
from kimi_jax.models import paths
from kimi_jax.models.config import ModelConfig
from kimi_jax.models.layers import MLP_TOKENS
from kimi_jax.models.policy import Policy
from kimi_jax.rl.batch import build_minibatches
from kimi_jax.sampling.engine import Engine
from kimi_jax.trainers import setup
from kimi_jax.trainers.config import fields, has_rl
from kimi_jax.training import sharding, trainable
from kimi_jax.types import Problem, Prompt, Rollout, RolloutGroup, StopReason

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
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    for stage, runs in (("sft", config.sft.steps), ("rl", has_rl(config))):
        if runs and (micro_rows := config[stage].micro_rows) % ways:
            lines.append(
                f"{stage}.micro_rows={micro_rows} is no multiple of {ways}, the devices that rows are split over "
                "(data × fsdp): each of them computes all rows."
            )
    return "\n".join([*lines, "", *_batch_lines(config), "", *_memory_lines(config, policy, mesh, state)])


def _batch_lines(config):
    tokens = config.rows.tokens
    responses = config.rl.problems * config.rl.responses
    sampling = config.sampling
    longest = min(sampling.max_tokens, config.rl.segment_tokens or sampling.max_tokens)
    sft = (
        f"SFT update: {_count(config.sft.rows, 'row')} of {tokens:,} tokens in "
        f"{_count(config.sft.rows // config.sft.micro_rows, 'micro-batch', 'es')} of {config.sft.micro_rows:,} = "
        f"{config.sft.micro_rows * tokens:,} tokens"
    )
    lines = ["# Batches", sft if config.sft.steps else "no SFT"]
    if not has_rl(config):
        return [*lines, f"{config.sft.steps * config.sft.rows * tokens:,} tokens in all; no RL"]
    lines += [
        f"RL rollout: {_count(config.rl.problems, 'problem')} × {config.rl.responses} = {responses:,} responses, each "
        f"of at most {longest:,} more tokens, {sampling.rows:,} at a time in chunks of {sampling.chunk} tokens; "
        f"prompts are read {sampling.prefill_tokens:,} tokens at a time",
        f"RL update: {_count(config.rl.updates, 'mini-batch', 'es')} of {responses // config.rl.updates:,} responses, "
        f"in micro-batches of {_count(config.rl.micro_rows, 'row')} = {config.rl.micro_rows * tokens:,} tokens:",
    ]
    for name, share in (("if all have the most tokens", 1.0), ("if all are half as long", 0.5)):
        rows, micro_batches = rl_rows(config, share)
        lines.append(f"  {name + ':':28} {_count(rows, 'row')}, {_count(micro_batches, 'micro-batch', 'es')} each")
    return lines


def _count(n: int, noun: str, plural: str = "s") -> str:
    return f"{n:,} {noun}{'' if n == 1 else plural}"


def evaluates(config: ml_collections.ConfigDict) -> bool:
    """Whether what the supervised loop trains is asked the held-out problems, so that it writes responses."""
    data = config.data
    heldout = data.heldout_file or data.heldout_per_kind and (data.text_tasks or data.image_tasks)
    return bool(heldout) and config.reward_model.kind != "classic"


def rl_rows(config, share: float) -> tuple[int, int]:
    """Rows and micro-batches per mini-batch when each response, prompt included, has `share` of the most tokens."""
    longest = config.sampling.prompt_tokens + config.sampling.max_tokens
    per_row = config.rows.tokens // max(int(longest * share), 1)
    # A micro-batch has room for so many responses; more than that per row leave rows empty.
    per_micro = config.rl.micro_rows * min(per_row, config.rl.responses)
    responses = config.rl.problems // config.rl.updates * config.rl.responses
    return math.ceil(responses / per_row), math.ceil(responses / per_micro)


def rl_micro_batch(config: ml_collections.ConfigDict, shape: ModelConfig) -> RLBatch:
    """Any micro-batch: all have the same shapes."""
    token = np.zeros(1, np.int32)
    rollout = Rollout(0, token, np.zeros(1, np.float32), token, StopReason.END)
    group = RolloutGroup(Problem("", "", "", ""), Prompt(token), (rollout, rollout))
    [[batch]] = build_minibatches(
        [group],
        [np.zeros(2)],
        [np.zeros(2)],
        minibatches=1,
        rows=config.rl.micro_rows,
        responses=config.rl.micro_rows * config.rl.responses,
        oldest_version=0,
        **setup.packing(config, shape, image_id=-1),
    )
    return batch


def iteration_bytes(config: ml_collections.ConfigDict, shape: ModelConfig, mesh) -> int:
    """Per device, of the micro-batches of an iteration, which are all sent before its first update, at most."""
    batch = rl_micro_batch(config, shape)
    placed = setup.with_shardings(batch, sharding.row_shardings(mesh, batch))
    return config.rl.updates * rl_rows(config, 1.0)[1] * bytes_per_device(placed)


def _memory_lines(config, policy, mesh, state):
    """Estimates per device: what the large arrays take. Only the compiler knows the rest."""
    shape, tensor = policy.config, mesh.shape["tensor"]
    engine = plan_engine(config, dataclasses.replace(policy, mesh=mesh))
    itemsize = np.dtype(shape.dtype).itemsize
    split = lambda n, ways: n // ways if n % ways == 0 else n  # noqa: E731
    row_ways = mesh.shape["data"] * mesh.shape["fsdp"]
    rows = split(config.sampling.rows, row_ways)
    vocab = split(shape.vocab_size, tensor)
    logits = 3 * np.dtype(np.float32).itemsize * vocab  # of a token: themselves, their softmax, their gradient

    def activations(tokens: int, layers: int, tower, head_dim: int) -> int:
        """Bytes that the backward pass of a layer reads; with remat, of one layer beside what all layers keep."""
        heads, mlp_width = split(tower.num_heads, tensor), split(tower.mlp_width, tensor)
        qkv, mlp = 3 * heads * head_dim, 3 * mlp_width
        width = 4 * tower.width + mlp + qkv
        middle = tower.width * np.dtype(np.float32).itemsize // itemsize  # of the residual stream, which is float32
        keepable = {"attention": heads * head_dim, "qkv": qkv, "middle": middle, "mlp": mlp - mlp_width}
        inputs = tower.width + sum(keepable[name] for name in config.model.kept)
        if not config.model.remat:
            return itemsize * tokens * layers * width
        at_once = tokens if "mlp" in config.model.kept else min(tokens, MLP_TOKENS)
        return itemsize * (tokens * (layers * inputs + width - mlp) + at_once * mlp)

    def update(stage: str) -> dict[str, int]:
        micro_rows = split(config[stage].micro_rows, row_ways)
        each = _count(micro_rows, "row")
        parts = {"gradients, float32": state.trained_bytes, "optimizer moments": state.moments(stage)}
        parts[f"activations, {each} × {config.rows.tokens:,} tokens"] = activations(
            micro_rows * config.rows.tokens, shape.num_layers, shape, shape.head_dim
        )
        if config.reward_model.kind != "classic":
            name = f"logits, {config.rows.logits_chunk:,} tokens per row"
            parts[name] = micro_rows * config.rows.logits_chunk * logits
        if (tower := shape.vision) and config.rows.patches:
            trained = any("vision" in path.split("/") for path, _ in paths.flatten(state.trained))
            layers = tower.num_layers if trained else 1  # whose backward pass there is, or which runs at a time
            parts[f"activations, {each} × {config.rows.patches:,} patches"] = activations(
                micro_rows * config.rows.patches, layers, tower, tower.width // tower.num_heads
            )
        if "lora" in state.params:
            parts["kernels with adapters merged, float32"] = state.merged(config.model.remat)
        return parts

    masters = {"masters, float32": state.trained_bytes}
    if state.frozen:
        masters[f"frozen parameters, {config.model.base_dtype}"] = state.masters - state.trained_bytes
    copy = {"rollout copy of the weights": state.rollout}
    writing = copy | {
        f"KV cache, {engine.shard_pages:,} pages of {engine.page} tokens": bytes_per_device(engine.page_shapes()),
        "logits of one decode step": rows * logits,
    }
    phases = {}
    if config.sft.steps:
        phases["SFT phase"] = masters | update("sft")
        if evaluates(config):
            meanwhile = {"optimizer moments": state.moments("sft")} if config.sft.eval_problems else {}
            phases["SFT evaluation"] = masters | meanwhile | writing
    if has_rl(config):
        always = masters if config.rl.reset_optimizer else masters | {"optimizer moments": state.moments("rl")}
        phases["rollout phase"] = always | writing
        sent = {"micro-batches of an iteration, at most": iteration_bytes(config, shape, mesh)}
        phases["update phase"] = always | copy | sent | update("rl")
    lines = ["# Memory per device (estimate)"]
    for phase, parts in phases.items():
        lines += [phase]
        lines += [f"  {name:44} {_gib(size)}" for name, size in (parts | {"total": sum(parts.values())}).items()]
    if has_rl(config) and config.rl.reset_optimizer:
        lines += ["In RL the moments exist in the update phase only."]
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
    opt_states: dict[str, Any]  # by section of the config: sft, rl
    rollout_params: Any

    @classmethod
    def of(cls, config, policy: Policy, mesh) -> "Weights":
        place = lambda tree, rules: setup.with_shardings(tree, sharding.shardings(mesh, tree, rules))  # noqa: E731
        params = setup.params_like(config, policy, mesh)
        trained, frozen = trainable.split(params, setup.trained_patterns(config))
        fresh = {s: jax.eval_shape(setup.make_optimizer(config[s].optimizer).init, trained) for s in ("sft", "rl")}
        dtype = config.model.sampling_dtype or policy.config.dtype
        rollout_params = jax.eval_shape(functools.partial(policy.to_sampling_layout, dtype=dtype), params)
        return cls(
            params,
            trained,
            frozen,
            place(fresh, sharding.TRAIN_RULES),
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

    def moments(self, stage: str) -> int:
        return bytes_per_device(self.opt_states[stage])

    @property
    def rollout(self) -> int:
        return bytes_per_device(self.rollout_params)


def bytes_per_device(tree: Any) -> int:
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def _gib(size: float) -> str:
    return f"{size / GIB:9.3f} GiB"
