// `central_tokens`: checks the arguments and distributes the rows over the threads.
#include "arguments.h"
#include "operators.h"
#include "parallel.h"
#include "rows.h"
#include "scratch.h"

namespace skipkv {

Tensor central_tokens(const std::vector<Tensor>& caches, const Tensor&, int64_t layout, const Tensor& table,
                      const Tensor& positions, const Tensor& num_resident, const Tensor& begin, const Tensor& end,
                      const Tensor& quota, int64_t longest) {
  check(positions, "positions", ScalarType::Int, {-1, -1, -1, -1});
  const int64_t slots = positions.size(3);
  const Held held(caches, layout, table, num_resident, 0, slots);
  check(positions, "positions", ScalarType::Int, {held.requests(), held.layers(), held.heads(), slots});
  check(begin, "begin", ScalarType::Int, {held.requests()});
  check(end, "end", ScalarType::Int, {held.requests()});
  check(quota, "quota", ScalarType::Int, {held.requests(), -1});
  STD_TORCH_CHECK(longest > 0, "skipkv_cpu: longest=", longest, " must be positive");
  const Tensor all_positions = packed(positions), begins = packed(begin), ends = packed(end), quotas = packed(quota);
  Tensor chosen = torch::stable::new_empty(positions, positions.sizes(), ScalarType::Bool);
  bool* const to = static_cast<bool*>(chosen.mutable_data_ptr());
  const int32_t* const from_positions = all_positions.const_data_ptr<int32_t>();
  const int64_t segments = quota.size(1);
  const Kernels& kernel = kernels();
  const size_t bytes = kernel.central_scratch(held.longest(), held.dim());
  parallel_rows(held.rows(), [&](const auto& next) {
    const RowScratch scratch(bytes);
    for (int64_t row = next(); row >= 0; row = next()) {
      const int64_t r = held.request(row);
      const CentralRow job{held.row(row),
                           from_positions + row * slots,
                           quotas.const_data_ptr<int32_t>() + r * segments,
                           segments,
                           begins.const_data_ptr<int32_t>()[r],
                           ends.const_data_ptr<int32_t>()[r],
                           longest,
                           to + row * slots};
      kernel.central(job, scratch.get());
      std::fill(job.chosen + job.length, job.chosen + slots, false);
    }
  });
  return chosen;
}

}  // namespace skipkv
