// Checks of arguments, and small views of tensors.
#pragma once

#include <vector>

#include "gpu.h"

#include "common/check.h"

namespace skipkv {

// Checks a vector like `check`, and that it is contiguous.
inline void check_vector(const Tensor& tensor, const char* name, ScalarType type, int64_t size) {
  check(tensor, name, type, {size});
  STD_TORCH_CHECK(size <= 1 || tensor.stride(0) == 1, "skipkv_cuda: ", name, " must be contiguous");
}

// Returns the stride of a dimension; 0 for one entry, which no index multiplies: PyTorch's may be any number then, and
// must not narrow what a copy moves at a time.
inline int64_t stride_of(const Tensor& tensor, int64_t dimension) {
  return tensor.size(dimension) > 1 ? tensor.stride(dimension) : 0;
}

// Returns an uninitialised tensor on the device of another.
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
