#!/usr/bin/env bash
# Check the operators and the runtime on a CUDA machine that has torch, and neither a network nor vLLM; in ten minutes.
#
#   scripts/gpu_check.sh prepare      on a machine with a network: gather what the other one lacks into build/gpu-check
#   scripts/gpu_check.sh              on the CUDA machine, in a copy of this checkout with that folder
#   scripts/gpu_check.sh --help       steps, sizes, where the results go; `prepare --help` likewise
#
# Without a GPU the same steps run on the CPU as far as they can. Environment: PYTHON is the interpreter, which needs
# torch; by default that of .venv, else python3.
set -euo pipefail
cd "$(dirname "$0")/.."

if [ -z "${PYTHON:-}" ]; then
  PYTHON=python3
  [ -x .venv/bin/python ] && PYTHON=$PWD/.venv/bin/python
fi
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
exec "$PYTHON" -m scripts.gpu_check "$@"
