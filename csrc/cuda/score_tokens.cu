// `score_tokens`: checks the arguments, allocates scratch memory and launches the kernels.
#include <algorithm>
#include <cmath>

#include "operators.h"
#include "order_rows.cuh"
#include "score.cuh"

namespace skipkv {

Tensor score_tokens(const std::vector<Tensor>& caches, const Tensor& pointers, int64_t layout, const Tensor& table,
                    const Tensor& positions, const Tensor& num_resident, const Tensor& queries,
                    const std::optional<Tensor>& penalty, int64_t pool, double mix, double threshold) {
  const Pages pages = pages_of(caches, pointers, layout);
  const ScalarType type = caches[0].scalar_type();
  check_keys(pages, type);
  const int64_t requests = table.size(0), n = positions.size(-1);
  check_table(table, requests);
  check(positions, "positions", ScalarType::Int, {requests, pages.layers, pages.heads, n});
  check_vector(num_resident, "num_resident", ScalarType::Int, requests);
  check_queries(queries, pages, type, requests);
  STD_TORCH_CHECK(pool % 2 == 1 && pool > 0, "skipkv_cuda: pool must be odd, not ", pool);
  if (penalty) check(*penalty, "penalty", ScalarType::Float, {requests, pages.layers, pages.heads, n});

  const Guard guard(positions.get_device_index());
  const cudaStream_t stream = current_stream(positions);
  const Tensor ordered = packed(positions), all_queries = packed(queries);
  const Tensor penalties = penalty ? packed(*penalty) : ordered;
  Tensor out = scratch(ordered, {requests, pages.layers, pages.heads, n}, ScalarType::Float);
  const int64_t rows = requests * pages.layers * pages.heads;
  if (rows * n == 0) return out;

  Scoring s{};
  s.pages = pages;
  s.n = static_cast<int>(n);
  s.window = static_cast<int>(queries.size(2));
  s.group = static_cast<int>(queries.size(3)) / pages.heads;
  s.pool = static_cast<int>(pool);
  s.mix = static_cast<float>(mix);
  s.threshold = static_cast<float>(threshold);
  s.root = static_cast<float>(std::sqrt(static_cast<double>(pages.dim)));
  s.redundancy = mix != 1.0;
  s.vectors = in_chunks(pages, caches);
  s.table = data<const int>(table);
  s.table_stride = table.stride(0);
  s.num_resident = data<const int>(num_resident);
  s.queries = all_queries.const_data_ptr();
  s.positions = data<const int>(ordered);
  s.penalty = penalty ? data<const float>(penalties) : nullptr;
  s.out = data<float>(out);
  s.measured = pages.dim <= 128 ? 64 : 32;

  const int64_t blocks = s.blocks(s.measured);
  const int64_t bytes = n * (28 + 4 * s.window) + 4 * (blocks + 1) * pages.dim + 4 * blocks;
  const int64_t at_once = std::min(rows, std::max<int64_t>(1, kScratchBytes / bytes));
  const Tensor order = scratch(out, {at_once, n}, ScalarType::Int);
  const Tensor cells = scratch(out, {at_once, n}, ScalarType::Int);
  const Tensor inverse = scratch(out, {at_once, n}, ScalarType::Float);
  const Tensor similar = scratch(out, {at_once, n}, ScalarType::Long);
  const Tensor reached = scratch(out, {at_once, blocks}, ScalarType::Int);
  const Tensor exempted = scratch(out, {at_once, n}, ScalarType::Long);
  const Tensor logits = scratch(out, {at_once, s.window, n}, ScalarType::Float);
  const Tensor partial = scratch(out, {at_once, blocks, pages.dim}, ScalarType::Float);
  const Tensor total = scratch(out, {at_once, pages.dim}, ScalarType::Float);
  const Tensor normaliser = scratch(out, {at_once}, ScalarType::Float);
  s.order = data<int>(order);
  s.cells = data<int>(cells);
  s.inverse = data<float>(inverse);
  s.similar = data<unsigned long long>(similar);
  s.mean = data<float>(similar);
  s.attention = s.mean + at_once * n;
  s.reached = data<int>(reached);
  s.exempted = data<unsigned long long>(exempted);
  s.logits = data<float>(logits);
  s.partial = data<float>(partial);
  s.total = data<float>(total);
  s.normaliser = data<float>(normaliser);

  for (s.first = 0; s.first < rows; s.first += at_once) {
    s.count = std::min(at_once, rows - s.first);
    order_by_position({s.positions, s.num_resident, s.first, s.count, s.n, pages.layers * pages.heads, s.order}, stream);
    measure_keys(s, type, stream);
    if (s.redundancy) {
      clear_async(s.exempted, static_cast<size_t>(s.count * n) * sizeof(*s.exempted), stream);
      exempt_last_similar(s, type, stream);
      mean_cosine(s, type, stream);
    }
    attend(s, stream);
    combine(s, stream);
  }
  return out;
}

}  // namespace skipkv
