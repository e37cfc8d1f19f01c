// The last kernels of `score_tokens`: mean cosines, the softmaxes, pooling over neighbours and the mixture.
#include "launch.cuh"
#include "score.cuh"

namespace skipkv {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;

// Sums all unit keys of a row, `[D]`; one block a row.
__global__ void __launch_bounds__(kThreads) sum_partials(Scoring s) {
  const int64_t row = blockIdx.x, blocks = s.blocks(s.measured);
  const int used = (s.num_resident[row_of(s, row).request] + s.measured - 1) / s.measured;
  for (int d = static_cast<int>(threadIdx.x); d < s.pages.dim; d += kThreads) {
    float sum = 0.0f;
    for (int b = 0; b < used; ++b) sum += s.partial[(row * blocks + b) * s.pages.dim + d];
    s.total[row * s.pages.dim + d] = sum;
  }
}

// Computes the mean cosine of each key with all others, without the exempted ones; a warp a key.
template <class T>
__global__ void __launch_bounds__(kThreads) mean_of_cosines(Scoring s) {
  const int64_t blocks = s.blocks(kTile);
  const int64_t row = blockIdx.x / blocks;
  const int start = static_cast<int>(blockIdx.x % blocks) * kTile;
  const Row at = row_of(s, row);
  const int length = s.num_resident[at.request];
  const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
  const T* pages = head_pages<T>(s.pages, at);
  const float* total = s.total + row * s.pages.dim;
  const int end = min(start + kTile, length);
  for (int rank = start + warp; rank < end; rank += kWarps) {
    const int64_t i = row * s.n + rank;
    const T* key = pages + cell_offset(s.pages, s.cells[i]);
    const float inverse = s.inverse[i];
    float others = 0.0f;
    if (s.vectors) {
      constexpr int kChunk = Chunk<T>::kSize;
      for (int d = lane * kChunk; d < s.pages.dim; d += kWarp * kChunk) {
        const Chunk<T> chunk = read_chunk(key + d);
#pragma unroll
        for (int e = 0; e < kChunk; ++e) {
          const float unit = to_float(chunk.values[e]) * inverse;
          others += unit * (total[d + e] - unit);
        }
      }
    } else {
      for (int d = lane; d < s.pages.dim; d += kWarp) {
        const float unit = to_float(key[d]) * inverse;
        others += unit * (total[d] - unit);
      }
    }
    others = warp_sum(others);
    if (lane == 0) {
      const float exempted = static_cast<float>(static_cast<long long>(s.exempted[i])) / kFixed;
      s.mean[i] = (others - exempted) / static_cast<float>(length);
    }
  }
}

// Computes the softmaxes of a row: attention, averaged over the queries, and the normaliser of redundancy; one block a
// row.
__global__ void __launch_bounds__(kThreads) attend_row(Scoring s) {
  __shared__ float sums[kWarps];
  float* top = reinterpret_cast<float*>(dynamic_shared());
  float* weight = top + s.window;
  const int64_t row = blockIdx.x, line = row * s.n;
  const int length = s.num_resident[row_of(s, row).request], old = length - s.window;
  const int thread = static_cast<int>(threadIdx.x), lane = thread % kWarp, warp = thread / kWarp;
  const float* logits = s.logits + line * s.window;

  for (int w = warp; w < s.window; w += kWarps) {
    const float* logit = logits + static_cast<int64_t>(w) * s.n;
    float highest = -INFINITY, sum = 0.0f;
    for (int rank = lane; rank < old; rank += kWarp) highest = fmaxf(highest, logit[rank]);
    for (int offset = kWarp / 2; offset > 0; offset /= 2) {
      highest = fmaxf(highest, __shfl_xor_sync(kAllLanes, highest, offset));
    }
    for (int rank = lane; rank < old; rank += kWarp) sum += expf(logit[rank] - highest);
    sum = warp_sum(sum);
    if (lane == 0) {
      top[w] = highest;
      weight[w] = sum;
    }
  }
  __syncthreads();
  for (int rank = thread; rank < old; rank += kThreads) {
    float share = 0.0f;
    for (int w = 0; w < s.window; ++w) share += expf(logits[static_cast<int64_t>(w) * s.n + rank] - top[w]) / weight[w];
    s.attention[line + rank] = share / static_cast<float>(s.window);
  }
  if (!s.redundancy) return;
  // Mean cosines lie within -2 and 2, so their softmax needs no maximum.
  float sum = 0.0f;
  for (int rank = thread; rank < length; rank += kThreads) sum += expf(s.mean[line + rank]);
  sum = warp_sum(sum);
  if (lane == 0) sums[warp] = sum;
  __syncthreads();
  if (thread == 0) {
    float all = 0.0f;
    for (int i = 0; i < kWarps; ++i) all += sums[i];
    s.normaliser[row] = all;
  }
}

// Pools the attention over neighbours, mixes it with redundancy and subtracts the penalty; a thread a rank.
__global__ void __launch_bounds__(kThreads) mix_scores(Scoring s) {
  const int64_t blocks = s.blocks(kThreads);
  const int64_t row = blockIdx.x / blocks, line = row * s.n;
  const int rank = static_cast<int>(blockIdx.x % blocks) * kThreads + static_cast<int>(threadIdx.x);
  if (rank >= s.n) return;
  const int length = s.num_resident[row_of(s, row).request], old = length - s.window;
  const int64_t place = (s.first + row) * s.n + s.order[line + rank];
  if (rank >= length) {
    s.out[place] = -INFINITY;
    return;
  }
  float score = 0.0f;
  if (rank < old) {
    const int end = min(rank + s.pool / 2, old - 1);
    float pooled = 0.0f;
    for (int i = max(rank - s.pool / 2, 0); i <= end; ++i) pooled = fmaxf(pooled, s.attention[line + i]);
    score = s.mix * pooled;
    if (s.redundancy) score -= (1.0f - s.mix) * (expf(s.mean[line + rank]) / s.normaliser[row]);
  }
  s.out[place] = s.penalty == nullptr ? score : score - s.penalty[place];
}

}  // namespace

void mean_cosine(const Scoring& s, ScalarType type, cudaStream_t stream) {
  launch(sum_partials, s.count, kThreads, 0, stream, s);
  const int64_t blocks = s.count * s.blocks(kTile);
  with_type(type, [&](auto element) {
    launch(mean_of_cosines<decltype(element)>, blocks, kThreads, 0, stream, s);
  });
}

void attend(const Scoring& s, cudaStream_t stream) {
  launch(attend_row, s.count, kThreads, 2 * s.window * static_cast<int64_t>(sizeof(float)), stream, s);
}

void combine(const Scoring& s, cudaStream_t stream) {
  launch(mix_scores, s.count * s.blocks(kThreads), kThreads, 0, stream, s);
}

}  // namespace skipkv
