// `pool_neighbours` of one row. Compiled once per instruction set.
#include "isa_kernels.h"
#include "order.h"
#include "pooling.h"

namespace skipkv {
namespace SKIPKV_ISA {
namespace {

struct Scratch {
  float *ordered, *pooled;
  int32_t* rank;
  SortScratch sort;

  Scratch(Arena& arena, int64_t length)
      : ordered(arena.take<float>(length)),
        pooled(arena.take<float>(length)),
        rank(arena.take<int32_t>(length)),
        sort(arena, length) {}
};

}  // namespace

void pool(const PoolRow& row, void* memory) {
  Arena arena(memory);
  const Scratch s(arena, row.length);
  rank_by_position(row.positions, row.length, s.sort, s.rank);
  for (int64_t slot = 0; slot < row.length; ++slot) s.ordered[s.rank[slot]] = row.scores[slot];
  const int64_t old = row.length - row.window;
  max_pool(s.ordered, old, row.pool, s.pooled);
  for (int64_t slot = 0; slot < row.length; ++slot) row.pooled[slot] = s.rank[slot] < old ? s.pooled[s.rank[slot]] : 0;
}

size_t pool_scratch(int64_t length) {
  Arena arena(nullptr);
  Scratch scratch(arena, length);
  return arena.used();
}

}  // namespace SKIPKV_ISA
}  // namespace skipkv
