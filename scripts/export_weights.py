"""Writes a checkpoint as a directory in the Hugging Face layout, which vLLM, SGLang and transformers load as it is.

    python scripts/export_weights.py --checkpoint=runs/math --out=exported
    python scripts/export_weights.py --checkpoint=runs/math --stage=rl --step=40 --out=exported_40

--checkpoint is the workdir of a run, which may be going on, or what scripts/import_weights.py wrote. Names and dtypes
of tensors, config.json, tokenizer and so on are those of the model that it began with; adapters are merged. OUT appears
when it is complete. A summary goes to stdout as JSON.

Exit status: 0 exported; 2 something in what was given is wrong, and stderr says what.
"""

import argparse
import json
import pathlib
import sys
from collections.abc import Sequence

_STAGES = ("rl", "dpo", "sft", "merged")  # the last one first

# Everything that imports JAX is imported after the flags are parsed, so that a typing error is reported at once.


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--checkpoint", type=pathlib.Path, required=True, help="a run, or an import")
    parser.add_argument("--out", type=pathlib.Path, required=True, help="a new directory")
    parser.add_argument("--stage", choices=_STAGES, help="of a run; default: the first of these with a checkpoint")
    parser.add_argument("--step", type=int, help="of that stage; default: the newest")
    parser.add_argument("--shard_gb", type=float, default=5.0, help="most gigabytes of a file (default: 5)")
    parser.add_argument("--overwrite", action="store_true", help="replace the model that is at OUT")
    parser.add_argument("--traceback", action="store_true", help="show where an error came from")
    args = parser.parse_args(argv)
    if not 0 < args.shard_gb < float("inf"):
        parser.error(f"--shard_gb={args.shard_gb:g} must be a positive number")
    return args


def export(args: argparse.Namespace) -> dict:
    """Returns what is printed. Raises ValueError, FileNotFoundError, FileExistsError."""
    from kimi_jax.models import hf, lora
    from kimi_jax.models.policy import Policy
    from kimi_jax.trainers import setup
    from kimi_jax.trainers.config import default_config
    from kimi_jax.training import sharding
    from kimi_jax.training.checkpoint import Checkpointer

    source = args.checkpoint / "hf"
    if not (source / "config.json").is_file():
        raise FileNotFoundError(
            f"There is no {source / 'config.json'}: {args.checkpoint} is neither an import nor a run that began with a "
            "published model. What began as one of our own sizes is of no published family, so that no other program "
            "could load it."
        )
    mesh = sharding.make_mesh(data=1, fsdp=-1, tensor=1)
    policy = Policy(hf.read_config(source, unused=("*",))[1])
    stage = find_stage(args.checkpoint, args.stage)
    if stage is None:
        if args.step is not None:
            raise ValueError(f"{args.checkpoint} is an import, which has no steps. Drop --step={args.step}.")
        step, params = None, hf.load_params(source, setup.params_like(default_config(), policy, mesh), unused=("*",))
    else:
        like = {"params": setup.params_like(read_config(args.checkpoint), policy, mesh)}
        with Checkpointer.reader(args.checkpoint / "checkpoints" / stage) as checkpoints:
            target = {"state": like} if stage == "rl" else like
            step, loaded, _ = checkpoints.restore(target, args.step, partial=True)
        params = lora.merge((loaded["state"] if stage == "rl" else loaded)["params"])
    hf.save_params(params, args.out, source=source, shard_bytes=int(args.shard_gb * 1e9), overwrite=args.overwrite)
    return {"stage": stage or "import", "step": step, "out": str(args.out)}


def find_stage(workdir: pathlib.Path, wanted: str | None) -> str | None:
    """The last stage that has a complete checkpoint, or the wanted one if it has; None for an import."""
    from kimi_jax.training.checkpoint import Checkpointer

    found = []
    for stage in _STAGES:
        directory = workdir / "checkpoints" / stage
        if directory.is_dir():
            with Checkpointer.reader(directory) as checkpoints:
                found += [stage] if checkpoints.latest_step() is not None else []
    if wanted and wanted not in found:
        raise FileNotFoundError(f"{workdir} has no complete checkpoint of --stage={wanted}.")
    if not found and not list((workdir / "hf").glob("*.safetensors")):
        raise FileNotFoundError(f"{workdir} has no complete checkpoint yet. Let scripts/train.py run on.")
    return wanted or (found[0] if found else None)


def read_config(workdir: pathlib.Path):
    """The config that the run was made with."""
    import ml_collections

    path = workdir / "config.json"
    try:
        return ml_collections.ConfigDict(json.loads(path.read_text()))
    except (OSError, TypeError, ValueError) as error:
        raise ValueError(f"{path} cannot be read ({error}), so it is unknown what the run trained.") from error


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    try:
        result = export(args)
    except (ValueError, OSError) as error:
        if args.traceback:
            raise
        print(f"Error: {error}", file=sys.stderr)
        return 2
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
