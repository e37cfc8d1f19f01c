// `vector_norms` of one row. Compiled once per instruction set.
#include "isa_kernels.h"
#include "keys.h"
#include "order.h"

namespace skipkv {
namespace SKIPKV_ISA {
namespace {

struct Scratch {
  int64_t stride;  // head size in whole vectors
  float *rows, *centre, *weights;
  int32_t* rank;
  SortScratch sort;

  Scratch(Arena& arena, int64_t length, int64_t dim)
      : stride(round_up(dim, kLanes)),
        rows(arena.take<float>(length * stride)),
        centre(arena.take<float>(2 * stride)),
        weights(arena.take<float>(length)),
        rank(arena.take<int32_t>(length)),
        sort(arena, length) {}
};

// Returns the 1-norm or the square of the 2-norm of a vector less a centre.
template <bool squares>
inline float distance(const float* vector, const float* centre, int64_t stride) {
  Vector sum = {};
  for (int64_t d = 0; d < stride; d += kLanes) {
    const Vector x = load(vector + d) - load(centre + d), zero = {};
    sum += squares ? x * x : x > zero ? x : -x;
  }
  return sum_lanes(sum);
}

// Writes the centre of `count` rows, and in the end of its memory what it needs meanwhile.
void find_centre(const float* rows, int64_t stride, int64_t count, const float* weights, float* centre) {
  if (weights == nullptr) {
    sum_rows(rows, stride, count, centre);
    const float each = 1 / static_cast<float>(count);
    for (int64_t d = 0; d < stride; ++d) centre[d] *= each;
    return;
  }
  clear(centre, stride);
  for (int64_t i = 0; i < count; ++i) {
    const float weight = weights[i];
    for (int64_t d = 0; d < stride; d += kLanes) {
      store(centre + d, load(centre + d) + weight * load(rows + i * stride + d));
    }
  }
}

}  // namespace

void norms(const NormsRow& row, void* memory) {
  Arena arena(memory);
  const int64_t dim = row.pages->dim, length = row.length;
  const Scratch s(arena, length, dim);
  // The order matters only where a row has several centres.
  if (row.part > 0 && row.part < length) {
    rank_by_position(row.positions, length, s.sort, s.rank);
  } else {
    for (int64_t i = 0; i < length; ++i) s.rank[i] = static_cast<int32_t>(i);
  }
  if (s.stride > dim) clear(s.rows, length * s.stride);
  with_types(row.type, [&](auto element, auto) {
    if (row.values) {
      read_values<decltype(element)>(row, s.rank, s.rows, s.stride);
    } else {
      read_keys<decltype(element)>(row, s.rank, s.rows, s.stride);
    }
  });
  if (row.weights != nullptr) {
    for (int64_t slot = 0; slot < length; ++slot) s.weights[s.rank[slot]] = row.weights[slot];
  }
  clear(s.centre, s.stride);
  for (int64_t slot = 0; slot < length; ++slot) row.norms[slot] = 0;
  // The norms by rank replace the weights of a part that has its centre.
  const int64_t part = row.part > 0 && row.part < length ? row.part : length;
  for (int64_t first = 0; first < length; first += part) {
    const int64_t count = length - first < part ? length - first : part;
    const float* const rows = s.rows + first * s.stride;
    if (row.part > 0) {
      find_centre(rows, s.stride, count, row.weights == nullptr ? nullptr : s.weights + first, s.centre);
    }
    for (int64_t i = 0; i < count; ++i) {
      s.weights[first + i] = row.norm == 1 ? distance<false>(rows + i * s.stride, s.centre, s.stride)
                                           : __builtin_sqrtf(distance<true>(rows + i * s.stride, s.centre, s.stride));
    }
  }
  for (int64_t slot = 0; slot < length; ++slot) row.norms[slot] = s.weights[s.rank[slot]];
}

size_t norms_scratch(int64_t length, int64_t dim) {
  Arena arena(nullptr);
  Scratch scratch(arena, length, dim);
  return arena.used();
}

}  // namespace SKIPKV_ISA
}  // namespace skipkv
