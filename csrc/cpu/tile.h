// The inner product of a few rows with a panel of columns, kept in registers: where the time of scoring goes.
#pragma once

#include "vectors.h"

namespace skipkv {
namespace SKIPKV_ISA {
namespace {

// `kTileColumns` rows from `first`, transposed to [stride, kTileColumns]; zeros past `length`.
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

// What `multiply` leaves in registers: the inner products of `kTileRows` rows with a panel.
template <int64_t vectors>
using Tile = Vector[kTileRows][vectors];

// sum[m, c] = sum over d of rows[m][d] * panel[d, c], the rows of the panel being `step` apart. The same terms in the
// same order whichever of a pair of vectors is the row, so a cosine does not depend on the side it was computed from.
template <int64_t vectors>
__attribute__((always_inline)) inline void multiply(const float* const* rows, const float* panel, int64_t step,
                                                    int64_t dim, Tile<vectors>& sum) {
  const float* row[kTileRows];
  for (int64_t m = 0; m < kTileRows; ++m) row[m] = rows[m];
  for (int64_t d = 0; d < dim; ++d) {
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

// The next two are functions of their own, never inlined: a compiler that has other things to keep in registers besides
// spills the panel's columns in the inner loop, which takes half as long again.

// The products themselves, `out[m, c]`; rows of the panel and of `out` are some floats apart.
template <int64_t vectors>
__attribute__((noinline)) void products(const float* const* rows, const float* panel, int64_t step, int64_t dim,
                                        float* out, int64_t out_step) {
  Tile<vectors> sum = {};
  multiply<vectors>(rows, panel, step, dim, sum);
#pragma GCC unroll 8
  for (int64_t m = 0; m < kTileRows; ++m) {
#pragma GCC unroll 8
    for (int64_t v = 0; v < vectors; ++v) store(out + m * out_step + v * kLanes, sum[m][v]);
  }
}

inline void products(const float* const* rows, const float* panel, int64_t dim, float* out) {
  products<kTileVectors>(rows, panel, kTileColumns, dim, out, kTileColumns);
}

// Bit c of `above[m]` says whether product `[m, c]` is above the threshold. Returns whether any is.
[[maybe_unused]] __attribute__((noinline)) bool products_above(const float* const* rows, const float* panel,
                                                               int64_t dim, float threshold, uint64_t* above) {
  static_assert(kTileColumns <= 64, "a panel's columns fit a mask");
  Tile<kTileVectors> sum = {};
  multiply<kTileVectors>(rows, panel, kTileColumns, dim, sum);
  const Vector least = threshold - Vector{};
  uint64_t any = 0;
#pragma GCC unroll 8
  for (int64_t m = 0; m < kTileRows; ++m) {
    uint64_t mask = 0;
#pragma GCC unroll 8
    for (int64_t v = 0; v < kTileVectors; ++v) mask |= mask_greater(sum[m][v], least) << v * kLanes;
    above[m] = mask;
    any |= mask;
  }
  return any != 0;
}

}  // namespace
}  // namespace SKIPKV_ISA
}  // namespace skipkv
