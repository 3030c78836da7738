"""What bench.py and the peers have in common: clock, probes of the device, random weights."""

import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


class Clock:
    """Times runs, and hears what XLA compiles meanwhile."""

    def __init__(self):
        self.compilations, self.seconds = 0, 0.0
        jax.monitoring.register_event_duration_secs_listener(self._hear)

    def _hear(self, event: str, seconds: float, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            self.compilations += 1
            self.seconds += seconds

    def steady(self, run: Callable[[], Any], *, repeats: int) -> tuple[Any, float]:
        """(what the last run gave, median seconds) of `repeats` runs in which nothing was compiled.

        Raises RuntimeError when equal runs go on compiling.
        """
        seconds: list[float] = []
        for _ in range(repeats + 5):
            before, start = self.compilations, time.perf_counter()
            result = jax.block_until_ready(run())
            if self.compilations == before:
                seconds.append(time.perf_counter() - start)
            if len(seconds) == repeats:
                return result, statistics.median(seconds)
        raise RuntimeError(f"{repeats + 5} equal runs compiled {self.compilations} programs and still do.")


def probes() -> dict[str, float]:
    """What device 0 can do: a copy in TB/s (read and write both count) and a bf16 product of squares in TFLOP/s."""
    size, side, span = (2**25, 512, 0.1) if jax.devices()[0].platform == "cpu" else (2**28, 8192, 3.0)
    block = jnp.zeros(size, jnp.uint8)
    square = jax.random.normal(jax.random.key(0), (side, side), jnp.bfloat16)
    return {
        "copy_tb_s": 2 * size / _median_seconds(_copy, block, span) / 1e12,
        "matmul_tflop_s": 2 * side**3 / _median_seconds(_matmul, square, span) / 1e12,
        "matmul_side": side,
    }


_copy = jax.jit(jnp.copy)
_matmul = jax.jit(lambda a: a @ a)


def _median_seconds(program: Callable[[jax.Array], jax.Array], x: jax.Array, span: float) -> float:
    """Of one call, over about `span` seconds of them. Calls are made ten at a time, which hides launching them."""
    seconds, end = [], time.perf_counter() + span
    while len(seconds) < 2 or time.perf_counter() < end:
        start = time.perf_counter()
        for _ in range(10):
            y = program(x)  # replaces the last one: the probe must not be what needs most memory
        jax.block_until_ready(y)
        seconds.append((time.perf_counter() - start) / 10)
    return statistics.median(seconds[1:])


def random_matrices(tree: Any, seed: int) -> Any:
    """Every leaf of at least two axes drawn anew, with standard deviation 0.02; the others as they are.

    Leaf by leaf, so that no copy of the whole in float32 is ever there. Leaves may be shapes.
    """
    leaves, structure = jax.tree.flatten(tree)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    drawn = [
        _draw(key, leaf.shape, leaf.dtype) if len(leaf.shape) > 1 else leaf
        for key, leaf in zip(keys, leaves, strict=True)
    ]
    return jax.tree.unflatten(structure, drawn)


@functools.partial(jax.jit, static_argnames=("shape", "dtype"))
def _draw(key, shape, dtype):
    return (0.02 * jax.random.normal(key, shape)).astype(dtype)
