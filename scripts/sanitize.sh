#!/usr/bin/env bash
# Run the tests of the C++ operators on a library that checks every memory access and undefined operation.
#
#   scripts/sanitize.sh [pytest arguments]
#
# Environment: VENV names the environment's folder; CXX the compiler, which must be a GCC with libasan and libubsan.
set -euo pipefail
cd "$(dirname "$0")/.."

PY=${VENV:-.venv}/bin/python
export CXX=${CXX:-g++}
library=$PWD/build/sanitize/skipkv_vllm/ops/_skipkv_sanitize.so
runtime=$("$CXX" -print-file-name=libasan.so)
if [ "$runtime" = libasan.so ]; then
  printf 'error: %s has no libasan\n       Debian/Ubuntu: apt-get install g++ (or set CXX to a GCC)\n' "$CXX" >&2
  exit 1
fi

rm -f "$library"
SKIPKV_SANITIZE=1 "$PY" setup.py -q build_ext --build-lib build/sanitize --build-temp build/sanitize-objects
[ -f "$library" ] || exit 1

# Python and PyTorch leak by design; everything else ends the process. The tests of missing libraries and of Triton
# say nothing about this one.
export SKIPKV_NATIVE_CPU=$library
export ASAN_OPTIONS=detect_leaks=0:halt_on_error=1:abort_on_error=1 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1
LD_PRELOAD="$runtime $("$CXX" -print-file-name=libstdc++.so.6)" "$PY" -m pytest -q --capture=sys -p no:cacheprovider \
  tests/unit/ops/test_parity*.py -k "not interpreter" "$@"
