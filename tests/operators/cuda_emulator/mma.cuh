// Replaces csrc/cuda/mma.cuh, which documents the elements of each lane.
#pragma once

#include "device.cuh"

namespace skipkv {

struct Operands {
  uint32_t a[4], b[2];
};

template <class T>
float half_of(uint32_t pair, int which) {
  const uint16_t bits = static_cast<uint16_t>(pair >> 16 * which);
  T value;
  std::memcpy(&value, &bits, sizeof(bits));
  return to_float(value);
}

template <class T>
void multiply_add(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, T) {
  const Operands own{{a[0], a[1], a[2], a[3]}, {b0, b1}};
  const char* shown = emulator::show(&own, sizeof(own));
  const int g = emulator::lane() / 4, t = emulator::lane() % 4;
  for (int i = 0; i < 4; ++i) {
    const int row = g + 8 * (i / 2), column = 2 * t + i % 2;
    for (int k = 0; k < 16; ++k) {
      const int lane_of_k = k % 8 / 2;
      const auto left = emulator::of_lane<Operands>(shown, row % 8 * 4 + lane_of_k);
      const auto right = emulator::of_lane<Operands>(shown, column * 4 + lane_of_k);
      d[i] += half_of<T>(left.a[row / 8 + 2 * (k / 8)], k % 2) * half_of<T>(right.b[k / 8], k % 2);
    }
  }
}

// Returns element (row, column) of one of four matrices whose rows' addresses the lanes have shown.
inline uint16_t element_of(const char* shown, int matrix, int row, int column) {
  const auto* from = emulator::of_lane<const uint16_t*>(shown, 8 * matrix + row);
  if (reinterpret_cast<uintptr_t>(from) % 16 != 0) std::abort();
  return from[column];
}

inline void load_matrices(uint32_t (&to)[4], const void* row) {
  const char* shown = emulator::show(&row, sizeof(row));
  const int g = emulator::lane() / 4, t = emulator::lane() % 4;
  for (int m = 0; m < 4; ++m) to[m] = element_of(shown, m, g, 2 * t) | element_of(shown, m, g, 2 * t + 1) << 16;
}

inline void load_transposed(uint32_t (&to)[4], const void* row) {
  const char* shown = emulator::show(&row, sizeof(row));
  const int g = emulator::lane() / 4, t = emulator::lane() % 4;
  for (int m = 0; m < 4; ++m) to[m] = element_of(shown, m, 2 * t, g) | element_of(shown, m, 2 * t + 1, g) << 16;
}

}  // namespace skipkv
