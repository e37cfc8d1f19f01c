// `functional.redundancy` without a matrix of cosines.
//
// The mean over i of S_ij is the inner product of unit key j with the sum of all, less the diagonal, less the exempted
// terms. Only the search for the exempted column of each row, the last one above the threshold, compares pairs of keys.
// It skips most pairs, because it scans columns from the last and drops a row at its first hit, and it multiplies two
// keys only until they are known to be unlike each other.
#pragma once

#include "keys.h"
#include "tile.h"

namespace skipkv {
namespace SKIPKV_ISA {
namespace {

// Where a product of two unit vectors of `dim` floats may be given up: after about one half, and after three quarters.
constexpr int64_t kCuts = 2;
inline int64_t cut_at(int64_t cut, int64_t dim) { return round_up(dim * (cut + 2) / 4, kLanes); }

// The norms of what is left of unit vectors after each cut, `[kCuts, step]`.
class Remainders {
 public:
  Remainders(float* norms, int64_t step) : norms_(norms), step_(step) {}

  void measure(const float* unit, int64_t length, int64_t dim) {
    for (int64_t i = 0; i < length; ++i) {
      float left = 0;
      for (int64_t cut = kCuts - 1, end = dim; cut >= 0; --cut) {
        const int64_t begin = cut_at(cut, dim);
        left += inner(unit + i * dim + begin, unit + i * dim + begin, end - begin);
        norms_[cut * step_ + i] = __builtin_sqrtf(left);
        end = begin;
      }
    }
    for (int64_t cut = 0; cut < kCuts; ++cut) clear(norms_ + cut * step_ + length, step_ - length);
  }

  const float* of(int64_t i) const { return norms_ + i; }
  int64_t step() const { return step_; }

 private:
  float* norms_;
  int64_t step_;
};

// `kTileRows` unit vectors, with the norms of what is left of each.
struct UnitRows {
  const float *rows[kTileRows], *left[kTileRows];
};

// Sets bit c of `above[m]` if product `[m, c]` of unit vectors is above the threshold. Returns whether any is.
//
// By the inequality of Cauchy and Schwarz, what is left of two vectors adds at most the product of its norms. So a tile
// is given up at the first cut where no product can get above; `kRounding` exceeds what such a sum of
// up to 1,000 products rounds away in any order.
[[maybe_unused]] __attribute__((noinline)) bool products_above(const UnitRows& unit, const float* panel,
                                                               const float* panel_left, int64_t step, int64_t dim,
                                                               float threshold, uint64_t* above) {
  static_assert(kTileColumns <= 64, "a panel's columns fit a mask");
  constexpr float kRounding = 1e-4f;
  Tile<kTileVectors> sum = {};
  int64_t d = 0;
  for (int64_t cut = 0; cut < kCuts; ++cut, panel_left += step) {
    const int64_t end = cut_at(cut, dim);
    if (end >= dim) break;
    multiply<kTileVectors>(unit.rows, panel, kTileColumns, d, end, sum);
    d = end;
    const Vector least = threshold - kRounding - Vector{};
    Vector most = least;
#pragma GCC unroll 8
    for (int64_t m = 0; m < kTileRows; ++m) {
      const float left = unit.left[m][cut * step];
#pragma GCC unroll 8
      for (int64_t v = 0; v < kTileVectors; ++v) {
        const Vector bound = sum[m][v] + left * load(panel_left + v * kLanes);
        most = bound > most ? bound : most;
      }
    }
    if (mask_greater(most, least) == 0) return false;
  }
  multiply<kTileVectors>(unit.rows, panel, kTileColumns, d, dim, sum);
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

struct ExemptScratch {
  int32_t *last, *earlier, *active, *seekers, *furthest;
  float* left;

  ExemptScratch(Arena& arena, int64_t length)
      : last(arena.take<int32_t>(length)),
        earlier(arena.take<int32_t>(length)),
        active(arena.take<int32_t>(length)),
        seekers(arena.take<int32_t>(length)),
        furthest(arena.take<int32_t>(length / kTileColumns + 1)),
        left(arena.take<float>(kCuts * round_up(length, kTileColumns))) {}
};

class ExemptSearch {
 public:
  ExemptSearch(const float* unit, int64_t stride, int64_t length, float threshold, ExemptScratch scratch)
      : unit_(unit),
        stride_(stride),
        length_(length),
        threshold_(threshold),
        s_(scratch),
        left_(scratch.left, round_up(length, kTileColumns)),
        num_active_(length) {
    left_.measure(unit, length, stride);
    for (int64_t i = 0; i < length; ++i) {
      s_.last[i] = s_.earlier[i] = -1;
      s_.active[i] = static_cast<int32_t>(i);
    }
  }

  // Searches the columns of a panel for later similar keys; panels come from the last to the first. A hit of row i in
  // column j is also a hit of row j in column i, which counts if j has no later one.
  void scan_later(const float* panel, int64_t first) {
    const int64_t end = first + kTileColumns < length_ ? first + kTileColumns : length_;
    while (num_active_ > 0 && s_.active[num_active_ - 1] >= end) --num_active_;
    uint64_t above[kTileRows];
    // Rows from the last, so that each column records one row: the last that is similar to it.
    uint64_t noted = 0;
    for (int64_t a = round_up(num_active_, kTileRows) - kTileRows; a >= 0; a -= kTileRows) {
      if (!compare(a, num_active_, panel, first, above)) continue;
      for (int64_t m = (num_active_ - a < kTileRows ? num_active_ - a : kTileRows) - 1; m >= 0; --m) {
        uint64_t hits = above[m] & columns(end - first);
        if (hits == 0) continue;
        const int32_t i = s_.active[a + m];
        if (i >= first) hits &= ~columns(i + 1 - first);
        if (hits == 0) continue;
        s_.last[i] = static_cast<int32_t>(first + 63 - __builtin_clzll(hits));
        uint64_t fresh = hits & ~noted;
        noted |= hits;
        for (; fresh != 0; fresh &= fresh - 1) s_.earlier[first + __builtin_ctzll(fresh)] = i;
      }
    }
    int64_t kept = 0;
    for (int64_t a = 0; a < num_active_; ++a) {
      if (s_.last[s_.active[a]] < 0) s_.active[kept++] = s_.active[a];
    }
    num_active_ = kept;
  }

  // Completes `last` for the rows without a later similar key; `panel` is memory for a panel.
  void finish(float* panel) {
    if (threshold_ < 0) {
      // The zero on the diagonal is above the threshold, and its column is the last such one.
      for (int64_t i = 0; i < length_; ++i) s_.last[i] = s_.last[i] < 0 ? static_cast<int32_t>(i) : s_.last[i];
      return;
    }
    scan_earlier(panel);
    for (int64_t i = 0; i < length_; ++i) {
      if (s_.last[i] < 0) s_.last[i] = s_.earlier[i] < 0 ? 0 : s_.earlier[i];
    }
  }

 private:
  // Compares `kTileRows` active rows from number `from` on with the panel of the columns from `first` on.
  bool compare(int64_t from, int64_t count, const float* panel, int64_t first, uint64_t* above) const {
    UnitRows unit;
    for (int64_t m = 0; m < kTileRows; ++m) {
      const int64_t i = s_.active[from + m < count ? from + m : from];
      unit.rows[m] = unit_ + i * stride_;
      unit.left[m] = left_.of(i);
    }
    return products_above(unit, panel, left_.of(first), left_.step(), stride_, threshold_, above);
  }

  // Returns a mask of the first n columns of a panel, n < 64.
  static uint64_t columns(int64_t n) { return (uint64_t{1} << n) - 1; }
  static_assert(kTileColumns < 64, "a shift by 64 is undefined");

  static int64_t panel_end(int64_t i) { return (i / kTileColumns + 1) * kTileColumns; }

  // Searches the pairs (i, j), i < j, that `scan_later` skipped because i had a hit before the panel of j.
  void scan_earlier(float* panel) {
    const int64_t panels = (length_ + kTileColumns - 1) / kTileColumns;
    for (int64_t p = 0; p < panels; ++p) {
      s_.furthest[p] = -1;
      for (int64_t i = p * kTileColumns; i < (p + 1) * kTileColumns && i < length_; ++i) {
        s_.furthest[p] = s_.last[i] > s_.furthest[p] ? s_.last[i] : s_.furthest[p];
      }
    }
    int64_t num_seekers = 0;
    for (int64_t j = 0; j < length_; ++j) {
      if (s_.last[j] < 0) s_.seekers[num_seekers++] = static_cast<int32_t>(j);
    }
    uint64_t above[kTileRows];
    for (int64_t p = panels - 1; p >= 0; --p) {
      const int64_t first = p * kTileColumns;
      if (s_.furthest[p] < first + kTileColumns) continue;
      int64_t count = 0;
      for (int64_t n = num_seekers - 1; n >= 0 && s_.seekers[n] >= first; --n) {
        const int32_t j = s_.seekers[n];
        const bool seeks = s_.earlier[j] < first + kTileColumns - 1;
        if (seeks && s_.furthest[p] >= panel_end(j)) s_.active[count++] = j;
      }
      if (count == 0) continue;
      pack_panel(unit_, stride_, first, length_, panel);
      for (int64_t a = 0; a < count; a += kTileRows) {
        if (!compare(a, count, panel, first, above)) continue;
        for (int64_t m = 0; m < kTileRows && a + m < count; ++m) {
          uint64_t hits = above[m];
          if (hits == 0) continue;
          const int32_t j = s_.active[a + m];
          if (j < first + kTileColumns) hits &= columns(j - first);
          if (hits == 0) continue;
          const int32_t i = static_cast<int32_t>(first + 63 - __builtin_clzll(hits));
          s_.earlier[j] = i > s_.earlier[j] ? i : s_.earlier[j];
        }
      }
    }
  }

  const float* unit_;
  int64_t stride_, length_;
  float threshold_;
  ExemptScratch s_;
  Remainders left_;
  int64_t num_active_;
};

// Sets mean[j] to the mean of the cosines in column j, with zeros for the diagonal and the exempted terms. `total` is
// scratch, [2, stride].
inline void mean_cosines(const float* unit, int64_t stride, int64_t length, const int32_t* last, float* total,
                         float* mean) {
  sum_rows(unit, stride, length, total);
  for (int64_t j = 0; j < length; ++j) {
    const float* const key = unit + j * stride;
    Vector sum = {};
    for (int64_t d = 0; d < stride; d += kLanes) sum += load(key + d) * (load(total + d) - load(key + d));
    mean[j] = sum_lanes(sum);
  }
  for (int64_t i = 0; i < length; ++i) {
    const int32_t j = last[i];
    if (j != i) mean[j] -= inner(unit + i * stride, unit + j * stride, stride);
  }
  for (int64_t j = 0; j < length; ++j) mean[j] /= static_cast<float>(length);
}

}  // namespace
}  // namespace SKIPKV_ISA
}  // namespace skipkv
