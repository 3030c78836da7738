"""Several processes, one program: each machine runs the same script, and JAX joins their devices into one mesh.

Every process takes every decision, from the same numbers, so that all of them issue the same programs in the same
order. What could differ between them (files that are there, signals, verdicts) comes from process 0, through `agreed`.
Process 0 alone writes files other than checkpoints, which Orbax writes with all of them together.
"""

from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils


def initialize(coordinator: str | None, processes: int | None, process: int | None) -> None:
    """Joins this process to the others, before JAX is used. All None: JAX finds them out, as on TPU pods or Slurm.

    coordinator: "host:port" of process 0. Raises ValueError when only some of the three are given.
    """
    given = (coordinator, processes, process)
    if any(x is None for x in given) and not all(x is None for x in given):
        raise ValueError(
            f"--coordinator={coordinator}, --processes={processes}, --process={process}: give all three, the first "
            "two the same everywhere, or none of them where JAX can find them out (TPU pods, Slurm)."
        )
    jax.distributed.initialize(coordinator, processes, process)


def is_first() -> bool:
    """Whether this process writes what is written once."""
    return jax.process_index() == 0


def alone() -> bool:
    """Whether there are no other processes."""
    return jax.process_count() == 1


def agreed(value: Any) -> Any:
    """`value` (arrays or scalars of equal shapes everywhere) as process 0 has it. Waits for all processes."""
    if alone():
        return value
    return jax.tree.map(np.asarray, multihost_utils.broadcast_one_to_all(jax.tree.map(np.asarray, value)))


def meet(name: str) -> None:
    """Waits until all processes are here."""
    if not alone():
        multihost_utils.sync_global_devices(name)
