// Searches for each key's last similar key in float32 caches, without tensor cores, which would round.
#include "launch.cuh"
#include "score.cuh"

namespace skipkv {
namespace {

constexpr int kThreads = 256;
// Features of a key that are in shared memory at a time.
constexpr int kDepth = 32;

struct Tile {
  float keys[kTile][kDepth + 1];
  float inverse[kTile];
  int64_t offsets[kTile];
};

// Sets the offsets and 1 / norm of the keys of `kTile` ranks from `start` on.
__device__ void place(const Scoring& s, int64_t line, int start, int length, Tile& tile) {
  const int thread = static_cast<int>(threadIdx.x);
  if (thread < kTile) {
    const int rank = start + thread;
    tile.offsets[thread] = rank < length ? cell_offset(s.pages, s.cells[line + rank]) : -1;
    tile.inverse[thread] = rank < length ? s.inverse[line + rank] : 0.0f;
  }
}

__device__ void load(const Scoring& s, const float* pages, int depth, Tile& tile) {
  for (int i = static_cast<int>(threadIdx.x); i < kTile * kDepth; i += kThreads) {
    const int k = i / kDepth, d = i % kDepth;
    const bool inside = tile.offsets[k] >= 0 && depth + d < s.pages.dim;
    tile.keys[k][d] = inside ? pages[tile.offsets[k] + depth + d] : 0.0f;
  }
}

// Like `find_similar` in score_similar.cu, with 16 x 16 threads; thread (x, y) has ranks 4 * y + i and columns x + 16 * j.
__global__ void __launch_bounds__(kThreads) find_similar_float(Scoring s) {
  __shared__ Tile own, other;
  const int64_t blocks = s.blocks(kTile);
  const int64_t row = blockIdx.x / blocks;
  const int start = static_cast<int>(blockIdx.x % blocks) * kTile;
  const Row at = row_of(s, row);
  const int length = s.num_resident[at.request];
  if (start >= length) return;
  const float* pages = head_pages<float>(s.pages, at);
  const int64_t line = row * s.n;
  const int x = static_cast<int>(threadIdx.x) % 16, y = static_cast<int>(threadIdx.x) / 16;

  place(s, line, start, length, own);
  int last[4];
  float value[4] = {}, to_first[4] = {};
  for (int i = 0; i < 4; ++i) last[i] = start + 4 * y + i < length ? -1 : 0;

  for (int column = (length - 1) / kTile * kTile; column >= 0; column -= kTile) {
    place(s, line, column, length, other);
    __syncthreads();
    float product[4][4] = {};
    for (int depth = 0; depth < s.pages.dim; depth += kDepth) {
      load(s, pages, depth, own);
      load(s, pages, depth, other);
      __syncthreads();
      for (int d = 0; d < kDepth; ++d) {
        float a[4], b[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          a[i] = own.keys[4 * y + i][d];
          b[i] = other.keys[x + 16 * i][d];
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) {
#pragma unroll
          for (int j = 0; j < 4; ++j) product[i][j] += a[i] * b[j];
        }
      }
      __syncthreads();
    }
    bool open = false;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      int found = -1;
      float cosine = 0.0f;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int at_column = column + x + 16 * j;
        const float scale = own.inverse[4 * y + i] * other.inverse[x + 16 * j];
        const float cos = at_column == start + 4 * y + i ? 0.0f : product[i][j] * scale;
        if (j == 0) to_first[i] = cos;
        if (at_column < length && cos > s.threshold) {
          found = at_column;
          cosine = cos;
        }
      }
      // The 16 threads of a rank are neighbours in a warp.
      for (int offset = 1; offset < 16; offset *= 2) {
        const int found_there = __shfl_xor_sync(kAllLanes, found, offset);
        const float cosine_there = __shfl_xor_sync(kAllLanes, cosine, offset);
        if (found_there > found) {
          found = found_there;
          cosine = cosine_there;
        }
      }
      if (last[i] < 0 && found >= 0) {
        last[i] = found;
        value[i] = cosine;
      }
      open = open || last[i] < 0;
    }
    if (!__syncthreads_or(open)) break;
  }
  if (x != 0) return;
  for (int i = 0; i < 4; ++i) {
    if (start + 4 * y + i >= length) continue;
    const float exempt = last[i] < 0 ? to_first[i] : value[i];
    atomicAdd(s.exempted + line + max(last[i], 0),
              static_cast<unsigned long long>(static_cast<long long>(exempt * kFixed)));
  }
}

}  // namespace

void exempt_last_similar_float(const Scoring& s, cudaStream_t stream) {
  launch(find_similar_float, s.count * s.blocks(kTile), kThreads, 0, stream, s);
}

}  // namespace skipkv
