// Inner products of a few rows with a panel of columns, in registers. Scoring spends its time here.
#pragma once

#include "vectors.h"

namespace skipkv {
namespace SKIPKV_ISA {
namespace {

// Transposes `kTileColumns` rows from `first` on to [stride, kTileColumns], with zeros past `length`.
inline void pack_panel(const float* rows, int64_t stride, int64_t first, int64_t length, float* panel) {
  for (int64_t c = 0; c < kTileColumns; c += kLanes) {
    for (int64_t d = 0; d < stride; d += kLanes) {
      Vector square[kLanes];
#pragma GCC unroll 16
      for (int64_t k = 0; k < kLanes; ++k) {
        const int64_t row = first + c + k;
        square[k] = row < length ? load(rows + row * stride + d) : Vector{};
      }
      transpose(square);
#pragma GCC unroll 16
      for (int64_t k = 0; k < kLanes; ++k) store(panel + (d + k) * kTileColumns + c, square[k]);
    }
  }
}

// The result of `multiply`: the inner products of `kTileRows` rows with a panel.
template <int64_t vectors>
using Tile = Vector[kTileRows][vectors];

// sum[m, c] += sum over d from `begin` to `end` of rows[m][d] * panel[d, c]; the rows of the panel are `step` apart.
// The order of the terms does not depend on which of two vectors is the row, so neither does their cosine.
template <int64_t vectors>
__attribute__((always_inline)) inline void multiply(const float* const* rows, const float* panel, int64_t step,
                                                    int64_t begin, int64_t end, Tile<vectors>& sum) {
  const float* row[kTileRows];
  for (int64_t m = 0; m < kTileRows; ++m) row[m] = rows[m];
  for (int64_t d = begin; d < end; ++d) {
    Vector column[vectors];
#pragma GCC unroll 8
    for (int64_t v = 0; v < vectors; ++v) column[v] = load(panel + d * step + v * kLanes);
#pragma GCC unroll 8
    for (int64_t m = 0; m < kTileRows; ++m) {
      const float x = row[m][d];
#pragma GCC unroll 8
      for (int64_t v = 0; v < vectors; ++v) sum[m][v] += x * column[v];
    }
  }
}

// Functions that multiply are never inlined. With other values to keep in registers, compilers spill the panel's
// columns in the inner loop, which makes it half as slow again.

// Writes the products to `out[m, c]`, whose rows are `out_step` apart.
template <int64_t vectors>
__attribute__((noinline)) void products(const float* const* rows, const float* panel, int64_t step, int64_t dim,
                                        float* out, int64_t out_step) {
  Tile<vectors> sum = {};
  multiply<vectors>(rows, panel, step, 0, dim, sum);
#pragma GCC unroll 8
  for (int64_t m = 0; m < kTileRows; ++m) {
#pragma GCC unroll 8
    for (int64_t v = 0; v < vectors; ++v) store(out + m * out_step + v * kLanes, sum[m][v]);
  }
}

inline void products(const float* const* rows, const float* panel, int64_t dim, float* out) {
  products<kTileVectors>(rows, panel, kTileColumns, dim, out, kTileColumns);
}

}  // namespace
}  // namespace SKIPKV_ISA
}  // namespace skipkv
