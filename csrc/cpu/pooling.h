// Max-pooling over neighbours.
#pragma once

#include "vectors.h"

namespace skipkv {
namespace SKIPKV_ISA {
namespace {

// Sets `pooled[i]` to the largest of the `pool` (odd) neighbours of `x[i]`, with itself, that lie within n.
inline void max_pool(const float* x, int64_t n, int64_t pool, float* pooled) {
  for (int64_t i = 0; i < n; ++i) pooled[i] = x[i];
  for (int64_t shift = 1; shift <= pool / 2; ++shift) {
    for (int64_t i = 0; i + shift < n; ++i) pooled[i] = x[i + shift] > pooled[i] ? x[i + shift] : pooled[i];
    for (int64_t i = shift; i < n; ++i) pooled[i] = x[i - shift] > pooled[i] ? x[i - shift] : pooled[i];
  }
}

}  // namespace
}  // namespace SKIPKV_ISA
}  // namespace skipkv
