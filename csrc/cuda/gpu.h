// The host's calls to the GPU. Tests replace this file, copy.cuh, launch.cuh and mma.cuh to run the kernels
// without a GPU.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/tensor.h>

#define SKIPKV_DISPATCH_KEY CUDA

namespace skipkv {

using torch::stable::Tensor;

constexpr char kLibrary[] = "skipkv_cuda: ";
constexpr char kDevice[] = "a GPU";

// Makes a device the current one for the lifetime of the object.
using Guard = torch::stable::accelerator::DeviceGuard;

inline void check_cuda(cudaError_t error, const char* what) {
  STD_TORCH_CHECK(error == cudaSuccess, "skipkv_cuda: ", what, ": ", cudaGetErrorString(error));
}

inline bool on_device(const Tensor& tensor) { return tensor.is_cuda(); }

// Returns PyTorch's current stream on a tensor's device.
inline cudaStream_t current_stream(const Tensor& tensor) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

inline void clear_async(void* memory, size_t bytes, cudaStream_t stream) {
  check_cuda(cudaMemsetAsync(memory, 0, bytes, stream), "cudaMemsetAsync");
}

}  // namespace skipkv
