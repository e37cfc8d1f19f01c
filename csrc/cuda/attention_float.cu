// `measure_attention` of float32 caches, without tensor cores, which would round.
#include <cmath>

#include "attention.cuh"
#include "launch.cuh"

namespace skipkv {
namespace {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / kWarp;
constexpr int kQueries = 16;  // query heads of a tile

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
__device__ void load_queries(const Measuring& s, const Place& p, int first, float* to) {
  const float* from = first_query<float>(s, p);
  for (int i = static_cast<int>(threadIdx.x); i < kQueries * p.padded; i += kThreads) {
    const int q = first + i / p.padded, d = i % p.padded;
    to[i] = q < p.heads && d < s.pages.dim ? from[query_offset(s, p, q) + d] : 0.0f;
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

// Computes the softmax of a tile of query heads over all tokens, and their outputs unless `outputs` is null.
template <int TILE>
__global__ void __launch_bounds__(kThreads) attend_queries(Measuring s) {
  constexpr int kParts = kThreads / TILE, kEach = kQueries / kParts;
  // Query heads of a thread, which computes 4 features of their outputs; D / 4 threads cover all features.
  constexpr int kRows = TILE == 64 ? 4 : 8;
  __shared__ int cells[TILE], positions[TILE];
  __shared__ float top[kQueries], weight[kQueries], factor[kQueries], visible[kQueries];
  const int64_t tiles = ceil_div(s.heads(), kQueries);
  const int64_t row = blockIdx.x / tiles;
  const int first = static_cast<int>(blockIdx.x % tiles) * kQueries;
  const Place p(s, row);
  if (first >= p.heads) return;
  float* vectors = reinterpret_cast<float*>(dynamic_shared());
  float* query_tile = vectors + TILE * p.stride;
  float* attention = query_tile + kQueries * p.padded;  // [kQueries, TILE]
  const int thread = static_cast<int>(threadIdx.x), lane = thread % kWarp, warp = thread / kWarp;
  const int own = thread % TILE, part = thread / TILE;
  const float* pages = head_pages<float>(s.pages, p.at);
  const int groups = p.padded / 4, parts = kThreads / groups;
  const int feature = thread % groups * 4, begin = thread / groups;
  float4 output[kRows] = {};

  load_queries(s, p, first, query_tile);
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
    weight[thread] += expf(sink_of(s, p, first + thread) - top[thread]);
    s.top[head + thread] = top[thread];
    s.share[head + thread] = s.effect == Effect::kSeen         ? visible[thread] / weight[thread]
                             : s.effect == Effect::kNegligible ? 1.0f / visible[thread]
                                                               : 1.0f / weight[thread];
  }
  if (s.outputs == nullptr) return;
  __syncthreads();
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
template <int TILE>
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
  const float* pages = head_pages<float>(s.pages, p.at);

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
    load_queries(s, p, first, query_tile);
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

template <int TILE>
void run(const Measuring& s, cudaStream_t stream) {
  constexpr int64_t kFloat = sizeof(float);
  const int64_t padded = ceil_div(s.pages.dim, 4) * 4, tile = TILE * (padded + 4);
  launch(attend_queries<TILE>, s.count * ceil_div(s.heads(), kQueries), kThreads,
         (tile + kQueries * (padded + TILE)) * kFloat, stream, s);
  launch(sum_queries<TILE>, s.count * ceil_div(s.n, TILE), kThreads,
         ((s.has_value() ? 2 : 1) * tile + kQueries * padded) * kFloat, stream, s);
}

}  // namespace

void measure_float(const Measuring& s, cudaStream_t stream) {
  s.pages.dim <= 128 ? run<64>(s, stream) : run<32>(s, stream);
}

}  // namespace skipkv
