// Element-wise arithmetic on the vector of a token: `record_queries`, `steer_add`, and the sums of `track_sentences`.
// Compiled once per instruction set, without fused multiply-adds: PyTorch rounds the product.
#include "isa_kernels.h"
#include "vectors.h"

#include "common/epsilon.h"

namespace skipkv {
namespace SKIPKV_ISA {
namespace {

template <class T>
void steer_as(const void* hidden, float coefficient, const float* vector, void* out, int64_t n) {
  const T* const from = static_cast<const T*>(hidden);
  T* const to = static_cast<T*>(out);
  for (int64_t i = 0; i < n; ++i) from_float(to_float(from[i]) + coefficient * vector[i], to + i);
}

template <class From, class To>
void dequantise_as(const void* x, float scale, void* out, int64_t n) {
  const From* const from = static_cast<const From*>(x);
  To* const to = static_cast<To*>(out);
  for (int64_t i = 0; i < n; ++i) from_float(to_float(from[i]) * scale, to + i);
}

template <class From>
void dequantise_to(const void* x, float scale, void* out, Dtype to, int64_t n) {
  switch (to) {
    case Dtype::kFloat32:
      return dequantise_as<From, Float32>(x, scale, out, n);
    case Dtype::kBFloat16:
      return dequantise_as<From, BFloat16>(x, scale, out, n);
    case Dtype::kFloat16:
      return dequantise_as<From, Float16>(x, scale, out, n);
  }
}

template <class T>
void accumulate_as(const void* x, float* sum, int64_t n) {
  const T* const from = static_cast<const T*>(x);
  for (int64_t i = 0; i < n; ++i) sum[i] += to_float(from[i]);
}

template <class T>
void normalise_as(float* sum, float length, void* out, int64_t n) {
  T* const to = static_cast<T*>(out);
  float squares = 0;
  for (int64_t i = 0; i < n; ++i) {
    sum[i] /= length;
    squares += sum[i] * sum[i];
  }
  const float scale = __builtin_sqrtf(squares) + kEpsilon;
  for (int64_t i = 0; i < n; ++i) {
    from_float(sum[i] / scale, to + i);
    sum[i] = 0;
  }
}

}  // namespace

void accumulate(const void* x, Dtype dtype, float* sum, int64_t n) {
  switch (dtype) {
    case Dtype::kFloat32:
      return accumulate_as<Float32>(x, sum, n);
    case Dtype::kBFloat16:
      return accumulate_as<BFloat16>(x, sum, n);
    case Dtype::kFloat16:
      return accumulate_as<Float16>(x, sum, n);
  }
}

void normalise(float* sum, float length, void* out, Dtype dtype, int64_t n) {
  switch (dtype) {
    case Dtype::kFloat32:
      return normalise_as<Float32>(sum, length, out, n);
    case Dtype::kBFloat16:
      return normalise_as<BFloat16>(sum, length, out, n);
    case Dtype::kFloat16:
      return normalise_as<Float16>(sum, length, out, n);
  }
}

void dequantise(const void* x, KeyType type, float scale, void* out, Dtype to, int64_t n) {
  return type == KeyType::kFloat8E4M3 ? dequantise_to<Float8E4M3>(x, scale, out, to, n)
                                      : dequantise_to<Float8E5M2>(x, scale, out, to, n);
}

void steer(const void* hidden, float coefficient, const float* vector, void* out, Dtype dtype, int64_t n) {
  switch (dtype) {
    case Dtype::kFloat32:
      return steer_as<Float32>(hidden, coefficient, vector, out, n);
    case Dtype::kBFloat16:
      return steer_as<BFloat16>(hidden, coefficient, vector, out, n);
    case Dtype::kFloat16:
      return steer_as<Float16>(hidden, coefficient, vector, out, n);
  }
}

}  // namespace SKIPKV_ISA
}  // namespace skipkv
