"""The one command: a config in, a trained model with its curves and report out.

    python scripts/train.py --config=configs/quickstart.py --workdir=runs/quickstart [--config.rl.tau=0.1]
    python scripts/train.py --config=configs/quickstart.py --dry_run
    python scripts/train.py --config=configs/rl_qwen25_7b.py --dry_run --topology=v5e:16x16

The same command again resumes. Exit status: 0 finished, or stopped by Ctrl-C and saved; 130 left at once, by Ctrl-C
before training or by a second one; 2 what was given cannot work, with the reason in one line on stderr; 1 anything
else, with its traceback.
"""

import itertools
import os
import pathlib
import re
import signal
import sys

from absl import app, flags
from ml_collections import config_flags

# Everything that imports JAX is imported after the flags are parsed, so that a typing error is reported at once.
from kimi_jax.trainers.config import check_config, nearest_field

CONFIG = config_flags.DEFINE_config_file("config", None, "File with get_config(); --config.FIELD=VALUE overrides.")
WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the run. A run that is there resumes.")
DRY_RUN = flags.DEFINE_bool("dry_run", False, "Print the resolved config, batch arithmetic and memory plan, and stop.")
TOPOLOGY = flags.DEFINE_string("topology", None, "With --dry_run: also compile for this TPU slice, such as v5e:16x16.")
DISTRIBUTED = flags.DEFINE_bool("distributed", False, "One of several processes that train together; see the README.")
COORDINATOR = flags.DEFINE_string("coordinator", None, "With --distributed: host:port of process 0.")
PROCESSES = flags.DEFINE_integer("processes", None, "With --distributed: how many processes there are.")
PROCESS = flags.DEFINE_integer("process", None, "With --distributed: which of them this is, from 0.")
TRACEBACK = flags.DEFINE_bool("traceback", False, "Show where an error came from even if it is one in what was given.")


_OUT_OF_MEMORY = (
    "The device ran out of memory. What takes it, by phase, is what --dry_run prints. To need less: in the rollout "
    "sampling.rows, sampling.pages, sampling.prefill_tokens; in the update sft.micro_rows, rl.micro_rows, rows.tokens, "
    "rows.logits_chunk, or model.remat=True; more devices or mesh.fsdp. What was saved is intact: after SFT, another "
    "--workdir goes on with --config.init=THIS_WORKDIR --config.sft.steps=0. --traceback shows where it happened."
)


def run(argv: list[str]) -> None:
    if len(argv) > 1:
        raise ValueError(f"Unexpected argument {argv[1]!r}. Flags begin with --, and values follow = without a space.")
    if CONFIG.value is None:
        raise ValueError("--config=configs/NAME.py is missing. " + _configs())
    if TOPOLOGY.value and not DRY_RUN.value:
        raise ValueError("--topology compiles without running: it needs --dry_run as well.")
    if not DRY_RUN.value and not WORKDIR.value:
        raise ValueError("--workdir=DIR is missing: where shall checkpoints and the report go? (Or give --dry_run.)")
    config = CONFIG.value
    check_config(config)
    sys.path.append(os.getcwd())  # where config.rewards.verifiers may lie

    if DRY_RUN.value and TOPOLOGY.value:
        os.environ["JAX_PLATFORMS"] = "cpu"  # nothing is computed, so whatever devices are here can be left alone
        from kimi_jax.trainers import plan, topology

        print(plan.describe(config, topology.topology_devices(TOPOLOGY.value)), flush=True)
        print(f"\n{topology.compile_for_topology(config, TOPOLOGY.value)}")
        return
    if DRY_RUN.value:
        from kimi_jax.trainers import plan

        print(plan.describe(config))
        return

    if DISTRIBUTED.value:
        from kimi_jax.training import distributed

        distributed.initialize(COORDINATOR.value, PROCESSES.value, PROCESS.value)
    elif not (COORDINATOR.value is PROCESSES.value is PROCESS.value is None):
        raise ValueError("--coordinator, --processes and --process belong to --distributed, which is missing.")

    from kimi_jax.trainers import pipeline
    from kimi_jax.trainers.interrupt import Interrupted

    try:
        pipeline.run(config, pathlib.Path(WORKDIR.value))
    except Interrupted as stopped:
        print(f"{stopped}. The same command resumes.")


def parse_flags(argv: list[str]) -> list[str]:
    """Parses flags, the config file and its overrides. Raises ValueError, FileNotFoundError in our own words."""
    spaced = (f"{a}={b}" for a, b in itertools.pairwise(argv) if a == "--config")
    path = next((a.split("=", 1)[1] for a in (*argv, *spaced) if a.startswith("--config=")), None)
    if path is not None and not pathlib.Path(path).is_file():
        raise FileNotFoundError(f"--config={path}: there is no such file. " + _configs())
    for argument in argv[1:]:
        name = re.match(r"--?config\.([^=]+)", argument)
        if name and (near := nearest_field(name[1])):
            raise ValueError(f"Unknown override --config.{name[1]}. Did you mean --config.{near}?")
    try:
        return flags.FLAGS(argv)
    except flags.Error as error:
        raise ValueError(str(error)) from error
    except (AttributeError, KeyError) as error:  # of the config file, whose settings are locked
        if not (unknown := re.search(r'Key "(\w+)" does not exist', str(error))):
            raise
        near = re.search(r'Did you mean "(\w+)"', str(error))
        hint = f" Did you mean {near[1]!r}?" if near else " kimi_jax/trainers/config.py has them all."
        raise ValueError(f"--config={path} sets {unknown[1]!r}, which there is not.{hint}") from error


def _configs():
    names = sorted(str(path) for path in pathlib.Path("configs").glob("*.py"))
    return "Configs here: " + (", ".join(names) or "none; run this from the root of the repository") + "."


def _ours(error: Exception) -> bool:
    """Is this about what was given, or a bug? Libraries raise ValueError too; theirs keep their traceback."""
    if isinstance(error, OSError):
        return True
    last = error.__traceback__
    while last.tb_next:
        last = last.tb_next
    root = pathlib.Path(__file__).resolve().parent.parent
    file = pathlib.Path(last.tb_frame.f_code.co_filename).resolve()
    return file.is_relative_to(root) and "site-packages" not in file.parts


def _leave(number, frame):
    """Ctrl-C before there is anything to save, or a second time. An exception could be lost, as it is in callbacks of
    the garbage collector, and a print collide with the one that it interrupts."""
    os.write(2, b"Left at once. What was saved is intact: the same command goes on from there.\n")
    os._exit(130)


def main() -> None:
    if "--traceback" not in sys.argv:
        signal.signal(signal.SIGINT, _leave)
    try:
        app.run(run, flags_parser=parse_flags)
    except (ValueError, OSError, FloatingPointError, MemoryError) as error:
        if "--traceback" in sys.argv or not _ours(error):
            raise
        print(f"Error: {error}", file=sys.stderr)
        sys.exit(2)
    except RuntimeError as error:
        if "--traceback" in sys.argv or "RESOURCE_EXHAUSTED" not in str(error):
            raise
        print(f"Error: {_OUT_OF_MEMORY}\n{str(error).splitlines()[0]}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
