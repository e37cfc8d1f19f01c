// `pool_neighbours`: checks the arguments and distributes the rows over the threads.
#include "arguments.h"
#include "operators.h"
#include "parallel.h"
#include "scratch.h"

#include <limits>

namespace skipkv {

Tensor pool_neighbours(const Tensor& scores, const Tensor& positions, const Tensor& num_resident, int64_t window,
                       int64_t pool) {
  check(positions, "positions", ScalarType::Int, {-1, -1, -1, -1});
  const int64_t requests = positions.size(0), layers = positions.size(1), heads = positions.size(2);
  const int64_t slots = positions.size(3);
  check(scores, "scores", ScalarType::Float, {requests, layers, heads, slots});
  check(num_resident, "num_resident", ScalarType::Int, {requests});
  STD_TORCH_CHECK(pool >= 1 && pool % 2 == 1, "skipkv_cpu: pool=", pool, " must be odd and positive");
  const Tensor all_scores = packed(scores), all_positions = packed(positions), lengths = packed(num_resident);
  const int32_t* const length = lengths.const_data_ptr<int32_t>();
  int64_t longest = 0;
  for (int64_t r = 0; r < requests; ++r) {
    STD_TORCH_CHECK(0 <= window && window < length[r] && length[r] <= slots, "skipkv_cpu: num_resident=", length[r],
                    " must be above the window of ", window, " and at most ", slots);
    longest = std::max<int64_t>(longest, length[r]);
  }
  Tensor pooled = torch::stable::new_empty(positions, positions.sizes(), ScalarType::Float);
  float* const to = pooled.mutable_data_ptr<float>();
  const float* const from_scores = all_scores.const_data_ptr<float>();
  const int32_t* const from_positions = all_positions.const_data_ptr<int32_t>();
  const Kernels& kernel = kernels();
  const size_t bytes = kernel.pool_scratch(longest);
  parallel_rows(requests * layers * heads, [&](const auto& next) {
    const RowScratch scratch(bytes);
    for (int64_t row = next(); row >= 0; row = next()) {
      const int64_t first = row * slots;
      const PoolRow job{from_scores + first, from_positions + first, length[row / (layers * heads)], window, pool,
                        to + first};
      kernel.pool(job, scratch.get());
      std::fill(job.pooled + job.length, job.pooled + slots, -std::numeric_limits<float>::infinity());
    }
  });
  return pooled;
}

}  // namespace skipkv
