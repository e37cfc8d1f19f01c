// `measure_attention`: checks the arguments, allocates scratch memory and launches the kernels.
#include <algorithm>
#include <cmath>

#include "attention.cuh"
#include "operators.h"

namespace skipkv {

Tensor measure_attention(const std::vector<Tensor>& caches, const Tensor& pointers, int64_t layout, const Tensor& table,
                         const Tensor& positions, const Tensor& num_resident, const Tensor& queries,
                         const Tensor& num_queries, const Tensor& newest, const std::optional<Tensor>& sinks,
                         int64_t effect, double negligible) {
  const Pages pages = pages_of(caches, pointers, layout);
  const ScalarType type = caches[0].scalar_type();
  const int64_t requests = table.size(0), n = positions.size(-1);
  check_keys(pages, type);
  check_table(table, requests);
  check(positions, "positions", ScalarType::Int, {requests, pages.layers, pages.heads, n});
  check_queries(queries, pages, type, requests);
  check_vector(num_resident, "num_resident", ScalarType::Int, requests);
  check_vector(num_queries, "num_queries", ScalarType::Int, requests);
  check_vector(newest, "newest", ScalarType::Int, requests);
  STD_TORCH_CHECK(0 <= effect && effect <= static_cast<int64_t>(Effect::kNegligible), "skipkv_cuda: effect=", effect,
                  " is unknown");

  const Guard guard(positions.get_device_index());
  const cudaStream_t stream = current_stream(positions);
  const Tensor places = packed(positions), all_queries = packed(queries);
  std::optional<Tensor> all_sinks;
  if (sinks) {
    check(*sinks, "sinks", ScalarType::Float, {pages.layers, queries.size(3)});
    all_sinks = packed(*sinks);
  }
  const Tensor out = scratch(places, {requests, pages.layers, pages.heads, n}, ScalarType::Float);
  const int64_t rows = requests * pages.layers * pages.heads;
  if (rows * n == 0) return out;

  Measuring s{};
  s.pages = pages;
  s.n = static_cast<int>(n);
  s.window = static_cast<int>(queries.size(2));
  s.group = static_cast<int>(queries.size(3)) / pages.heads;
  s.effect = static_cast<Effect>(effect);
  s.log_negligible = static_cast<float>(std::log(negligible));
  s.root = static_cast<float>(std::sqrt(static_cast<double>(pages.dim)));
  s.vectors = in_chunks(pages, caches);
  s.wide_queries = copy_unit({pages.dim * static_cast<int64_t>(all_queries.element_size())}, {all_queries}) == 16;
  s.table = data<const int>(table);
  s.table_stride = table.stride(0);
  s.num_resident = data<const int>(num_resident);
  s.num_queries = data<const int>(num_queries);
  s.newest = data<const int>(newest);
  s.queries = all_queries.const_data_ptr();
  s.sinks = all_sinks ? data<const float>(*all_sinks) : nullptr;
  s.positions = data<const int>(places);
  s.out = data<float>(out);

  const int64_t width = s.has_output() ? pages.dim : 0;
  const int64_t bytes = std::max<int64_t>(1, s.heads() * (width + 3) * static_cast<int64_t>(sizeof(float)));
  const int64_t at_once = std::min(rows, std::max<int64_t>(1, kScratchBytes / bytes));
  const Tensor softmax = scratch(out, {3, at_once, s.heads()}, ScalarType::Float);
  const Tensor outputs = scratch(out, {at_once, s.heads(), width}, ScalarType::Float);
  s.top = data<float>(softmax);
  s.share = s.top + at_once * s.heads();
  s.squares = s.share + at_once * s.heads();
  s.outputs = s.has_output() ? data<float>(outputs) : nullptr;
  for (s.first = 0; s.first < rows; s.first += at_once) {
    s.count = std::min(at_once, rows - s.first);
    if (type == ScalarType::Float) {
      measure_float(s, stream);
    } else {
      attend_queries(s, type, stream);
      sum_queries(s, type, stream);
    }
  }
  return out;
}

}  // namespace skipkv
