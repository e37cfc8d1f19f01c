// The small operators that run at every step: `observe_queries`, `steer_add` and `sentence_similarity`.
#include "ops.h"
#include "parallel.h"

#include <cstring>
#include <limits>

namespace skipkv {

void observe_queries(const Tensor& query, const Tensor& index, const Tensor& rows) {
  STD_TORCH_CHECK(query.dim() == 3 && query.is_cpu(), "skipkv_cpu: query must be [tokens, heads, D] on the CPU");
  const int64_t tokens = query.size(0), heads = query.size(1), dim = query.size(2);
  check(rows, "rows", query.scalar_type(), {-1, heads, dim});
  check(index, "index", ScalarType::Long, {-1});
  STD_TORCH_CHECK(index.size(0) >= tokens, "skipkv_cpu: index has ", index.size(0), " rows; ", tokens, " are needed");
  STD_TORCH_CHECK(rows.stride(2) == 1 && index.stride(0) == 1, "skipkv_cpu: rows and index must be contiguous");
  const Tensor from = query.stride(2) == 1 ? query : torch::stable::contiguous(query);
  const int64_t size = static_cast<int64_t>(query.element_size()), num_rows = rows.size(0);
  const char* const source = static_cast<const char*>(from.const_data_ptr());
  char* const target = static_cast<char*>(rows.mutable_data_ptr());
  const int64_t* const to_row = index.const_data_ptr<int64_t>();
  const bool whole = from.stride(1) == dim && rows.stride(1) == dim;
  const int64_t pieces = whole ? 1 : heads, bytes = (whole ? heads : 1) * dim * size;
  for (int64_t t = 0; t < tokens; ++t) {
    STD_TORCH_CHECK(to_row[t] >= 0 && to_row[t] < num_rows, "skipkv_cpu: index names row ", to_row[t], " of ", num_rows);
    for (int64_t h = 0; h < pieces; ++h) {
      std::memcpy(target + (to_row[t] * rows.stride(0) + h * rows.stride(1)) * size,
                  source + (t * from.stride(0) + h * from.stride(1)) * size, bytes);
    }
  }
}

Tensor steer_add(const Tensor& hidden, const Tensor& coefficient, const Tensor& row, const Tensor& vectors) {
  STD_TORCH_CHECK(hidden.dim() == 2 && hidden.is_cpu(), "skipkv_cpu: hidden must be [tokens, E] on the CPU");
  const int64_t tokens = hidden.size(0), width = hidden.size(1);
  const Dtype dtype = float_type(hidden, "hidden");
  check(coefficient, "coefficient", ScalarType::Float, {-1});
  check(row, "row", ScalarType::Int, {-1});
  check(vectors, "vectors", ScalarType::Float, {-1, width});
  STD_TORCH_CHECK(coefficient.size(0) >= tokens && row.size(0) >= tokens,
                  "skipkv_cpu: coefficient and row must have an entry for each token");
  const Tensor from = hidden.stride(1) == 1 ? hidden : torch::stable::contiguous(hidden);
  const Tensor directions = packed(vectors), strengths = packed(coefficient), choices = packed(row);
  Tensor out = torch::stable::new_empty(hidden, {tokens, width});
  const int64_t size = static_cast<int64_t>(hidden.element_size()), stride = from.stride(0);
  const char* const source = static_cast<const char*>(from.const_data_ptr());
  char* const target = static_cast<char*>(out.mutable_data_ptr());
  const float *const strength = strengths.const_data_ptr<float>(), *const vector = directions.const_data_ptr<float>();
  const int32_t* const choice = choices.const_data_ptr<int32_t>();
  for (int64_t t = 0; t < tokens; ++t) {
    STD_TORCH_CHECK(choice[t] >= 0 && choice[t] < vectors.size(0), "skipkv_cpu: row names vector ", choice[t], " of ",
                    vectors.size(0));
  }
  const Kernels& kernel = kernels();
  torch::stable::parallel_for(0, tokens, std::max<int64_t>(1, 32768 / std::max<int64_t>(1, width)),
                              [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const char* const x = source + t * stride * size;
      char* const y = target + t * width * size;
      if (choice[t] == 0) {
        std::memcpy(y, x, width * size);
      } else {
        kernel.steer(x, strength[t], vector + choice[t] * width, y, dtype, width);
      }
    }
  });
  return out;
}

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
  // A thread makes its own copy of the new sentences, so it gets many earlier ones to compare them with.
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
