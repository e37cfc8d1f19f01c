// Numbers for tensor cores that have more bits than the cores multiply: a number is the sum of two parts of 16 bits.
#pragma once

#include "attention.cuh"
#include "tiles.cuh"

namespace skipkv {

constexpr float kLog2E = 1.44269504088896341f, kLn2 = 0.693147180559945309f;

// The parts of the queries that go with keys of type T: keys of 8 bits have float32 queries.
template <class T>
constexpr int kQueryParts = sizeof(typename Types<T>::Query) == sizeof(float) ? 2 : 1;

__device__ inline uint32_t pack_pair(float x, float y, __half) {
  const __half2 pair = __floats2half2_rn(x, y);
  uint32_t bits;
  memcpy(&bits, &pair, sizeof(bits));
  return bits;
}
__device__ inline uint32_t pack_pair(float x, float y, __nv_bfloat16) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(x, y);
  uint32_t bits;
  memcpy(&bits, &pair, sizeof(bits));
  return bits;
}

// Splits two numbers into the pairs of their first and of their second parts.
template <class Factor>
__device__ void split_pair(float x, float y, uint32_t& first, uint32_t& second) {
  first = pack_pair(x, y, Factor());
  Factor rounded[2];
  memcpy(rounded, &first, sizeof(first));
  second = pack_pair(x - to_float(rounded[0]), y - to_float(rounded[1]), Factor());
}

// Fills a tile with queries, or two tiles with the parts of float32 queries. These are divided by a power of two each,
// so that every one fits. `gains` gets what turns a query's products with keys into logits, in units of log 2. Called
// by all THREADS of a block.
template <class T, int STEPS, int THREADS, int HEADS>
__device__ void fill_queries(const Measuring& s, const typename Types<T>::Query* from, const int64_t* offsets,
                             float* gains, typename Types<T>::Factor* tile) {
  const int thread = static_cast<int>(threadIdx.x), dim = s.pages.dim;
  const float unit = kLog2E / s.root;
  if constexpr (kQueryParts<T> == 1) {
    if (thread < HEADS) gains[thread] = unit;
    fill_tile<typename Types<T>::Query, STEPS, THREADS, HEADS>(from, offsets, dim, s.wide_queries, tile);
  } else {
    using Shape = Tile<T, STEPS, HEADS>;
    constexpr int kEach = Shape::kWidth / kWarp;
    const int lane = thread % kWarp;
    for (int q = thread / kWarp; q < HEADS; q += THREADS / kWarp) {
      float x[kEach], largest = 0.0f;
#pragma unroll
      for (int i = 0; i < kEach; ++i) {
        const int d = i * kWarp + lane;
        x[i] = d < dim ? from[offsets[q] + d] : 0.0f;
        largest = fmaxf(largest, fabsf(x[i]));
      }
      for (int offset = kWarp / 2; offset > 0; offset /= 2) {
        largest = fmaxf(largest, __shfl_xor_sync(kAllLanes, largest, offset));
      }
      int exponent = 0;
      if (largest > 0.0f && largest < INFINITY) frexpf(largest, &exponent);
      if (lane == 0) gains[q] = ldexpf(unit, exponent);
#pragma unroll
      for (int i = 0; i < kEach; ++i) {
        const float part = ldexpf(x[i], -exponent);
        const __half rounded = from_float<__half>(part);
        const int at = q * Shape::kStride + i * kWarp + lane;
        tile[at] = rounded;
        tile[Shape::kSize + at] = from_float<__half>(part - to_float(rounded));
      }
    }
  }
}

}  // namespace skipkv
