#!/usr/bin/env bash
# Run everything that needs a GPU, the most important questions in the first ten minutes; see gpu_test.py beside this.
#
#   scripts/gpu_test.sh                       what one GPU answers in about half an hour
#   scripts/gpu_test.sh --full                also every attention backend, graph mode and runner (hours); or FULL=1
#   scripts/gpu_test.sh --only served         single parts; --list names them
#
# Environment: PYTHON is an interpreter with vLLM, this package and pytest (default: .venv/bin/python).
# SKIPKV_GPU_TESTS=cpu runs the same on vLLM's CPU backend, to test the tests themselves.
set -euo pipefail
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-.venv/bin/python}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
exec "$PYTHON" scripts/gpu_test.py "$@"
