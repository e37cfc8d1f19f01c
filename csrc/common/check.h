// Checks of arguments that both libraries make. Before this file a library includes its own cpu/device.h or cuda/gpu.h,
// which define
//   kLibrary: the beginning of its messages,
//   kDevice: where its tensors must be, for messages,
//   on_device(tensor): whether a tensor is there.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <initializer_list>

namespace skipkv {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Checks device, dtype and sizes; a negative size means any.
inline void check(const Tensor& tensor, const char* name, ScalarType type, std::initializer_list<int64_t> sizes) {
  STD_TORCH_CHECK(on_device(tensor), kLibrary, name, " must be on ", kDevice);
  STD_TORCH_CHECK(tensor.scalar_type() == type, kLibrary, name, " must be ", torch::headeronly::toString(type),
                  ", not ", torch::headeronly::toString(tensor.scalar_type()));
  STD_TORCH_CHECK(tensor.dim() == static_cast<int64_t>(sizes.size()), kLibrary, name, " must have ", sizes.size(),
                  " dimensions, not ", tensor.dim());
  int64_t i = 0;
  for (int64_t size : sizes) {
    STD_TORCH_CHECK(size < 0 || tensor.size(i) == size, kLibrary, name, " must have size ", size, " in dimension ", i,
                    ", not ", tensor.size(i));
    ++i;
  }
}

// Returns a tensor itself if it is contiguous, else a contiguous copy.
inline Tensor packed(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

}  // namespace skipkv
