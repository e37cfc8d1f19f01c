// `sentence_similarity`: compares the new sentences of all requests with all earlier ones.
#include "arguments.h"
#include "operators.h"
#include "parallel.h"

#include <limits>

namespace skipkv {

void sentence_similarity(const Tensor& embeddings, const Tensor& rows, const Tensor& count, const Tensor& compared,
                         const Tensor& penalties, double threshold, int64_t rule) {
  STD_TORCH_CHECK(embeddings.dim() == 3 && embeddings.is_cpu() && embeddings.is_contiguous(),
                  "skipkv_cpu: embeddings must be contiguous, [rows, S + 1, E] on the CPU");
  const int64_t num_rows = embeddings.size(0), held = embeddings.size(1) - 1, width = embeddings.size(2);
  const Dtype dtype = float_type(embeddings, "embeddings");
  check(rows, "rows", ScalarType::Long, {-1});
  check(count, "count", ScalarType::Long, {num_rows});
  check(compared, "compared", ScalarType::Long, {num_rows});
  check(penalties, "penalties", ScalarType::Float, {num_rows, -1});
  STD_TORCH_CHECK(compared.is_contiguous() && penalties.stride(1) == 1,
                  "skipkv_cpu: compared and penalties must be contiguous");
  const Tensor all_rows = packed(rows), counts = packed(count);
  const int64_t *const row_of = all_rows.const_data_ptr<int64_t>(), *const closed = counts.const_data_ptr<int64_t>();
  int64_t* const seen = compared.mutable_data_ptr<int64_t>();
  float* const penalty = penalties.mutable_data_ptr<float>();
  const int64_t requests = rows.size(0), stride = penalties.stride(0);
  const char* const data = static_cast<const char*>(embeddings.const_data_ptr());
  const int64_t row_bytes = (held + 1) * width * static_cast<int64_t>(embeddings.element_size());
  constexpr float kNothing = -std::numeric_limits<float>::infinity();
  std::vector<float> best(static_cast<size_t>(requests * held), kNothing);
  std::vector<SentenceRange> ranges;
  int64_t products = 0;
  for (int64_t r = 0; r < requests; ++r) {
    const int64_t row = row_of[r];
    STD_TORCH_CHECK(row >= 0 && row < num_rows, "skipkv_cpu: row ", row, " of ", num_rows);
    STD_TORCH_CHECK(closed[row] <= penalties.size(1), "skipkv_cpu: count=", closed[row], " exceeds the ",
                    penalties.size(1), " penalties of a row");
    const int64_t last = closed[row], oldest = std::max<int64_t>(0, last - held);
    ranges.push_back({data + row * row_bytes, dtype, width, held, oldest, seen[row], last,
                      static_cast<float>(threshold), rule == 1, best.data() + r * held});
    products += (last - seen[row]) * (last - oldest) * width;
  }
  // Each thread copies the new sentences, so it should compare them with many earlier ones.
  constexpr int64_t kChunk = 256;
  const int64_t chunks = (held + kChunk - 1) / kChunk;
  const Kernels& kernel = kernels();
  parallel_rows(requests * chunks, [&](const auto& next) {
    std::vector<float> scratch(static_cast<size_t>(kernel.similar_scratch(width)));
    for (int64_t job = next(); job >= 0; job = next()) {
      const SentenceRange& range = ranges[job / chunks];
      const int64_t begin = range.oldest + job % chunks * kChunk, end = std::min(begin + kChunk, range.last);
      if (begin >= end) continue;
      kernel.similar(range, begin, end, scratch.data());
      float* const known = penalty + row_of[job / chunks] * stride;
      for (int64_t n = begin; n < end; ++n) {
        const float cosine = range.best[n - range.oldest];
        if (cosine > kNothing) known[n] = range.only_last ? cosine : std::max(known[n], cosine);
      }
    }
  }, products / 16'000'000 + 1);
  for (int64_t r = 0; r < requests; ++r) seen[row_of[r]] = closed[row_of[r]];
}

}  // namespace skipkv
