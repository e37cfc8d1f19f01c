// Vectors of the instruction set that this translation unit is compiled for.
//
// GCC's and Clang's vector extensions do not name an instruction set, so one source serves all of them; only the bit
// mask of a comparison needs intrinsics.
#pragma once

#include <cstdint>
#include <cstring>

#include "kernels.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#ifndef SKIPKV_ISA
#error "SKIPKV_ISA must name the namespace: generic, avx2 or avx512"
#endif

namespace skipkv {
namespace SKIPKV_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int64_t kLanes = 16, kTileRows = 8, kTileVectors = 3;
#elif defined(__AVX2__)
constexpr int64_t kLanes = 8, kTileRows = 4, kTileVectors = 3;
#else
constexpr int64_t kLanes = 4, kTileRows = 4, kTileVectors = 2;
#endif
constexpr int64_t kTileColumns = kLanes * kTileVectors;

typedef float Vector __attribute__((vector_size(kLanes * 4)));
// A vector at any address. Only for memory: Clang gives variables of this type a small alignment, but forgets it when
// it passes them by reference.
typedef float Anywhere __attribute__((vector_size(kLanes * 4), aligned(4), may_alias));

inline Vector load(const float* from) { return *reinterpret_cast<const Anywhere*>(from); }
inline void store(float* to, Vector value) { *reinterpret_cast<Anywhere*>(to) = value; }

template <class To, class From>
inline To bits(From value) {
  To result;
  static_assert(sizeof(To) == sizeof(From), "bits of equal size");
  __builtin_memcpy(&result, &value, sizeof(To));
  return result;
}

// Sums the lanes by halves; a loop over lanes would extract each one.
template <int64_t n>
struct Lanes {
  typedef float Half __attribute__((vector_size(n * 2), may_alias));
  struct Halves {
    Half low, high;
  };
  template <class V>
  static float sum(V v) {
    const Halves halves = bits<Halves>(v);
    return Lanes<n / 2>::sum(halves.low + halves.high);
  }
};
template <>
struct Lanes<2> {
  template <class V>
  static float sum(V v) {
    return v[0] + v[1];
  }
};
inline float sum_lanes(Vector v) { return Lanes<kLanes>::sum(v); }

// Sets bit k if lane k of a is greater than that of b.
inline uint64_t mask_greater(Vector a, Vector b) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask(bits<__m512>(a), bits<__m512>(b), _CMP_GT_OQ);
#elif defined(__AVX2__)
  return static_cast<uint64_t>(_mm256_movemask_ps(bits<__m256>(a > b)));
#else
  const auto greater = a > b;
  uint64_t mask = 0;
  for (int64_t k = 0; k < kLanes; ++k) mask |= static_cast<uint64_t>(greater[k] & 1) << k;
  return mask;
#endif
}

// Exchanges the lanes k with bit `step` of a with the lanes k - step of b.
template <int64_t step>
inline void exchange(Vector& a, Vector& b) {
  const Vector x = a, y = b;
#if defined(__clang__)
  for (int64_t k = 0; k < kLanes; ++k) {
    a[k] = k & step ? y[k - step] : x[k];
    b[k] = k & step ? y[k] : x[k + step];
  }
#else
  typedef int32_t Order __attribute__((vector_size(kLanes * 4)));
  Order low = {}, high = {};
#pragma GCC unroll 16
  for (int32_t k = 0; k < kLanes; ++k) {
    low[k] = k & step ? kLanes + k - step : k;
    high[k] = k & step ? kLanes + k : k + step;
  }
  a = __builtin_shuffle(x, y, low);
  b = __builtin_shuffle(x, y, high);
#endif
}

template <int64_t step>
inline void transpose_from(Vector (&square)[kLanes]) {
#pragma GCC unroll 16
  for (int64_t i = 0; i < kLanes; ++i) {
    if ((i & step) == 0) exchange<step>(square[i], square[i + step]);
  }
  if constexpr (step > 1) transpose_from<step / 2>(square);
}

// Exchanges lane k of vector i with lane i of vector k: by halves, then by halves of those.
inline void transpose(Vector (&square)[kLanes]) { transpose_from<kLanes / 2>(square); }

// Element types. Conversions are integer arithmetic without branches, which compilers vectorise for every processor.
struct Float32 {
  float value;
};
struct BFloat16 {
  uint16_t value;
};
struct Float16 {
  uint16_t value;
};
// 4 bits of exponent and 3 of mantissa, without infinities: `torch.float8_e4m3fn`.
struct Float8E4M3 {
  uint8_t value;
};
// The upper half of a Float16: `torch.float8_e5m2`.
struct Float8E5M2 {
  uint8_t value;
};

inline float to_float(Float32 x) { return x.value; }
inline float to_float(BFloat16 x) { return bits<float>(static_cast<uint32_t>(x.value) << 16); }
inline float to_float(Float16 x) {
  const uint32_t sign = static_cast<uint32_t>(x.value & 0x8000u) << 16;
  const uint32_t rest = static_cast<uint32_t>(x.value & 0x7fffu) << 13, exponent = rest & 0x0f800000u;
  const uint32_t normal = rest + (112u << 23);
  const uint32_t infinite = rest + (224u << 23);
  // A subnormal half is a normal float: build 2^-14 + the half, then subtract 2^-14.
  const uint32_t small = bits<uint32_t>(bits<float>(rest + (113u << 23)) - bits<float>(113u << 23));
  const uint32_t magnitude = exponent == 0x0f800000u ? infinite : exponent == 0 ? small : normal;
  return bits<float>(magnitude | sign);
}
inline float to_float(Float8E5M2 x) { return to_float(Float16{static_cast<uint16_t>(x.value << 8)}); }
inline float to_float(Float8E4M3 x) {
  const uint32_t sign = static_cast<uint32_t>(x.value & 0x80u) << 24;
  const uint32_t rest = static_cast<uint32_t>(x.value & 0x7fu) << 20;
  const uint32_t normal = rest + (120u << 23);
  // As for a subnormal half, with 2^-6.
  const uint32_t small = bits<uint32_t>(bits<float>(rest + (121u << 23)) - bits<float>(121u << 23));
  const uint32_t magnitude = rest == (0x7fu << 20) ? 0x7fc00000u : rest < (8u << 20) ? small : normal;
  return bits<float>(magnitude | sign);
}

inline void from_float(float x, Float32* to) { to->value = x; }
inline void from_float(float x, BFloat16* to) {
  const uint32_t u = bits<uint32_t>(x);
  const uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1)) >> 16;
  to->value = static_cast<uint16_t>(x != x ? 0x7fc0u : rounded);
}
inline void from_float(float x, Float16* to) {
  const uint32_t u = bits<uint32_t>(x), sign = (u >> 16) & 0x8000u, magnitude = u & 0x7fffffffu;
  // The integer arithmetic rounds normal results, an addition rounds subnormal ones.
  const uint32_t normal = (magnitude + 0xfffu + ((magnitude >> 13) & 1) - (112u << 23)) >> 13;
  const uint32_t small = bits<uint32_t>(bits<float>(magnitude) + 0.5f) - bits<uint32_t>(0.5f);
  const uint32_t large = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
  const uint32_t half = magnitude >= 0x477ff000u ? large : magnitude < 0x38800000u ? small : normal;
  to->value = static_cast<uint16_t>(half | sign);
}

// Returns e^x to about 1 ulp for x <= 0, and e^-87 below -87.
inline float exp_nonpositive(float x) {
  x = x < -87.0f ? -87.0f : x;
  const float shifted = x * 1.44269504f + 12582912.0f;  // adding 1.5 * 2^23 rounds to an integer
  const float n = shifted - 12582912.0f;
  float r = x - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  // Unsigned, because a NaN would overflow a signed shift.
  const uint32_t exponent = bits<uint32_t>(shifted) - bits<uint32_t>(12582912.0f);
  return p * bits<float>((exponent + 127u) << 23);
}

inline float max_of(const float* x, int64_t n) {
  float best = x[0];
  int64_t i = 0;
  if (n >= kLanes) {
    Vector most = load(x);
    for (i = kLanes; i + kLanes <= n; i += kLanes) {
      const Vector v = load(x + i);
      most = v > most ? v : most;
    }
    for (int64_t k = 0; k < kLanes; ++k) best = most[k] > best ? most[k] : best;
  }
  for (; i < n; ++i) best = x[i] > best ? x[i] : best;
  return best;
}

// Replaces x by e^(x - most), where no x is above `most`, and returns the sum.
inline float exponentials(float* x, int64_t n, float most) {
  for (int64_t i = 0; i < n; ++i) x[i] = exp_nonpositive(x[i] - most);
  Vector sums = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) sums += load(x + i);
  float total = sum_lanes(sums);
  for (; i < n; ++i) total += x[i];
  return total;
}

// Replaces x by e^(x - max) and returns the sum.
inline float exponentials(float* x, int64_t n) { return exponentials(x, n, max_of(x, n)); }

// Divides scratch memory; without memory it only counts the bytes.
class Arena {
 public:
  explicit Arena(void* memory) : memory_(static_cast<char*>(memory)) {}

  template <class T>
  T* take(int64_t count) {
    T* result = memory_ == nullptr ? nullptr : reinterpret_cast<T*>(memory_ + used_);
    used_ += (static_cast<size_t>(count) * sizeof(T) + 63) / 64 * 64;
    return result;
  }
  size_t used() const { return used_; }

 private:
  char* memory_;
  size_t used_ = 0;
};

inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

}  // namespace
}  // namespace SKIPKV_ISA
}  // namespace skipkv
