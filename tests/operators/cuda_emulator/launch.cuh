// Replaces csrc/cuda/launch.cuh.
#pragma once

#include "gpu.h"

namespace skipkv {

inline char* dynamic_shared() { return emulator::shared; }

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), int64_t blocks, int threads, int64_t shared, cudaStream_t,
            Arguments... arguments) {
  // With up to 4 KiB of other shared memory a block fits onto the smallest GPUs, of 99 KiB.
  if (shared > 95 * 1024) std::abort();
  emulator::run(blocks, threads, shared, [=] { kernel(arguments...); });
}

}  // namespace skipkv
