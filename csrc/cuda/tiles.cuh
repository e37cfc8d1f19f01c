// Tiles of keys or values in shared memory, in the type that tensor cores multiply.
#pragma once

#include "copy.cuh"
#include "mma.cuh"
#include "rows.cuh"

namespace skipkv {

// A tile of vectors of at most 16 * STEPS features. `load_matrices` reads 8 of its rows at a time: 16 bytes more a row
// put them in different banks.
template <class T, int STEPS, int VECTORS = 64>
struct Tile {
  using Factor = typename Types<T>::Factor;
  static constexpr int kVectors = VECTORS, kWidth = STEPS * 16, kStride = kWidth + 8, kSize = kVectors * kStride;
  static constexpr int64_t kBytes = kSize * static_cast<int64_t>(sizeof(Factor));
};

// Reads eight features of a key of 8 bits, from a multiple of eight on, without rounding.
template <class T>
__device__ Chunk<__half> read_eight(const T* from) {
  const uint2 bits = __ldg(reinterpret_cast<const uint2*>(from));
  T narrow[8];
  memcpy(narrow, &bits, sizeof(bits));
  Chunk<__half> chunk;
#pragma unroll
  for (int e = 0; e < 8; ++e) chunk.values[e] = to_half(narrow[e]);
  return chunk;
}

// Fills a tile without wide reads.
template <class T, int STEPS, int THREADS, int VECTORS>
__device__ __noinline__ void fill_slowly(const T* from, const int64_t* offsets, int dim,
                                         typename Types<T>::Factor* tile) {
  using Shape = Tile<T, STEPS, VECTORS>;
  for (int i = static_cast<int>(threadIdx.x); i < Shape::kVectors * Shape::kWidth; i += THREADS) {
    const int k = i / Shape::kWidth, d = i % Shape::kWidth;
    const float x = d < dim ? to_float(from[offsets[k] + d]) : 0.0f;
    tile[k * Shape::kStride + d] = from_float<typename Shape::Factor>(x);
  }
}

// Starts to fill a tile with the vectors at these offsets from `from`, with zeros past `dim`; called by all THREADS of
// a block. It is full after `wait_for_copies` and a barrier. With `vectors`, reads have 16 bytes.
template <class T, int STEPS, int THREADS, int VECTORS = 64>
__device__ void fill_tile(const T* from, const int64_t* offsets, int dim, bool vectors,
                          typename Types<T>::Factor* tile) {
  using Shape = Tile<T, STEPS, VECTORS>;
  using Factor = typename Shape::Factor;
  const int thread = static_cast<int>(threadIdx.x);
  if (!vectors) {
    fill_slowly<T, STEPS, THREADS, VECTORS>(from, offsets, dim, tile);
    return;
  }
  // Threads stay at their features, so that addresses differ by constants. Where the chunks of a vector do not divide
  // the threads, some of them idle.
  constexpr int kChunks = Shape::kWidth / 8, kTogether = THREADS / kChunks;
  constexpr int kTurns = (Shape::kVectors + kTogether - 1) / kTogether;
  const int own = thread / kChunks, d = thread % kChunks * 8;
  if (own >= kTogether) return;
#pragma unroll
  for (int i = 0; i < kTurns; ++i) {
    const int k = i * kTogether + own;
    if (Shape::kVectors % kTogether != 0 && k >= Shape::kVectors) break;
    const T* at = d < dim ? from + offsets[k] + d : from;
    Factor* to = tile + k * Shape::kStride + d;
    if constexpr (sizeof(T) == sizeof(Factor)) {
      copy_16(to, at, d < dim);
    } else {
      Chunk<Factor> chunk = {};
      if (d < dim) chunk = read_eight(at);
      *reinterpret_cast<Chunk<Factor>*>(to) = chunk;
    }
  }
}

// Reads the operand A of 16 vectors of a tile, of features 16 * k to 16 * k + 15.
template <class T, int STEPS>
__device__ void read_rows(const typename Types<T>::Factor* tile, int vector, int k, uint32_t (&a)[4]) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  load_matrices(a, tile + (vector + lane % 16) * Tile<T, STEPS>::kStride + k * 16 + lane / 16 * 8);
}

// Reads the operands B of 16 vectors likewise: of the first 8 in b[0] and b[1], of the others in b[2] and b[3].
template <class T, int STEPS>
__device__ void read_columns(const typename Types<T>::Factor* tile, int vector, int k, uint32_t (&b)[4]) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  load_matrices(b, tile + (vector + lane / 16 * 8 + lane % 8) * Tile<T, STEPS>::kStride + k * 16 + lane / 8 % 2 * 8);
}

}  // namespace skipkv
