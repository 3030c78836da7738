# Sourced by the two commands, quickstart.sh and test.sh. From a bare machine to a virtual environment with the tested versions.

# The environment holds what the pins say, whatever the caller's shell brings along. And because pip is told --no-compile below,
# which saves a third of its time, Python has to be free to keep the byte code of what it imports.
unset PYTHONPATH PYTHONHOME PYTHONDONTWRITEBYTECODE
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1

usable_python() { # COMMAND: does it start, is it new enough, and can it make virtual environments?
  "$1" -c 'import sys, ensurepip, venv; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1
}

find_python() { # [VERSION]: prints an interpreter, of that version if one is given
  local candidates=("python${1:-3.11}")
  [[ -n "${1:-}" ]] || candidates+=(python3.12 python3 python)
  # A pyenv shim exists for versions that are installed but not active, and fails; so look at the versions themselves too.
  candidates+=("$HOME/.pyenv/versions/${1:-3.11}".*/bin/python)
  [[ -n "${1:-}" ]] || candidates+=("$HOME/.pyenv/versions/3.12".*/bin/python)
  local candidate
  for candidate in "${candidates[@]}"; do
    if usable_python "$candidate"; then echo "$candidate"; return; fi
  done
  return 1
}

choose_python() { # prints the interpreter to use, or says what is missing
  if [[ -n "${PYTHON:-}" ]]; then
    usable_python "$PYTHON" && echo "$PYTHON" && return
    echo "PYTHON=$PYTHON cannot be used: it must be Python 3.11 or newer with the modules venv and ensurepip." >&2
  else
    find_python && return
    echo "No Python 3.11 or newer with venv was found (tried python3.11, python3.12, python3, ~/.pyenv/versions)." >&2
    echo "Install one, for instance 'apt install python3 python3-venv', or name one: PYTHON=/path/to/python3.12 bash $0" >&2
  fi
  return 1
}

accelerator() { # prints cpu, cuda or tpu; KIMI_JAX_EXTRA overrides what is found
  case "${KIMI_JAX_EXTRA:-}" in
    cpu | cuda | tpu) echo "$KIMI_JAX_EXTRA"; return ;;
    "") ;;
    *) echo "KIMI_JAX_EXTRA=$KIMI_JAX_EXTRA is not one of cpu, cuda, tpu. Leave it unset to have the machine looked at." >&2; return 1 ;;
  esac
  if nvidia-smi -L >/dev/null 2>&1; then
    echo cuda
  elif compgen -G '/dev/accel[0-9]*' >/dev/null || compgen -G '/dev/vfio/[0-9]*' >/dev/null &&
    { [[ -n "${TPU_NAME:-}${TPU_ACCELERATOR_TYPE:-}${TPU_WORKER_ID:-}" ]] || grep -qs 0x1ae0 /sys/bus/pci/devices/*/vendor; }; then
    echo tpu # a device node that is Google's: by the variables of a TPU VM or by the PCI vendor
  else
    echo cpu
  fi
}

set_up() { # VENV PYTHON [EXTRA...]: afterwards VENV/bin/python has the project, its extras and the pinned versions
  local venv=$1 python=$2 extras pins stamp wanted
  shift 2
  extras=$(IFS=,; echo "$*")
  pins=requirements/$("$python" -c 'import sys; print("py311" if sys.version_info < (3, 12) else "py312")').txt
  stamp=$venv/.installed-${extras:-base}
  wanted=$("$python" -c '
import hashlib, sys
print(sys.version.split()[0], hashlib.sha256(b"".join(open(f, "rb").read() for f in sys.argv[1:])).hexdigest())' setup.py "$pins")
  wanted+=" $PWD" # the installation is editable: it points here
  [[ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]] || return 0

  echo "Setting up $venv${extras:+ with [$extras]} from $pins"
  if [[ "$("$venv/bin/python" -c 'import pip, sys; print(sys.version.split()[0])' 2>/dev/null)" != "${wanted%% *}" ]]; then
    "$python" -m venv --clear "$venv"
  fi
  "$venv/bin/python" -m pip install -qq --no-compile --progress-bar off -c "$pins" -e ".${extras:+[$extras]}"
  echo "$wanted" >"$stamp"
}
