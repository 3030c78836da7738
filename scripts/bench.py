"""How fast, how much memory, and how near to what the machine can do: every such claim of the project is made here.

    python scripts/bench.py decode  --shape=qwen2.5-1.5b --rows=64 --prompt=128 --new=512 --peers=all
    python scripts/bench.py decode  --shape=qwen2.5-1.5b --live=4096,128*63 --new=64
    python scripts/bench.py rollout --shape=qwen2.5-1.5b --rows=64 --problems=32 --responses=8 --peers=tunix
    python scripts/bench.py rollout --shape=qwen2.5-1.5b --rows=64 --cut=8192 --iterations=20 --budget=1024
    python scripts/bench.py gap     --shape=qwen2.5-1.5b --rows=64 --prompt=128 --new=128
    python scripts/bench.py handoff --shape=qwen2.5-1.5b
    python scripts/bench.py train   --shape=qwen2.5-1.5b --rows=8 --tokens=4096 --micro_rows=2 --peers=hf

decode    All rows at once, each with a key, a budget and stops of its own. `ms_per_step` is of decode steps alone: the
          whole less the same with one token each. --live: prompt lengths row by row, also set against all rows at the
          shortest of them.
rollout   Groups that share a prompt, with responses of log-normal length (imposed by budgets), through --rows slots.
          With --iterations: responses that go on in the next iteration after --budget tokens, against waiting for all.
gap       Mean and largest difference between the log-probs of sampler and trainer, with the same weights: as they are
          drawn, and sharpened to 1 nat.
handoff   From the masters in training layout to the copy that samples, which replaces the last one.
train     One update: micro-batches, clipping, AdamW on float32 masters. The peer is a plain loop of PyTorch and
          transformers, with weights in the compute dtype, fused AdamW and gradient checkpointing.

One device. Weights are random; those that sample are scaled so that the entropy of the next token is about 1 nat. A run
in which something compiled does not count and is repeated. Floor: the time in which memory delivers the weights once
per step, and the keys and values that are present, at the copy bandwidth that the same process measured.

Peers run first, one after the other, each in a process of its own with probes of its own: the same rows, prompt and new
tokens, and in `rollout`, where they know but one length for all, batches of --rows up to the longest budget.

Prints every figure and, last, one JSON line. --config.FIELD=VALUE works as for scripts/train.py. Exit status: 0
measured; 2 what was given cannot work.
"""

import argparse
import ast
import functools
import importlib.util
import json
import math
import pathlib
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence

# Everything that imports JAX is imported after the flags are parsed, so that a typing error is reported at once.

PEERS = {"tunix": "tunix", "hf-dynamic": "transformers", "hf-static": "transformers"}  # that sample -> what they need
TRAINERS = {"hf": "transformers"}  # that train


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    commands = parser.add_subparsers(dest="command", required=True)
    decode, rollout, gap, handoff, train = (
        commands.add_parser(name, allow_abbrev=False) for name in ("decode", "rollout", "gap", "handoff", "train")
    )
    for command in (decode, rollout, gap, handoff, train):
        command.add_argument("--shape", default="tiny", help="a name in models.config.NAMED_SIZES (default: tiny)")
        command.add_argument("--seed", type=int, default=0, help="of weights, prompts, lengths and sampling (0)")
        command.add_argument("--json", action="store_true", help="print the JSON line alone")
    for command in (decode, rollout, handoff, train):
        command.add_argument("--repeats", type=_count, default=3, help="runs to take the median of (3)")
    for command in (decode, rollout, gap):
        command.add_argument("--rows", type=_count, default=64, help="responses in flight (64)")
    for command, peers in ((decode, PEERS), (rollout, PEERS), (train, TRAINERS)):
        some = functools.partial(_peers, peers)
        command.add_argument("--peers", type=some, default=[], help=f"none, all, or some of {','.join(peers)}")
        command.add_argument("--peer_seconds", type=_count, default=900, help="after which a peer is given up (900)")
    for command in (decode, gap):
        command.add_argument("--prompt", type=_count, default=128, help="tokens of a prompt (128)")
    gap.add_argument("--new", type=_count, default=128, help="tokens to write per row (128)")
    decode.add_argument("--new", type=_count, default=512, help="tokens to write per row, at least 2 (512)")
    decode.add_argument("--live", type=_lengths, help="as 4096,128*63: a prompt each; instead of --rows and --prompt")
    decode.add_argument("--capacity", type=_count, help="tokens that a row of the cache may hold (prompt + new)")
    rollout.add_argument("--prompt", type=_count, default=1024, help="tokens of a prompt (1024)")
    rollout.add_argument("--problems", type=_count, default=32, help="groups, per iteration (32)")
    rollout.add_argument("--responses", type=_count, default=8, help="responses per problem (8)")
    rollout.add_argument("--median", type=float, default=256.0, help="of the length of a response (256)")
    rollout.add_argument("--sigma", type=float, default=1.0, help="standard deviation of the logarithm of it (1)")
    rollout.add_argument("--cut", type=_count, default=4096, help="longest response (4096)")
    rollout.add_argument("--iterations", type=_count, help="partial rollouts against waiting, over so many")
    rollout.add_argument("--budget", type=_count, help="most tokens that a response grows in an iteration")
    train.add_argument("--rows", type=_count, default=8, help="sequences per update (8)")
    train.add_argument("--tokens", type=_count, default=4096, help="tokens of a sequence (4096)")
    train.add_argument("--micro_rows", type=_count, help="sequences per micro-batch (all)")

    args, rest = parser.parse_known_args(argv)
    args.overrides = {}
    for flag in rest:
        name, equals, value = flag.removeprefix("--config.").partition("=")
        if not flag.startswith("--config.") or not equals:
            parser.error(f"unexpected {flag!r}: `{args.command} --help` lists flags; --config.FIELD=VALUE overrides")
        args.overrides[name] = _literal(value)
    if args.command == "decode":
        args.live = args.live or [args.prompt] * args.rows
        if args.new < 2:
            parser.error("--new=1 leaves no step beside the first, whose time is taken off: give at least 2")
    if args.command == "gap":
        args.tokens = args.prompt + args.new
    if args.command == "rollout" and (args.iterations is None) != (args.budget is None):
        parser.error("--iterations and --budget belong together: give both, or neither for a single rollout")
    return args


def _count(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} must be at least 1")
    return int(text)


def _lengths(text: str) -> list[int]:
    """ "4096,128*63" -> one of 4,096 and 63 of 128."""
    parts = [part.partition("*") for part in text.split(",")]
    return [_count(length) for length, _, times in parts for _ in range(_count(times or "1"))]


def _peers(there: Mapping[str, str], text: str) -> list[str]:
    names = {"all": list(there), "none": []}.get(text, text.split(","))
    if unknown := sorted(set(names) - set(there)):
        raise argparse.ArgumentTypeError(f"unknown {', '.join(unknown)}: use none, all, or some of {','.join(there)}")
    return names


def _literal(text: str):
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def measure(args: argparse.Namespace) -> dict:
    """All figures of one command. Raises ValueError or MemoryError for what cannot be."""
    import _bench_ours as ours

    ours.named_size(args.shape)  # told before the peers take their minutes
    peers = measure_peers(args) if args.command not in ("gap", "handoff") else {}
    bench = ours.Bench.of(args)  # takes the memory of the device
    result = getattr(ours, args.command)(bench)
    for peer in peers.values():
        if "error" not in peer:
            peer["ours_is_times_as_fast"] = result["tokens_per_second"] / peer["tokens_per_second"]
    return {"command": args.command, **ours.circumstances(bench), **result, "peers": peers}


def measure_peers(args: argparse.Namespace) -> dict[str, dict]:
    """What each peer reports, or {"error": why there is nothing}."""
    import _bench_ours as ours

    request = {"shape": args.shape, "seed": args.seed}
    if args.command == "train":
        request |= {"rows": args.rows, "tokens": args.tokens, "micro_rows": args.micro_rows or args.rows}
        return {name: run_peer(name, request | {"repeats": args.repeats}, args.peer_seconds) for name in args.peers}
    if args.command == "decode":
        request |= {"rows": len(args.live), "prompt": max(args.live), "new": args.new, "repeats": args.repeats}
        return {name: run_peer(name, request, args.peer_seconds) for name in args.peers}
    lengths = ours.draw_lengths(range(args.problems * args.responses), args)
    batches = math.ceil(len(lengths) / args.rows)
    request |= {"rows": args.rows, "prompt": args.prompt, "new": max(lengths), "repeats": 1}  # batches are all alike
    peers = {name: run_peer(name, request, args.peer_seconds) for name in args.peers}
    for peer in peers.values():
        if "error" not in peer:
            peer |= {"seconds": batches * peer["seconds"], "batches": batches}
            peer |= {"tokens_per_second": sum(lengths) / peer["seconds"]}
    return peers


def run_peer(name: str, request: dict, seconds: float) -> dict:
    if importlib.util.find_spec(needs := (PEERS | TRAINERS)[name]) is None:
        return {"error": f"{needs} is not installed"}
    program = str(pathlib.Path(__file__).with_name("_bench_peers.py"))
    command = [sys.executable, program, name, json.dumps(request)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        return {"error": f"it had not ended after {seconds} s; allow more with --peer_seconds"}
    if done.returncode:
        return {"error": (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]}
    return json.loads(done.stdout.strip().splitlines()[-1])


def table(figures: dict, indent: int = 0) -> Iterator[str]:
    """A line per figure; those of a part stand indented below its name."""
    for name, value in figures.items():
        head = f"{' ' * indent}{name:{40 - indent}}"
        if isinstance(value, dict):
            yield head.rstrip()
            yield from table(value, indent + 4) if value else [" " * (indent + 4) + "none"]
        elif isinstance(value, float):
            yield head + (f"{value:,.0f}" if abs(value) >= 1e4 else f"{value:,.4g}")
        else:
            yield head + (f"{value:,}" if isinstance(value, int) else str(value))


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    try:
        result = measure(args)
    except (ValueError, MemoryError) as error:
        print(f"Error: {error}", file=sys.stderr)
        return 2
    if not args.json:
        print("\n".join(table(result)))
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
