#!/usr/bin/env bash
# Run everything that needs a GPU: operators, engines with every attention backend, graph mode and model runner, FP8
# caches, and a short measurement. Later parts run even if an earlier one fails; the summary names the failed ones.
#
# Environment: PYTHON is an interpreter with vLLM, this package and pytest (default: .venv/bin/python).
# SKIPKV_GPU_TESTS=cpu runs the engine tests on vLLM's CPU backend, to test the tests themselves.
set -uo pipefail
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-.venv/bin/python}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
if [ "${SKIPKV_GPU_TESTS:-}" != cpu ] && ! "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  echo "error: $PYTHON sees no GPU (torch.cuda.is_available() is False)" >&2
  echo "       Install a CUDA build of torch and vLLM (scripts/bootstrap.sh does), or set PYTHON." >&2
  exit 1
fi

failed=()
part() {  # part TITLE COMMAND...
  local title=$1
  shift
  printf '\n==== %s\n' "$title"
  "$@" || failed+=("$title")
}

part "installation" "$PYTHON" -c 'from skipkv_vllm.cli.doctor import examine; print(*examine().lines, sep="\n")'
part "operators" "$PYTHON" -m pytest -q -rs -k cuda tests/gpu/test_ops_cuda.py tests/unit/ops/test_parity*.py
part "an independent attention kernel" "$PYTHON" -m pytest -q -rs tests/gpu/test_xformers_cuda.py
part "engines" "$PYTHON" -m pytest -rA tests/gpu/test_engine_cuda.py
part "FP8 keys" "$PYTHON" -m pytest -q -rs tests/engine/test_fp8.py
part "cost of a decode step against stock vLLM" "$PYTHON" -m benchmarks.overhead --compiled --dtype bfloat16 \
  --budgets 256 --batch-sizes 1 16 --rounds 3

echo
if [ ${#failed[@]} -gt 0 ]; then
  printf 'FAILED: %s\n' "${failed[@]}"
  exit 1
fi
echo "all parts passed; skipped tests are listed above with their reasons"
