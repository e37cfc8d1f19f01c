// `vector_norms`: checks the arguments and distributes the rows over the threads.
#include "arguments.h"
#include "operators.h"
#include "parallel.h"
#include "rows.h"
#include "scratch.h"

namespace skipkv {

Tensor vector_norms(const std::vector<Tensor>& caches, const Tensor&, int64_t layout, const Tensor& table,
                    const Tensor& positions, const Tensor& num_resident, bool values, int64_t norm, int64_t part,
                    const std::optional<Tensor>& weights) {
  check(positions, "positions", ScalarType::Int, {-1, -1, -1, -1});
  const int64_t slots = positions.size(3);
  const Held held(caches, layout, table, num_resident, 0, slots);
  check(positions, "positions", ScalarType::Int, {held.requests(), held.layers(), held.heads(), slots});
  STD_TORCH_CHECK(norm == 1 || norm == 2, "skipkv_cpu: norm=", norm, " must be 1 or 2");
  STD_TORCH_CHECK(part >= 0, "skipkv_cpu: part=", part, " must not be negative");
  std::optional<Tensor> shares;
  if (weights) {
    check(*weights, "weights", ScalarType::Float, {held.requests(), held.layers(), held.heads(), slots});
    shares = packed(*weights);
  }
  const Tensor all_positions = packed(positions);
  Tensor norms = torch::stable::new_empty(positions, positions.sizes(), ScalarType::Float);
  float* const to = norms.mutable_data_ptr<float>();
  const int32_t* const from_positions = all_positions.const_data_ptr<int32_t>();
  const float* const from_weights = shares ? shares->const_data_ptr<float>() : nullptr;
  const Kernels& kernel = kernels();
  const size_t bytes = kernel.norms_scratch(held.longest(), held.dim());
  parallel_rows(held.rows(), [&](const auto& next) {
    const RowScratch scratch(bytes);
    for (int64_t row = next(); row >= 0; row = next()) {
      const NormsRow job{held.row(row),
                         from_positions + row * slots,
                         values,
                         norm,
                         part,
                         from_weights == nullptr ? nullptr : from_weights + row * slots,
                         to + row * slots};
      kernel.norms(job, scratch.get());
      std::fill(job.norms + job.length, job.norms + slots, 0.0f);
    }
  });
  return norms;
}

}  // namespace skipkv
