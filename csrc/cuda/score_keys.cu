// The first pass of `score_tokens` over the keys: their cells, 1 / norm, sums of unit keys, logits of the queries.
#include "launch.cuh"
#include "score.cuh"

namespace skipkv {
namespace {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / kWarp;
// Queries that share a pass over the keys in shared memory.
constexpr int kQueries = 8;

// Writes cells, inverse, partial and logits of `TILE` ranks of a row.
template <class T, int TILE>
__global__ void __launch_bounds__(kThreads) measure(Scoring s) {
  // A thread takes one key of the tile and `kEach` of the queries.
  constexpr int kParts = kThreads / TILE;
  constexpr int kEach = kQueries / kParts;
  __shared__ int cells[TILE];
  __shared__ float inverse[TILE];
  const int dim = s.pages.dim;
  const int padded = (dim + 3) / 4 * 4;
  // 16 bytes more a row, so that 16-byte reads of neighbouring rows hit different banks.
  const int stride = padded + 4;
  float* keys = reinterpret_cast<float*>(dynamic_shared());
  float* query_tile = keys + TILE * stride;

  const int64_t blocks = s.blocks(TILE);
  const int64_t row = blockIdx.x / blocks, block = blockIdx.x % blocks;
  const Row at = row_of(s, row);
  const int length = s.num_resident[at.request];
  const int start = static_cast<int>(block) * TILE;
  if (start >= length) return;
  const int thread = static_cast<int>(threadIdx.x), lane = thread % kWarp, warp = thread / kWarp;
  const int64_t line = row * s.n;

  if (thread < TILE) {
    int cell = -1;
    if (start + thread < length) {
      const int slot = s.order[line + start + thread];
      cell = cell_of(s.pages, s.table + at.request * s.table_stride, slot);
      s.cells[line + start + thread] = cell;
    }
    cells[thread] = cell;
  }
  __syncthreads();
  load_cells<kThreads>(s.pages, head_pages<T>(s.pages, at), cells, TILE, s.vectors, keys, stride);
  __syncthreads();
  for (int k = warp; k < TILE; k += kWarps) {
    float square = 0.0f;
    for (int d = lane; d < padded; d += kWarp) square += keys[k * stride + d] * keys[k * stride + d];
    square = warp_sum(square);
    if (lane == 0) {
      inverse[k] = 1.0f / (sqrtf(square) + kEpsilon);
      if (cells[k] >= 0) s.inverse[line + start + k] = inverse[k];
    }
  }
  __syncthreads();
  for (int d = thread; d < dim; d += kThreads) {
    float sum = 0.0f;
    // Rows past the length are zero.
    for (int k = 0; k < TILE; ++k) sum += keys[k * stride + d] * inverse[k];
    s.partial[(row * blocks + block) * dim + d] = sum;
  }

  const int own = thread % TILE, part = thread / TILE;
  using Query = typename Types<T>::Query;
  const Query* queries = static_cast<const Query*>(s.queries) +
                         (static_cast<int64_t>(at.request) * s.pages.layers + at.layer) * s.window * s.pages.heads *
                             s.group * dim;
  for (int w0 = 0; w0 < s.window; w0 += kQueries) {
    float best[kEach];
    for (int i = 0; i < kEach; ++i) best[i] = -INFINITY;
    for (int g = 0; g < s.group; ++g) {
      __syncthreads();
      for (int i = thread; i < kQueries * padded; i += kThreads) {
        const int w = w0 + i / padded, d = i % padded;
        const int64_t head = static_cast<int64_t>(w) * s.pages.heads * s.group + at.head * s.group + g;
        query_tile[i] = w < s.window && d < dim ? to_float(queries[head * dim + d]) : 0.0f;
      }
      __syncthreads();
      float logit[kEach] = {};
      for (int d = 0; d < padded; d += 4) {
        const float4 key = *reinterpret_cast<const float4*>(keys + own * stride + d);
#pragma unroll
        for (int i = 0; i < kEach; ++i) {
          const float4 query = *reinterpret_cast<const float4*>(query_tile + (part * kEach + i) * padded + d);
          logit[i] += key.x * query.x + key.y * query.y + key.z * query.z + key.w * query.w;
        }
      }
#pragma unroll
      for (int i = 0; i < kEach; ++i) best[i] = fmaxf(best[i], logit[i]);
    }
    for (int i = 0; i < kEach; ++i) {
      const int w = w0 + part * kEach + i;
      if (w < s.window && start + own < length - s.window) {
        s.logits[(row * s.window + w) * s.n + start + own] = best[i] / s.root;
      }
    }
  }
}

template <class T>
void run(const Scoring& s, cudaStream_t stream) {
  const int64_t padded = ceil_div(s.pages.dim, 4) * 4;
  const int64_t shared = (s.measured * (padded + 4) + kQueries * padded) * static_cast<int64_t>(sizeof(float));
  const int64_t blocks = s.count * s.blocks(s.measured);
  if (s.measured == 64) {
    launch(measure<T, 64>, blocks, kThreads, shared, stream, s);
  } else {
    launch(measure<T, 32>, blocks, kThreads, shared, stream, s);
  }
}

}  // namespace

void measure_keys(const Scoring& s, ScalarType type, cudaStream_t stream) {
  with_type(type, [&](auto element) { run<decltype(element)>(s, stream); });
}

}  // namespace skipkv
