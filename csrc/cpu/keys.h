// The keys of a row, read from pages of any layout and turned into unit vectors in ascending position.
#pragma once

#include "vectors.h"

namespace skipkv {
namespace SKIPKV_ISA {
namespace {

constexpr float kEpsilon = 1e-8f;  // of `reference.redundancy`

template <class T>
inline void convert(const T* from, float* to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] = to_float(from[i]);
}

constexpr int64_t kBlock = 16;  // tokens

// `to[t][d + k]` becomes `from[k * step + t]`, for a block of tokens and `kLanes` dimensions.
template <class T>
inline void transpose_block(const T* from, int64_t step, float* const* to, int64_t d) {
  static_assert(kBlock % kLanes == 0, "a block of tokens is whole vectors");
  for (int64_t t = 0; t < kBlock; t += kLanes) {
    Vector square[kLanes];
#pragma GCC unroll 16
    for (int64_t k = 0; k < kLanes; ++k) {
      float row[kLanes];
      convert(from + k * step + t, row, kLanes);
      square[k] = load(row);
    }
    transpose(square);
#pragma GCC unroll 16
    for (int64_t k = 0; k < kLanes; ++k) store(to[t + k] + d, square[k]);
  }
}

// Token t of the first `count` of a cell becomes `rows[rank[t]]`.
template <class T>
inline void read_cell(const Pages& p, const T* cell, int64_t count, const int32_t* rank, float* rows, int64_t stride) {
  if (p.layout == kRows) {
    for (int64_t t = 0; t < count; ++t) convert(cell + t * p.token_stride, rows + rank[t] * stride, p.dim);
    return;
  }
  // Both other layouts interleave tokens, so they are read along the tokens, a block of them at a time.
  for (int64_t first = 0; first < count; first += kBlock) {
    const int64_t n = count - first < kBlock ? count - first : kBlock;
    float* to[kBlock];
    for (int64_t t = 0; t < n; ++t) to[t] = rows + rank[first + t] * stride;
    if (p.layout == kVec) {
      int64_t d = 0;
      if (n == kBlock) {
        for (; d + kLanes <= p.dim; d += kLanes) transpose_block(cell + d * p.size + first, p.size, to, d);
      }
      for (; d < p.dim; ++d) {
        const T* const from = cell + d * p.size + first;
        for (int64_t t = 0; t < n; ++t) to[t][d] = to_float(from[t]);
      }
    } else {
      const T* const block = cell + first * p.dim;
      for (int64_t d = 0; d < p.dim; d += 2) {
        const T* const from = block + d * kBlock;
        for (int64_t t = 0; t < n; ++t) {
          to[t][d] = to_float(from[2 * t]);
          to[t][d + 1] = to_float(from[2 * t + 1]);
        }
      }
    }
  }
}

template <class T>
inline void read_keys(const ScoreRow& row, const int32_t* rank, float* rows, int64_t stride) {
  const Pages& p = *row.pages;
  for (int64_t first = 0, page = 0; first < row.length; first += p.size, ++page) {
    const int64_t count = row.length - first < p.size ? row.length - first : p.size;
    const T* const cell = static_cast<const T*>(row.cache) + p.cell(row.table[page], row.head);
    read_cell(p, cell, count, rank + first, rows, stride);
  }
}

// Divides each row by its length; `norm` is what it was divided by.
inline void normalise(float* rows, int64_t length, int64_t stride, float* norm) {
  for (int64_t i = 0; i < length; ++i) {
    float* const row = rows + i * stride;
    Vector squares = {};
    for (int64_t d = 0; d < stride; d += kLanes) squares += load(row + d) * load(row + d);
    norm[i] = __builtin_sqrtf(sum_lanes(squares)) + kEpsilon;
    const float inverse = 1 / norm[i];
    for (int64_t d = 0; d < stride; d += kLanes) store(row + d, load(row + d) * inverse);
  }
}

}  // namespace
}  // namespace SKIPKV_ISA
}  // namespace skipkv
