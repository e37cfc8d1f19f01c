// `pool_neighbours`: a thread a token, by rank.
#include <algorithm>
#include <cmath>

#include "launch.cuh"
#include "operators.h"
#include "order_rows.cuh"
#include "rows.cuh"

namespace skipkv {
namespace {

constexpr int kThreads = 256;

struct Pooling {
  Ordering rows;
  const float* scores;  // [rows, n] by slot, as is `out`
  float* out;
  int window, pool;
};

__global__ void __launch_bounds__(kThreads) pool_ranks(Pooling s) {
  const int64_t blocks = ceil_div(s.rows.n, kThreads);
  const int64_t row = blockIdx.x / blocks;
  const int rank = static_cast<int>(blockIdx.x % blocks) * kThreads + static_cast<int>(threadIdx.x);
  if (rank >= s.rows.n) return;
  const int length = s.rows.num_resident[(s.rows.first + row) / s.rows.rows_per_request], old = length - s.window;
  const int* order = s.rows.order + row * s.rows.n;
  const float* scores = s.scores + (s.rows.first + row) * s.rows.n;
  float pooled = rank < length ? 0.0f : -INFINITY;
  if (rank < old) {
    const int end = min(rank + s.pool / 2, old - 1);
    pooled = -INFINITY;
    for (int i = max(rank - s.pool / 2, 0); i <= end; ++i) pooled = fmaxf(pooled, scores[order[i]]);
  }
  s.out[(s.rows.first + row) * s.rows.n + order[rank]] = pooled;
}

}  // namespace

Tensor pool_neighbours(const Tensor& scores, const Tensor& positions, const Tensor& num_resident, int64_t window,
                       int64_t pool) {
  check(positions, "positions", ScalarType::Int, {-1, -1, -1, -1});
  const int64_t requests = positions.size(0), layers = positions.size(1), heads = positions.size(2);
  const int64_t n = positions.size(3), rows = requests * layers * heads;
  check(scores, "scores", ScalarType::Float, {requests, layers, heads, n});
  check_vector(num_resident, "num_resident", ScalarType::Int, requests);
  STD_TORCH_CHECK(pool % 2 == 1 && pool > 0, "skipkv_cuda: pool must be odd, not ", pool);
  STD_TORCH_CHECK(window >= 0, "skipkv_cuda: window=", window, " must not be negative");

  const Guard guard(positions.get_device_index());
  const cudaStream_t stream = current_stream(positions);
  const Tensor places = packed(positions), all_scores = packed(scores);
  const Tensor out = scratch(places, {requests, layers, heads, n}, ScalarType::Float);
  if (rows * n == 0) return out;
  const int64_t at_once = std::min(rows, std::max<int64_t>(1, kScratchBytes / (4 * n)));
  const Tensor order = scratch(out, {at_once, n}, ScalarType::Int);
  Pooling s{{data<const int>(places), data<const int>(num_resident), 0, 0, static_cast<int>(n),
             static_cast<int>(layers * heads), data<int>(order)},
            data<const float>(all_scores), data<float>(out), static_cast<int>(window), static_cast<int>(pool)};
  for (; s.rows.first < rows; s.rows.first += at_once) {
    s.rows.count = std::min(at_once, rows - s.rows.first);
    order_by_position(s.rows, stream);
    launch(pool_ranks, s.rows.count * ceil_div(n, kThreads), kThreads, 0, stream, s);
  }
  return out;
}

}  // namespace skipkv
