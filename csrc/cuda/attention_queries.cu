// The first pass of `measure_attention` on tensor cores, for caches of 16 and 8 bits: each query's softmax and output.
#include <cmath>

#include "attention_parts.cuh"
#include "launch.cuh"

namespace skipkv {
namespace {

constexpr int kThreads = 128;
constexpr int kHeads = 16 * kThreads / kWarp;  // query heads of a block; a warp has 16, a lane 2 of them

// Tokens of a tile, of which a lane has 2 in 8. More features and more parts of queries leave shared memory for fewer.
template <class T, int STEPS>
constexpr int kTokens = STEPS <= 8 ? 64 : 32 / kQueryParts<T>;

// A lane's part of a softmax over the tokens so far, by query head. Logits are in units of log 2.
struct Softmax {
  float scale[2], top[2] = {-INFINITY, -INFINITY}, weight[2] = {}, visible[2] = {};
  int reach[2];
};

template <class T, int STEPS>
using Pairs = float[kTokens<T, STEPS> / 8][4];

// Computes the products of the warp's query heads with the keys of a tile.
template <class T, int STEPS>
__device__ void multiply_keys(const typename Types<T>::Factor* queries, const typename Types<T>::Factor* keys,
                              Pairs<T, STEPS>& products) {
  using Factor = typename Types<T>::Factor;
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
#pragma unroll
  for (int k = 0; k < STEPS; ++k) {
    uint32_t a[kQueryParts<T>][4];
#pragma unroll
    for (int i = 0; i < kQueryParts<T>; ++i) {
      read_rows<T, STEPS>(queries + i * Tile<T, STEPS, kHeads>::kSize, warp * 16, k, a[i]);
    }
#pragma unroll
    for (int c = 0; c < kTokens<T, STEPS> / 8; c += 2) {
      uint32_t b[4];
      read_columns<T, STEPS>(keys, c * 8, k, b);
#pragma unroll
      for (int i = 0; i < kQueryParts<T>; ++i) {
        multiply_add(products[c], a[i], b[0], b[1], Factor());
        multiply_add(products[c + 1], a[i], b[2], b[3], Factor());
      }
    }
  }
}

// Turns products into weights relative to the largest so far, and sets by how much earlier ones shrink.
template <class T, int STEPS>
__device__ void attend(const int* positions, bool counts, Softmax& softmax, Pairs<T, STEPS>& pairs,
                       float (&factor)[2]) {
  const int t = static_cast<int>(threadIdx.x) % 4;
  float highest[2] = {softmax.top[0], softmax.top[1]};
#pragma unroll
  for (int c = 0; c < kTokens<T, STEPS> / 8; ++c) {
    const int2 place = *reinterpret_cast<const int2*>(positions + c * 8 + 2 * t);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float &x = pairs[c][2 * h], &y = pairs[c][2 * h + 1];
      x = place.x <= softmax.reach[h] ? __fmul_rn(x, softmax.scale[h]) : -INFINITY;
      y = place.y <= softmax.reach[h] ? __fmul_rn(y, softmax.scale[h]) : -INFINITY;
      highest[h] = fmaxf(highest[h], fmaxf(x, y));
    }
  }
  if (counts) {
#pragma unroll
    for (int i = 0; i < kTokens<T, STEPS> / 2; ++i) {
      softmax.visible[i / 2 % 2] += pairs[i / 4][i % 4] > -INFINITY ? 1.0f : 0.0f;
    }
  }
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    for (int offset = 1; offset < 4; offset *= 2) {
      highest[h] = fmaxf(highest[h], __shfl_xor_sync(kAllLanes, highest[h], offset));
    }
    // Until a query has seen a token there is nothing to subtract.
    const float shift = highest[h] == -INFINITY ? 0.0f : highest[h];
    factor[h] = exp2f(softmax.top[h] - shift);
    softmax.top[h] = highest[h];
    float sum = 0.0f;
#pragma unroll
    for (int c = 0; c < kTokens<T, STEPS> / 8; ++c) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        float& x = pairs[c][2 * h + e];
        x = exp2f(x - shift);
        sum += x;
      }
    }
    softmax.weight[h] = softmax.weight[h] * factor[h] + sum;
  }
}

// Adds the products of weights, in two parts, with the values of a tile to the outputs.
template <class T, int STEPS>
__device__ void multiply_values(const Pairs<T, STEPS>& weights, const typename Types<T>::Factor* values,
                                float (&outputs)[2 * STEPS][4]) {
  using Factor = typename Types<T>::Factor;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
#pragma unroll
  for (int k = 0; k < kTokens<T, STEPS> / 16; ++k) {
    uint32_t a[2][4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float* pair = weights[2 * k + i / 2] + i % 2 * 2;
      split_pair<Factor>(pair[0], pair[1], a[0][i], a[1][i]);
    }
#pragma unroll
    for (int n = 0; n < STEPS; ++n) {
      uint32_t b[4];
      load_transposed(b, values + (k * 16 + lane % 16) * Tile<T, STEPS>::kStride + n * 16 + lane / 16 * 8);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        multiply_add(outputs[2 * n], a[i], b[0], b[1], Factor());
        multiply_add(outputs[2 * n + 1], a[i], b[2], b[3], Factor());
      }
    }
  }
}

// Writes the results of the warp's query heads, of which `first` is the lane's first.
template <class Factor, int STEPS>
__device__ void write(const Measuring& s, const Place& p, int64_t row, int first, const Softmax& softmax,
                      const float (&outputs)[2 * STEPS][4]) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp, t = lane % 4;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    float weight = softmax.weight[h], visible = softmax.visible[h], square = 0.0f;
    for (int offset = 1; offset < 4; offset *= 2) {
      weight += __shfl_xor_sync(kAllLanes, weight, offset);
      visible += __shfl_xor_sync(kAllLanes, visible, offset);
    }
    const int q = first + 8 * h;
    weight += exp2f(kLog2E * sink_of(s, p, q) - softmax.top[h]);
    const bool held = q < p.heads;
    const int64_t head = row * s.heads() + q;
    if (s.outputs != nullptr) {
      Factor* to = reinterpret_cast<Factor*>(s.outputs) + head * 2 * s.pages.dim;
      const float share = 1.0f / weight;
#pragma unroll
      for (int n = 0; n < 2 * STEPS; ++n) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int d = n * 8 + 2 * t + e;
          const float x = outputs[n][2 * h + e] * share;
          const Factor one = from_float<Factor>(x), two = from_float<Factor>(x - to_float(one));
          // Of what the second pass reads, so that the distance of a value from itself is zero.
          const float sum = to_float(one) + to_float(two);
          square += sum * sum;
          if (!held || d >= s.pages.dim) continue;
          to[d] = one;
          to[s.pages.dim + d] = two;
        }
      }
      for (int offset = 1; offset < 4; offset *= 2) square += __shfl_xor_sync(kAllLanes, square, offset);
    }
    if (!held || t != 0) continue;
    s.top[head] = softmax.top[h];
    s.share[head] = s.effect == Effect::kSeen         ? visible / weight
                    : s.effect == Effect::kNegligible ? 1.0f / visible
                                                      : 1.0f / weight;
    if (s.outputs != nullptr) s.squares[head] = square;
  }
}

// Computes the softmax of a tile of query heads over all tokens, and their outputs unless `outputs` is null. The values
// of a tile arrive while its logits are computed, the keys of the next one behind that.
template <class T, int STEPS>
__global__ void __launch_bounds__(kThreads, 2) attend_heads(Measuring s) {
  constexpr int kTile = kTokens<T, STEPS>;
  using Factor = typename Types<T>::Factor;
  using Query = typename Types<T>::Query;
  __shared__ int64_t heads[kHeads], offsets[2][kTile];
  __shared__ __align__(8) int positions[2][kTile];
  __shared__ float gains[kHeads];
  Factor* queries = reinterpret_cast<Factor*>(dynamic_shared());
  Factor* keys = queries + kQueryParts<T> * Tile<T, STEPS, kHeads>::kSize;
  Factor* values = keys + Tile<T, STEPS, kTile>::kSize;

  const int64_t blocks = ceil_div(s.heads(), kHeads);
  const int64_t row = blockIdx.x / blocks;
  const int first = static_cast<int>(blockIdx.x % blocks) * kHeads;
  const Place p(s, row);
  if (first >= p.heads) return;
  const T* pages = head_pages<T>(s.pages, p.at);
  const int dim = s.pages.dim, thread = static_cast<int>(threadIdx.x), lane = thread % kWarp;
  const bool counts = s.effect == Effect::kSeen || s.effect == Effect::kNegligible;

  const auto place = [&](int turn, int start) {
    if (thread >= kTile || start >= p.length) return;
    // The last token fills the rest of its tile, out of all queries' sight.
    const int slot = min(start + thread, p.length - 1);
    offsets[turn][thread] = cell_offset(s.pages, cell_of(s.pages, s.table + p.at.request * s.table_stride, slot));
    positions[turn][thread] = start + thread < p.length ? s.positions[p.line + slot] : INT32_MAX;
  };
  if (thread < kHeads) heads[thread] = query_offset(s, p, min(first + thread, p.heads - 1));
  place(0, 0);
  __syncthreads();
  fill_queries<T, STEPS, kThreads, kHeads>(s, first_query<Query>(s, p), heads, gains, queries);
  fill_tile<T, STEPS, kThreads, kTile>(pages, offsets[0], dim, s.vectors, keys);
  __syncthreads();

  const int own = thread / kWarp * 16 + lane / 4;
  Softmax softmax;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    softmax.scale[h] = gains[own + 8 * h];
    softmax.reach[h] = reach(s, p, first + own + 8 * h);
  }
  float outputs[2 * STEPS][4] = {};
  int turn = 0;
  for (int start = 0; start < p.length; start += kTile, turn ^= 1) {
    wait_for_copies();
    __syncthreads();
    if (s.outputs != nullptr) fill_tile<T, STEPS, kThreads, kTile>(pages + dim, offsets[turn], dim, s.vectors, values);
    end_copies();
    place(turn ^ 1, start + kTile);
    Pairs<T, STEPS> pairs = {};
    multiply_keys<T, STEPS>(queries, keys, pairs);
    __syncthreads();
    if (start + kTile < p.length) fill_tile<T, STEPS, kThreads, kTile>(pages, offsets[turn ^ 1], dim, s.vectors, keys);
    end_copies();
    float factor[2];
    attend<T, STEPS>(positions[turn], counts, softmax, pairs, factor);
    if (s.outputs == nullptr) continue;
    wait_for_earlier_copies();
    __syncthreads();
    // Once a query has seen what it attends to most, nothing shrinks.
    if (__ballot_sync(kAllLanes, factor[0] != 1.0f || factor[1] != 1.0f) != 0) {
#pragma unroll
      for (int n = 0; n < 2 * STEPS; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) outputs[n][i] *= factor[i / 2];
      }
    }
    multiply_values<T, STEPS>(pairs, values, outputs);
  }
  write<Factor, STEPS>(s, p, row, first + own, softmax, outputs);
}

template <class T, int STEPS>
void start(const Measuring& s, cudaStream_t stream) {
  const int64_t shared =
      kQueryParts<T> * Tile<T, STEPS, kHeads>::kBytes + 2 * Tile<T, STEPS, kTokens<T, STEPS>>::kBytes;
  launch(attend_heads<T, STEPS>, s.count * ceil_div(s.heads(), kHeads), kThreads, shared, stream, s);
}

}  // namespace

void attend_queries(const Measuring& s, ScalarType type, cudaStream_t stream) {
  with_type(type, [&](auto element) {
    using T = decltype(element);
    if constexpr (sizeof(T) <= 2) {
      const int dim = s.pages.dim;
      dim <= 64 ? start<T, 4>(s, stream) : dim <= 128 ? start<T, 8>(s, stream) : start<T, 16>(s, stream);
    }
  });
}

}  // namespace skipkv
