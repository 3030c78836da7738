"""The measurements of bench.py: each maps a `Bench` to its figures."""

import argparse
import dataclasses
import math
import statistics
import types
import zlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from _bench_probes import Clock, probes, random_matrices

from kimi_jax.arrays import TrainState
from kimi_jax.data.packing import pack_rows
from kimi_jax.models.config import named_size
from kimi_jax.models.policy import Policy
from kimi_jax.sampling.engine import Engine
from kimi_jax.sampling.handover import make_handover, num_bytes
from kimi_jax.sampling.logits import SamplingSettings
from kimi_jax.trainers import setup
from kimi_jax.trainers.config import default_config
from kimi_jax.trainers.supervised import SFTBatch, loss_fn
from kimi_jax.training import sharding
from kimi_jax.training.metrics import peak_memory
from kimi_jax.types import Example, Prompt, Request, Segment

_ENTROPY = 1.0  # nats, of the next token
_CALIBRATION_TOKENS = 64  # per row, at each step of the search for the scale that gives it


@dataclasses.dataclass(frozen=True)
class Bench:
    """Config and policy of a measurement, on one device."""

    args: argparse.Namespace
    config: Any
    mesh: jax.sharding.Mesh
    policy: Policy
    clock: Clock

    @classmethod
    def of(cls, args: argparse.Namespace) -> "Bench":
        config = default_config()
        try:
            config.update_from_flattened_dict({"model.size": args.shape} | args.overrides)
        except (KeyError, TypeError) as error:
            raise ValueError(f"--config.FIELD=VALUE: {error}") from error
        # Of rows that are trained on, which the choice of attention depends on.
        if tokens := getattr(args, "tokens", None):
            with config.unlocked():
                config.rows.tokens, config.rows.patches = tokens, 0
                config.rows.logits_chunk = math.gcd(config.rows.logits_chunk, tokens)
        shape = dataclasses.replace(named_size(args.shape), vision=None)  # text alone
        shape = dataclasses.replace(shape, dtype=config.model.dtype or shape.dtype)
        mesh = sharding.make_mesh(data=1, fsdp=1, tensor=1, devices=jax.devices()[:1])
        return cls(args, config, mesh, setup.make_policy(config, mesh, shape), Clock())

    @property
    def sampling_dtype(self) -> str:
        return self.config.model.sampling_dtype or self.policy.config.dtype

    @property
    def parameters(self) -> int:
        return sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(self.policy.init, jax.random.key(0))))

    def masters(self) -> dict:
        key = jax.random.key(self.args.seed)
        shapes = jax.eval_shape(self.policy.init, key)
        return jax.jit(self.policy.init, out_shardings=sharding.shardings(self.mesh, shapes, sharding.TRAIN_RULES))(key)

    def prompts(self, lengths: Sequence[int], stream: int) -> list[Prompt]:
        draw = np.random.default_rng((self.args.seed, stream))
        return [Prompt(draw.integers(1, self.policy.config.vocab_size, n).astype(np.int32)) for n in lengths]


def circumstances(bench: Bench) -> dict:
    """What stands beside every figure. To be asked when all is measured."""
    device = bench.mesh.devices.flat[0]
    return {
        "hardware": device.device_kind,
        "jax": jax.__version__,
        "shape": bench.args.shape,
        "dtype": bench.policy.config.dtype,
        "parameters": bench.parameters,
        "peak_memory_bytes": peak_memory(),
        "compilations": bench.clock.compilations,
        "compile_seconds": bench.clock.seconds,
    }


def draw_lengths(serials: range, args: argparse.Namespace) -> list[int]:
    """Log-normal, in tokens: how long the responses of these serials are, whoever writes them and when."""
    normal = np.random.default_rng(args.seed).normal(size=serials.stop)[serials.start :]
    return np.clip(np.rint(args.median * np.exp(args.sigma * normal)), 1, args.cut).astype(int).tolist()


@dataclasses.dataclass
class Sampler:
    """An engine, and random weights for it."""

    bench: Bench
    engine: Engine
    params: dict

    @classmethod
    def of(cls, bench: Bench, *, rows: int, prompt_tokens: int, max_tokens: int) -> "Sampler":
        chat = types.SimpleNamespace(image_id=-1, tokenizer=types.SimpleNamespace(decode=lambda tokens: ""))
        sizes = {"rows": rows, "prompt_tokens": prompt_tokens, "max_tokens": max_tokens, "prompt_patches": 0}
        engine = setup.make_engine(bench.config, bench.mesh, bench.policy, chat, **sizes)

        def vectors(path, leaf):
            scale = jax.tree_util.keystr(path[-1:], simple=True) == "scale"  # 1; biases 0
            return leaf if len(leaf.shape) > 1 else jnp.full(leaf.shape, scale, leaf.dtype)

        layout = lambda: bench.policy.to_sampling_layout(bench.policy.init(jax.random.key(0)), bench.sampling_dtype)  # noqa: E731
        shapes = jax.eval_shape(layout)
        params = random_matrices(jax.tree_util.tree_map_with_path(vectors, shapes), bench.args.seed)
        return cls(bench, engine, jax.device_put(params, sharding.shardings(bench.mesh, shapes, sharding.SAMPLE_RULES)))

    def write(self, requests: Sequence[Request], temperature: float = 1.0) -> list[Segment]:
        """What is written for each request, as long as its budget. Raises RuntimeError if it is not."""
        # The end token lies outside the vocabulary: looked for at every step, never found.
        settings = SamplingSettings.of(temperature=temperature, end_ids=[self.bench.policy.config.vocab_size])
        key = jax.random.key(self.bench.args.seed)
        flight = self.engine.start(self.params, requests, run_key=key, settings=settings)
        written = {}
        while not flight.done:
            written |= dict(flight.advance())
        for index, request in enumerate(requests):
            if (n := len(written[index].tokens)) != request.budget:
                raise RuntimeError(
                    f"Response {index} has {n} tokens, its budget was {request.budget}: {written[index].stop} ended "
                    "it, and the figures would mean nothing."
                )
        return [written[index] for index in range(len(requests))]

    def scale_to_entropy(self, requests: Sequence[Request]) -> None:
        """Scales the final norm, and so the logits, until the written tokens have the wanted entropy on average."""
        low, high = 1e-3, 1e2  # temperatures around the one to find
        for _ in range(14):
            middle = math.sqrt(low * high)
            low, high = (middle, high) if entropy(self.write(requests, middle)) < _ENTROPY else (low, middle)
        norm = self.params["decoder"]["ends"]["norm"]
        norm["scale"] = (norm["scale"] / math.sqrt(low * high)).astype(norm["scale"].dtype)

    def floor(self, *, steps: float, cached: float, bandwidth: float) -> float:
        """Seconds in which memory reads the weights `steps` times and the keys and values of `cached` tokens once."""
        shape, decoder = self.bench.policy.config, self.params["decoder"]
        weights = num_bytes(decoder) - (0 if shape.tie_embeddings else num_bytes(decoder["ends"]["embed"]))
        per_token = 2 * shape.num_layers * shape.num_kv_heads * shape.head_dim * np.dtype(shape.dtype).itemsize
        return (steps * weights + cached * per_token) / (1e12 * bandwidth)


def entropy(written: Sequence[Segment]) -> float:
    """Mean of −log p over tokens drawn from p: an estimate of the entropy of the next token, in nats."""
    return -float(np.mean(np.concatenate([segment.logprobs for segment in written])))


def decode(bench: Bench) -> dict:
    args, measured = bench.args, probes()
    rows, longest, shortest = len(args.live), max(args.live), min(args.live)
    capacity = args.capacity or longest + args.new
    if capacity < longest + args.new:
        raise ValueError(f"--capacity={capacity} is less than prompt and response: {longest} + {args.new} tokens.")
    sampler = Sampler.of(bench, rows=rows, prompt_tokens=longest, max_tokens=capacity - longest)

    def requests(lengths, budget):
        return [Request(prompt, i, budget) for i, prompt in enumerate(bench.prompts(lengths, 0))]

    def measure(lengths):
        written, whole = bench.clock.steady(lambda: sampler.write(requests(lengths, args.new)), repeats=args.repeats)
        _, first = bench.clock.steady(lambda: sampler.write(requests(lengths, 1)), repeats=args.repeats)
        step = (whole - first) / (args.new - 1)
        cached = sum(lengths) + rows * args.new / 2  # on average
        floor = sampler.floor(steps=1, cached=cached, bandwidth=measured["copy_tb_s"])
        return {
            "tokens_per_second": rows * args.new / whole,
            "ms_per_step": 1e3 * step,
            "floor_ms": 1e3 * floor,
            "share_of_floor": floor / step,
            "share_of_floor_prefill_included": floor * args.new / whole,
            "seconds": whole,
            "seconds_prefill_and_first_token": first,
            "entropy": entropy(written),
        }

    sampler.scale_to_entropy(requests([shortest] * rows, min(args.new, _CALIBRATION_TOKENS)))
    result = {"rows": rows, "prompt": longest, "new": args.new, "capacity": capacity}
    result |= {**measure(args.live), "probes": measured}
    if longest > shortest:
        even = measure([shortest] * rows)
        result |= {"cost_over_even_rows": result["ms_per_step"] / even["ms_per_step"], "even_rows": even}
    return result


def rollout(bench: Bench) -> dict:
    args, measured, k = bench.args, probes(), bench.args.responses
    sampler = Sampler.of(bench, rows=args.rows, prompt_tokens=args.prompt, max_tokens=args.cut)
    few = min(_CALIBRATION_TOKENS, args.cut)
    sampler.scale_to_entropy(
        [Request(prompt, i, few) for i, prompt in enumerate(bench.prompts([args.prompt] * args.rows, 1))]
    )
    asked = ("rows", "prompt", "problems", "responses", "median", "sigma", "cut", "seed", "iterations", "budget")
    result = {name: getattr(args, name) for name in asked} | {"probes": measured}
    if args.iterations:
        waiting = partial(sampler, budget=args.cut)
        carried = partial(sampler, budget=args.budget)
        gain = carried["tokens_per_second"] / waiting["tokens_per_second"]
        return result | carried | {"gain_over_waiting": gain, "waiting": waiting}

    prompts = bench.prompts([args.prompt] * args.problems, 0)
    lengths = draw_lengths(range(args.problems * k), args)
    requests = [Request(prompts[i // k], i, length) for i, length in enumerate(lengths)]
    written, seconds = bench.clock.steady(lambda: sampler.write(requests), repeats=args.repeats)
    steps = max(max(lengths), sum(lengths) / args.rows)  # fewer are impossible
    cached = sum(n * (args.prompt + n / 2) for n in lengths)
    return result | {
        "tokens_per_second": sum(lengths) / seconds,
        "ms_per_step": 1e3 * seconds / steps,
        "share_of_floor": sampler.floor(steps=steps, cached=cached, bandwidth=measured["copy_tb_s"]) / seconds,
        "seconds": seconds,
        "response_tokens": sum(lengths),
        "longest": max(lengths),
        "entropy": entropy(written),
    }


@dataclasses.dataclass(frozen=True)
class _Open:
    """A response in the making, over several iterations."""

    prompt: Prompt
    serial: int
    length: int
    tokens: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0, np.int32))


def partial(sampler: Sampler, *, budget: int) -> dict:
    """Rollout phases one after the other. Each starts `problems` new groups and writes on at every open response.

    budget: most tokens that a response may grow in one phase. What is unfinished goes on in the next one, where its
    prompt and tokens are read again, as new weights would demand. From the longest length on, every phase waits.
    """
    bench, args = sampler.bench, sampler.bench.args
    group = args.problems * args.responses
    responses: list[_Open] = []
    seconds, longest, tokens, read_again = [], [], 0, 0
    for iteration in range(args.iterations):
        prompts = bench.prompts([args.prompt] * args.problems, 2 + iteration)
        serials = range(iteration * group, (iteration + 1) * group)
        read_again += sum(len(r.prompt.tokens) + len(r.tokens) for r in responses)
        responses += [
            _Open(prompts[j // args.responses], serial, length)
            for j, (serial, length) in enumerate(zip(serials, draw_lengths(serials, args), strict=True))
        ]
        requests = [Request(r.prompt, r.serial, min(r.length - len(r.tokens), budget), r.tokens) for r in responses]
        written, taken = bench.clock.steady(lambda requests=requests: sampler.write(requests), repeats=1)
        seconds.append(taken)
        longest.append(max(r.length for r in responses))
        tokens += sum(request.budget for request in requests)
        grown = [
            dataclasses.replace(r, tokens=np.concatenate([r.tokens, segment.tokens]))
            for r, segment in zip(responses, written, strict=True)
        ]
        responses = [r for r in grown if len(r.tokens) < r.length]
    return {
        "tokens_per_second": tokens / sum(seconds),
        "seconds": sum(seconds),
        "response_tokens": tokens,
        "responses_finished": args.iterations * group - len(responses),
        "tokens_read_again": read_again,
        "seconds_per_iteration": [round(s, 4) for s in seconds],
        "longest_per_iteration": longest,
    }


def gap(bench: Bench) -> dict:
    args, policy = bench.args, bench.policy
    masters = _roughened(bench.masters(), jax.random.key(args.seed))
    sampler = Sampler.of(bench, rows=args.rows, prompt_tokens=args.prompt, max_tokens=args.new)
    sampler.params = make_handover(policy, bench.mesh, dtype=bench.sampling_dtype)(masters, sampler.params)
    prompts = bench.prompts([args.prompt] * args.rows, 0)
    requests = [Request(prompt, i, args.new) for i, prompt in enumerate(prompts)]
    packing = setup.packing(bench.config, policy.config, image_id=-1) | {"num_rows": 1}
    chunk = bench.config.rows.logits_chunk
    logprobs = jax.jit(lambda params, rows: policy.logprobs(params, rows, temperature=1.0, logits_chunk=chunk)[0])

    def measure():
        written, gaps = sampler.write(requests), []
        for prompt, segment in zip(prompts, written, strict=True):
            example = Example(np.concatenate([prompt.tokens, segment.tokens]), np.arange(args.tokens) > 0)
            of_row = logprobs(masters, pack_rows([example], [[0]], **packing)[0])[0]
            gaps.append(np.abs(np.asarray(of_row)[args.prompt - 1 : -1] - segment.logprobs))
        return {"entropy": entropy(written), "mean": float(np.mean(gaps)), "max": float(np.max(gaps))}

    result = {"rows": args.rows, "prompt": args.prompt, "new": args.new, "at_random": measure()}
    sampler.scale_to_entropy(requests)
    scale = sampler.params["decoder"]["ends"]["norm"]["scale"]
    masters["decoder"]["ends"]["norm"]["scale"] = scale.astype(jnp.float32)
    return result | {"sharpened": measure()}


def _roughened(params: dict, key: jax.Array) -> dict:
    """Biases that are not 0 and scales that are not 1, so that it shows where they are applied."""

    def one(path, leaf):
        if path[-1].key not in ("bias", "scale"):
            return leaf
        return leaf + 0.1 * jax.random.normal(jax.random.fold_in(key, zlib.crc32(str(path).encode())), leaf.shape)

    return jax.tree_util.tree_map_with_path(one, params)


def handoff(bench: Bench) -> dict:
    measured, masters = probes(), bench.masters()
    to_rollout = make_handover(bench.policy, bench.mesh, dtype=bench.sampling_dtype)
    copy = None

    def run():
        nonlocal copy
        copy = to_rollout(masters, copy)
        return copy

    _, seconds = bench.clock.steady(run, repeats=max(bench.args.repeats, 20))
    floor = (num_bytes(masters) + num_bytes(copy)) / (1e12 * measured["copy_tb_s"])
    return {
        "ms": 1e3 * seconds,
        "bytes": num_bytes(copy),
        "bytes_of_masters": num_bytes(masters),
        "floor_ms": 1e3 * floor,
        "share_of_floor": floor / seconds,
        "probes": measured,
    }


def train(bench: Bench) -> dict:
    args, config, shape, before = bench.args, bench.config, bench.policy.config, probes()
    micro_rows = args.micro_rows or args.rows
    if args.rows % micro_rows:
        raise ValueError(f"--rows={args.rows} must be a multiple of --micro_rows={micro_rows}.")
    stepper = setup.make_stepper(config, bench.policy, bench.mesh, loss_fn, config.sft.optimizer, total_steps=100)

    packing = setup.packing(config, shape, image_id=-1) | {"num_rows": micro_rows}
    one_per_row = [[i] for i in range(micro_rows)]
    prompts = bench.prompts([args.tokens] * args.rows, 0)
    examples = [Example(prompt.tokens, np.arange(args.tokens) > 0) for prompt in prompts]
    batches = [
        sharding.put_rows(bench.mesh, SFTBatch(pack_rows(examples[i : i + micro_rows], one_per_row, **packing)[0]))
        for i in range(0, args.rows, micro_rows)
    ]
    hyper = {"temperature": np.float32(1), "weight": np.float32(1 / (args.rows * max(args.tokens - 1, 1)))}
    params = bench.masters()
    step = jax.device_put(np.int32(0), jax.NamedSharding(bench.mesh, jax.P()))
    state = TrainState(params, stepper.init_optimizer(params), step)
    del params  # the update gives its memory to the new ones

    def run():
        nonlocal state
        acc = None
        for batch in batches:
            acc = stepper.accumulate(acc, state.params, batch, hyper)
        state, metrics = stepper.apply(state, acc)
        return jax.block_until_ready((state, metrics))[1]

    metrics, seconds = bench.clock.steady(run, repeats=args.repeats)
    measured = {"before": before, "after": probes()}
    rate = 1e12 * statistics.mean(probe["matmul_tflop_s"] for probe in measured.values())
    tokens = args.rows * args.tokens
    causal = args.rows * args.tokens**2 / 2  # pairs of a query and what it sees
    flops = 6 * bench.parameters * tokens + 12 * shape.num_layers * shape.num_heads * shape.head_dim * causal
    return {
        "rows": args.rows,
        "tokens": args.tokens,
        "micro_rows": micro_rows,
        "tokens_per_second": tokens / seconds,
        "ms_per_step": 1e3 * seconds,
        "share_of_matmul_rate": flops / seconds / rate,
        "loss": float(metrics["loss"]),
        "probes": measured,
    }
