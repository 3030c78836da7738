"""Whether a TPU slice can hold a run, asked of its compiler before anyone rents it.

The very programs that a run consists of, from the gradient of SFT to the optimizer of RL, are compiled ahead of time by
the compiler of real TPUs, which needs no TPU, and what they take on each chip is read off.
"""

import collections
import contextlib
import dataclasses
import functools
import importlib.util
import math
import os
import re
import sys
import time
from typing import Any

import jax
import ml_collections
import numpy as np
from jax.experimental import topologies

from kimi_jax.arrays import TrainState
from kimi_jax.data.packing import pack_rows
from kimi_jax.sampling import decode, repetition
from kimi_jax.sampling.handover import make_handover
from kimi_jax.sampling.logits import SamplingSettings
from kimi_jax.trainers import dpo, objectives, reward_models, rl, setup, supervised
from kimi_jax.trainers.config import has_rl
from kimi_jax.trainers.plan import GIB, Weights, evaluates, iteration_bytes, plan_engine, rl_micro_batch
from kimi_jax.training import sharding
from kimi_jax.training.step import LossFn, Reads

# What the TPU compiler says is available per chip, in GiB, by the device kind that JAX reports.
HBM = {"TPU v4": 30.75, "TPU v5 lite": 15.75, "TPU v5": 95.74, "TPU v6 lite": 31.25}
# The compiler need not ask the network which TPU it runs on: any answer will do, as the topology is named. Nor does it
# take hold of a TPU, so several processes may use it.
_LIBTPU_ENVIRONMENT = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
}
_COLLECTIVE = re.compile(r"[\s)](all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(?:-start)?\(")


@dataclasses.dataclass(frozen=True)
class Program:
    """What the compiler says of one program, in bytes per chip.

    flops, moved and collectives count the bodies of loops (over layers, chunks of logits, decode steps) once.
    """

    name: str
    seconds: float  # to compile
    error: str = ""  # why it did not compile; the rest is then empty
    arguments: int = 0
    outputs: int = 0
    aliased: int = 0  # outputs in the memory of arguments
    temporaries: int = 0
    flops: float = 0.0
    moved: float = 0.0  # bytes to and from memory, as the compiler estimates them
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
        return all(not p.error and p.peak <= self.hbm * GIB for p in self.programs)

    def __str__(self) -> str:
        sizes = ("arguments", "outputs", "aliased", "temporaries", "total", "resident", "peak")
        lines = [self.heading, "", f"{'GiB per chip':14}" + "".join(f"{name:>13}" for name in sizes) + "   compile s"]
        for p in self.programs:
            if p.error:
                lines.append(f"{p.name:14} {p.error}")
                continue
            numbers = "".join(f"{getattr(p, size) / GIB:13.3f}" for size in sizes)
            lines.append(f"{p.name:14}{numbers}{p.seconds:12.1f}")
        lines += ["", f"{'per chip':14}{'FLOPs':>13}{'bytes':>13}   collectives (bodies of loops counted once)"]
        for p in self.programs:
            kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(p.collectives.items())) or "none"
            if not p.error:
                lines.append(f"{p.name:14}{p.flops:13.3g}{p.moved:13.3g}   {kinds}")
        lines += ["", "resident: what else is in memory meanwhile: masters, rollout copy, moments, micro-batches."]
        if any(p.name == "prefill" for p in self.programs):
            lines.append("The pages of the KV cache are arguments of the programs from prefill to decode chunk.")
        peak = max(self.programs, key=lambda p: p.peak)
        if self.fits:
            lines.append(f"It fits: at most {peak.peak / GIB:.2f} of {self.hbm} GiB per chip, in {peak.name}.")
        else:
            lines += ["It does NOT fit:"]
            for p in self.programs:
                if p.error:
                    lines.append(f"  {p.name}: {p.error}")
                elif p.peak > self.hbm * GIB:
                    over = p.peak / GIB - self.hbm
                    lines.append(f"  {p.name}: {p.peak / GIB:.2f} GiB per chip, {over:.2f} more than there are")
            lines.append(
                "Lower sft.micro_rows, rl.micro_rows, rows.tokens or rows.logits_chunk (update), sampling.rows, "
                "sampling.max_tokens or sampling.pages (rollout), raise mesh.fsdp or mesh.tensor, or take a larger "
                "slice."
            )
        return "\n".join(lines)


def compile_for_topology(config: ml_collections.ConfigDict, topology: str) -> Report:
    """Compiles the programs of a run for a TPU slice, ahead of time: the update of SFT, if the config has any, then
    those of an iteration of RL, from the hand-over to the optimizer.

    topology: a name such as v5e:16x16. Raises ValueError where `topology_devices` does, or when the mesh does not fit.
    """
    devices = topology_devices(topology)
    mesh = sharding.make_mesh(**config.mesh, devices=devices)
    policy = setup.make_policy(config, mesh, setup.model_config(config, config.tokenizer.vocab_size))
    weights = Weights.of(config, policy, mesh)
    kind = devices[0].device_kind
    if kind not in HBM:
        raise ValueError(f"How much memory has a {kind}? Add it to HBM in {__name__}; known are {', '.join(HBM)}.")
    sizes = ", ".join(f"{name} {size}" for name, size in mesh.shape.items())
    heading = (
        f"# Compiled for {topology}: {len(devices)} × {kind}, {HBM[kind]} GiB each; mesh {sizes}; "
        f"attention {policy.implementation}"
    )
    programs = [*_sft_programs(config, policy, mesh, weights)] if config.sft.steps else []
    evaluated = config.sft.steps and evaluates(config)
    meanwhile = weights.moments("sft") if config.sft.eval_problems else 0
    if has_rl(config):
        moments = 0 if config.rl.reset_optimizer else weights.moments("rl")
        rollout = [*_rollout_programs(config, policy, mesh, weights, moments=moments)]
        if evaluated:  # by the same programs, while the moments of SFT are there
            largest = max(rollout[1:], key=lambda program: program.total)
            resident = weights.masters + meanwhile
            programs.append(dataclasses.replace(largest, name="SFT evaluation", seconds=0.0, resident=resident))
        programs += [*rollout, *_rl_programs(config, policy, mesh, weights)]
    elif evaluated:
        programs += _rollout_programs(config, policy, mesh, weights, moments=meanwhile)
    return Report(heading, HBM[kind], tuple(programs))


def topology_devices(topology: str) -> list:
    """The devices of a TPU slice that need not exist. Raises ValueError for an unknown name, or without libtpu."""
    if importlib.util.find_spec("libtpu") is None:
        raise ValueError(f"Compiling for {topology} takes libtpu, though no TPU: pip install -e '.[tpu]'")
    os.environ.update(_LIBTPU_ENVIRONMENT)
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
            f"The TPU compiler refuses the topology {topology!r} ({reason}). Names are a generation and the number of "
            "chips along each side, such as v5e:2x4, v5e:16x16, v6e:8x8, v4:2x2x4, v5p:4x4x4."
        ) from error


def _rollout_programs(config, policy, mesh, weights, *, moments: int):
    """moments: bytes of them that are there meanwhile."""
    waiting = weights.masters + moments
    dtype = config.model.sampling_dtype or policy.config.dtype
    handover = make_handover(policy, mesh, dtype=dtype)
    yield _compile("hand-over", handover, weights.params, weights.rollout_params, resident=waiting - weights.masters)

    engine = plan_engine(config, policy)
    put_rows = lambda tree: setup.with_shardings(tree, sharding.row_shardings(mesh, tree))  # noqa: E731
    pages, slots = engine.page_shapes(), put_rows(engine.empty_slots())
    # The longest pieces: of prompts with images, and of what is read further on, where the cache is read too.
    longest = engine.bucket(engine.prompt_tokens + engine.max_tokens)
    with_images = bool(policy.config.vision and engine.prompt_patches)
    for name, images, fresh in (("prefill", with_images, True), ("prefill on", False, False)):
        arrays = put_rows(engine.prefill_arrays(longest, images))
        args = (weights.rollout_params, pages, *arrays)
        yield _compile(name, decode.prefill, *args, policy=policy, fresh=fresh, resident=waiting)
    resident = waiting + weights.rollout
    yield _compile("fork", decode.fork, pages, slots.lengths, slots.lengths, mesh=mesh, resident=resident)
    yield _compile(
        "decode chunk",
        decode.decode,
        weights.rollout_params,
        pages,
        put_rows(jax.eval_shape(lambda: repetition.start(engine.rows, window=engine.repetition_window))),
        slots,
        jax.eval_shape(lambda: jax.random.key(0)),
        SamplingSettings.of(temperature=1.0, end_ids=[0]),
        engine.repetition,
        np.int32(0),
        policy=policy,
        steps=engine.chunk,
        resident=waiting,
    )


def _sft_programs(config, policy, mesh, weights):
    loss_fn, batch, reads = _supervised(config, policy)
    stepper = setup.make_stepper(config, policy, mesh, loss_fn, config.sft.optimizer, total_steps=1, reads=reads)
    hyper = {"temperature": np.float32(1), "weight": np.float32(1)}
    alone = config.sft.micro_rows == config.sft.rows
    yield from _update_programs(stepper, mesh, weights, "sft", batch, hyper, waiting=0, prefix="SFT ", alone=alone)


def _supervised(config, policy) -> tuple[LossFn, Any, Reads]:
    """The loss of what the supervised loop learns, a micro-batch for it, and what it is given of the policy."""
    rows, _ = pack_rows([], [], num_rows=config.sft.micro_rows, **setup.packing(config, policy.config, image_id=-1))
    if config.dpo.pairs:
        loss_fn = functools.partial(dpo.loss_fn, beta=config.dpo.beta, alpha=config.dpo.alpha)
        return loss_fn, dpo.PairBatch(rows, np.zeros(rows.tokens.shape, np.float32)), "logprobs"
    if config.reward_model.kind == "classic":
        pairs = config.reward_model.objective == "pairs"
        return reward_models.pairs_loss if pairs else reward_models.labels_loss, supervised.SFTBatch(rows), "scalars"
    return supervised.loss_fn, supervised.SFTBatch(rows), "logprobs"


def _rl_programs(config, policy, mesh, weights):
    objective = objectives.find(config.rl)
    loss_fn = functools.partial(rl.loss_fn, objective=objective)
    stepper = setup.make_stepper(config, policy, mesh, loss_fn, config.rl.optimizer, total_steps=1)
    batch = rl_micro_batch(config, policy.config)
    hyper = {"temperature": np.float32(1), "is_pi_i": True} | objective.hyper
    waiting = weights.rollout + iteration_bytes(config, policy.config, mesh)
    scored = waiting + (0 if config.rl.reset_optimizer else weights.moments("rl"))
    rows = setup.with_shardings(batch.rows, sharding.row_shardings(mesh, batch.rows))
    yield _compile("score", stepper.score, weights.params, rows, hyper["temperature"], resident=scored)
    yield from _update_programs(stepper, mesh, weights, "rl", batch, hyper, waiting=waiting)


def _update_programs(stepper, mesh, weights, stage: str, batch, hyper, *, waiting: int, prefix: str = "", alone=False):
    """alone: there is one micro-batch, so that its gradients are added to none."""
    batch = setup.with_shardings(batch, sharding.row_shardings(mesh, batch))
    acc = jax.eval_shape(stepper.accumulate, None, weights.params, batch, hyper)
    acc = setup.with_shardings(acc, sharding.shardings(mesh, acc, sharding.TRAIN_RULES))
    state = TrainState(weights.params, weights.opt_states[stage], jax.ShapeDtypeStruct((), np.int32))
    resident = waiting + weights.moments(stage)
    before = None if alone else acc
    yield _compile(f"{prefix}gradient", stepper.accumulate, before, weights.params, batch, hyper, resident=resident)
    yield _compile(f"{prefix}optimizer", stepper.apply, state, acc, resident=waiting)


def _compile(name: str, function, *args, resident: int, **statics) -> Program:
    print(f"compiling {name} ...", file=sys.stderr, flush=True)
    begin = time.perf_counter()
    try:
        with _not_cached():
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


@contextlib.contextmanager
def _not_cached():
    """Keeps programs for other machines out of JAX's persistent cache, from which it could not load them here."""
    name = "jax_persistent_cache_min_compile_time_secs"
    before = getattr(jax.config, name)
    jax.config.update(name, math.inf)
    try:
        yield
    finally:
        jax.config.update(name, before)
