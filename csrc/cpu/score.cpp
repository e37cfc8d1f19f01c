// `score_tokens` of one row: a request's layer and kv head. Compiled once per instruction set.
#include "keys.h"
#include "order.h"
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

inline void clear(float* x, int64_t n) {
  for (int64_t i = 0; i < n; ++i) x[i] = 0;
}

// Queries of the group as [W * G, stride] floats, scaled by 1 / sqrt(D).
template <class T>
void read_queries(const ScoreRow& row, const Scratch& s) {
  const int64_t dim = row.pages->dim;
  const float scale = 1 / __builtin_sqrtf(static_cast<float>(dim));
  for (int64_t w = 0; w < row.window; ++w) {
    for (int64_t g = 0; g < row.group; ++g) {
      const T* const from = static_cast<const T*>(row.queries) + w * row.query_stride + g * dim;
      float* const to = s.queries + (w * row.group + g) * s.stride;
      convert(from, to, dim);
      for (int64_t d = 0; d < dim; ++d) to[d] *= scale;
      clear(to + dim, s.stride - dim);
    }
  }
}

// Largest logit of the group at the keys of a panel, for each query of the window.
void panel_logits(const ScoreRow& row, const Scratch& s, int64_t first) {
  const float* rows[kTileRows];
  const int64_t count = row.window * row.group;
  for (int64_t q = 0; q < count; q += kTileRows) {
    for (int64_t m = 0; m < kTileRows; ++m) rows[m] = s.queries + (q + m < count ? q + m : q) * s.stride;
    products(rows, s.panel, s.stride, s.tile);
    for (int64_t m = 0; m < kTileRows && q + m < count; ++m) {
      const float* const from = s.tile + m * kTileColumns;
      float* const to = s.logits + (q + m) / row.group * s.logits_stride + first;
      const bool is_first = (q + m) % row.group == 0;
      for (int64_t v = 0; v < kTileColumns; v += kLanes) {
        // The panel holds unit vectors.
        const Vector x = load(from + v) * load(s.norm + first + v), known = load(to + v);
        store(to + v, is_first ? x : x > known ? x : known);
      }
    }
  }
}

// Softmax over the first `old` keys, mean over the queries, max-pooling: into `pooled`.
void attention(const ScoreRow& row, const Scratch& s, int64_t old) {
  clear(s.attention, old);
  for (int64_t w = 0; w < row.window; ++w) {
    float* const x = s.logits + w * s.logits_stride;
    const float share = 1 / exponentials(x, old);
    for (int64_t i = 0; i < old; ++i) s.attention[i] += x[i] * share;
  }
  const float each = 1 / static_cast<float>(row.window);
  for (int64_t i = 0; i < old; ++i) s.pooled[i] = s.attention[i] *= each;
  for (int64_t shift = 1; shift <= row.pool / 2; ++shift) {
    for (int64_t i = 0; i + shift < old; ++i) {
      const float x = s.attention[i + shift];
      s.pooled[i] = x > s.pooled[i] ? x : s.pooled[i];
    }
    for (int64_t i = shift; i < old; ++i) {
      const float x = s.attention[i - shift];
      s.pooled[i] = x > s.pooled[i] ? x : s.pooled[i];
    }
  }
}

// Keys of type T, queries of type Q.
template <class T, class Q = T>
void score_as(const ScoreRow& row, void* memory) {
  Arena arena(memory);
  const int64_t dim = row.pages->dim, length = row.length, old = length - row.window;
  Scratch s(arena, length, dim, row.window, row.group);
  // A weight of zero leaves the other half of the score, and half of the work.
  const bool important = row.mix != 0, redundant = row.mix != 1;

  rank_by_position(row.positions, length, s.sort, s.rank);
  if (s.stride > dim) clear(s.unit, length * s.stride);
  read_keys<T>(row, s.rank, s.unit, s.stride);
  clear(s.norm + length, s.logits_stride - length);
  normalise(s.unit, length, s.stride, s.norm);
  if (important) read_queries<Q>(row, s);

  ExemptSearch search(s.unit, s.stride, length, row.threshold, s.exempt);
  for (int64_t first = s.logits_stride - kTileColumns; first >= 0; first -= kTileColumns) {
    pack_panel(s.unit, s.stride, first, length, s.panel);
    if (important && first < old) panel_logits(row, s, first);
    if (redundant) search.scan_later(s.panel, first);
  }
  if (important) {
    attention(row, s, old);
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

void score(const ScoreRow& row, void* scratch) {
  switch (row.type) {
    case KeyType::kFloat32:
      return score_as<Float32>(row, scratch);
    case KeyType::kBFloat16:
      return score_as<BFloat16>(row, scratch);
    case KeyType::kFloat16:
      return score_as<Float16>(row, scratch);
    case KeyType::kFloat8E4M3:
      return score_as<Float8E4M3, Float32>(row, scratch);
    case KeyType::kFloat8E5M2:
      return score_as<Float8E5M2, Float32>(row, scratch);
  }
}

size_t score_scratch(int64_t length, int64_t dim, int64_t window, int64_t group) {
  Arena arena(nullptr);
  Scratch scratch(arena, length, dim, window, group);
  return arena.used();
}

}  // namespace

// In similar.cpp.
void similar(const SentenceRange& all, int64_t begin, int64_t end, float* scratch);
int64_t similar_scratch(int64_t width);
// In steer.cpp.
void steer(const void* hidden, float coefficient, const float* vector, void* out, Dtype dtype, int64_t n);
void accumulate(const void* x, Dtype dtype, float* sum, int64_t n);
void normalise(float* sum, float length, void* out, Dtype dtype, int64_t n);

extern const Kernels kKernels;
#define SKIPKV_STRING_(x) #x
#define SKIPKV_STRING(x) SKIPKV_STRING_(x)
const Kernels kKernels = {SKIPKV_STRING(SKIPKV_ISA), score_scratch, score, steer, similar, similar_scratch, accumulate,
                          normalise};

}  // namespace SKIPKV_ISA
}  // namespace skipkv
