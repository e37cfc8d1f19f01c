// What the kernels of `score_tokens` share. A row is one (request, layer, kv head), numbered in this order; a rank is a
// token's place in ascending position. The cosine matrix never exists: the column sums of cosines are
// `unit_j . sum_i unit_i`, so only the search for each row's last similar column looks at pairs, newest columns first
// and no further than needed.
#pragma once

#include <cuda_runtime.h>

#include "device.cuh"
#include "ops.h"

namespace skipkv {

constexpr float kEpsilon = 1e-8f;
// Exempted cosines are added as integers of this unit: any order of the additions gives the same sum.
constexpr float kFixed = 1099511627776.0f;
constexpr int kTile = 64;
constexpr int kMaxDim = 256;

// What goes with keys of type T: the type of the queries, and the one that tensor cores multiply.
template <class T>
struct Types {
  using Query = T;
  using Factor = T;
};
template <>
struct Types<__nv_fp8_e4m3> {
  using Query = float;
  using Factor = __half;
};
template <>
struct Types<__nv_fp8_e5m2> {
  using Query = float;
  using Factor = __half;
};

// The arguments of a launch over `count` rows from `first` on. Scratch memory is numbered from 0.
struct Scoring {
  Pages pages;
  int64_t first, count;
  int n, window, group, pool;
  float mix, threshold, root;
  bool redundancy;
  // 16-byte reads of keys are possible.
  bool vectors;
  const int* table;
  int64_t table_stride;
  const int* num_resident;
  const void* queries;
  // By slot, `[rows, n]`, of all rows; penalty may be null.
  const int* positions;
  const float* penalty;
  float* out;
  // By rank, `[count, n]`.
  int* order;
  int* cells;
  float* inverse;
  float* mean;
  float* attention;
  unsigned long long* exempted;
  // `[count, window, n]`.
  float* logits;
  // `[count, blocks, D]` with `blocks` of `measured` ranks, and their sum `[count, D]`.
  float* partial;
  float* total;
  int measured;
  // `[count]`.
  float* normaliser;

  __host__ __device__ int64_t blocks(int ranks) const { return ceil_div(n, ranks); }
};

struct Row {
  int request, layer, head;
};

__device__ inline Row row_of(const Scoring& s, int64_t row) {
  const int64_t whole = s.first + row;
  const int64_t heads = s.pages.heads, layers = s.pages.layers;
  return {static_cast<int>(whole / (layers * heads)), static_cast<int>(whole / heads % layers),
          static_cast<int>(whole % heads)};
}

template <class T>
__device__ const T* head_pages(const Pages& pages, const Row& row) {
  return reinterpret_cast<const T*>(pages.pointers[row.layer]) + row.head * pages.head_stride;
}

// Elements from `head_pages` to the key of a cell (page * size + offset).
__device__ inline int64_t cell_offset(const Pages& pages, int cell) {
  return cell / pages.size * pages.page_stride + cell % pages.size * pages.token_stride;
}

// Order of the tokens and the kernels in order of use.
void order_by_position(const Scoring& s, cudaStream_t stream);
void measure_keys(const Scoring& s, ScalarType type, cudaStream_t stream);
void exempt_last_similar(const Scoring& s, ScalarType type, cudaStream_t stream);
void exempt_last_similar_float(const Scoring& s, cudaStream_t stream);
void mean_cosine(const Scoring& s, ScalarType type, cudaStream_t stream);
void attend(const Scoring& s, cudaStream_t stream);
void combine(const Scoring& s, cudaStream_t stream);

}  // namespace skipkv
