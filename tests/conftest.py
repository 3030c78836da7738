"""What every test runs under. The environment is set before JAX is imported; processes that tests start inherit it."""

import os
import pathlib
import sys

ROOT = pathlib.Path(__file__).parents[1]

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # JAX_PLATFORMS=cuda pytest ... runs the same tests on a GPU
# Eight devices on any machine. Each needs a thread to meet the others in a collective; on few cores XLA's pool is too
# small for many collectives in flight, and they wait for each other forever. NPROC: how many cores the pool assumes.
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
os.environ["NPROC"] = "32"
# Tests compile more than they compute: this takes a sixth of the time, for programs that are slower and as exact.
# XLA_FLAGS=--xla_backend_optimization_level=3 pytest ... compiles as for users.
if os.environ["JAX_PLATFORMS"] == "cpu" and "optimization_level" not in os.environ["XLA_FLAGS"]:
    os.environ["XLA_FLAGS"] += " --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    os.environ["XLA_FLAGS"] += " --xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters"
# Small products gain nothing from several threads of PyTorch or NumPy, which wait for each other busily.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Each version of Python, and so of JAX, keeps its own cache.
cache = ROOT / ".cache" / "jax" / f"py{sys.version_info.major}{sys.version_info.minor}"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")  # one is read in 0.05 s

import jax  # noqa: E402
from absl import flags  # noqa: E402

# A [T] array added to a [B, T] one is more often a bug than an intention: broadcasting has to be written out.
jax.config.update("jax_numpy_rank_promotion", "raise")

flags.FLAGS.mark_as_parsed()  # grain's worker processes read absl flags, which otherwise only absl.app.run parses


def pytest_collection_modifyitems(items):
    """Files with slow tests first: where whole files are given to workers, none is left with a long one at the end."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)
