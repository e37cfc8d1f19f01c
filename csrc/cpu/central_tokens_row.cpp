// `central_tokens` of one row. Compiled once per instruction set.
#include "isa_kernels.h"
#include "keys.h"
#include "order.h"

#include "common/clusters.h"

namespace skipkv {
namespace SKIPKV_ISA {
namespace {

constexpr int64_t kStep = 4 * kLanes;  // centroids that are compared with a token at a time
static_assert(kMostClusters % kStep == 0, "whole steps");

struct Scratch {
  int64_t stride;  // head size in whole vectors
  // Keys and centroids by row, and the centroids by column, [stride, kMostClusters].
  float *rows, *centroids, *columns, *distance, *least;
  int32_t *rank, *places, *assigned, *size;
  bool* chosen;
  SortScratch sort;

  Scratch(Arena& arena, int64_t length, int64_t dim)
      : stride(round_up(dim, kLanes)),
        rows(arena.take<float>(length * stride)),
        centroids(arena.take<float>(kMostClusters * stride)),
        columns(arena.take<float>(kMostClusters * stride)),
        distance(arena.take<float>(length)),
        least(arena.take<float>(kMostClusters)),
        rank(arena.take<int32_t>(length)),
        places(arena.take<int32_t>(length)),
        assigned(arena.take<int32_t>(length)),
        size(arena.take<int32_t>(kMostClusters)),
        chosen(arena.take<bool>(length)),
        sort(arena, length) {}
};

void copy(const float* from, int64_t n, float* to) {
  for (int64_t d = 0; d < n; ++d) to[d] = from[d];
}

// Assigns each of `count` tokens to the nearest of k centroids, the first of those equally near.
void assign(const Scratch& s, const float* rows, int64_t count, int64_t k) {
  for (int64_t j = 0; j < kMostClusters; ++j) {
    for (int64_t d = 0; d < s.stride; ++d) s.columns[d * kMostClusters + j] = j < k ? s.centroids[j * s.stride + d] : 0;
  }
  for (int64_t t = 0; t < count; ++t) {
    const float* const row = rows + t * s.stride;
    float least = __builtin_inff();
    s.assigned[t] = 0;  // also if its key is no number
    for (int64_t first = 0; first < k; first += kStep) {
      Vector sum[4] = {};
      for (int64_t d = 0; d < s.stride; ++d) {
        const float* const column = s.columns + d * kMostClusters + first;
#pragma GCC unroll 4
        for (int64_t v = 0; v < 4; ++v) {
          const Vector apart = row[d] - load(column + v * kLanes);
          sum[v] += apart * apart;
        }
      }
      float distance[kStep];
      for (int64_t v = 0; v < 4; ++v) store(distance + v * kLanes, sum[v]);
      for (int64_t j = first; j < first + kStep && j < k; ++j) {
        if (distance[j - first] < least) {
          least = distance[j - first];
          s.assigned[t] = static_cast<int32_t>(j);
        }
      }
    }
    s.distance[t] = least;
  }
}

// Moves each of k centroids to the mean of its tokens; one without tokens stays.
void move_centroids(const Scratch& s, const float* rows, int64_t count, int64_t k) {
  for (int64_t j = 0; j < k; ++j) s.size[j] = 0;
  for (int64_t t = 0; t < count; ++t) {
    float* const sum = s.centroids + s.assigned[t] * s.stride;
    const float* const row = rows + t * s.stride;
    if (s.size[s.assigned[t]]++ == 0) {
      copy(row, s.stride, sum);
    } else {
      for (int64_t d = 0; d < s.stride; ++d) sum[d] += row[d];
    }
  }
  for (int64_t j = 0; j < k; ++j) {
    const float size = static_cast<float>(s.size[j] > 0 ? s.size[j] : 1);
    for (int64_t d = 0; d < s.stride; ++d) s.centroids[j * s.stride + d] /= size;
  }
}

// Chooses, of the `count` tokens from rank `first` on, the nearest to each of k centroids.
void choose(const Scratch& s, int64_t first, int64_t count, int64_t k) {
  const float* const rows = s.rows + first * s.stride;
  for (int64_t j = 0; j < k; ++j) {
    copy(rows + (2 * j + 1) * count / (2 * k) * s.stride, s.stride, s.centroids + j * s.stride);
  }
  for (int round = 0; round < kRounds; ++round) {
    assign(s, rows, count, k);
    move_centroids(s, rows, count, k);
  }
  assign(s, rows, count, k);
  for (int64_t j = 0; j < k; ++j) s.least[j] = __builtin_inff();
  for (int64_t t = 0; t < count; ++t) {
    float* const least = s.least + s.assigned[t];
    *least = s.distance[t] < *least ? s.distance[t] : *least;
  }
  for (int64_t t = 0; t < count; ++t) {
    float* const least = s.least + s.assigned[t];
    s.chosen[first + t] = s.distance[t] <= *least * kTie;
    if (s.chosen[first + t]) *least = -1;  // only the first of a cluster
  }
}

}  // namespace

void central(const CentralRow& row, void* memory) {
  Arena arena(memory);
  const int64_t dim = row.pages->dim, length = row.length;
  const Scratch s(arena, length, dim);
  rank_by_position(row.positions, length, s.sort, s.rank);
  if (s.stride > dim) clear(s.rows, length * s.stride);
  with_types(row.type, [&](auto key, auto) { read_keys<decltype(key)>(row, s.rank, s.rows, s.stride); });
  for (int64_t slot = 0; slot < length; ++slot) s.places[s.rank[slot]] = row.positions[slot];
  for (int64_t first = 0, after = 0; first < length; first = after) {
    after = first + 1;
    s.chosen[first] = false;
    if (s.places[first] < row.begin || s.places[first] >= row.end) continue;
    const int64_t number = (s.places[first] - row.begin) / row.longest;
    if (number >= row.segments) continue;
    const int64_t end = row.begin + (number + 1) * row.longest;
    while (after < length && s.places[after] < end && s.places[after] < row.end) ++after;
    const int64_t count = after - first, quota = row.quota[number];
    for (int64_t i = first; i < after; ++i) s.chosen[i] = count <= quota;
    if (count > quota && quota > 0) choose(s, first, count, quota < kMostClusters ? quota : kMostClusters);
  }
  for (int64_t slot = 0; slot < length; ++slot) row.chosen[slot] = s.chosen[s.rank[slot]];
}

size_t central_scratch(int64_t length, int64_t dim) {
  Arena arena(nullptr);
  Scratch scratch(arena, length, dim);
  return arena.used();
}

}  // namespace SKIPKV_ISA
}  // namespace skipkv
