// Copies from global to shared memory that run beside the thread that starts them. They are there after
// `wait_for_copies`, for this thread; for others after a barrier behind it.
#pragma once

#include <cstdint>

namespace skipkv {

// Copies 16 bytes, or writes zeros if not `inside`. Both addresses must be multiples of 16.
__device__ inline void copy_16(void* to, const void* from, bool inside) {
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(to));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(address), "l"(from), "r"(inside ? 16 : 0)
               : "memory");
}

// Copies 4 bytes likewise.
__device__ inline void copy_4(void* to, const void* from, bool inside) {
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(to));
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;\n" ::"r"(address), "l"(from), "r"(inside ? 4 : 0)
               : "memory");
}

// Ends a group of copies.
__device__ inline void end_copies() { asm volatile("cp.async.commit_group;\n" ::: "memory"); }

// Waits for all groups but the last one.
__device__ inline void wait_for_earlier_copies() { asm volatile("cp.async.wait_group 1;\n" ::: "memory"); }

__device__ inline void wait_for_copies() { asm volatile("cp.async.wait_all;\n" ::: "memory"); }

}  // namespace skipkv
