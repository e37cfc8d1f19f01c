// The first pass over the keys: where they are, 1 / norm, sums of unit keys, logits of the window's queries.
#include "launch.cuh"
#include "score.cuh"

namespace skipkv {
namespace {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / kWarp;
// Queries of one group member that share a pass over the keys in shared memory.
constexpr int kQueries = 8;

// Writes cells, inverse, partial and logits of `TILE` ranks of a row.
template <class T, int TILE>
__global__ void __launch_bounds__(kThreads) measure(Scoring s) {
  // A thread takes one key of the tile and every `kParts`-th query.
  constexpr int kParts = kThreads / TILE;
  constexpr int kEach = kQueries / kParts;
  __shared__ int cells[TILE];
  __shared__ float inverse[TILE];
  const int dim = s.pages.dim;
  const int padded = (dim + 3) / 4 * 4;
  // 16 bytes more a row, so that 16-byte reads of neighbouring rows hit different banks.
  const int stride = padded + 4;
  float* keys = reinterpret_cast<float*>(dynamic_shared());
  float* asked = keys + TILE * stride;

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
      cell = s.table[at.request * s.table_stride + slot / s.pages.size] * s.pages.size + slot % s.pages.size;
      s.cells[line + start + thread] = cell;
    }
    cells[thread] = cell;
  }
  __syncthreads();
  const T* pages = head_pages<T>(s.pages, at);
  if (s.vectors) {
    // D is a multiple of a chunk, so there is no padding.
    constexpr int kChunk = Chunk<T>::kSize;
    const int chunks = dim / kChunk;
#pragma unroll 4
    for (int i = thread; i < TILE * chunks; i += kThreads) {
      const int k = i / chunks, d = i % chunks * kChunk;
      Chunk<T> chunk = {};
      if (cells[k] >= 0) chunk = read_chunk(pages + cell_offset(s.pages, cells[k]) + d);
#pragma unroll
      for (int e = 0; e < kChunk; e += 4) {
        *reinterpret_cast<float4*>(keys + k * stride + d + e) =
            make_float4(to_float(chunk.values[e]), to_float(chunk.values[e + 1]), to_float(chunk.values[e + 2]),
                        to_float(chunk.values[e + 3]));
      }
    }
  } else {
    for (int i = thread; i < TILE * padded; i += kThreads) {
      const int k = i / padded, d = i % padded;
      keys[k * stride + d] =
          cells[k] >= 0 && d < dim ? to_float(pages[cell_offset(s.pages, cells[k]) + d]) : 0.0f;
    }
  }
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
        asked[i] = w < s.window && d < dim ? to_float(queries[head * dim + d]) : 0.0f;
      }
      __syncthreads();
      float logit[kEach] = {};
      for (int d = 0; d < padded; d += 4) {
        const float4 key = *reinterpret_cast<const float4*>(keys + own * stride + d);
#pragma unroll
        for (int i = 0; i < kEach; ++i) {
          const float4 query = *reinterpret_cast<const float4*>(asked + (part * kEach + i) * padded + d);
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
  if (type == ScalarType::Float) {
    run<float>(s, stream);
  } else if (type == ScalarType::Half) {
    run<__half>(s, stream);
  } else if (type == ScalarType::Float8_e4m3fn) {
    run<__nv_fp8_e4m3>(s, stream);
  } else if (type == ScalarType::Float8_e5m2) {
    run<__nv_fp8_e5m2>(s, stream);
  } else {
    run<__nv_bfloat16>(s, stream);
  }
}

}  // namespace skipkv
