// `measure_attention` and `key_similarity`: check the arguments and distribute the rows over the threads.
#include "arguments.h"
#include "operators.h"
#include "parallel.h"
#include "rows.h"
#include "scratch.h"

#include <cmath>

namespace skipkv {

Tensor measure_attention(const std::vector<Tensor>& caches, const Tensor&, int64_t layout, const Tensor& table,
                         const Tensor& positions, const Tensor& num_resident, const Tensor& queries,
                         const Tensor& num_queries, const Tensor& newest, const std::optional<Tensor>& sinks,
                         int64_t effect, double negligible) {
  check(positions, "positions", ScalarType::Int, {-1, -1, -1, -1});
  const int64_t slots = positions.size(3);
  const Held held(caches, layout, table, num_resident, 0, slots);
  const Queries all_queries(queries, caches[0], held);
  check(positions, "positions", ScalarType::Int, {held.requests(), held.layers(), held.heads(), slots});
  check(num_queries, "num_queries", ScalarType::Int, {held.requests()});
  check(newest, "newest", ScalarType::Int, {held.requests()});
  STD_TORCH_CHECK(0 <= effect && effect <= static_cast<int64_t>(Effect::kNegligible), "skipkv_cpu: effect=", effect,
                  " is unknown");
  const Effect wanted = static_cast<Effect>(effect);
  const float log_negligible = static_cast<float>(std::log(negligible));
  std::optional<Tensor> all_sinks;
  if (sinks) {
    check(*sinks, "sinks", ScalarType::Float, {held.layers(), held.heads() * all_queries.group()});
    all_sinks = packed(*sinks);
  }
  const float* const from_sinks = all_sinks ? all_sinks->const_data_ptr<float>() : nullptr;
  const Tensor all_positions = packed(positions), numbers = packed(num_queries), all_newest = packed(newest);
  const int32_t *const number = numbers.const_data_ptr<int32_t>(), *const last = all_newest.const_data_ptr<int32_t>();
  for (int64_t r = 0; r < held.requests(); ++r) {
    STD_TORCH_CHECK(0 <= number[r] && number[r] <= all_queries.number(), "skipkv_cpu: num_queries=", number[r],
                    " must be from 0 to ", all_queries.number());
  }
  Tensor sums = torch::stable::new_empty(positions, positions.sizes(), ScalarType::Float);
  float* const to = sums.mutable_data_ptr<float>();
  const int32_t* const from_positions = all_positions.const_data_ptr<int32_t>();
  const Kernels& kernel = kernels();
  const size_t bytes = kernel.attention_scratch(held.longest(), held.dim());
  parallel_rows(held.rows(), [&](const auto& next) {
    const RowScratch scratch(bytes);
    for (int64_t row = next(); row >= 0; row = next()) {
      const int64_t r = held.request(row), of_layers = row % (held.layers() * held.heads());
      const AttentionRow job{held.row(row),
                             all_queries.last(row, number[r]),
                             from_positions + row * slots,
                             last[r],
                             from_sinks == nullptr ? nullptr : from_sinks + of_layers * all_queries.group(),
                             wanted,
                             log_negligible,
                             to + row * slots};
      if (number[r] > 0) kernel.attention(job, scratch.get());
      std::fill(job.sums + (number[r] > 0 ? job.length : 0), job.sums + slots, 0.0f);
    }
  });
  return sums;
}

Tensor key_similarity(const std::vector<Tensor>& caches, const Tensor&, int64_t layout, const Tensor& table,
                      const Tensor& num_resident, int64_t length) {
  const Held held(caches, layout, table, num_resident, 0, length);
  Tensor cosines = torch::stable::new_empty(table, {held.requests(), held.layers(), held.heads(), length},
                                            ScalarType::Float);
  float* const to = cosines.mutable_data_ptr<float>();
  const Kernels& kernel = kernels();
  const size_t bytes = kernel.cosines_scratch(held.longest(), held.dim());
  parallel_rows(held.rows(), [&](const auto& next) {
    const RowScratch scratch(bytes);
    for (int64_t row = next(); row >= 0; row = next()) {
      const HeldRow job = held.row(row);
      kernel.cosines(job, to + row * length, scratch.get());
      std::fill(to + row * length + job.length, to + (row + 1) * length, 0.0f);
    }
  });
  return cosines;
}

}  // namespace skipkv
