// Where the tensors of this library are.
#pragma once

#include <torch/csrc/stable/tensor.h>

namespace skipkv {

constexpr char kLibrary[] = "skipkv_cpu: ";
constexpr char kDevice[] = "the CPU";

inline bool on_device(const torch::stable::Tensor& tensor) { return tensor.is_cpu(); }

}  // namespace skipkv
