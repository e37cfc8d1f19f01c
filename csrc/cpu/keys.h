// Reads the keys, values and queries of a row as float32 vectors, from pages of any layout.
#pragma once

#include "vectors.h"

#include "common/epsilon.h"

namespace skipkv {
namespace SKIPKV_ISA {
namespace {

template <class T>
inline void convert(const T* from, float* to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] = to_float(from[i]);
}

inline void clear(float* x, int64_t n) {
  for (int64_t i = 0; i < n; ++i) x[i] = 0;
}

constexpr int64_t kBlock = 16;  // tokens

// Sets `to[t][d + k] = from[k * step + t]` for a block of tokens and `kLanes` dimensions.
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

// Copies the first `count` tokens of a cell: token t to `rows[rank[t]]`.
template <class T>
inline void read_cell(const Pages& p, const T* cell, int64_t count, const int32_t* rank, float* rows, int64_t stride) {
  if (p.in_rows()) {
    for (int64_t t = 0; t < count; ++t) convert(cell + t * p.token_stride, rows + rank[t] * stride, p.dim);
    return;
  }
  // The other layouts interleave tokens, so they are read along the tokens, a block at a time.
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

// Calls `read(cell, first, count)` for each page of a row, which has `count` tokens from `first` on.
template <class T, class Read>
inline void each_cell(const HeldRow& row, const Read& read) {
  const Pages& p = *row.pages;
  for (int64_t first = 0, page = 0; first < row.length; first += p.size, ++page) {
    const int64_t count = row.length - first < p.size ? row.length - first : p.size;
    read(static_cast<const T*>(row.cache) + p.cell(row.table[page], row.head), first, count);
  }
}

template <class T>
inline void read_keys(const HeldRow& row, const int32_t* rank, float* rows, int64_t stride) {
  each_cell<T>(row, [&](const T* cell, int64_t first, int64_t count) {
    read_cell(*row.pages, cell, count, rank + first, rows, stride);
  });
}

// Copies the value of slot i to `rows[rank[i]]`, with zeros where a value is shorter than a key.
template <class T>
inline void read_values(const HeldRow& row, const int32_t* rank, float* rows, int64_t stride) {
  const Pages& p = *row.pages;
  each_cell<T>(row, [&](const T* cell, int64_t first, int64_t count) {
    const T* const values = cell + (p.in_rows() ? p.value : p.size * p.dim);
    for (int64_t t = 0; t < count; ++t) {
      float* const to = rows + rank[first + t] * stride;
      if (p.layout != kAmx) {
        convert(values + t * (p.in_rows() ? p.token_stride : p.dim), to, p.value_dim);
        clear(to + p.value_dim, p.dim - p.value_dim);
        continue;
      }
      // 16 features of a pair of tokens, then the next 16.
      const T* from = values + t / 2 * 32 + t % 2;
      for (int64_t d = 0; d < p.dim; d += 16, from += 16 * p.size) {
        for (int64_t k = 0; k < 16; ++k) to[d + k] = to_float(from[2 * k]);
      }
    }
  });
}

// Copies `count` query heads from number `first` on to rows, scaled by 1 / sqrt(D). The heads of a query are adjacent.
template <class T>
inline void read_queries(const RowQueries& queries, int64_t first, int64_t count, int64_t dim, float* rows,
                         int64_t stride) {
  const float scale = 1 / __builtin_sqrtf(static_cast<float>(dim));
  for (int64_t i = first; i < first + count; ++i, rows += stride) {
    convert(static_cast<const T*>(queries.data) + i / queries.group * queries.stride + i % queries.group * dim, rows,
            dim);
    for (int64_t d = 0; d < dim; ++d) rows[d] *= scale;
    clear(rows + dim, stride - dim);
  }
}

// Calls `work` with an element of the type of the keys and an element of the type of the queries.
template <class Work>
inline void with_types(KeyType type, const Work& work) {
  switch (type) {
    case KeyType::kFloat32:
      return work(Float32{}, Float32{});
    case KeyType::kBFloat16:
      return work(BFloat16{}, BFloat16{});
    case KeyType::kFloat16:
      return work(Float16{}, Float16{});
    case KeyType::kFloat8E4M3:
      return work(Float8E4M3{}, Float32{});
    case KeyType::kFloat8E5M2:
      return work(Float8E5M2{}, Float32{});
  }
}

// Divides each row by its norm, which `norm` receives.
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

inline float inner(const float* a, const float* b, int64_t stride) {
  Vector sum = {};
  for (int64_t d = 0; d < stride; d += kLanes) sum += load(a + d) * load(b + d);
  return sum_lanes(sum);
}

// Sums the rows into the first `stride` floats of `total`, which has room for twice as many.
inline void sum_rows(const float* rows, int64_t stride, int64_t length, float* total) {
  // Sum in blocks, to limit the rounding error of a long sum.
  float* const block = total + stride;
  clear(total, stride);
  for (int64_t first = 0; first < length; first += 64) {
    clear(block, stride);
    for (int64_t i = first; i < first + 64 && i < length; ++i) {
      for (int64_t d = 0; d < stride; d += kLanes) store(block + d, load(block + d) + load(rows + i * stride + d));
    }
    for (int64_t d = 0; d < stride; ++d) total[d] += block[d];
  }
}

}  // namespace
}  // namespace SKIPKV_ISA
}  // namespace skipkv
