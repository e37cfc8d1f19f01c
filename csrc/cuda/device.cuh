// Types and functions that several kernels share.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>

#include <cstdint>
#include <cstring>

namespace skipkv {

// The token ids of a step, int32 or int64 as the model runner has them.
struct TokenIds {
  const void* data;
  bool wide;

  __device__ int64_t operator[](int64_t i) const {
    return wide ? static_cast<const int64_t*>(data)[i] : static_cast<const int*>(data)[i];
  }
};

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(__half x) { return __half2float(x); }
__device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

// Keys of 8 bits become halves without rounding.
__device__ inline __half to_half(__nv_fp8_e4m3 x) { return __half(__nv_cvt_fp8_to_halfraw(x.__x, __NV_E4M3)); }
__device__ inline __half to_half(__nv_fp8_e5m2 x) { return __half(__nv_cvt_fp8_to_halfraw(x.__x, __NV_E5M2)); }
__device__ inline float to_float(__nv_fp8_e4m3 x) { return __half2float(to_half(x)); }
__device__ inline float to_float(__nv_fp8_e5m2 x) { return __half2float(to_half(x)); }

template <class T>
__device__ T from_float(float x);
template <>
__device__ inline float from_float<float>(float x) {
  return x;
}
template <>
__device__ inline __half from_float<__half>(float x) {
  return __float2half_rn(x);
}
template <>
__device__ inline __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}

// 16 bytes of memory that no running kernel writes, so they may be read through the read-only cache.
template <class T>
struct alignas(16) Chunk {
  static constexpr int kSize = 16 / sizeof(T);
  T values[kSize];
};

template <class T>
__device__ Chunk<T> read_chunk(const T* from) {
  const uint4 bits = __ldg(reinterpret_cast<const uint4*>(from));
  Chunk<T> chunk;
  memcpy(&chunk, &bits, sizeof(bits));
  return chunk;
}

// Returns the sum over a warp, in every lane.
__device__ inline float warp_sum(float x) {
  for (int offset = kWarp / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(kAllLanes, x, offset);
  return x;
}

// Returns the sum over the lanes up to this one.
__device__ inline int warp_scan(int x, int lane) {
  for (int offset = 1; offset < kWarp; offset *= 2) {
    const int below = __shfl_up_sync(kAllLanes, x, offset);
    if (lane >= offset) x += below;
  }
  return x;
}

}  // namespace skipkv
