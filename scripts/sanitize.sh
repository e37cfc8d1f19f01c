#!/usr/bin/env bash
# Run the tests of the C++ operators with AddressSanitizer and UndefinedBehaviorSanitizer.
#
#   scripts/sanitize.sh [pytest arguments]
#
# Environment: VENV is the environment's folder; CXX is the compiler, a GCC with libasan and libubsan.
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

# Python and PyTorch leak by design; every other finding ends the process. Tests of missing libraries and of Triton do
# not use this library.
export SKIPKV_NATIVE_CPU=$library
export ASAN_OPTIONS=detect_leaks=0:halt_on_error=1:abort_on_error=1 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1
LD_PRELOAD="$runtime $("$CXX" -print-file-name=libstdc++.so.6)" "$PY" -m pytest -q --capture=sys -p no:cacheprovider \
  tests/unit/ops/test_parity*.py -k "not interpreter" "$@"
