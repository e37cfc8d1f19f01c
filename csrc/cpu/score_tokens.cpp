// `score_tokens`: checks the arguments and distributes the rows over the threads.
#include "arguments.h"
#include "operators.h"
#include "parallel.h"
#include "rows.h"
#include "scratch.h"

#include <limits>

namespace skipkv {

Tensor score_tokens(const std::vector<Tensor>& caches, const Tensor&, int64_t layout, const Tensor& table,
                    const Tensor& positions, const Tensor& num_resident, const Tensor& queries,
                    const std::optional<Tensor>& penalty, int64_t pool, double mix, double threshold) {
  check(positions, "positions", ScalarType::Int, {-1, -1, -1, -1});
  STD_TORCH_CHECK(queries.dim() == 5, "skipkv_cpu: queries must have 5 dimensions, not ", queries.dim());
  const int64_t slots = positions.size(3);
  const Held held(caches, layout, table, num_resident, queries.size(2), slots);
  const Queries all_queries(queries, caches[0], held);
  check(positions, "positions", ScalarType::Int, {held.requests(), held.layers(), held.heads(), slots});
  STD_TORCH_CHECK(pool >= 1 && pool % 2 == 1, "skipkv_cpu: pool=", pool, " must be odd and positive");
  std::optional<Tensor> penalties;
  if (penalty) {
    check(*penalty, "penalty", ScalarType::Float, {held.requests(), held.layers(), held.heads(), slots});
    penalties = packed(*penalty);
  }
  const Tensor all_positions = packed(positions);
  Tensor scores = torch::stable::new_empty(positions, positions.sizes(), ScalarType::Float);
  float* const to = scores.mutable_data_ptr<float>();
  const int32_t* const from_positions = all_positions.const_data_ptr<int32_t>();
  const float* const from_penalty = penalties ? penalties->const_data_ptr<float>() : nullptr;
  const Kernels& kernel = kernels();
  const size_t bytes = held.longest() == 0 ? 0
                                           : kernel.score_scratch(held.longest(), held.dim(), all_queries.number(),
                                                                  all_queries.group());

  parallel_rows(held.rows(), [&](const auto& next) {
    const RowScratch scratch(bytes);
    for (int64_t row = next(); row >= 0; row = next()) {
      const ScoreRow job{held.row(row),
                         all_queries.last(row, all_queries.number()),
                         from_positions + row * slots,
                         from_penalty == nullptr ? nullptr : from_penalty + row * slots,
                         pool,
                         static_cast<float>(mix),
                         static_cast<float>(threshold),
                         to + row * slots};
      kernel.score(job, scratch.get());
      std::fill(job.scores + job.length, job.scores + slots, -std::numeric_limits<float>::infinity());
    }
  });
  return scores;
}

}  // namespace skipkv
