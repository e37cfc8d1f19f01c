// Shared by the kernels of `measure_attention`, which has two passes: each query's softmax and output, a tile of tokens
// at a time, then each token's sum over the queries. The second pass computes the logits again, so nothing is stored
// per pair of query and token, and no sum depends on the order in which blocks run.
#pragma once

#include "rows.cuh"

#include "common/effects.h"

namespace skipkv {

// The arguments of a launch over `count` rows from `first` on. Rows of scratch memory are numbered from 0. A row has
// `window * group` query heads, by query; those of queries that do not count come first.
struct Measuring {
  Pages pages;
  int64_t first, count;
  int n, window, group;
  Effect effect;
  float root, log_negligible;
  bool vectors, wide_queries;  // 16-byte reads of keys and values are possible, and of queries
  const int* table;
  int64_t table_stride;
  const int *num_resident, *num_queries, *newest;
  const void* queries;
  const float* sinks;    // [layers, heads * group], logits; or null
  const int* positions;  // [rows, n]
  float* out;            // [rows, n]
  // By query head that counts, `[count, window * group]`: largest logit, effect of a token with the weight 1, |o|^2;
  // and o, if the effect has o. On tensor cores logits are in units of log 2, and an o is the sum of two vectors of 16
  // bits, which lie one behind the other.
  float *top, *share, *squares, *outputs;

  __host__ __device__ bool has_value() const { return effect >= Effect::kOutput && effect <= Effect::kJoint; }
  __host__ __device__ bool has_output() const { return has_value() && effect != Effect::kValue; }
  __host__ __device__ int heads() const { return window * group; }
};

// The row of a block.
struct Place {
  Row at;
  int length, heads;  // tokens, and query heads that count
  int first_reach;    // the position that the first query that counts reaches
  int64_t line;       // first of the row's entries by token
  int padded, stride;

  __device__ Place(const Measuring& s, int64_t row) : at(row_of(s.pages, s.first + row)) {
    const int number = s.num_queries[at.request];
    length = s.num_resident[at.request];
    heads = number * s.group;
    first_reach = s.newest[at.request] - (number - 1);
    line = (s.first + row) * s.n;
    padded = (s.pages.dim + 3) / 4 * 4;
    // 16 bytes more a row, so that 16-byte reads of neighbouring rows hit different banks.
    stride = padded + 4;
  }
};

// Returns the last position that a query head sees.
__device__ inline int reach(const Measuring& s, const Place& p, int q) { return p.first_reach + q / s.group; }

// Returns the first query of a row's request and layer.
template <class Query>
__device__ const Query* first_query(const Measuring& s, const Place& p) {
  return static_cast<const Query*>(s.queries) + (static_cast<int64_t>(p.at.request) * s.pages.layers + p.at.layer) *
                                                    s.window * s.pages.heads * s.group * s.pages.dim;
}

// Returns the offset from there to query head q of those that count, in elements.
__device__ inline int64_t query_offset(const Measuring& s, const Place& p, int q) {
  const int number = s.heads() - p.heads + q;
  const int64_t head =
      static_cast<int64_t>(number / s.group) * s.pages.heads * s.group + p.at.head * s.group + number % s.group;
  return head * s.pages.dim;
}

// Returns the logit of the sink of query head q; minus infinity if there is none.
__device__ inline float sink_of(const Measuring& s, const Place& p, int q) {
  const int64_t first = (static_cast<int64_t>(p.at.layer) * s.pages.heads + p.at.head) * s.group;
  return s.sinks == nullptr ? -INFINITY : s.sinks[first + q % s.group];
}

// The launches: both passes for float32 caches, and each pass for others.
void measure_float(const Measuring& s, cudaStream_t stream);
void attend_queries(const Measuring& s, ScalarType type, cudaStream_t stream);
void sum_queries(const Measuring& s, ScalarType type, cudaStream_t stream);

}  // namespace skipkv
