// Launches kernels, with dynamic shared memory.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "gpu.h"

namespace skipkv {

// Returns the dynamic shared memory of a block, aligned for 16-byte accesses.
__device__ inline char* dynamic_shared() {
  extern __shared__ __align__(16) char buffer[];
  return buffer;
}

// Dynamic shared memory of a block that needs no request. Without one a block gets at most 48 KiB, of which kernels
// declare some themselves.
constexpr int64_t kUnrequested = 40 * 1024;

// Launches a kernel with `blocks` blocks of `threads` threads, unless the grid is empty.
template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), int64_t blocks, int threads, int64_t shared, cudaStream_t stream,
            Arguments... arguments) {
  if (blocks == 0) return;
  STD_TORCH_CHECK(blocks <= INT32_MAX, "skipkv_cuda: a launch of ", blocks, " blocks is too large");
  if (shared > kUnrequested) {
    check_cuda(
        cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                             static_cast<int>(shared)),
        "shared memory");
  }
  kernel<<<static_cast<unsigned>(blocks), threads, static_cast<size_t>(shared), stream>>>(arguments...);
  check_cuda(cudaGetLastError(), "launch");
}

}  // namespace skipkv
