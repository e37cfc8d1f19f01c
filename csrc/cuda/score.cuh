// Shared by the kernels of `score_tokens`. A row is one (request, layer, kv head), numbered in this order; a rank is a
// token's place in ascending position. The matrix of cosines is never stored: its column sums are
// `unit_j . sum_i unit_i`, so only the search for each row's last similar column compares pairs, newest columns first,
// and it stops at a hit.
#pragma once

#include "rows.cuh"

namespace skipkv {

// Exempted cosines are added as integers in this unit, so that the sum does not depend on the order of the additions.
constexpr float kFixed = 1099511627776.0f;
constexpr int kTile = 64;

// The arguments of a launch over `count` rows from `first` on. Rows of scratch memory are numbered from 0.
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
  // The last similar column and its cosine, while they are searched; in the memory of mean and attention.
  unsigned long long* similar;
  // `[count, blocks]` with at least `blocks(128)`, `blocks(64)` with D > 128: how far a block has searched.
  int* reached;
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

__device__ inline Row row_of(const Scoring& s, int64_t row) { return row_of(s.pages, s.first + row); }

// The launches, in order.
void measure_keys(const Scoring& s, ScalarType type, cudaStream_t stream);
void exempt_last_similar(const Scoring& s, ScalarType type, cudaStream_t stream);
void exempt_last_similar_float(const Scoring& s, cudaStream_t stream);
void mean_cosine(const Scoring& s, ScalarType type, cudaStream_t stream);
void attend(const Scoring& s, cudaStream_t stream);
void combine(const Scoring& s, cudaStream_t stream);

}  // namespace skipkv
