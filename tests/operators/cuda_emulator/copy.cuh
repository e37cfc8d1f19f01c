// Replaces csrc/cuda/copy.cuh. The copies are made when their thread waits for them, so that a missing wait shows.
#pragma once

#include <cuda_runtime.h>

namespace skipkv {

inline void copy_16(void* to, const void* from, bool inside) { emulator::copy_later(to, from, 16, inside); }
inline void copy_4(void* to, const void* from, bool inside) { emulator::copy_later(to, from, 4, inside); }
inline void end_copies() { emulator::end_copies(); }
inline void wait_for_earlier_copies() { emulator::make_copies(1); }
inline void wait_for_copies() {
  emulator::end_copies();
  emulator::make_copies(0);
}

}  // namespace skipkv
