"""Reads a published model and keeps it as a checkpoint: everything about it is checked once, here.

    python scripts/import_weights.py --model=Qwen2.5-1.5B-Instruct --out=runs/qwen

--model is a directory in the Hugging Face layout: config.json, safetensors, tokenizer files. OUT/hf holds the same
model afterwards, in the same layout, dtypes and bytes, without what is not read. Tensors go to the devices and back one
by one; the host holds one at a time. A summary goes to stdout as JSON.

Exit status: 0 imported; 2 something in what was given is wrong, and stderr says what.
"""

import argparse
import json
import pathlib
import sys
import time
from collections.abc import Sequence

# Everything that imports JAX is imported after the flags are parsed, so that a typing error is reported at once.


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--model", type=pathlib.Path, required=True, help="a directory in the Hugging Face layout")
    parser.add_argument("--out", type=pathlib.Path, required=True, help="the checkpoint, a new directory")
    parser.add_argument(
        "--unused", action="append", default=[], help="a tensor or option that may be left unread; may be a glob"
    )
    parser.add_argument("--shard_gb", type=float, default=5.0, help="most gigabytes of a file (default: 5)")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier import at OUT")
    parser.add_argument("--traceback", action="store_true", help="show where an error came from")
    args = parser.parse_args(argv)
    if not 0 < args.shard_gb < float("inf"):
        parser.error(f"--shard_gb={args.shard_gb:g} must be a positive number")
    return args


def import_model(model: pathlib.Path, out: pathlib.Path, *, unused: Sequence[str], shard_bytes: int, overwrite: bool):
    """Returns what is printed. Raises ValueError, FileNotFoundError, FileExistsError."""
    import jax

    from kimi_jax.data.hf_tokenizer import HFTokenizer
    from kimi_jax.models import hf
    from kimi_jax.models.hf.shards import DTYPES, read_directory
    from kimi_jax.models.policy import Policy
    from kimi_jax.trainers import setup
    from kimi_jax.trainers.config import default_config
    from kimi_jax.training.sharding import make_mesh

    if (out / "checkpoints").exists():
        raise FileExistsError(f"--out={out} holds a run. Choose a new directory.")
    begin = time.perf_counter()
    family, config = hf.read_config(model, unused=unused)
    try:
        HFTokenizer.load(model).check_vocab(config.vocab_size)
    except FileNotFoundError as error:
        print(f"[no tokenizer: {error}]", file=sys.stderr)
    entries = read_directory(model)
    # In their own dtype, so that nothing is rounded.
    dtypes = {entry.dtype for entry in entries.values() if entry.dtype in DTYPES}
    dtype = DTYPES[dtypes.pop()] if len(dtypes) == 1 else DTYPES["F32"]

    mesh = make_mesh(data=1, fsdp=-1, tensor=1)
    masters = setup.params_like(default_config(), Policy(config), mesh)
    like = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=leaf.sharding), masters)
    params = jax.block_until_ready(hf.load_params(model, like, unused=unused))
    read = time.perf_counter()
    hf.save_params(params, out / "hf", source=model, shard_bytes=shard_bytes, overwrite=overwrite)
    if unused:  # who reads OUT need not name it again
        (out / "hf" / hf.UNUSED).write_text(json.dumps(list(unused)) + "\n")
    return {
        "architecture": family.architecture,
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(params)),
        "tensors": len(entries),
        "bytes": sum(leaf.nbytes for leaf in jax.tree.leaves(params)),
        "read_s": round(read - begin, 2),
        "write_s": round(time.perf_counter() - read, 2),
        "out": str(out / "hf"),
    }


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    try:
        result = import_model(
            args.model,
            args.out,
            unused=args.unused,
            shard_bytes=int(args.shard_gb * 1e9),
            overwrite=args.overwrite,
        )
    except (ValueError, OSError) as error:
        if args.traceback:
            raise
        print(f"Error: {error}", file=sys.stderr)
        return 2
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
