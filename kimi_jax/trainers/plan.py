"""What a run will need, before it runs: the arithmetic of its batches, its memory, and whether a TPU slice can hold it.

`describe` counts shapes and costs nothing. `compile_for_topology` hands the very programs that a run consists of to the
compiler of real TPUs, which needs no TPU, and reads off what they take on each chip.
"""

import collections
import dataclasses
import functools
import importlib.util
import math
import re
import sys
import time
from typing import Any

import jax
import ml_collections
import numpy as np
from jax.experimental import topologies
from jax.sharding import AbstractMesh

from kimi_jax.models.policy import Policy
from kimi_jax.rl.batch import build_minibatches
from kimi_jax.sampling import decode
from kimi_jax.sampling.engine import Engine
from kimi_jax.sampling.handover import make_handover
from kimi_jax.sampling.logits import SamplingSettings
from kimi_jax.trainers import rl, setup
from kimi_jax.training import sharding
from kimi_jax.types import Problem, Prompt, RLBatch, Rollout, RolloutGroup, StopReason, TrainState

# What the TPU compiler says is available per chip, in GiB, by the device kind that JAX reports.
HBM = {"TPU v4": 30.75, "TPU v5 lite": 15.75, "TPU v5": 95.74, "TPU v6 lite": 31.25}
_GIB = 2**30
_COLLECTIVE = re.compile(r"[\s)](all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(?:-start)?\(")


# --- counting -------------------------------------------------------------------------------------------------------


def describe(config: ml_collections.ConfigDict, devices=None) -> str:
    """The resolved config, parameters, batch arithmetic and memory plan. Allocates no parameters.

    devices: those to plan for, by default the ones of this machine. Raises ValueError for a bad model or mesh.
    """
    devices = jax.devices() if devices is None else devices
    shape = setup.model_config(config, config.tokenizer.vocab_size)
    policy = Policy(shape, remat=config.model.remat)
    mesh = _mesh_of_sizes(config, len(devices))
    state = _Weights.of(config, policy, mesh)
    count = lambda name: sum(leaf.size for leaf in jax.tree.leaves(state.params.get(name, ())))  # noqa: E731
    sizes = ", ".join(f"{name} {size}" for name, size in mesh.shape.items())
    lines = [
        "# Config",
        str(config).strip(),
        "",
        "# Model",
        f"{config.model.size}, computing in {shape.dtype}; a vocabulary of at most {shape.vocab_size:,} tokens",
        f"parameters: decoder {count('decoder'):,} + vision {count('vision'):,} = {state.count:,}",
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
    lines = [
        "# Batches",
        f"SFT update: {config.sft.rows} rows of {tokens:,} tokens in {config.sft.rows // config.sft.micro_rows} "
        f"micro-batches of {config.sft.micro_rows} = {config.sft.micro_rows * tokens:,} tokens",
        f"RL rollout: {config.rl.problems} problems × {config.rl.responses} = {responses:,} responses, "
        f"{config.sampling.rows:,} at a time: {math.ceil(responses / config.sampling.rows)} × (1 prefill + at most "
        f"{math.ceil(config.sampling.max_tokens / config.sampling.chunk)} chunks of {config.sampling.chunk} tokens)",
        f"RL update: {config.rl.updates} mini-batches of {responses // config.rl.updates:,} responses, in "
        f"micro-batches of {config.rl.micro_rows} rows = {config.rl.micro_rows * tokens:,} tokens:",
    ]
    for name, share in (("if all have the most tokens", 1.0), ("if all are half as long", 0.5)):
        rows, micro_batches = _rl_rows(config, share)
        lines.append(f"  {name + ':':28} {rows:,} rows, {micro_batches} micro-batches each")
    return lines


def _rl_rows(config, share: float) -> tuple[int, int]:
    """Rows and micro-batches per mini-batch when each response, prompt included, has `share` of the most tokens."""
    longest = config.sampling.prompt_tokens + config.sampling.max_tokens
    per_row = config.rows.tokens // max(int(longest * share), 1)
    # A micro-batch has room for so many responses; more than that per row leave rows empty.
    per_micro = config.rl.micro_rows * min(per_row, config.rl.responses)
    responses = config.rl.problems // config.rl.updates * config.rl.responses
    return math.ceil(responses / per_row), math.ceil(responses / per_micro)


def _memory_lines(config, policy, mesh, state):
    """Estimates per device. The compiler knows better (`compile_for_topology`), but not where it comes from."""
    shape, tensor = policy.config, mesh.shape["tensor"]
    itemsize = np.dtype(shape.dtype).itemsize
    split = lambda n, ways: n // ways if n % ways == 0 else n  # noqa: E731
    row_ways = mesh.shape["data"] * mesh.shape["fsdp"]
    rows, micro_rows = split(config.sampling.rows, row_ways), split(config.rl.micro_rows, row_ways)
    vocab, heads = split(shape.vocab_size, tensor), split(shape.num_kv_heads, tensor)
    tokens = micro_rows * config.rows.tokens
    slots = config.sampling.prompt_tokens + config.sampling.max_tokens
    width = 4 * shape.width + 3 * split(shape.mlp_width, tensor) + 3 * split(shape.num_heads, tensor) * shape.head_dim
    kept, recomputed = (shape.width, width) if config.model.remat else (width, 0)

    cache = 2 * shape.num_layers * rows * slots * heads * shape.head_dim * itemsize
    activations = tokens * itemsize * (shape.num_layers * kept + recomputed)
    always = {"masters, float32": state.masters}
    if not config.rl.reset_optimizer:
        always["optimizer moments"] = state.moments
    rollout = always | {
        "rollout copy of the weights": state.rollout,
        f"KV cache, {rows} rows × {slots:,} slots": cache,
        "logits of one decode step": 3 * 4 * rows * vocab,
    }
    update = always | {
        "rollout copy of the weights": state.rollout,
        "gradients, float32": state.masters,
        "optimizer moments": state.moments,
        f"activations, {micro_rows} rows × {config.rows.tokens:,} tokens": activations,
        f"logits, {config.rows.logits_chunk} tokens per row": 3 * 4 * micro_rows * config.rows.logits_chunk * vocab,
    }
    lines = ["# Memory per device (estimate)"]
    for phase, parts in (("rollout", rollout), ("update", update)):
        lines += [f"{phase} phase"]
        lines += [f"  {name:44} {_gib(size)}" for name, size in (parts | {"total": sum(parts.values())}).items()]
    if config.rl.reset_optimizer:
        lines += ["The moments exist in the update phase only."]
    return lines


def _mesh_of_sizes(config, num_devices: int) -> AbstractMesh:
    """The mesh of the config, or where these devices do not fit it, the smallest that does."""
    sizes = dict(config.mesh)
    known = math.prod(size for size in sizes.values() if size != -1)
    free = num_devices // known if num_devices % known == 0 else 1
    return AbstractMesh(tuple(free if size == -1 else size for size in sizes.values()), tuple(sizes))


@dataclasses.dataclass(frozen=True)
class _Weights:
    """The copies of the parameters as shapes with shardings, and their bytes per device."""

    params: Any
    opt_state: Any
    rollout_params: Any

    @classmethod
    def of(cls, config, policy: Policy, mesh) -> "_Weights":
        place = lambda tree, rules: _like(tree, sharding.shardings(mesh, tree, rules))  # noqa: E731
        params = jax.eval_shape(policy.init, jax.random.key(0))
        opt_state = jax.eval_shape(setup.make_optimizer(config.rl.optimizer).init, params)
        dtype = config.model.sampling_dtype or policy.config.dtype
        rollout_params = jax.eval_shape(functools.partial(policy.to_sampling_layout, dtype=dtype), params)
        return cls(
            place(params, sharding.TRAIN_RULES),
            place(opt_state, sharding.TRAIN_RULES),
            place(rollout_params, sharding.SAMPLE_RULES),
        )

    @property
    def count(self) -> int:
        return sum(leaf.size for leaf in jax.tree.leaves(self.params))

    @property
    def masters(self) -> int:
        return _bytes_per_device(self.params)

    @property
    def moments(self) -> int:
        return _bytes_per_device(self.opt_state)

    @property
    def rollout(self) -> int:
        return _bytes_per_device(self.rollout_params)


# --- compiling ------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Program:
    """What the compiler says of one program. Sizes are bytes per chip; flops, moved bytes and collectives per chip too,
    with the bodies of loops (over layers, chunks of logits, decode steps) counted once."""

    name: str
    seconds: float  # to compile
    error: str = ""  # why it did not compile; the rest is then empty
    arguments: int = 0
    outputs: int = 0
    aliased: int = 0  # outputs in the memory of arguments
    temporaries: int = 0
    flops: float = 0.0
    moved: float = 0.0
    collectives: dict[str, int] = dataclasses.field(default_factory=dict)
    output_shardings: Any = None
    resident: int = 0  # what else is in memory while it runs

    @property
    def total(self) -> int:
        return self.arguments + self.outputs - self.aliased + self.temporaries

    @property
    def peak(self) -> int:
        return self.total + self.resident


@dataclasses.dataclass(frozen=True)
class Report:
    heading: str
    hbm: float  # GiB per chip that a program may use
    programs: tuple[Program, ...]

    @property
    def fits(self) -> bool:
        return all(not p.error and p.peak <= self.hbm * _GIB for p in self.programs)

    def __str__(self) -> str:
        sizes = ("arguments", "outputs", "aliased", "temporaries", "total", "resident", "peak")
        lines = [self.heading, "", f"{'GiB per chip':14}" + "".join(f"{name:>13}" for name in sizes) + "   compile s"]
        for p in self.programs:
            if p.error:
                lines.append(f"{p.name:14} {p.error}")
                continue
            numbers = "".join(f"{getattr(p, size) / _GIB:13.3f}" for size in sizes)
            lines.append(f"{p.name:14}{numbers}{p.seconds:12.1f}")
        lines += ["", f"{'per chip':14}{'FLOPs':>13}{'bytes':>13}   collectives (bodies of loops counted once)"]
        for p in self.programs:
            kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(p.collectives.items())) or "none"
            if not p.error:
                lines.append(f"{p.name:14}{p.flops:13.3g}{p.moved:13.3g}   {kinds}")
        lines += ["", "resident: what else is in memory meanwhile: masters, rollout copy, moments, micro-batches."]
        peak = max(self.programs, key=lambda p: p.peak)
        if self.fits:
            lines.append(f"It fits: at most {peak.peak / _GIB:.2f} of {self.hbm} GiB per chip, in {peak.name}.")
        else:
            lines += ["It does NOT fit:"]
            for p in self.programs:
                if p.error:
                    lines.append(f"  {p.name}: {p.error}")
                elif p.peak > self.hbm * _GIB:
                    over = p.peak / _GIB - self.hbm
                    lines.append(f"  {p.name}: {p.peak / _GIB:.2f} GiB per chip, {over:.2f} more than there are")
            lines.append(
                "Lower rl.micro_rows, rows.tokens or rows.logits_chunk (update), sampling.rows or sampling.max_tokens "
                "(rollout), raise mesh.fsdp or mesh.tensor, or take a larger slice."
            )
        return "\n".join(lines)


def compile_for_topology(config: ml_collections.ConfigDict, topology: str) -> Report:
    """Compiles the programs of an RL iteration for a TPU slice, ahead of time: from the hand-over to the optimizer.

    topology: a name such as v5e:16x16. Raises ValueError where `topology_devices` does, or when the mesh does not fit.
    """
    devices = topology_devices(topology)
    mesh = sharding.make_mesh(**config.mesh, devices=devices)
    policy = setup.make_policy(config, mesh, setup.model_config(config, config.tokenizer.vocab_size))
    weights = _Weights.of(config, policy, mesh)
    kind = devices[0].device_kind
    if kind not in HBM:
        raise ValueError(f"How much memory has a {kind}? Add it to HBM in {__name__}; known are {', '.join(HBM)}.")
    sizes = ", ".join(f"{name} {size}" for name, size in mesh.shape.items())
    heading = (
        f"# Compiled for {topology}: {len(devices)} × {kind}, {HBM[kind]} GiB each; mesh {sizes}; "
        f"attention {policy.implementation}"
    )
    programs = (*_rollout_programs(config, policy, mesh, weights), *_update_programs(config, policy, mesh, weights))
    return Report(heading, HBM[kind], programs)


def topology_devices(topology: str) -> list:
    """The devices of a TPU slice that need not exist. Raises ValueError for an unknown name, or without libtpu."""
    if importlib.util.find_spec("libtpu") is None:
        raise ValueError(f"Compiling for {topology} takes libtpu, though no TPU: pip install -e '.[tpu]'")
    options: dict[str, Any] = {}
    if topology.startswith("v4:"):
        options["chip_config_name"] = "megacore"  # one device per chip
    if re.fullmatch(r"\w+:1(x1)*", topology):
        options["chips_per_host_bounds"] = [1, 1, 1]
    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=topology, **options).devices)
    except Exception as error:  # whatever the plugin raises
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"The TPU compiler does not know the topology {topology!r} ({reason}). Names are a generation and the "
            "number of chips along each side, such as v5e:2x4, v5e:16x16, v6e:8x8, v4:2x2x4, v5p:4x4x4."
        ) from error


def _rollout_programs(config, policy, mesh, weights):
    waiting = weights.masters + (0 if config.rl.reset_optimizer else weights.moments)
    dtype = config.model.sampling_dtype or policy.config.dtype
    handover = make_handover(policy, mesh, dtype=dtype)
    yield _compile("hand-over", handover, weights.params, weights.rollout_params, resident=waiting - weights.masters)

    engine = Engine(
        policy=policy,
        image_id=-1,
        decode_text=str,
        put_rows=lambda tree: _like(tree, sharding.row_shardings(mesh, tree)),
        **config.sampling,
    )
    arrays = engine.start_arrays([_PROMPT], k=config.rl.responses, first_serial=0, budget=1)
    rest = (jax.eval_shape(lambda: jax.random.key(0)), SamplingSettings.of(temperature=1.0, end_ids=[0]))
    start_args = (weights.rollout_params, *arrays, *rest)
    start = _compile("prefill", decode.start, *start_args, resident=waiting, **engine.start_statics)
    yield start
    if start.error:
        return
    state = jax.eval_shape(functools.partial(decode.start, **engine.start_statics), *start_args)
    state = _like(state, start.output_shardings)
    yield _compile(
        "decode chunk",
        decode.decode_chunk,
        weights.rollout_params,
        state,
        *rest,
        policy=policy,
        steps=config.sampling.chunk,
        resident=waiting,
    )


def _update_programs(config, policy, mesh, weights):
    loss_fn = functools.partial(rl.loss_fn, form=config.rl.form)
    stepper = setup.make_stepper(config, policy, mesh, loss_fn, config.rl.optimizer, total_steps=1)
    batch = _micro_batch(config, policy)
    batch = _like(batch, sharding.row_shardings(mesh, batch))
    hyper = {"temperature": np.float32(1), "tau": np.float32(1), "is_pi_i": True}
    acc = jax.eval_shape(stepper.zeros, weights.params, batch, hyper)
    acc = _like(acc, sharding.shardings(mesh, acc, sharding.TRAIN_RULES))
    step = jax.ShapeDtypeStruct((), np.int32)
    state = TrainState(weights.params, weights.opt_state, step)

    waiting = weights.rollout + config.rl.updates * _rl_rows(config, 1.0)[1] * _bytes_per_device(batch)
    scored = waiting + (0 if config.rl.reset_optimizer else weights.moments)
    temperature = hyper["temperature"]
    yield _compile("score", stepper.score, weights.params, batch.rows, temperature, resident=scored)
    yield _compile(
        "gradient", stepper.accumulate, acc, weights.params, batch, hyper, resident=waiting + weights.moments
    )
    yield _compile("optimizer", stepper.apply, state, acc, resident=waiting)


_PROMPT = Prompt(np.zeros(1, np.int32))


def _micro_batch(config, policy) -> RLBatch:
    """Any micro-batch: all have the same shapes."""
    rollout = Rollout(0, np.zeros(1, np.int32), np.zeros(1, np.float32), StopReason.END, 0)
    group = RolloutGroup(Problem("", "", "", ""), _PROMPT, (rollout, rollout))
    [[batch]] = build_minibatches(
        [group],
        [np.zeros(2)],
        [np.zeros(2)],
        minibatches=1,
        rows=config.rl.micro_rows,
        responses=config.rl.micro_rows * config.rl.responses,
        **setup.packing(config, policy.config, image_id=-1),
    )
    return batch


def _compile(name: str, function, *args, resident: int, **statics) -> Program:
    print(f"compiling {name} ...", file=sys.stderr, flush=True)
    begin = time.perf_counter()
    try:
        compiled = function.lower(*args, **statics).compile()
    except jax.errors.JaxRuntimeError as error:
        return Program(name, time.perf_counter() - begin, error=_explain(str(error)), resident=resident)
    memory, cost = compiled.memory_analysis(), compiled.cost_analysis()
    return Program(
        name=name,
        seconds=time.perf_counter() - begin,
        arguments=memory.argument_size_in_bytes,
        outputs=memory.output_size_in_bytes,
        aliased=memory.alias_size_in_bytes,
        temporaries=memory.temp_size_in_bytes + memory.generated_code_size_in_bytes,
        flops=cost.get("flops", 0.0),
        moved=cost.get("bytes accessed", 0.0),
        collectives=dict(collections.Counter(_COLLECTIVE.findall(compiled.as_text()))),
        output_shardings=compiled.output_shardings,
        resident=resident,
    )


def _explain(message: str) -> str:
    """The compiler's reason in one line."""
    found = re.search(r"\(([\d.]+)([KMGT])\) exceeds available HBM \(([\d.]+)([KMGT])\)", message)
    if not found:
        return f"does not compile: {message.splitlines()[0]}"
    in_gib = lambda size, unit: float(size) * 1024 ** ("KMGT".index(unit) - 2)  # noqa: E731
    needed, available = in_gib(*found.group(1, 2)), in_gib(*found.group(3, 4))
    return (
        f"needs {needed:,.2f} GiB per chip, {needed - available:,.2f} more than the {available:.2f} that there are, "
        "for its temporaries alone"
    )


# --- small things ---------------------------------------------------------------------------------------------------


def _like(tree: Any, shardings: Any) -> Any:
    """Shapes and types of `tree`, placed: what a program can be compiled for."""
    place = lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)  # noqa: E731
    return jax.tree.map(place, tree, shardings)


def _bytes_per_device(tree: Any) -> int:
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def _gib(size: float) -> str:
    return f"{size / _GIB:9.3f} GiB"
