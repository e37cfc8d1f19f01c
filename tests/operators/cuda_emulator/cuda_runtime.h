// Replaces CUDA's header of this name when g++ compiles the kernels for the CPU; see emulator.cpp.
#pragma once

#include <vector_functions.h>
#include <vector_types.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>

#undef __global__
#undef __device__
#undef __host__
#undef __shared__
#undef __launch_bounds__
#undef __noinline__
#define __global__
#define __device__
#define __host__
#define __noinline__
// One block runs at a time.
#define __shared__ static
#define __launch_bounds__(...)

namespace emulator {

constexpr int kLanes = 32;
// Bytes that a lane may exchange with its warp.
constexpr int kSlot = 64;

struct Index {
  unsigned x, y, z;
};

// Dynamic shared memory of the running block.
extern char* shared;

void run(int64_t blocks, int threads, int64_t shared_bytes, const std::function<void()>& kernel);

// Waits at a barrier of the block. Returns whether any thread's `vote` was not zero.
int barrier(int vote);

// Waits at a barrier of the warp. Returns the data of all its lanes.
const char* show(const void* data, size_t bytes);

int lane();

// Notes a copy of this thread, or zeros if not `inside`; ends a group of them; makes all groups but the last `left`.
void copy_later(void* to, const void* from, size_t bytes, bool inside);
void end_copies();
void make_copies(int left);

template <class T>
T of_lane(const char* shown, int lane) {
  T value;
  std::memcpy(&value, shown + lane * kSlot, sizeof(T));
  return value;
}

template <class T>
const char* show_all(unsigned mask, const T& value) {
  // The kernels use whole warps only.
  if (mask != ~0u) std::abort();
  return show(&value, sizeof(T));
}

}  // namespace emulator

extern emulator::Index threadIdx, blockIdx;

using std::max;
using std::min;

inline void __syncthreads() { emulator::barrier(0); }
inline int __syncthreads_or(int vote) { return emulator::barrier(vote); }

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits) {
  return emulator::of_lane<T>(emulator::show_all(mask, value), emulator::lane() ^ bits);
}

template <class T>
T __shfl_up_sync(unsigned mask, T value, int distance) {
  const char* shown = emulator::show_all(mask, value);
  const int from = emulator::lane() - distance;
  return from < 0 ? value : emulator::of_lane<T>(shown, from);
}

inline unsigned __ballot_sync(unsigned mask, int vote) {
  const char* shown = emulator::show_all(mask, vote);
  unsigned votes = 0;
  for (int i = 0; i < emulator::kLanes; ++i) votes |= static_cast<unsigned>(emulator::of_lane<int>(shown, i) != 0) << i;
  return votes;
}

inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }

inline unsigned __float_as_uint(float x) {
  unsigned bits;
  std::memcpy(&bits, &x, sizeof(bits));
  return bits;
}

inline float __uint_as_float(unsigned bits) {
  float x;
  std::memcpy(&x, &bits, sizeof(x));
  return x;
}

// Volatile, so that the compiler does not fuse them.
inline float __fmul_rn(float a, float b) {
  volatile float product = a * b;
  return product;
}
inline float __fadd_rn(float a, float b) {
  volatile float sum = a + b;
  return sum;
}

// Misaligned addresses trap as on a GPU.
template <class T>
T __ldg(const T* from) {
  if (reinterpret_cast<uintptr_t>(from) % sizeof(T) != 0) std::abort();
  return *from;
}

template <class T, class U>
T atomicAdd(T* at, U value) {
  const T old = *at;
  *at = old + static_cast<T>(value);
  return old;
}
inline int atomicMax(int* at, int value) {
  const int old = *at;
  *at = std::max(old, value);
  return old;
}
inline unsigned long long atomicMax(unsigned long long* at, unsigned long long value) {
  const unsigned long long old = *at;
  *at = std::max(old, value);
  return old;
}
inline int atomicMin(int* at, int value) {
  const int old = *at;
  *at = std::min(old, value);
  return old;
}
inline unsigned atomicOr(unsigned* at, unsigned value) {
  const unsigned old = *at;
  *at = old | value;
  return old;
}
