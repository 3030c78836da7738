#!/usr/bin/env bash
# From an empty clone to a model trained by reinforcement learning, with its curves and report, in one command.
set -euo pipefail
workdir=runs/quickstart seed=0 flags=()

usage() {
  cat <<'TEXT'
bash scripts/quickstart.sh [--workdir=DIR] [--seed=N] [--config.FIELD=VALUE ...]

  --workdir=DIR           where checkpoints, metrics and the report go (default: runs/quickstart)
  --seed=N                seed of data, weights and sampling (default: 0)
  --config.FIELD=VALUE    override a field of configs/quickstart.py

Environment: PYTHON=/path/to/python names the interpreter; KIMI_JAX_EXTRA=cpu|cuda|tpu overrides the accelerator that was found.
TEXT
}

while (($#)); do
  case "$1" in
    --workdir=*) workdir=${1#*=} ;;
    --seed=*) seed=${1#*=} ;;
    --config.*=*) flags+=("$1") ;;
    -h | --help) usage; exit 0 ;;
    *) echo "Unknown argument '$1'." >&2; usage >&2; exit 2 ;;
  esac
  shift
done
[[ "$workdir" ]] || { echo "--workdir= is empty: give it a directory, or leave it out." >&2; exit 2; }
[[ "$seed" =~ ^[0-9]+$ ]] || { echo "--seed=$seed is not a whole number of 0 or more." >&2; exit 2; }
[[ "$workdir" == /* ]] || workdir=$PWD/$workdir # relative to where the command was given
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/_setup.sh

python=$(choose_python)
extra=$(accelerator)
if [[ "$extra" == cpu ]]; then
  set_up .venv "$python"
  export JAX_PLATFORMS=cpu # or JAX would look for the TPU of a compiler that the tests installed
else
  set_up .venv "$python" "$extra"
fi

.venv/bin/python scripts/train.py --config=configs/quickstart.py --workdir="$workdir" --config.seed="$seed" \
  ${flags[@]+"${flags[@]}"}

[[ -e "$workdir/summary.json" ]] || exit 0 # stopped by Ctrl-C
echo
echo "Done:"
for file in summary.json curves.png report.html; do
  if [[ -e "$workdir/$file" ]]; then echo "  $workdir/$file"; fi
done
