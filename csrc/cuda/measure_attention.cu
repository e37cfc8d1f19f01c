// `measure_attention` in two passes: each query's softmax and output, a tile of tokens at a time, then each token's sum
// over the queries. The second pass computes the logits again, so nothing is stored per pair of query and token, and no
// sum depends on the order in which blocks run.
#include <algorithm>
#include <cmath>

#include "launch.cuh"
#include "operators.h"
#include "rows.cuh"

#include "common/effects.h"

namespace skipkv {
namespace {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / kWarp;
constexpr int kQueries = 16;  // query heads of a tile

// The arguments of a launch over `count` rows from `first` on. Rows of scratch memory are numbered from 0. A row has
// `window * group` query heads, by query; those of queries that do not count come first.
struct Measuring {
  Pages pages;
  int64_t first, count;
  int n, window, group;
  Effect effect;
  float root, log_negligible;
  bool vectors;  // 16-byte reads of keys and values are possible
  const int* table;
  int64_t table_stride;
  const int *num_resident, *num_queries, *newest;
  const void* queries;
  const int* positions;  // [rows, n]
  float* out;            // [rows, n]
  // By query head that counts, `[count, window * group]`: largest logit, effect of a token with the weight 1, |o|^2; and
  // o, if the effect has o.
  float *top, *share, *squares, *outputs;

  __host__ __device__ bool has_value() const { return effect >= Effect::kOutput && effect <= Effect::kJoint; }
  __host__ __device__ bool has_output() const { return has_value() && effect != Effect::kValue; }
  __host__ __device__ int heads() const { return window * group; }
  __host__ __device__ int64_t tiles() const { return ceil_div(heads(), kQueries); }
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

// Loads the cells and positions of a tile of tokens; cells past the length become negative.
template <int TILE>
__device__ void load_places(const Measuring& s, const Place& p, int start, int* cells, int* positions) {
  const int thread = static_cast<int>(threadIdx.x), slot = start + thread;
  if (thread < TILE) {
    const bool held = slot < p.length;
    cells[thread] = held ? cell_of(s.pages, s.table + p.at.request * s.table_stride, slot) : -1;
    positions[thread] = held ? s.positions[p.line + slot] : INT32_MAX;
  }
}

// Loads a tile of query heads from number `first` on, with zeros past the last.
template <class T>
__device__ void load_queries(const Measuring& s, const Place& p, int first, float* to) {
  using Query = typename Types<T>::Query;
  const Query* from = static_cast<const Query*>(s.queries) +
                      (static_cast<int64_t>(p.at.request) * s.pages.layers + p.at.layer) * s.window * s.pages.heads *
                          s.group * s.pages.dim;
  const int hidden = s.heads() - p.heads;
  for (int i = static_cast<int>(threadIdx.x); i < kQueries * p.padded; i += kThreads) {
    const int q = first + i / p.padded, d = i % p.padded, number = hidden + q;
    const int64_t head = static_cast<int64_t>(number / s.group) * s.pages.heads * s.group + p.at.head * s.group +
                         number % s.group;
    to[i] = q < p.heads && d < s.pages.dim ? to_float(from[head * s.pages.dim + d]) : 0.0f;
  }
}

// Computes the inner products of a vector with the rows of a tile, 4 elements at a time.
template <int EACH>
__device__ void multiply(const float* own, const float* tile, int padded, float (&products)[EACH]) {
#pragma unroll
  for (int i = 0; i < EACH; ++i) products[i] = 0.0f;
  for (int d = 0; d < padded; d += 4) {
    const float4 a = *reinterpret_cast<const float4*>(own + d);
#pragma unroll
    for (int i = 0; i < EACH; ++i) {
      const float4 b = *reinterpret_cast<const float4*>(tile + i * padded + d);
      products[i] += a.x * b.x + a.y * b.y + a.z * b.z + a.w * b.w;
    }
  }
}

__device__ int reach(const Measuring& s, const Place& p, int q) { return p.first_reach + q / s.group; }

// Computes the softmax of a tile of query heads over all tokens, and their outputs unless `outputs` is null.
template <class T, int TILE>
__global__ void __launch_bounds__(kThreads) attend_queries(Measuring s) {
  constexpr int kParts = kThreads / TILE, kEach = kQueries / kParts;
  // Query heads of a thread, which computes 4 features of their outputs; D / 4 threads cover all features.
  constexpr int kRows = TILE == 64 ? 4 : 8;
  __shared__ int cells[TILE], positions[TILE];
  __shared__ float top[kQueries], weight[kQueries], factor[kQueries], visible[kQueries];
  const int64_t row = blockIdx.x / s.tiles();
  const int first = static_cast<int>(blockIdx.x % s.tiles()) * kQueries;
  const Place p(s, row);
  if (first >= p.heads) return;
  float* vectors = reinterpret_cast<float*>(dynamic_shared());
  float* query_tile = vectors + TILE * p.stride;
  float* attention = query_tile + kQueries * p.padded;  // [kQueries, TILE]
  const int thread = static_cast<int>(threadIdx.x), lane = thread % kWarp, warp = thread / kWarp;
  const int own = thread % TILE, part = thread / TILE;
  const T* pages = head_pages<T>(s.pages, p.at);
  const int groups = p.padded / 4, parts = kThreads / groups;
  const int feature = thread % groups * 4, begin = thread / groups;
  float4 output[kRows] = {};

  load_queries<T>(s, p, first, query_tile);
  if (thread < kQueries) {
    top[thread] = -INFINITY;
    weight[thread] = 0.0f;
    visible[thread] = 0.0f;
  }
  for (int start = 0; start < p.length; start += TILE) {
    __syncthreads();
    load_places<TILE>(s, p, start, cells, positions);
    __syncthreads();
    load_cells<kThreads>(s.pages, pages, cells, TILE, s.vectors, vectors, p.stride);
    __syncthreads();
    float logit[kEach];
    multiply(vectors + own * p.stride, query_tile + part * kEach * p.padded, p.padded, logit);
    for (int i = 0; i < kEach; ++i) {
      const int q = part * kEach + i;
      const bool seen = cells[own] >= 0 && positions[own] <= reach(s, p, first + q);
      attention[q * TILE + own] = seen ? logit[i] / s.root : -INFINITY;
    }
    __syncthreads();
    for (int q = warp; q < kQueries; q += kWarps) {
      float* line = attention + q * TILE;
      float highest = top[q], sum = 0.0f, number = 0.0f;
      for (int t = lane; t < TILE; t += kWarp) highest = fmaxf(highest, line[t]);
      for (int offset = kWarp / 2; offset > 0; offset /= 2) {
        highest = fmaxf(highest, __shfl_xor_sync(kAllLanes, highest, offset));
      }
      // Until a query has seen a token there is nothing to subtract.
      const float shift = highest == -INFINITY ? 0.0f : highest;
      for (int t = lane; t < TILE; t += kWarp) {
        number += line[t] > -INFINITY ? 1.0f : 0.0f;
        line[t] = expf(line[t] - shift);
        sum += line[t];
      }
      sum = warp_sum(sum);
      number = warp_sum(number);
      if (lane == 0) {
        factor[q] = expf(top[q] - shift);
        weight[q] = weight[q] * factor[q] + sum;
        visible[q] += number;
        top[q] = highest;
      }
    }
    if (s.outputs == nullptr) continue;
    load_cells<kThreads>(s.pages, pages + s.pages.dim, cells, TILE, s.vectors, vectors, p.stride);
    __syncthreads();
    if (begin >= parts) continue;
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const int q = min(begin + i * parts, kQueries - 1);
      const float scale = factor[q];
      const float4 o = output[i];
      output[i] = make_float4(o.x * scale, o.y * scale, o.z * scale, o.w * scale);
    }
#pragma unroll 4
    for (int t = 0; t < TILE; ++t) {
      const float4 v = *reinterpret_cast<const float4*>(vectors + t * p.stride + feature);
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        const float a = attention[min(begin + i * parts, kQueries - 1) * TILE + t];
        output[i].x += a * v.x;
        output[i].y += a * v.y;
        output[i].z += a * v.z;
        output[i].w += a * v.w;
      }
    }
  }
  __syncthreads();
  const int64_t head = row * s.heads() + first;
  if (thread < kQueries && first + thread < p.heads) {
    s.top[head + thread] = top[thread];
    s.share[head + thread] = s.effect == Effect::kSeen         ? visible[thread] / weight[thread]
                             : s.effect == Effect::kNegligible ? 1.0f / visible[thread]
                                                               : 1.0f / weight[thread];
  }
  if (s.outputs == nullptr) return;
  if (begin < parts) {
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const int q = begin + i * parts;
      if (q >= kQueries) continue;
      const float share = 1.0f / weight[q];
      const float4 o = output[i];
      // The queries are no longer needed.
      *reinterpret_cast<float4*>(query_tile + q * p.padded + feature) =
          make_float4(o.x * share, o.y * share, o.z * share, o.w * share);
    }
  }
  __syncthreads();
  for (int q = warp; q < kQueries && first + q < p.heads; q += kWarps) {
    float square = 0.0f;
    for (int d = lane; d < s.pages.dim; d += kWarp) {
      const float x = query_tile[q * p.padded + d];
      s.outputs[(head + q) * s.pages.dim + d] = x;
      square += x * x;
    }
    square = warp_sum(square);
    if (lane == 0) s.squares[head + q] = square;
  }
}

// Computes the effect of a token on a query that sees it. `of_value` is |v|^2, `mixed` v o and `of_output` |o|^2.
__device__ float effect_of(const Measuring& s, float logit, float top, float share, float of_value, float mixed,
                           float of_output) {
  if (s.effect == Effect::kNegligible) return logit < top + s.log_negligible ? share : 0.0f;
  const float attention = expf(logit - top) * share;
  if (!s.has_value()) return attention;
  // |x v - y o|^2, multiplied out.
  float x = 1.0f, y = s.effect == Effect::kValue ? 0.0f : 1.0f;
  if (s.effect == Effect::kKey || s.effect == Effect::kJoint) {
    y = logit;
    x = s.effect == Effect::kJoint ? 1.0f + logit : logit;
  }
  return attention * attention * fmaxf(0.0f, x * x * of_value - 2.0f * x * y * mixed + y * y * of_output);
}

// Computes the results of a tile of tokens: sums over all query heads of the row.
template <class T, int TILE>
__global__ void __launch_bounds__(kThreads) sum_queries(Measuring s) {
  constexpr int kParts = kThreads / TILE, kEach = kQueries / kParts;
  __shared__ int cells[TILE], positions[TILE];
  __shared__ float top[kQueries], share[kQueries], squares[kQueries], sums[kThreads];
  const int64_t blocks = ceil_div(s.n, TILE);
  const int64_t row = blockIdx.x / blocks;
  const int start = static_cast<int>(blockIdx.x % blocks) * TILE;
  const Place p(s, row);
  const int thread = static_cast<int>(threadIdx.x);
  const int own = thread % TILE, part = thread / TILE;
  if (start >= p.length || p.heads == 0) {
    if (thread < TILE && start + thread < s.n) s.out[p.line + start + thread] = 0.0f;
    return;
  }
  float* query_tile = reinterpret_cast<float*>(dynamic_shared());
  float* keys = query_tile + kQueries * p.padded;
  float* values = keys + TILE * p.stride;
  const T* pages = head_pages<T>(s.pages, p.at);

  load_places<TILE>(s, p, start, cells, positions);
  __syncthreads();
  load_cells<kThreads>(s.pages, pages, cells, TILE, s.vectors, keys, p.stride);
  float of_value = 0.0f;
  if (s.has_value()) {
    load_cells<kThreads>(s.pages, pages + s.pages.dim, cells, TILE, s.vectors, values, p.stride);
    __syncthreads();
    for (int d = 0; d < s.pages.dim; ++d) of_value += values[own * p.stride + d] * values[own * p.stride + d];
  }
  float sum = 0.0f;
  for (int first = 0; first < p.heads; first += kQueries) {
    const int64_t head = row * s.heads() + first;
    __syncthreads();
    load_queries<T>(s, p, first, query_tile);
    if (thread < kQueries) {
      const bool counts = first + thread < p.heads;
      top[thread] = counts ? s.top[head + thread] : 0.0f;
      share[thread] = counts ? s.share[head + thread] : 0.0f;
      squares[thread] = counts && s.outputs != nullptr ? s.squares[head + thread] : 0.0f;
    }
    __syncthreads();
    float logit[kEach], mixed[kEach] = {};
    multiply(keys + own * p.stride, query_tile + part * kEach * p.padded, p.padded, logit);
    if (s.outputs != nullptr) {
      __syncthreads();
      for (int i = thread; i < kQueries * p.padded; i += kThreads) {
        const int q = i / p.padded, d = i % p.padded;
        query_tile[i] = first + q < p.heads && d < s.pages.dim ? s.outputs[(head + q) * s.pages.dim + d] : 0.0f;
      }
      __syncthreads();
      multiply(values + own * p.stride, query_tile + part * kEach * p.padded, p.padded, mixed);
    }
    for (int i = 0; i < kEach; ++i) {
      const int q = part * kEach + i;
      const bool seen = first + q < p.heads && positions[own] <= reach(s, p, first + q);
      if (seen) sum += effect_of(s, logit[i] / s.root, top[q], share[q], of_value, mixed[i], squares[q]);
    }
  }
  sums[thread] = sum;
  __syncthreads();
  if (thread >= TILE || start + thread >= s.n) return;
  for (int other = thread + TILE; other < kThreads; other += TILE) sum += sums[other];
  s.out[p.line + start + thread] = cells[thread] < 0 ? 0.0f : sum / static_cast<float>(s.group);
}

template <class T, int TILE>
void run(const Measuring& s, cudaStream_t stream) {
  constexpr int64_t kFloat = sizeof(float);
  const int64_t padded = ceil_div(s.pages.dim, 4) * 4, tile = TILE * (padded + 4);
  launch(attend_queries<T, TILE>, s.count * s.tiles(), kThreads, (tile + kQueries * (padded + TILE)) * kFloat, stream,
         s);
  launch(sum_queries<T, TILE>, s.count * ceil_div(s.n, TILE), kThreads,
         ((s.has_value() ? 2 : 1) * tile + kQueries * padded) * kFloat, stream, s);
}

}  // namespace

Tensor measure_attention(const std::vector<Tensor>& caches, const Tensor& pointers, int64_t layout, const Tensor& table,
                         const Tensor& positions, const Tensor& num_resident, const Tensor& queries,
                         const Tensor& num_queries, const Tensor& newest, int64_t effect, double negligible) {
  const Pages pages = pages_of(caches, pointers, layout);
  const ScalarType type = caches[0].scalar_type();
  const int64_t requests = table.size(0), n = positions.size(-1);
  check_keys(pages, type);
  check_table(table, requests);
  check(positions, "positions", ScalarType::Int, {requests, pages.layers, pages.heads, n});
  check_queries(queries, pages, type, requests);
  check_vector(num_resident, "num_resident", ScalarType::Int, requests);
  check_vector(num_queries, "num_queries", ScalarType::Int, requests);
  check_vector(newest, "newest", ScalarType::Int, requests);
  STD_TORCH_CHECK(0 <= effect && effect <= static_cast<int64_t>(Effect::kNegligible), "skipkv_cuda: effect=", effect,
                  " is unknown");

  const Guard guard(positions.get_device_index());
  const cudaStream_t stream = current_stream(positions);
  const Tensor places = packed(positions), all_queries = packed(queries);
  const Tensor out = scratch(places, {requests, pages.layers, pages.heads, n}, ScalarType::Float);
  const int64_t rows = requests * pages.layers * pages.heads;
  if (rows * n == 0) return out;

  Measuring s{};
  s.pages = pages;
  s.n = static_cast<int>(n);
  s.window = static_cast<int>(queries.size(2));
  s.group = static_cast<int>(queries.size(3)) / pages.heads;
  s.effect = static_cast<Effect>(effect);
  s.log_negligible = static_cast<float>(std::log(negligible));
  s.root = static_cast<float>(std::sqrt(static_cast<double>(pages.dim)));
  s.vectors = in_chunks(pages, caches);
  s.table = data<const int>(table);
  s.table_stride = table.stride(0);
  s.num_resident = data<const int>(num_resident);
  s.num_queries = data<const int>(num_queries);
  s.newest = data<const int>(newest);
  s.queries = all_queries.const_data_ptr();
  s.positions = data<const int>(places);
  s.out = data<float>(out);

  const int64_t width = s.has_output() ? pages.dim : 0;
  const int64_t bytes = std::max<int64_t>(1, s.heads() * (width + 3) * static_cast<int64_t>(sizeof(float)));
  const int64_t at_once = std::min(rows, std::max<int64_t>(1, kScratchBytes / bytes));
  const Tensor softmax = scratch(out, {3, at_once, s.heads()}, ScalarType::Float);
  const Tensor outputs = scratch(out, {at_once, s.heads(), width}, ScalarType::Float);
  s.top = data<float>(softmax);
  s.share = s.top + at_once * s.heads();
  s.squares = s.share + at_once * s.heads();
  s.outputs = s.has_output() ? data<float>(outputs) : nullptr;
  for (s.first = 0; s.first < rows; s.first += at_once) {
    s.count = std::min(at_once, rows - s.first);
    with_type(type, [&](auto element) {
      using T = decltype(element);
      pages.dim <= 128 ? run<T, 64>(s, stream) : run<T, 32>(s, stream);
    });
  }
  return out;
}

}  // namespace skipkv
