// The second pass of `measure_attention` on tensor cores, for caches of 16 and 8 bits: each token's sum over queries.
#include <algorithm>

#include "attention_parts.cuh"
#include "launch.cuh"

namespace skipkv {
namespace {

constexpr int kThreads = 128;

// Query heads of a tile. More features leave shared memory for fewer.
template <int STEPS>
constexpr int kHeads = STEPS <= 8 ? 32 : 16;

// Tokens of a block: a warp has `kHigh` times 16, a lane 2 of each 16. More features leave registers for fewer.
template <int STEPS>
struct Shape {
  static constexpr int kHigh = STEPS <= 8 ? 2 : 1;
  static constexpr int kEach = 2 * kHigh, kTokens = 16 * kHigh * kThreads / kWarp;
};

// What is known of the query heads of a tile.
template <int STEPS>
struct alignas(16) Heads {
  int64_t offsets[kHeads<STEPS>];
  int reach[kHeads<STEPS>];
  float gains[kHeads<STEPS>], top[kHeads<STEPS>], share[kHeads<STEPS>], squares[kHeads<STEPS>];
};

// The tokens of a lane: the first one, their positions, |v|^2, and the sums so far.
template <int STEPS>
struct Tokens {
  static constexpr int kEach = Shape<STEPS>::kEach;
  int first;
  int position[kEach];
  float square[kEach], sum[kEach];

  __device__ int slot(int i) const { return first + i / 2 * 16 + i % 2 * 8; }
};

// The effects with values are `A^2 |x v - y o|^2`, with x and y linear in the logit.
struct Line {
  float x, x_slope, y, y_slope;
};

__device__ Line line_of(Effect effect) {
  switch (effect) {
    case Effect::kValue:
      return {1.0f, 0.0f, 0.0f, 0.0f};
    case Effect::kKey:
      return {0.0f, 1.0f, 0.0f, 1.0f};
    case Effect::kJoint:
      return {1.0f, 1.0f, 0.0f, 1.0f};
    default:
      return {1.0f, 0.0f, 1.0f, 0.0f};
  }
}

template <int STEPS>
using Keys = uint32_t[Shape<STEPS>::kHigh][STEPS][4];

// Products of the lane's tokens with 16 query heads.
template <int STEPS>
using Pairs = float[Shape<STEPS>::kHigh][2][4];

// Adds the products of the warp's tokens with 16 vectors of PARTS tiles, in the order of the first pass.
template <class T, int STEPS, int PARTS>
__device__ void multiply(const Keys<STEPS>& tokens, const typename Types<T>::Factor* heads, int first,
                         Pairs<STEPS>& products) {
  using Factor = typename Types<T>::Factor;
#pragma unroll
  for (int k = 0; k < STEPS; ++k) {
#pragma unroll
    for (int i = 0; i < PARTS; ++i) {
      uint32_t b[4];
      read_columns<T, STEPS>(heads + i * Tile<T, STEPS, kHeads<STEPS>>::kSize, first, k, b);
#pragma unroll
      for (int h = 0; h < Shape<STEPS>::kHigh; ++h) {
        multiply_add(products[h][0], tokens[h][k], b[0], b[1], Factor());
        multiply_add(products[h][1], tokens[h][k], b[2], b[3], Factor());
      }
    }
  }
}

// Two neighbours in shared memory.
template <class T>
struct alignas(8) Two {
  T of[2];
};
template <class T>
__device__ Two<T> read_two(const T* from) {
  return *reinterpret_cast<const Two<T>*>(from);
}

// Effects that differ in more than numbers.
enum class Kind { kWeight, kValue, kNegligible };

__device__ Kind kind_of(const Measuring& s) {
  return s.effect == Effect::kNegligible ? Kind::kNegligible : s.has_value() ? Kind::kValue : Kind::kWeight;
}

// Adds the effects of the lane's tokens on 16 query heads to their sums. `mixed` has the products v o.
template <int STEPS, Kind KIND>
__device__ void add_effects(const Measuring& s, const Heads<STEPS>& heads, int first, const Pairs<STEPS>& products,
                            const Pairs<STEPS>& mixed, const Line& line, Tokens<STEPS>& tokens) {
  const float low = s.log_negligible * kLog2E;
#pragma unroll
  for (int c = 0; c < 2; ++c) {
    const int q = first + c * 8 + static_cast<int>(threadIdx.x) % 4 * 2;
    const Two<int> reach = read_two(heads.reach + q);
    const Two<float> gain = read_two(heads.gains + q), top = read_two(heads.top + q);
    const Two<float> share = read_two(heads.share + q), square = read_two(heads.squares + q);
#pragma unroll
    for (int e = 0; e < 2; ++e) {
#pragma unroll
      for (int i = 0; i < Shape<STEPS>::kEach; ++i) {
        const float product = products[i / 2][c][i % 2 * 2 + e];
        // Rounded as in the first pass, so that no weight is above that of the largest logit.
        const float below = __fmul_rn(product, gain.of[e]) - top.of[e];
        float effect;
        if constexpr (KIND == Kind::kNegligible) {
          effect = below < low ? share.of[e] : 0.0f;
        } else {
          effect = exp2f(below) * share.of[e];
          if constexpr (KIND == Kind::kValue) {
            const float z = product * (gain.of[e] * kLn2);
            const float x = line.x + line.x_slope * z, y = line.y + line.y_slope * z;
            // |x v - y o|^2, multiplied out.
            const float mixture = y * square.of[e] - 2.0f * x * mixed[i / 2][c][i % 2 * 2 + e];
            effect *= effect * fmaxf(0.0f, x * x * tokens.square[i] + y * mixture);
          }
        }
        if (tokens.position[i] <= reach.of[e]) tokens.sum[i] += effect;
      }
    }
  }
}

// Reads the warp's keys or values, `from` on, through shared memory.
template <class T, int STEPS>
__device__ void read_tokens(const Measuring& s, const T* from, const int64_t* offsets,
                            typename Types<T>::Factor* tile, Keys<STEPS>& to) {
  constexpr int kTokens = Shape<STEPS>::kTokens, kHigh = Shape<STEPS>::kHigh;
  __syncthreads();
  fill_tile<T, STEPS, kThreads, kTokens>(from, offsets, s.pages.dim, s.vectors, tile);
  wait_for_copies();
  __syncthreads();
#pragma unroll
  for (int h = 0; h < kHigh; ++h) {
#pragma unroll
    for (int k = 0; k < STEPS; ++k) {
      read_rows<T, STEPS>(tile, (static_cast<int>(threadIdx.x) / kWarp * kHigh + h) * 16, k, to[h][k]);
    }
  }
}

// Computes |v|^2 of the lane's tokens.
template <class Factor, int STEPS>
__device__ void square(const Keys<STEPS>& values, Tokens<STEPS>& tokens) {
#pragma unroll
  for (int i = 0; i < Shape<STEPS>::kEach; ++i) {
    float sum = 0.0f;
#pragma unroll
    for (int k = 0; k < STEPS; ++k) {
#pragma unroll
      for (int part = 0; part < 2; ++part) {
        Factor pair[2];
        memcpy(pair, &values[i / 2][k][i % 2 + 2 * part], sizeof(pair));
        sum += to_float(pair[0]) * to_float(pair[0]) + to_float(pair[1]) * to_float(pair[1]);
      }
    }
    for (int offset = 1; offset < 4; offset *= 2) sum += __shfl_xor_sync(kAllLanes, sum, offset);
    tokens.square[i] = sum;
  }
}

// Notes what is known of the query heads of a tile from number `first` on. Those past the last see nothing.
template <int STEPS>
__device__ void place_heads(const Measuring& s, const Place& p, int64_t row, int first, Heads<STEPS>& heads) {
  const int thread = static_cast<int>(threadIdx.x), q = first + thread;
  if (thread >= kHeads<STEPS> || first >= p.heads) return;
  const bool held = q < p.heads;
  const int64_t head = row * s.heads() + q;
  heads.offsets[thread] = query_offset(s, p, min(q, p.heads - 1));
  heads.reach[thread] = held ? reach(s, p, q) : INT32_MIN;
  heads.top[thread] = held ? s.top[head] : 0.0f;
  heads.share[thread] = held ? s.share[head] : 0.0f;
  heads.squares[thread] = held && s.outputs != nullptr ? s.squares[head] : 0.0f;
}

// The tiles of a turn: the parts of the queries, then those of the outputs.
template <class T, int STEPS>
struct Stage {
  using Shape = Tile<T, STEPS, kHeads<STEPS>>;
  static constexpr int kOutputs = kQueryParts<T> * Shape::kSize, kSize = kOutputs + 2 * Shape::kSize;
};

// Starts to fill the tiles of a turn.
template <class T, int STEPS>
__device__ void fill_heads(const Measuring& s, const Place& p, int64_t row, int first, Heads<STEPS>& heads,
                           typename Types<T>::Factor* stage) {
  using Factor = typename Types<T>::Factor;
  constexpr int kTile = kHeads<STEPS>;
  fill_queries<T, STEPS, kThreads, kTile>(s, first_query<typename Types<T>::Query>(s, p), heads.offsets, heads.gains,
                                          stage);
  if (s.outputs == nullptr) return;
  // An output is two vectors, its parts; the last head fills the rest of a tile.
  constexpr int kChunks = Tile<T, STEPS>::kWidth / 8;
  const int dim = s.pages.dim, last = p.heads - 1;
  const Factor* outputs = reinterpret_cast<const Factor*>(s.outputs) + row * s.heads() * 2 * dim;
  for (int i = static_cast<int>(threadIdx.x); i < 2 * kTile * kChunks; i += kThreads) {
    const int vector = i / kChunks, part = vector / kTile, q = vector % kTile, d = i % kChunks * 8;
    const Factor* from = outputs + (min(first + q, last) * 2 + part) * static_cast<int64_t>(dim) + d;
    Factor* to = stage + Stage<T, STEPS>::kOutputs + vector * Tile<T, STEPS>::kStride + d;
    if (dim % 8 == 0) {
      copy_16(to, d < dim ? from : outputs, d < dim);
    } else {
      for (int e = 0; e < 8; ++e) to[e] = d + e < dim ? from[e] : from_float<Factor>(0.0f);
    }
  }
}

// Computes the results of a block of tokens: sums over all query heads of the row. A tile of query heads arrives while
// the one before is used.
template <class T, int STEPS>
__global__ void __launch_bounds__(kThreads, 2) sum_heads(Measuring s) {
  constexpr int kTokens = Shape<STEPS>::kTokens, kHigh = Shape<STEPS>::kHigh, kEach = Shape<STEPS>::kEach;
  constexpr int kTile = kHeads<STEPS>;
  using Factor = typename Types<T>::Factor;
  __shared__ int64_t offsets[kTokens];
  __shared__ Heads<STEPS> heads[3];
  Factor* stages = reinterpret_cast<Factor*>(dynamic_shared());

  const int64_t blocks = ceil_div(s.n, kTokens);
  const int64_t row = blockIdx.x / blocks;
  const int start = static_cast<int>(blockIdx.x % blocks) * kTokens;
  const Place p(s, row);
  const int thread = static_cast<int>(threadIdx.x), lane = thread % kWarp;
  if (start >= p.length || p.heads == 0) {
    if (thread < kTokens && start + thread < s.n) s.out[p.line + start + thread] = 0.0f;
    return;
  }
  const T* pages = head_pages<T>(s.pages, p.at);
  if (thread < kTokens) {
    // The last token fills the rest of the block.
    const int slot = min(start + thread, p.length - 1);
    offsets[thread] = cell_offset(s.pages, cell_of(s.pages, s.table + p.at.request * s.table_stride, slot));
  }
  place_heads(s, p, row, 0, heads[0]);
  place_heads(s, p, row, kTile, heads[1]);
  Tokens<STEPS> tokens;
  tokens.first = start + thread / kWarp * 16 * kHigh + lane / 4;
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    tokens.position[i] = tokens.slot(i) < p.length ? s.positions[p.line + tokens.slot(i)] : INT32_MAX;
    tokens.square[i] = tokens.sum[i] = 0.0f;
  }
  Keys<STEPS> keys, values = {};
  read_tokens<T, STEPS>(s, pages, offsets, stages, keys);
  if (s.has_value()) {
    read_tokens<T, STEPS>(s, pages + s.pages.dim, offsets, stages, values);
    square<Factor, STEPS>(values, tokens);
  }
  __syncthreads();
  fill_heads<T, STEPS>(s, p, row, 0, heads[0], stages);

  const Line line = line_of(s.effect);
  const Kind kind = kind_of(s);
  int turn = 0, own = 0;
  for (int first = 0; first < p.heads; first += kTile, turn ^= 1) {
    const int next = own == 2 ? 0 : own + 1;
    wait_for_copies();
    __syncthreads();
    if (first + kTile < p.heads) {
      fill_heads<T, STEPS>(s, p, row, first + kTile, heads[next], stages + (turn ^ 1) * Stage<T, STEPS>::kSize);
    }
    place_heads(s, p, row, first + 2 * kTile, heads[next == 2 ? 0 : next + 1]);
    const Factor* queries = stages + turn * Stage<T, STEPS>::kSize;
    const Factor* outputs = queries + Stage<T, STEPS>::kOutputs;
#pragma unroll 1
    for (int q = 0; q < kTile; q += 16) {
      Pairs<STEPS> products = {}, mixed = {};
      multiply<T, STEPS, kQueryParts<T>>(keys, queries, q, products);
      if (s.outputs != nullptr) multiply<T, STEPS, 2>(values, outputs, q, mixed);
      if (kind == Kind::kValue) {
        add_effects<STEPS, Kind::kValue>(s, heads[own], q, products, mixed, line, tokens);
      } else if (kind == Kind::kWeight) {
        add_effects<STEPS, Kind::kWeight>(s, heads[own], q, products, mixed, line, tokens);
      } else {
        add_effects<STEPS, Kind::kNegligible>(s, heads[own], q, products, mixed, line, tokens);
      }
    }
    own = next;
  }
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    float sum = tokens.sum[i];
    for (int offset = 1; offset < 4; offset *= 2) sum += __shfl_xor_sync(kAllLanes, sum, offset);
    const int slot = tokens.slot(i);
    if (lane % 4 == 0 && slot < s.n) s.out[p.line + slot] = slot < p.length ? sum / static_cast<float>(s.group) : 0.0f;
  }
}

template <class T, int STEPS>
void start(const Measuring& s, cudaStream_t stream) {
  constexpr int kTokens = Shape<STEPS>::kTokens;
  const int64_t stages = 2 * Stage<T, STEPS>::kSize * static_cast<int64_t>(sizeof(typename Types<T>::Factor));
  const int64_t shared = std::max(stages, Tile<T, STEPS, kTokens>::kBytes);
  launch(sum_heads<T, STEPS>, s.count * ceil_div(s.n, kTokens), kThreads, shared, stream, s);
}

}  // namespace

void sum_queries(const Measuring& s, ScalarType type, cudaStream_t stream) {
  with_type(type, [&](auto element) {
    using T = decltype(element);
    if constexpr (sizeof(T) <= 2) {
      const int dim = s.pages.dim;
      dim <= 64 ? start<T, 4>(s, stream) : dim <= 128 ? start<T, 8>(s, stream) : start<T, 16>(s, stream);
    }
  });
}

}  // namespace skipkv
