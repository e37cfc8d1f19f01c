// `measure_attention` and `key_similarity` of one row. Compiled once per instruction set.
#include "isa_kernels.h"
#include "keys.h"
#include "tile.h"

namespace skipkv {
namespace SKIPKV_ISA {
namespace {

constexpr int64_t kQueries = 8 * kTileRows;  // query heads of a pass

// Scratch of a row: its keys and its values, and the attention of some query heads.
struct Scratch {
  int64_t stride;  // head size in whole vectors
  int64_t width;   // length in whole panels
  float *rows, *panels, *panel, *queries, *outputs, *attention, *tile, *logits, *sums, *squares;
  int32_t* slots;

  Scratch(Arena& arena, int64_t length, int64_t dim)
      : stride(round_up(dim, kLanes)),
        width(round_up(length, kTileColumns)),
        rows(arena.take<float>(length * stride)),
        panels(arena.take<float>(width * stride)),
        panel(arena.take<float>(kTileColumns * stride)),
        queries(arena.take<float>(kQueries * stride)),
        outputs(arena.take<float>(kQueries * stride)),
        attention(arena.take<float>(kQueries * width)),
        tile(arena.take<float>(kTileRows * kTileColumns)),
        logits(arena.take<float>(kTileRows * kTileColumns)),
        sums(arena.take<float>(width)),
        squares(arena.take<float>(width)),
        slots(arena.take<int32_t>(length)) {}
};

// The `kTileRows` rows of a block from row i on; row i stands in for those from `count` on.
struct TileRows {
  const float* rows[kTileRows];

  TileRows(const float* block, int64_t stride, int64_t i, int64_t count) {
    for (int64_t m = 0; m < kTileRows; ++m) rows[m] = block + (i + m < count ? i + m : i) * stride;
  }
};

int64_t count_seen(const int32_t* positions, int64_t length, int32_t reach) {
  int64_t seen = 0;
  for (int64_t t = 0; t < length; ++t) seen += positions[t] <= reach;
  return seen;
}

// Computes the logits of the queries, then their attention or what `Effect` takes instead; 0 at tokens in a query's
// future.
void attend(const AttentionRow& row, const Scratch& s, int64_t first, int64_t count) {
  for (int64_t column = 0; column < s.width; column += kTileColumns) {
    for (int64_t i = 0; i < count; i += kTileRows) {
      const TileRows queries(s.queries, s.stride, i, count);
      products<kTileVectors>(queries.rows, s.panels + column * s.stride, kTileColumns, s.stride,
                             s.attention + i * s.width + column, s.width);
    }
  }
  for (int64_t i = 0; i < count; ++i) {
    const int64_t query = (first + i) / row.queries.group;
    const int32_t reach = static_cast<int32_t>(row.newest - (row.queries.number - 1 - query));
    float* const x = s.attention + i * s.width;
    for (int64_t t = 0; t < row.length; ++t) x[t] = row.positions[t] > reach ? -__builtin_inff() : x[t];
    if (row.effect == Effect::kNegligible) {
      const float least = max_of(x, row.length) + row.log_negligible;
      const float share = 1 / static_cast<float>(count_seen(row.positions, row.length, reach));
      for (int64_t t = 0; t < row.length; ++t) x[t] = row.positions[t] <= reach && x[t] < least ? share : 0;
    } else {
      const float most = max_of(x, row.length);
      float total = exponentials(x, row.length, most);
      if (row.sinks != nullptr) total += __builtin_expf(row.sinks[(first + i) % row.queries.group] - most);
      float share = 1 / total;
      if (row.effect == Effect::kSeen) share *= static_cast<float>(count_seen(row.positions, row.length, reach));
      for (int64_t t = 0; t < row.length; ++t) x[t] = row.positions[t] > reach ? 0 : x[t] * share;
    }
    clear(x + row.length, s.width - row.length);
  }
}

// Multiplies the attention of a tile of query heads by all values, for `vectors` vectors of features.
template <int64_t vectors>
inline void weigh(const TileRows& attention, const Scratch& s, int64_t length, int64_t i, int64_t d) {
  products<vectors>(attention.rows, s.rows + d, s.stride, length, s.outputs + i * s.stride + d, s.stride);
}

void add_attention(const Scratch& s, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    const float* const x = s.attention + i * s.width;
    for (int64_t t = 0; t < s.width; ++t) s.sums[t] += x[t];
  }
}

void add_of_values(const Scratch& s, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    const float* const x = s.attention + i * s.width;
    for (int64_t t = 0; t < s.width; ++t) s.sums[t] += x[t] * x[t] * s.squares[t];
  }
}

// Adds A^2 |x v - y o|^2 of each token and query, multiplied out: x^2 |v|^2 - 2 x y v o + y^2 |o|^2. The factors x and y
// follow from the logit.
template <Effect effect>
void add_changes(const Scratch& s, int64_t length, int64_t count) {
  for (int64_t i = 0; i < count; i += kTileRows) {
    const TileRows attention(s.attention, s.width, i, count);
    for (int64_t d = 0; d < s.stride;) {
      const int64_t left = (s.stride - d) / kLanes;
      const int64_t vectors = left < kTileVectors ? left : left == 4 ? 2 : kTileVectors;
      if (vectors == 1) {
        weigh<1>(attention, s, length, i, d);
      } else if (vectors == 2) {
        weigh<2>(attention, s, length, i, d);
      } else {
        weigh<kTileVectors>(attention, s, length, i, d);
      }
      d += vectors * kLanes;
    }
  }
  float of_output[kQueries];
  for (int64_t i = 0; i < count; ++i) {
    of_output[i] = inner(s.outputs + i * s.stride, s.outputs + i * s.stride, s.stride);
  }
  for (int64_t column = 0; column < s.width; column += kTileColumns) {
    pack_panel(s.rows, s.stride, column, length, s.panel);
    for (int64_t i = 0; i < count; i += kTileRows) {
      products(TileRows(s.outputs, s.stride, i, count).rows, s.panel, s.stride, s.tile);
      if constexpr (effect != Effect::kOutput) {
        products(TileRows(s.queries, s.stride, i, count).rows, s.panels + column * s.stride, s.stride, s.logits);
      }
      for (int64_t m = 0; m < kTileRows && i + m < count; ++m) {
        const float* const attention = s.attention + (i + m) * s.width + column;
        for (int64_t v = 0; v < kTileColumns; v += kLanes) {
          const Vector a = load(attention + v), zero = {};
          const Vector mixed = load(s.tile + m * kTileColumns + v), square = load(s.squares + column + v);
          Vector apart;
          if constexpr (effect == Effect::kOutput) {
            apart = square + of_output[i + m] - 2 * mixed;
          } else {
            const Vector y = load(s.logits + m * kTileColumns + v), x = effect == Effect::kJoint ? y + 1 : y;
            apart = x * x * square + y * y * of_output[i + m] - 2 * x * y * mixed;
          }
          float* const to = s.sums + column + v;
          store(to, load(to) + a * a * (apart > zero ? apart : zero));
        }
      }
    }
  }
}

}  // namespace

void attention(const AttentionRow& row, void* memory) {
  Arena arena(memory);
  const int64_t dim = row.pages->dim, length = row.length, heads = row.queries.number * row.queries.group;
  const Scratch s(arena, length, dim);
  for (int64_t i = 0; i < length; ++i) s.slots[i] = static_cast<int32_t>(i);
  if (s.stride > dim) clear(s.rows, length * s.stride);
  clear(s.sums, s.width);
  with_types(row.type, [&](auto key, auto query) {
    read_keys<decltype(key)>(row, s.slots, s.rows, s.stride);
    for (int64_t c = 0; c < s.width; c += kTileColumns) {
      pack_panel(s.rows, s.stride, c, length, s.panels + c * s.stride);
    }
    const bool reads_values = row.effect >= Effect::kOutput && row.effect <= Effect::kJoint;
    if (reads_values) {
      read_values<decltype(key)>(row, s.slots, s.rows, s.stride);
      for (int64_t i = 0; i < length; ++i) s.squares[i] = inner(s.rows + i * s.stride, s.rows + i * s.stride, s.stride);
      clear(s.squares + length, s.width - length);
    }
    for (int64_t first = 0; first < heads; first += kQueries) {
      const int64_t count = heads - first < kQueries ? heads - first : kQueries;
      read_queries<decltype(query)>(row.queries, first, count, dim, s.queries, s.stride);
      attend(row, s, first, count);
      switch (row.effect) {
        case Effect::kOutput:
          add_changes<Effect::kOutput>(s, length, count);
          break;
        case Effect::kValue:
          add_of_values(s, count);
          break;
        case Effect::kKey:
          add_changes<Effect::kKey>(s, length, count);
          break;
        case Effect::kJoint:
          add_changes<Effect::kJoint>(s, length, count);
          break;
        default:
          add_attention(s, count);
      }
    }
  });
  const float each = 1 / static_cast<float>(row.queries.group);
  for (int64_t i = 0; i < length; ++i) row.sums[i] = s.sums[i] * each;
}

size_t attention_scratch(int64_t length, int64_t dim) {
  Arena arena(nullptr);
  Scratch scratch(arena, length, dim);
  return arena.used();
}

void cosines(const HeldRow& row, float* cosines, void* memory) {
  Arena arena(memory);
  const int64_t dim = row.pages->dim, length = row.length, stride = round_up(dim, kLanes);
  float* const rows = arena.take<float>(length * stride);
  float* const total = arena.take<float>(2 * stride);
  float* const norm = arena.take<float>(length);
  int32_t* const slots = arena.take<int32_t>(length);
  for (int64_t i = 0; i < length; ++i) slots[i] = static_cast<int32_t>(i);
  if (stride > dim) clear(rows, length * stride);
  with_types(row.type, [&](auto key, auto) { read_keys<decltype(key)>(row, slots, rows, stride); });
  normalise(rows, length, stride, norm);
  sum_rows(rows, stride, length, total);
  const float each = 1 / static_cast<float>(length);
  for (int64_t d = 0; d < stride; ++d) total[d] *= each;
  normalise(total, 1, stride, norm);
  for (int64_t i = 0; i < length; ++i) cosines[i] = inner(rows + i * stride, total, stride);
}

size_t cosines_scratch(int64_t length, int64_t dim) {
  const int64_t stride = round_up(dim, kLanes);
  Arena arena(nullptr);
  arena.take<float>(length * stride);
  arena.take<float>(2 * stride);
  arena.take<float>(length);
  arena.take<int32_t>(length);
  return arena.used();
}

}  // namespace SKIPKV_ISA
}  // namespace skipkv
