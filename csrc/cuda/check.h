// Checks of arguments.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <initializer_list>
#include <vector>

#include "gpu.h"

namespace skipkv {

using torch::headeronly::ScalarType;

inline void check(const Tensor& tensor, const char* name, ScalarType type, std::initializer_list<int64_t> sizes) {
  STD_TORCH_CHECK(on_gpu(tensor), "skipkv_cuda: ", name, " must be on a GPU");
  STD_TORCH_CHECK(tensor.scalar_type() == type, "skipkv_cuda: ", name, " must be ", torch::headeronly::toString(type),
                  ", not ", torch::headeronly::toString(tensor.scalar_type()));
  STD_TORCH_CHECK(tensor.dim() == static_cast<int64_t>(sizes.size()), "skipkv_cuda: ", name, " must have ",
                  sizes.size(), " dimensions, not ", tensor.dim());
  int64_t i = 0;
  for (int64_t size : sizes) {
    STD_TORCH_CHECK(size < 0 || tensor.size(i) == size, "skipkv_cuda: ", name, " must have size ", size,
                    " in dimension ", i, ", not ", tensor.size(i));
    ++i;
  }
}

// As `check`, for vectors whose elements must lie side by side.
inline void check_vector(const Tensor& tensor, const char* name, ScalarType type, int64_t size) {
  check(tensor, name, type, {size});
  STD_TORCH_CHECK(size <= 1 || tensor.stride(0) == 1, "skipkv_cuda: ", name, " must be contiguous");
}

// Contiguous, or a copy.
inline Tensor packed(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

// An uninitialised tensor on the device of another.
inline Tensor scratch(const Tensor& like, std::initializer_list<int64_t> sizes, ScalarType type) {
  const std::vector<int64_t> shape(sizes);
  return torch::stable::new_empty(like, shape, type);
}

template <class T>
T* data(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

__host__ __device__ inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace skipkv
