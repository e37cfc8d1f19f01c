// `score_tokens` of one row. Compiled once per instruction set.
#include "isa_kernels.h"
#include "order.h"
#include "pooling.h"
#include "redundancy.h"

namespace skipkv {
namespace SKIPKV_ISA {
namespace {

// Scratch of a row; all of it O(L), with the head size and the window as factors.
struct Scratch {
  int64_t stride;         // head size in whole vectors
  int64_t logits_stride;  // length in whole panels
  float *unit, *norm, *queries, *logits, *panel, *tile, *attention, *pooled, *mean, *total;
  int32_t* rank;
  SortScratch sort;
  ExemptScratch exempt;

  Scratch(Arena& arena, int64_t length, int64_t dim, int64_t window, int64_t group)
      : stride(round_up(dim, kLanes)),
        logits_stride(round_up(length, kTileColumns)),
        unit(arena.take<float>(length * stride)),
        norm(arena.take<float>(logits_stride)),
        queries(arena.take<float>(window * group * stride)),
        logits(arena.take<float>(window * logits_stride)),
        panel(arena.take<float>(stride * kTileColumns)),
        tile(arena.take<float>(kTileRows * kTileColumns)),
        attention(arena.take<float>(logits_stride)),
        pooled(arena.take<float>(logits_stride)),
        mean(arena.take<float>(length)),
        total(arena.take<float>(2 * stride)),
        rank(arena.take<int32_t>(length)),
        sort(arena, length),
        exempt(arena, length) {}
};

// Computes the largest logit of the group at the keys of a panel, for each query of the window.
void panel_logits(const ScoreRow& row, const Scratch& s, int64_t first) {
  const float* rows[kTileRows];
  const int64_t count = row.queries.number * row.queries.group;
  for (int64_t q = 0; q < count; q += kTileRows) {
    for (int64_t m = 0; m < kTileRows; ++m) rows[m] = s.queries + (q + m < count ? q + m : q) * s.stride;
    products(rows, s.panel, s.stride, s.tile);
    for (int64_t m = 0; m < kTileRows && q + m < count; ++m) {
      const float* const from = s.tile + m * kTileColumns;
      float* const to = s.logits + (q + m) / row.queries.group * s.logits_stride + first;
      const bool is_first = (q + m) % row.queries.group == 0;
      for (int64_t v = 0; v < kTileColumns; v += kLanes) {
        // The columns of the panel are unit vectors.
        const Vector x = load(from + v) * load(s.norm + first + v), known = load(to + v);
        store(to + v, is_first ? x : x > known ? x : known);
      }
    }
  }
}

// Computes `pooled`: softmax over the first `old` keys, mean over the queries, max-pooling.
void importance(const ScoreRow& row, const Scratch& s, int64_t old) {
  clear(s.attention, old);
  for (int64_t w = 0; w < row.queries.number; ++w) {
    float* const x = s.logits + w * s.logits_stride;
    const float share = 1 / exponentials(x, old);
    for (int64_t i = 0; i < old; ++i) s.attention[i] += x[i] * share;
  }
  const float each = 1 / static_cast<float>(row.queries.number);
  for (int64_t i = 0; i < old; ++i) s.attention[i] *= each;
  max_pool(s.attention, old, row.pool, s.pooled);
}

// Scores a row with keys of type T and queries of type Q.
template <class T, class Q>
void score_as(const ScoreRow& row, void* memory) {
  Arena arena(memory);
  const int64_t dim = row.pages->dim, length = row.length, old = length - row.queries.number;
  Scratch s(arena, length, dim, row.queries.number, row.queries.group);
  // A weight of zero saves half of the work.
  const bool important = row.mix != 0, redundant = row.mix != 1;

  rank_by_position(row.positions, length, s.sort, s.rank);
  if (s.stride > dim) clear(s.unit, length * s.stride);
  read_keys<T>(row, s.rank, s.unit, s.stride);
  clear(s.norm + length, s.logits_stride - length);
  normalise(s.unit, length, s.stride, s.norm);
  if (important) read_queries<Q>(row.queries, 0, row.queries.number * row.queries.group, dim, s.queries, s.stride);

  // Without redundancy there is nothing to search.
  ExemptSearch search(s.unit, s.stride, redundant ? length : 0, row.threshold, s.exempt);
  for (int64_t first = s.logits_stride - kTileColumns; first >= 0; first -= kTileColumns) {
    pack_panel(s.unit, s.stride, first, length, s.panel);
    if (important && first < old) panel_logits(row, s, first);
    if (redundant) search.scan_later(s.panel, first);
  }
  if (important) {
    importance(row, s, old);
  } else {
    clear(s.pooled, old);
  }
  float share = 0;
  if (redundant) {
    search.finish(s.panel);
    mean_cosines(s.unit, s.stride, length, s.exempt.last, s.total, s.mean);
    share = (1 - row.mix) / exponentials(s.mean, length);
  } else {
    clear(s.mean, length);
  }
  for (int64_t i = 0; i < old; ++i) s.pooled[i] = row.mix * s.pooled[i] - share * s.mean[i];
  for (int64_t slot = 0; slot < length; ++slot) {
    const int32_t i = s.rank[slot];
    row.scores[slot] = (i < old ? s.pooled[i] : 0.0f) - (row.penalty == nullptr ? 0.0f : row.penalty[slot]);
  }
}

}  // namespace

void score(const ScoreRow& row, void* scratch) {
  with_types(row.type, [&](auto key, auto query) { score_as<decltype(key), decltype(query)>(row, scratch); });
}

size_t score_scratch(int64_t length, int64_t dim, int64_t window, int64_t group) {
  Arena arena(nullptr);
  Scratch scratch(arena, length, dim, window, group);
  return arena.used();
}

}  // namespace SKIPKV_ISA
}  // namespace skipkv
