// `score_tokens`: hands the rows, one for each request, layer and kv head, to the threads.
#include "ops.h"
#include "parallel.h"

#include <cstdlib>
#include <limits>
#include <memory>

namespace skipkv {
namespace {

struct Free {
  void operator()(void* memory) const { std::free(memory); }
};
using Memory = std::unique_ptr<void, Free>;

Memory aligned(size_t bytes) {
  void* const memory = std::aligned_alloc(64, (bytes + 63) / 64 * 64);
  if (memory == nullptr) throw std::bad_alloc();
  return Memory(memory);
}

// This thread's memory for a row. It is kept between calls, up to a size: new memory is paid for page by page, which
// takes as long as scoring a short row.
class RowScratch {
 public:
  explicit RowScratch(size_t bytes) {
    constexpr size_t kMostKept = 4 << 20;
    thread_local Memory kept;
    thread_local size_t size = 0;
    if (bytes > kMostKept) {
      own_ = aligned(bytes);
      return;
    }
    if (bytes > size) {
      kept = aligned(bytes);
      size = bytes;
    }
    memory_ = kept.get();
  }
  void* get() const { return own_ ? own_.get() : memory_; }

 private:
  Memory own_;
  void* memory_ = nullptr;
};

}  // namespace

int64_t score_scratch(int64_t length, int64_t dim, int64_t window, int64_t group) {
  return static_cast<int64_t>(kernels().score_scratch(length, dim, window, group));
}

Tensor score_tokens(const std::vector<Tensor>& caches, const Tensor&, int64_t layout, const Tensor& table,
                    const Tensor& positions, const Tensor& num_resident, const Tensor& queries,
                    const std::optional<Tensor>& penalty, int64_t pool, double mix, double threshold) {
  const Caches all(caches, layout);
  const KeyType type = key_type(caches[0]);
  const int64_t layers = all.num_layers(), heads = all.heads, dim = all.pages.dim;
  check(positions, "positions", ScalarType::Int, {-1, layers, heads, -1});
  const int64_t requests = positions.size(0), slots = positions.size(3);
  check(table, "table", ScalarType::Int, {requests, -1});
  check(num_resident, "num_resident", ScalarType::Int, {requests});
  const bool narrow = all.pages.element_size == 1;
  check(queries, "queries", narrow ? ScalarType::Float : caches[0].scalar_type(), {requests, layers, -1, -1, dim});
  const int64_t window = queries.size(2), query_heads = queries.size(3), group = query_heads / heads;
  STD_TORCH_CHECK(query_heads % heads == 0, "skipkv_cpu: ", query_heads, " query heads do not share ", heads,
                  " kv heads");
  STD_TORCH_CHECK(pool >= 1 && pool % 2 == 1, "skipkv_cpu: pool=", pool, " must be odd and positive");
  if (penalty) check(*penalty, "penalty", ScalarType::Float, {requests, layers, heads, slots});

  const Tensor tables = packed(table), all_positions = packed(positions), lengths = packed(num_resident);
  const Tensor all_queries = packed(queries);
  const std::optional<Tensor> penalties = penalty ? std::optional<Tensor>(packed(*penalty)) : std::nullopt;
  const int32_t *const ids = tables.const_data_ptr<int32_t>(), *const length = lengths.const_data_ptr<int32_t>();
  const int64_t width = table.size(1);
  int64_t longest = 0;
  for (int64_t r = 0; r < requests; ++r) {
    STD_TORCH_CHECK(window < length[r] && length[r] <= slots, "skipkv_cpu: num_resident=", length[r],
                    " must be above the window of ", window, " and at most ", slots);
    check_table(ids + r * width, width, (length[r] + all.pages.size - 1) / all.pages.size, all.num_pages, "table");
    longest = std::max<int64_t>(longest, length[r]);
  }
  Tensor scores = torch::stable::new_empty(positions, {requests, layers, heads, slots}, ScalarType::Float);
  float* const to = scores.mutable_data_ptr<float>();
  const int32_t* const from_positions = all_positions.const_data_ptr<int32_t>();
  const float* const from_penalty = penalties ? penalties->const_data_ptr<float>() : nullptr;
  const char* const from_queries = static_cast<const char*>(all_queries.const_data_ptr());
  const int64_t size = static_cast<int64_t>(queries.element_size());
  const Kernels& kernel = kernels();
  const size_t bytes = longest == 0 ? 0 : kernel.score_scratch(longest, dim, window, group);

  parallel_rows(requests * layers * heads, [&](const auto& next) {
    const RowScratch scratch(bytes);
    for (int64_t row = next(); row >= 0; row = next()) {
      const int64_t r = row / (layers * heads), i = row / heads % layers, head = row % heads;
      ScoreRow job;
      job.pages = &all.pages;
      job.cache = all.layers[i];
      job.type = type;
      job.head = head;
      job.table = ids + r * width;
      job.positions = from_positions + row * slots;
      job.length = length[r];
      job.queries = from_queries + ((r * layers + i) * window * query_heads + head * group) * dim * size;
      job.window = window;
      job.group = group;
      job.query_stride = query_heads * dim;
      job.penalty = from_penalty == nullptr ? nullptr : from_penalty + row * slots;
      job.pool = pool;
      job.mix = static_cast<float>(mix);
      job.threshold = static_cast<float>(threshold);
      job.scores = to + row * slots;
      kernel.score(job, scratch.get());
      std::fill(job.scores + job.length, job.scores + slots, -std::numeric_limits<float>::infinity());
    }
  });
  return scores;
}

}  // namespace skipkv
