"""Asks a trained model one question, and prints the answer while it is being written.

    python scripts/sample.py --workdir=runs/quickstart --prompt='12+5-3=?'
    python scripts/sample.py --workdir=runs/quickstart --prompt='How many pips? <image>' --image=tiles.png
    python scripts/sample.py --workdir=runs/quickstart --stage=sft --temperature=0 --json < question.txt
    python scripts/sample.py --model=Qwen2.5-1.5B-Instruct --prompt='Why is the sky blue?' --temperature=0

--model is a directory in the Hugging Face layout, or what scripts/import_weights.py wrote. The question is put as its
chat template says, or with --raw as it is.

The answer goes to stdout, everything else to stderr. Exit status: 0 answered; 2 something in what was given is wrong,
and stderr says what; 130 stopped by Ctrl-C.
"""

import argparse
import json
import pathlib
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

# Everything that imports JAX is imported after the flags are parsed, so that a typing error is reported at once.

_STAGES = ("rl", "dpo", "sft", "merged")  # the last one first
_CHUNK = 8  # tokens between two pieces of printed text
_INCOMPLETE = "\ufffd"  # how the bytes of an unfinished character decode


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--workdir", type=pathlib.Path, help="what scripts/train.py wrote to")
    parser.add_argument("--model", type=pathlib.Path, help="instead: a published model")
    parser.add_argument("--raw", action="store_true", help="with --model: no chat template, the prompt as it is")
    parser.add_argument("--system", default="", help="with --model: the system message, which a run has in its config")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="default: that of the model")
    parser.add_argument("--prompt", help="the question, <image> where an image belongs; default: read from stdin")
    parser.add_argument("--image", action="append", default=[], help="an image file; once per image, in order")
    parser.add_argument("--stage", choices=_STAGES, help="default: the first of these with a checkpoint")
    parser.add_argument("--temperature", type=float, default=1.0, help="0 takes the most likely token (default: 1)")
    parser.add_argument("--top_p", type=float, default=1.0, help="in (0, 1]; 1, the default, is off")
    parser.add_argument("--top_k", type=int, default=0, help="0, the default, is off")
    parser.add_argument("--max_tokens", type=int, help="most tokens of the answer; default: as in training, or 512")
    parser.add_argument("--ignore_end", action="store_true", help="go on to --max_tokens, whatever is written")
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same answer (default: 0)")
    parser.add_argument("--json", action="store_true", help="print one JSON object at the end instead of the text")
    parser.add_argument("--traceback", action="store_true", help="show where an error came from")
    args = parser.parse_args(argv)
    if (args.workdir is None) == (args.model is None):
        parser.error("give one of --workdir and --model")
    if args.model and args.stage or args.workdir and (args.raw or args.system):
        parser.error("--stage belongs to --workdir, --raw and --system to --model")
    if args.raw and args.system:
        parser.error("--raw has no chat template that could put the message of --system")
    return args


def answer(args: argparse.Namespace, config, write: Callable[[str], Any]) -> dict[str, Any]:
    """Gives the text to `write` piece by piece; returns what --json prints. Raises ValueError, FileNotFoundError."""
    import jax

    from kimi_jax.data.images import load_image
    from kimi_jax.sampling.handover import make_handover
    from kimi_jax.sampling.logits import SamplingSettings
    from kimi_jax.trainers import setup
    from kimi_jax.training.sharding import make_mesh
    from kimi_jax.types import IMAGE_MARKER

    if args.dtype:
        config.model.dtype = args.dtype
    stage = None if args.model else find_stage(args.workdir, args.stage)
    max_tokens = config.sampling.max_tokens if args.max_tokens is None else args.max_tokens
    if max_tokens < 1:
        raise ValueError(f"--max_tokens={max_tokens} must be at least 1.")

    # --- the question, as the model reads it
    chat, shape = load_chat(args, config)
    settings = SamplingSettings.of(
        temperature=args.temperature,
        end_ids=(-1,) if args.ignore_end else chat.end_ids,  # -1 is no token
        top_k=args.top_k,
        top_p=args.top_p,
    )
    if args.image and not shape.vision:
        raise ValueError(f"The model of {args.model or args.workdir} has no vision tower. Drop --image.")
    images = [load_image(path) for path in args.image]
    text = sys.stdin.read().strip() if args.prompt is None else args.prompt
    text = IMAGE_MARKER * max(len(images) - text.count(IMAGE_MARKER), 0) + text
    if not text:
        raise ValueError("The question is empty. Give --prompt=TEXT, or the text on stdin.")
    prompt = chat.encode_prompt(text, images)

    # --- the model. One row of tokens cannot be split, so all devices share the width.
    mesh = make_mesh(data=1, fsdp=1, tensor=-1)
    policy = setup.make_policy(config, mesh, shape)
    engine = setup.make_engine(
        config,
        mesh,
        policy,
        chat,
        rows=1,
        pages=None,
        prompt_tokens=max(config.sampling.prompt_tokens, len(prompt.tokens)),
        prompt_patches=max(config.sampling.prompt_patches, sum(len(image.patches) for image in prompt.images)),
        max_tokens=max_tokens,
        chunk=_CHUNK,
    )
    dtype = config.model.sampling_dtype or shape.dtype
    step, masters = load_params(args, stage, setup.params_like(config, policy, mesh), dtype)
    params = make_handover(policy, mesh, dtype=dtype)(masters, None)
    del masters
    origin = args.model or f"{stage}, step {step}"
    print(f"[{origin}, {len(prompt.tokens)} tokens of question]", file=sys.stderr)

    # --- the answer
    rollout = write_as_it_comes(
        engine.stream(params, prompt, serial=0, run_key=jax.random.key(args.seed), settings=settings), write
    )
    return {
        "prompt": text,
        "prompt_token_ids": prompt.tokens.tolist(),
        "token_ids": rollout.tokens.tolist(),
        "logprobs": rollout.logprobs.tolist(),
        "text": rollout.text,
        "tokens": len(rollout),
        "stop": rollout.stop.value,
        "logprob": float(rollout.logprobs.sum()),
        "stage": stage,
        "step": step,
        "seed": args.seed,
    }


def model_settings(model: pathlib.Path, system: str):
    from kimi_jax.trainers.config import default_config

    config = default_config()
    config.model.path = str(model)
    config.model.system = system
    config.data.image_tasks = ()
    config.sampling.max_tokens = 512
    config.sampling.prompt_patches = 0
    return config


def read_config(workdir: pathlib.Path):
    """The config that the run was made with, for whatever device is here."""
    import ml_collections

    from kimi_jax.trainers.config import default_config

    path = workdir / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"--workdir={workdir} holds no run: there is no {path}. Use that of scripts/train.py.")
    try:
        config = ml_collections.ConfigDict(json.loads(path.read_text()))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} is damaged ({error}). The report of the run also holds the config.") from error
    config.model.attention = "auto"
    for part in ("model", "sampling"):
        for name, value in default_config()[part].items():
            if name not in config[part]:  # the run is of an earlier version
                config[part][name] = value
    return config


def find_stage(workdir: pathlib.Path, wanted: str | None) -> str:
    """The last stage that has a checkpoint, or the wanted one if it has."""
    from kimi_jax.training.checkpoint import Checkpointer

    found = []
    for stage in _STAGES:
        directory = workdir / "checkpoints" / stage
        if directory.is_dir():
            with Checkpointer.reader(directory) as checkpoints:
                found += [stage] if checkpoints.latest_step() is not None else []
    if not found:
        raise FileNotFoundError(f"{workdir} has no complete checkpoint yet. Let scripts/train.py run on.")
    if wanted and wanted not in found:
        raise FileNotFoundError(f"{workdir} has no complete checkpoint of --stage={wanted}, only of {found[0]}.")
    return wanted or found[0]


def load_chat(args: argparse.Namespace, config):
    """(chat format, shape of the model)."""
    from kimi_jax.data.hf_chat import load_chat_format
    from kimi_jax.data.tokenizer import Tokenizer
    from kimi_jax.trainers import setup

    if not config.model.path:
        tokenizer = Tokenizer.load(args.workdir / "tokenizer.model")
        shape = setup.model_config(config, tokenizer.vocab_size)
        return setup.native_chat(tokenizer, shape), shape
    directory = setup.hf_directory(args.model or args.workdir)
    config.model.path = str(directory)
    shape = setup.model_config(config, None)  # first: it says better what is wrong with a directory
    return load_chat_format(directory, system=config.model.system, raw=args.raw), shape


def load_params(args: argparse.Namespace, stage: str | None, params_like: dict, dtype: str) -> tuple[int | None, dict]:
    """(step, parameters in the training layout). Of a checkpoint nothing else is read."""
    import jax

    from kimi_jax.models import hf
    from kimi_jax.trainers import setup
    from kimi_jax.training.checkpoint import Checkpointer

    if args.model:
        cast = lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=leaf.sharding)  # noqa: E731
        return None, hf.load_params(setup.hf_directory(args.model), jax.tree.map(cast, params_like))
    state = {"params": params_like}
    with Checkpointer.reader(args.workdir / "checkpoints" / stage) as checkpoints:
        step, loaded, _ = checkpoints.restore({"state": state} if stage == "rl" else state, partial=True)
    return step, (loaded["state"] if stage == "rl" else loaded)["params"]


def write_as_it_comes(rollouts: Iterable, write: Callable[[str], Any]):
    """Writes the text of a growing rollout, but no unfinished character at its end. Returns the last, whole rollout."""
    shown = 0
    for rollout in rollouts:
        stable = rollout.text.rstrip(_INCOMPLETE)  # can be shorter than before: some vocabularies replace all of a
        write(stable[shown:])  # run of bytes while one of its characters is unfinished
        shown = max(shown, len(stable))
    write(rollout.text[shown:])  # what is broken at the end stays broken
    return rollout


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    try:
        show = (lambda text: None) if args.json else lambda text: print(text, end="", flush=True)
        config = model_settings(args.model, args.system) if args.model else read_config(args.workdir)
        result = answer(args, config, show)
    except (ValueError, OSError, MemoryError) as error:
        if args.traceback:
            raise
        print(f"Error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print()
        return 130
    print(json.dumps(result, ensure_ascii=False) if args.json else "")
    if result["stop"] == "length":
        print(f"[cut after {result['tokens']} tokens; --max_tokens allows more]", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
