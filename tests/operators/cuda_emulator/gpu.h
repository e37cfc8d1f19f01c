// Replaces csrc/cuda/gpu.h: the CPU stands in for the GPU.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/stable/tensor.h>

#include <cstring>

#define SKIPKV_DISPATCH_KEY CPU

namespace skipkv {

using torch::stable::Tensor;

constexpr char kLibrary[] = "skipkv_cuda: ";
constexpr char kDevice[] = "a GPU";

struct Guard {
  explicit Guard(int32_t) {}
};

inline bool on_device(const Tensor& tensor) { return tensor.is_cpu(); }
inline cudaStream_t current_stream(const Tensor&) { return nullptr; }
inline void clear_async(void* memory, size_t bytes, cudaStream_t) { std::memset(memory, 0, bytes); }

}  // namespace skipkv
