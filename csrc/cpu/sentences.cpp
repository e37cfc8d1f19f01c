// `sentence_similarity`: compares the new sentences of all requests with all earlier ones.
#include "arguments.h"
#include "operators.h"
#include "parallel.h"

#include <limits>

namespace skipkv {

void sentence_similarity(const Tensor& embeddings, const Tensor& slots, const Tensor& count, const Tensor& compared,
                         const Tensor& penalties, double threshold, int64_t rule) {
  STD_TORCH_CHECK(embeddings.dim() == 3 && embeddings.is_cpu() && embeddings.is_contiguous(),
                  "skipkv_cpu: embeddings must be contiguous, [slots, S + 1, E] on the CPU");
  const int64_t num_slots = embeddings.size(0), held = embeddings.size(1) - 1, width = embeddings.size(2);
  const Dtype dtype = float_type(embeddings, "embeddings");
  check(slots, "slots", ScalarType::Long, {-1});
  check(count, "count", ScalarType::Long, {num_slots});
  check(compared, "compared", ScalarType::Long, {num_slots});
  check(penalties, "penalties", ScalarType::Float, {num_slots, -1});
  STD_TORCH_CHECK(compared.is_contiguous() && penalties.stride(1) == 1,
                  "skipkv_cpu: compared and penalties must be contiguous");
  const Tensor all_slots = packed(slots), counts = packed(count);
  const int64_t *const slot_of = all_slots.const_data_ptr<int64_t>(), *const closed = counts.const_data_ptr<int64_t>();
  int64_t* const seen = compared.mutable_data_ptr<int64_t>();
  float* const penalty = penalties.mutable_data_ptr<float>();
  const int64_t requests = slots.size(0), stride = penalties.stride(0);
  const char* const data = static_cast<const char*>(embeddings.const_data_ptr());
  const int64_t slot_bytes = (held + 1) * width * static_cast<int64_t>(embeddings.element_size());
  constexpr float kNothing = -std::numeric_limits<float>::infinity();
  std::vector<float> best(static_cast<size_t>(requests * held), kNothing);
  std::vector<SentenceRange> ranges;
  int64_t products = 0;
  for (int64_t r = 0; r < requests; ++r) {
    const int64_t slot = slot_of[r];
    STD_TORCH_CHECK(slot >= 0 && slot < num_slots, "skipkv_cpu: slot ", slot, " of ", num_slots);
    STD_TORCH_CHECK(closed[slot] <= penalties.size(1), "skipkv_cpu: count=", closed[slot], " exceeds the ",
                    penalties.size(1), " penalties of a slot");
    const int64_t last = closed[slot], oldest = std::max<int64_t>(0, last - held);
    ranges.push_back({data + slot * slot_bytes, dtype, width, held, oldest, seen[slot], last,
                      static_cast<float>(threshold), rule == 1, best.data() + r * held});
    products += (last - seen[slot]) * (last - oldest) * width;
  }
  // Each thread copies the new sentences, so it should compare them with many earlier ones.
  constexpr int64_t kChunk = 256;
  const int64_t chunks = (held + kChunk - 1) / kChunk;
  const Kernels& kernel = kernels();
  parallel_rows(requests * chunks, [&](const auto& next) {
    std::vector<float> scratch(static_cast<size_t>(kernel.similar_scratch(width)));
    for (int64_t row = next(); row >= 0; row = next()) {
      const SentenceRange& range = ranges[row / chunks];
      const int64_t begin = range.oldest + row % chunks * kChunk, end = std::min(begin + kChunk, range.last);
      if (begin >= end) continue;
      kernel.similar(range, begin, end, scratch.data());
      float* const known = penalty + slot_of[row / chunks] * stride;
      for (int64_t n = begin; n < end; ++n) {
        const float cosine = range.best[n - range.oldest];
        if (cosine > kNothing) known[n] = range.only_last ? cosine : std::max(known[n], cosine);
      }
    }
  }, products / 16'000'000 + 1);
  for (int64_t r = 0; r < requests; ++r) seen[slot_of[r]] = closed[slot_of[r]];
}

}  // namespace skipkv
