// Chooses the instruction set of the kernels.
#include <atomic>

#include "kernels.h"

namespace skipkv {
namespace {

int64_t supported() {
#if defined(__x86_64__)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  return avx2 ? (avx512 ? 2 : 1) : 0;
#else
  return 0;
#endif
}

std::atomic<int64_t> level{-1};

}  // namespace

int64_t limit_isa(int64_t limit) {
  const int64_t best = supported(), chosen = limit < best ? limit : best;
  level = chosen < 0 ? 0 : chosen;
  return level;
}

const Kernels& kernels() {
  const int64_t now = level < 0 ? limit_isa(2) : level.load();
#if defined(__x86_64__)
  if (now == 2) return avx512::kKernels;
  if (now == 1) return avx2::kKernels;
#endif
  (void)now;
  return generic::kKernels;
}

}  // namespace skipkv
