"""Imports a directory and exports it again, and prints how far anonymous memory grew, device arrays excluded.

python tests/models/hf/memory.py SOURCE OUT
"""

import json
import pathlib
import sys
import threading
import time

import jax

from kimi_jax.models import hf
from kimi_jax.models.hf.shards import DTYPES, read_directory
from kimi_jax.models.policy import Policy


def anonymous() -> int:
    status = pathlib.Path("/proc/self/status").read_text()
    return 1024 * int(next(line for line in status.splitlines() if line.startswith("RssAnon")).split()[1])


def on_host() -> int:
    """Bytes of device arrays that are part of `anonymous`."""
    return sum(array.nbytes for array in jax.live_arrays()) if jax.default_backend() == "cpu" else 0


class Peak:
    """The most anonymous memory within a block above that at its beginning, less what arrays took at its end."""

    def __enter__(self):
        self.start, self.arrays, self.most, self.running = anonymous(), on_host(), 0, True
        self.thread = threading.Thread(target=self._watch)
        self.thread.start()
        return self

    def _watch(self):
        while self.running:
            self.most = max(self.most, anonymous())
            time.sleep(0.002)

    def __exit__(self, *_):
        self.running = False
        self.thread.join()
        self.bytes = self.most - self.start - (on_host() - self.arrays)


def main(source: pathlib.Path, out: pathlib.Path) -> None:
    shapes = jax.eval_shape(Policy(hf.read_config(source)[1]).init, jax.random.key(0))
    jax.block_until_ready(jax.numpy.zeros(()))
    entries = read_directory(source)
    sizes = [entry.read().nbytes for entry in entries.values()]
    assert all(entry.dtype in DTYPES for entry in entries.values())
    with Peak() as reading:
        begin = time.perf_counter()
        params = jax.block_until_ready(hf.load_params(source, shapes))
        load_s = time.perf_counter() - begin
    with Peak() as writing:
        begin = time.perf_counter()
        hf.save_params(params, out, source=source, shard_bytes=5 * 10**9)
        save_s = time.perf_counter() - begin
    result = {"bytes": sum(sizes), "largest": max(sizes), "import": reading.bytes, "export": writing.bytes}
    print(json.dumps(result | {"import_s": round(load_s, 2), "export_s": round(save_s, 2)}))


if __name__ == "__main__":
    main(*map(pathlib.Path, sys.argv[1:]))
