// Searches for each key's last similar key on tensor cores, for caches of 16 and 8 bits.
//
// A pair of keys is compared once. Blocks have consecutive ranks. First, each block compares its ranks with the columns
// from the newest down to its own, until every rank has a similar one: this is the last one of the rank. Each column
// also learns of the last similar rank in the block. Then each block compares the ranks that have no similar column
// from their own block on with the older blocks that have not come to them. The candidates of a rank are kept as one
// integer, column above cosine, so the largest is the last column whatever the order in which blocks run.
#include "launch.cuh"
#include "score.cuh"
#include "tiles.cuh"

namespace skipkv {
namespace {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / kWarp;
constexpr int kColumns = kTile / 8;
constexpr int kNone = -1;

// The ranks of a block: a warp has `kHigh` times 16, a lane 2 of each 16. More features leave registers for fewer.
template <int STEPS>
struct Shape {
  static constexpr int kHigh = STEPS <= 8 ? 2 : 1;
  static constexpr int kEach = 2 * kHigh, kRanks = 16 * kHigh * kWarps, kTiles = kRanks / kTile;
};

// A candidate for a rank's last similar column. Zero is none.
__device__ unsigned long long pack(int column, float cosine) {
  return static_cast<unsigned long long>(column + 1) << 32 | __float_as_uint(cosine);
}
__device__ int column_of(unsigned long long candidate) { return static_cast<int>(candidate >> 32) - 1; }
__device__ float cosine_of(unsigned long long candidate) {
  return __uint_as_float(static_cast<unsigned>(candidate & 0xffffffffu));
}

// What a lane knows of its ranks: 1 / norm, the last similar column, which is INT32_MAX past the length, its cosine.
template <int STEPS>
struct Ranks {
  static constexpr int kEach = Shape<STEPS>::kEach;
  int first;
  float scale[kEach], value[kEach];
  int last[kEach];

  __device__ int rank(int i) const { return first + i / 2 * 16 + i % 2 * 8; }
  // Whether a column before `end` could be the last one of some rank.
  __device__ bool open(int end) const {
    bool any = false;
#pragma unroll
    for (int i = 0; i < kEach; ++i) any = any || last[i] < end;
    return any;
  }
};

// A tile of columns: the first, the end of all columns, and where their 1 / norm is.
struct Columns {
  int first, end;
  const float* inverse;
};

// The products of the ranks of a lane with the columns of a tile, or their cosines.
template <int STEPS>
using Pairs = float[Shape<STEPS>::kHigh][kColumns][4];

template <int STEPS>
__device__ float& pair_of(Pairs<STEPS>& pairs, int i, int c, int e) {
  return pairs[i / 2][c][i % 2 * 2 + e];
}

// Turns products into cosines. A key is not similar to itself: the diagonal counts as zero, also against a negative
// threshold. Columns past the end are similar to none.
template <int STEPS>
__device__ void divide(Pairs<STEPS>& pairs, const Columns& columns, const Ranks<STEPS>& own) {
  const int t = static_cast<int>(threadIdx.x) % 4;
#pragma unroll
  for (int c = 0; c < kColumns; ++c) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int within = c * 8 + 2 * t + e, j = columns.first + within;
      const float inverse = columns.inverse[within];
#pragma unroll
      for (int i = 0; i < Shape<STEPS>::kEach; ++i) {
        float& x = pair_of<STEPS>(pairs, i, c, e);
        const float cosine = x * inverse * own.scale[i];
        x = j >= columns.end ? -INFINITY : j == own.rank(i) ? 0.0f : cosine;
      }
    }
  }
}

// Updates the ranks' last similar columns from a tile.
template <int STEPS>
__device__ void note_columns(Pairs<STEPS>& cosines, int first, float threshold, Ranks<STEPS>& own) {
  const int t = static_cast<int>(threadIdx.x) % 4;
#pragma unroll
  for (int i = 0; i < Shape<STEPS>::kEach; ++i) {
    int found = kNone;
    float cosine = 0.0f;
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const float x = pair_of<STEPS>(cosines, i, c, e);
        if (x > threshold) {
          found = first + c * 8 + 2 * t + e;
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
    if (found > own.last[i]) {
      own.last[i] = found;
      own.value[i] = cosine;
    }
  }
}

// Tells newer columns of the last similar one of the warp's ranks.
template <int STEPS>
__device__ void tell_columns(Pairs<STEPS>& cosines, float threshold, const Ranks<STEPS>& own,
                             unsigned long long* similar) {
  const int g = static_cast<int>(threadIdx.x) % kWarp / 4, t = static_cast<int>(threadIdx.x) % 4;
#pragma unroll
  for (int c = 0; c < kColumns; ++c) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      // The number of the last similar rank, in the order of ranks, from 1 on.
      int found = 0;
      float cosine = 0.0f;
#pragma unroll
      for (int i = 0; i < Shape<STEPS>::kEach; ++i) {
        const float x = pair_of<STEPS>(cosines, i, c, e);
        if (x > threshold) {
          found = i * 8 + g + 1;
          cosine = x;
        }
      }
      if (__ballot_sync(kAllLanes, found != 0) == 0) continue;
      int last = found;
      for (int offset = 4; offset < kWarp; offset *= 2) last = max(last, __shfl_xor_sync(kAllLanes, last, offset));
      if (found == 0 || found != last) continue;
      atomicMax(similar + c * 8 + 2 * t + e, pack(own.rank((found - 1) / 8), cosine));
    }
  }
}

// Returns whether some cosine of a lane may be above the threshold: the scale of a rank is not negative, so the largest
// product decides, rounded as in `divide`. On the diagonal and past the end it may not.
template <int STEPS>
__device__ bool any_similar(Pairs<STEPS>& products, const Columns& columns, float threshold, const Ranks<STEPS>& own) {
  constexpr int kEach = Shape<STEPS>::kEach;
  float most[kEach];
#pragma unroll
  for (int i = 0; i < kEach; ++i) most[i] = -INFINITY;
#pragma unroll
  for (int c = 0; c < kColumns; ++c) {
    const float2 inverse =
        *reinterpret_cast<const float2*>(columns.inverse + c * 8 + static_cast<int>(threadIdx.x) % 4 * 2);
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      most[i] = fmaxf(most[i], pair_of<STEPS>(products, i, c, 0) * inverse.x);
      most[i] = fmaxf(most[i], pair_of<STEPS>(products, i, c, 1) * inverse.y);
    }
  }
  bool any = false;
#pragma unroll
  for (int i = 0; i < kEach; ++i) any = any || most[i] * own.scale[i] > threshold;
  return any;
}

// Returns the newest block up to `block` that has not come to the tile of columns `tile`, or a negative number.
__device__ int next_block(const int* reached, int block, int tile) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  for (; block >= 0; block -= kWarp) {
    const unsigned left = __ballot_sync(kAllLanes, block >= lane && reached[block - lane] > tile);
    if (left != 0) return block - (__ffs(static_cast<int>(left)) - 1);
  }
  return kNone;
}

// The tiles of columns that a block compares, from the newest on; negative after the last.
template <int STEPS, bool OLDER>
struct Path {
  static constexpr int kTiles = Shape<STEPS>::kTiles;
  const int* reached;
  int own;  // the block's first tile

  __device__ int from(int tile) const {
    if (!OLDER) return tile >= own ? tile : kNone;
    // The tiles of a block go together.
    if (tile < 0 || tile % kTiles != kTiles - 1) return tile;
    const int block = next_block(reached, tile / kTiles, own);
    return block < 0 ? kNone : block * kTiles + kTiles - 1;
  }
};

// Notes the last similar column of every rank of a block. Without OLDER it is searched from the newest tile down to the
// block's own ones, and newer ranks are told of the block's; with OLDER among the older blocks that have told nothing.
// D is at most 16 * STEPS.
template <class T, int STEPS, bool OLDER>
__global__ void __launch_bounds__(kThreads, STEPS <= 8 ? 3 : 2) find_similar(Scoring s) {
  constexpr int kHigh = Shape<STEPS>::kHigh, kRanks = Shape<STEPS>::kRanks, kTiles = Shape<STEPS>::kTiles;
  constexpr int kEach = Shape<STEPS>::kEach, kSize = Tile<T, STEPS>::kSize;
  static_assert(kTile == Tile<T, STEPS>::kVectors && kTiles <= 2, "the block's ranks fit into both tiles");
  __shared__ __align__(16) float inverse[2][kTile];
  __shared__ int64_t offsets[2][kTile];
  using Factor = typename Types<T>::Factor;
  Factor* tiles = reinterpret_cast<Factor*>(dynamic_shared());

  const int64_t blocks = s.blocks(kRanks);
  const int64_t row = blockIdx.x / blocks, line = row * s.n;
  const int block = static_cast<int>(blockIdx.x % blocks);
  const Row at = row_of(s, row);
  const int length = s.num_resident[at.request];
  if (block * kRanks >= length) return;
  const T* pages = head_pages<T>(s.pages, at);
  const int thread = static_cast<int>(threadIdx.x), lane = thread % kWarp, warp = thread / kWarp;
  const int dim = s.pages.dim;
  int* reached = s.reached + row * blocks;

  const auto place = [&](int turn, int tile) {
    if (thread >= kTile || tile < 0) return;
    // The last key fills the rest of its tile.
    const int rank = min(tile * kTile + thread, length - 1);
    offsets[turn][thread] = cell_offset(s.pages, s.cells[line + rank]);
  };
  const auto fill = [&](int turn, int tile) {
    fill_tile<T, STEPS, kThreads>(pages, offsets[turn], dim, s.vectors, tiles + turn * kSize);
    const int rank = tile * kTile + thread;
    if (thread < kTile) copy_4(inverse[turn] + thread, s.inverse + (rank < length ? line + rank : 0), rank < length);
  };

  Ranks<STEPS> own;
  own.first = block * kRanks + warp * 16 * kHigh + lane / 4;
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    const bool held = own.rank(i) < length;
    own.scale[i] = held ? s.inverse[line + own.rank(i)] : 0.0f;
    const unsigned long long before = OLDER && held ? s.similar[line + own.rank(i)] : 0;
    own.last[i] = held ? column_of(before) : INT32_MAX;
    own.value[i] = cosine_of(before);
  }
  const Path<STEPS, OLDER> path{reached, block * kTiles};
  int tile = path.from(OLDER ? path.own - 1 : (length - 1) / kTile);
  if (!__syncthreads_or(tile >= 0 && own.open((tile + 1) * kTile))) return;

  // The warp's own keys stay in registers.
  uint32_t a[kHigh][STEPS][4];
  for (int i = 0; i < kTiles; ++i) place(i, path.own + i);
  __syncthreads();
  for (int i = 0; i < kTiles; ++i) fill(i, path.own + i);
  wait_for_copies();
  __syncthreads();
#pragma unroll
  for (int h = 0; h < kHigh; ++h) {
#pragma unroll
    for (int k = 0; k < STEPS; ++k) {
      // The two tiles lie behind each other.
      read_rows<T, STEPS>(tiles, (warp * kHigh + h) * 16, k, a[h][k]);
    }
  }
  int next = path.from(tile - 1), done = tile;
  place(0, tile);
  place(1, next);
  __syncthreads();
  fill(0, tile);

  for (int turn = 0; tile >= 0; turn ^= 1) {
    wait_for_copies();
    if (!__syncthreads_or(own.open((tile + 1) * kTile))) break;
    if (next >= 0) fill(turn ^ 1, next);
    const int after = next < 0 ? kNone : path.from(next - 1);
    place(turn, after);
    Pairs<STEPS> pairs = {};
#pragma unroll
    for (int k = 0; k < STEPS; ++k) {
#pragma unroll
      for (int c = 0; c < kColumns; c += 2) {
        uint32_t b[4];
        read_columns<T, STEPS>(tiles + turn * kSize, c * 8, k, b);
#pragma unroll
        for (int h = 0; h < kHigh; ++h) {
          multiply_add(pairs[h][c], a[h][k], b[0], b[1], Factor());
          multiply_add(pairs[h][c + 1], a[h][k], b[2], b[3], Factor());
        }
      }
    }
    const Columns columns{tile * kTile, length, inverse[turn]};
    const bool mine = !OLDER && tile < path.own + kTiles;
    if (__ballot_sync(kAllLanes, mine || any_similar<STEPS>(pairs, columns, s.threshold, own)) != 0) {
      divide<STEPS>(pairs, columns, own);
      note_columns<STEPS>(pairs, columns.first, s.threshold, own);
      if (!OLDER && !mine) tell_columns<STEPS>(pairs, s.threshold, own, s.similar + line + columns.first);
    }
    done = tile;
    tile = next;
    next = after;
  }
  if (!OLDER && thread == 0) reached[block] = done;
  if (lane % 4 != 0) return;
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    if (own.last[i] < 0 || own.last[i] == INT32_MAX) continue;
    atomicMax(s.similar + line + own.rank(i), pack(own.last[i], own.value[i]));
  }
}

// Adds the cosine of each rank with its last similar column, else with column 0, to the column's exempted sum. Four
// threads have a rank.
template <class T>
__global__ void __launch_bounds__(kThreads) exempt(Scoring s) {
  constexpr int kRanks = kThreads / 4;
  const int64_t blocks = s.blocks(kRanks);
  const int64_t row = blockIdx.x / blocks, line = row * s.n;
  const Row at = row_of(s, row);
  const int thread = static_cast<int>(threadIdx.x), part = thread % 4;
  const int rank = static_cast<int>(blockIdx.x % blocks) * kRanks + thread / 4;
  const bool held = rank < s.num_resident[at.request];
  const unsigned long long candidate = held ? s.similar[line + rank] : 0;
  const bool alone = held && candidate == 0 && rank != 0;
  float product = 0.0f;
  if (alone) {
    const T* pages = head_pages<T>(s.pages, at);
    const T* own = pages + cell_offset(s.pages, s.cells[line + rank]);
    const T* first = pages + cell_offset(s.pages, s.cells[line]);
    if (s.vectors) {
      constexpr int kChunk = Chunk<T>::kSize;
      for (int d = part * kChunk; d < s.pages.dim; d += 4 * kChunk) {
        const Chunk<T> x = read_chunk(own + d), y = read_chunk(first + d);
#pragma unroll
        for (int e = 0; e < kChunk; ++e) product += to_float(x.values[e]) * to_float(y.values[e]);
      }
    } else {
      for (int d = part; d < s.pages.dim; d += 4) product += to_float(own[d]) * to_float(first[d]);
    }
  }
  for (int offset = 1; offset < 4; offset *= 2) product += __shfl_xor_sync(kAllLanes, product, offset);
  if (!held || part != 0) return;
  const float cosine = alone ? product * s.inverse[line] * s.inverse[line + rank] : cosine_of(candidate);
  atomicAdd(s.exempted + line + max(column_of(candidate), 0),
            static_cast<unsigned long long>(static_cast<long long>(cosine * kFixed)));
}

template <class T, int STEPS>
void search(const Scoring& s, cudaStream_t stream) {
  const int64_t blocks = s.count * s.blocks(Shape<STEPS>::kRanks), shared = 2 * Tile<T, STEPS>::kBytes;
  launch(find_similar<T, STEPS, false>, blocks, kThreads, shared, stream, s);
  launch(find_similar<T, STEPS, true>, blocks, kThreads, shared, stream, s);
}

template <class T>
void run(const Scoring& s, cudaStream_t stream) {
  const int dim = s.pages.dim;
  clear_async(s.similar, static_cast<size_t>(s.count * s.n) * sizeof(*s.similar), stream);
  if (dim <= 32) {
    search<T, 2>(s, stream);
  } else if (dim <= 64) {
    search<T, 4>(s, stream);
  } else if (dim <= 96) {
    search<T, 6>(s, stream);
  } else if (dim <= 128) {
    search<T, 8>(s, stream);
  } else {
    search<T, 16>(s, stream);
  }
  launch(exempt<T>, s.count * s.blocks(kThreads / 4), kThreads, 0, stream, s);
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
