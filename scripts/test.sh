#!/usr/bin/env bash
# All checks, from an empty clone: lint, types, the tests on the pinned Python and JAX, and the smoke tests on Python 3.12 as well.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/_setup.sh

python=$(choose_python)
extras=(test curation)
# Large downloads: the compiler for TPUs, which needs no TPU, and PyTorch with transformers, which published models are compared
# with. Without them those tests are skipped, and pytest says so.
[[ "${CI:-}" != true && "${KIMI_JAX_EXTRA:-}" != tpu ]] || extras+=(tpu)
[[ "${CI:-}" != true && "${KIMI_JAX_ORACLES:-}" != 1 ]] || extras+=(oracles)
set_up .venv "$python" "${extras[@]}"

export JAX_PLATFORMS=cpu TPU_SKIP_MDS_QUERY=1
.venv/bin/python -m ruff check
.venv/bin/python -m mypy
.venv/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --durations=15 # tests of a file share what is long to make

# The newest supported JAX needs Python 3.12. Where that is what just ran, there is nothing left to do.
if .venv/bin/python -c 'import sys; sys.exit(sys.version_info >= (3, 12))' && python312=$(find_python 3.12); then
  set_up .venv312 "$python312" test curation
  XLA_FLAGS=--xla_backend_optimization_level=3 .venv312/bin/python -m pytest -m smoke # compiled as for users
fi
