// Searches for each key's last similar key on tensor cores, for caches of 16 and 8 bits.
#include "launch.cuh"
#include "mma.cuh"
#include "score.cuh"

namespace skipkv {
namespace {

constexpr int kThreads = 128;
constexpr int kColumns = kTile / 8;

// Reads eight features of a key, from a multiple of eight on, in the type that tensor cores multiply.
template <class T>
__device__ Chunk<T> read_eight(const T* from) {
  return read_chunk(from);
}
template <class T>
__device__ Chunk<__half> read_narrow(const T* from) {
  const uint2 bits = __ldg(reinterpret_cast<const uint2*>(from));
  T narrow[8];
  memcpy(narrow, &bits, sizeof(bits));
  Chunk<__half> chunk;
#pragma unroll
  for (int e = 0; e < 8; ++e) chunk.values[e] = to_half(narrow[e]);
  return chunk;
}
__device__ inline Chunk<__half> read_eight(const __nv_fp8_e4m3* from) { return read_narrow(from); }
__device__ inline Chunk<__half> read_eight(const __nv_fp8_e5m2* from) { return read_narrow(from); }

// Loads the keys of `kTile` ranks from `start` on into shared memory, with zeros outside, and 1 / norm.
template <class T, int STEPS>
__device__ void load_tile(const Scoring& s, const T* pages, int64_t line, int start, int length,
                          typename Types<T>::Factor* tile, float* inverse, int64_t* offsets) {
  using Factor = typename Types<T>::Factor;
  constexpr int kWidth = STEPS * 16, kStride = kWidth + 8;
  const int thread = static_cast<int>(threadIdx.x), dim = s.pages.dim;
  if (thread < kTile) {
    const int rank = start + thread;
    offsets[thread] = rank < length ? cell_offset(s.pages, s.cells[line + rank]) : -1;
    inverse[thread] = rank < length ? s.inverse[line + rank] : 0.0f;
  }
  __syncthreads();
  if (s.vectors) {
    constexpr int kChunks = kWidth / 8;
    static_assert(kTile * kChunks == STEPS * kThreads, "a thread reads a chunk a step");
#pragma unroll
    for (int i = 0; i < STEPS; ++i) {
      const int k = (i * kThreads + thread) / kChunks, d = (i * kThreads + thread) % kChunks * 8;
      Chunk<Factor> chunk = {};
      if (offsets[k] >= 0 && d < dim) chunk = read_eight(pages + offsets[k] + d);
      *reinterpret_cast<Chunk<Factor>*>(tile + k * kStride + d) = chunk;
    }
  } else {
    for (int i = thread; i < kTile * kWidth; i += kThreads) {
      const int k = i / kWidth, d = i % kWidth;
      tile[k * kStride + d] = from_float<Factor>(offsets[k] >= 0 && d < dim ? to_float(pages[offsets[k] + d]) : 0.0f);
    }
  }
  __syncthreads();
}

// Finds, for each of `kTile` ranks of a row, the last column whose cosine is above the threshold, else column 0, and
// adds that cosine to the column's exempted sum. A warp has 16 ranks; D is at most 16 * STEPS.
template <class T, int STEPS>
__global__ void __launch_bounds__(kThreads) find_similar(Scoring s) {
  constexpr int kStride = STEPS * 16 + 8;
  __shared__ float inverse[kTile];
  __shared__ int64_t offsets[kTile];
  using Factor = typename Types<T>::Factor;
  Factor* tile = reinterpret_cast<Factor*>(dynamic_shared());

  const int64_t blocks = s.blocks(kTile);
  const int64_t row = blockIdx.x / blocks;
  const int start = static_cast<int>(blockIdx.x % blocks) * kTile;
  const Row at = row_of(s, row);
  const int length = s.num_resident[at.request];
  if (start >= length) return;
  const T* pages = head_pages<T>(s.pages, at);
  const int64_t line = row * s.n;
  const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
  const int g = lane / 4, t = lane % 4;

  // The warp's own keys stay in registers.
  load_tile<T, STEPS>(s, pages, line, start, length, tile, inverse, offsets);
  uint32_t a[STEPS][4];
  const Factor* own = tile + (warp * 16 + g) * kStride + 2 * t;
#pragma unroll
  for (int k = 0; k < STEPS; ++k) {
    a[k][0] = *reinterpret_cast<const uint32_t*>(own + k * 16);
    a[k][1] = *reinterpret_cast<const uint32_t*>(own + k * 16 + 8 * kStride);
    a[k][2] = *reinterpret_cast<const uint32_t*>(own + k * 16 + 8);
    a[k][3] = *reinterpret_cast<const uint32_t*>(own + k * 16 + 8 + 8 * kStride);
  }
  int rank[2], last[2];
  float scale[2], value[2], to_first[2];
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int within = warp * 16 + g + 8 * h;
    rank[h] = start + within;
    scale[h] = inverse[within];
    last[h] = rank[h] < length ? -1 : 0;
    value[h] = to_first[h] = 0.0f;
  }
  __syncthreads();

  for (int column = (length - 1) / kTile * kTile; column >= 0; column -= kTile) {
    load_tile<T, STEPS>(s, pages, line, column, length, tile, inverse, offsets);
    float d[kColumns][4] = {};
    const Factor* other = tile + g * kStride + 2 * t;
#pragma unroll
    for (int k = 0; k < STEPS; ++k) {
#pragma unroll
      for (int c = 0; c < kColumns; ++c) {
        const uint32_t b0 = *reinterpret_cast<const uint32_t*>(other + c * 8 * kStride + k * 16);
        const uint32_t b1 = *reinterpret_cast<const uint32_t*>(other + c * 8 * kStride + k * 16 + 8);
        multiply_add(d[c], a[k], b0, b1, Factor());
      }
    }
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      int found = -1;
      float cosine = 0.0f;
#pragma unroll
      for (int c = 0; c < kColumns; ++c) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int within = c * 8 + 2 * t + e;
          const int j = column + within;
          // A key is not similar to itself: the diagonal counts as zero, also against a negative threshold.
          const float x = j == rank[h] ? 0.0f : d[c][2 * h + e] * scale[h] * inverse[within];
          if (c == 0 && e == 0) to_first[h] = x;
          if (j < length && x > s.threshold) {
            found = j;
            cosine = x;
          }
        }
      }
      // The four lanes of a rank agree on the last column.
      for (int offset = 1; offset < 4; offset *= 2) {
        const int found_there = __shfl_xor_sync(kAllLanes, found, offset);
        const float cosine_there = __shfl_xor_sync(kAllLanes, cosine, offset);
        if (found_there > found) {
          found = found_there;
          cosine = cosine_there;
        }
      }
      if (last[h] < 0 && found >= 0) {
        last[h] = found;
        value[h] = cosine;
      }
    }
    if (!__syncthreads_or(last[0] < 0 || last[1] < 0)) break;
  }
  if (t != 0) return;
  for (int h = 0; h < 2; ++h) {
    if (rank[h] >= length) continue;
    // A rank without a similar column has scanned all columns, column 0 last, whose cosine lane t = 0 has.
    const float exempt = last[h] < 0 ? to_first[h] : value[h];
    atomicAdd(s.exempted + line + max(last[h], 0),
              static_cast<unsigned long long>(static_cast<long long>(exempt * kFixed)));
  }
}

template <class T, int STEPS>
void start(const Scoring& s, cudaStream_t stream) {
  const int64_t shared = kTile * (STEPS * 16 + 8) * static_cast<int64_t>(sizeof(typename Types<T>::Factor));
  launch(find_similar<T, STEPS>, s.count * s.blocks(kTile), kThreads, shared, stream, s);
}

template <class T>
void run(const Scoring& s, cudaStream_t stream) {
  const int dim = s.pages.dim;
  if (dim <= 32) {
    start<T, 2>(s, stream);
  } else if (dim <= 64) {
    start<T, 4>(s, stream);
  } else if (dim <= 96) {
    start<T, 6>(s, stream);
  } else if (dim <= 128) {
    start<T, 8>(s, stream);
  } else {
    start<T, 16>(s, stream);
  }
}

}  // namespace

void exempt_last_similar(const Scoring& s, ScalarType type, cudaStream_t stream) {
  if (type == ScalarType::Float) {
    exempt_last_similar_float(s, stream);
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
