// `track_sentences`: runs at every step, over the request's few tokens of the step.
#include "arguments.h"
#include "operators.h"

namespace skipkv {

void track_sentences(const Tensor& token_ids, const std::optional<Tensor>& hidden, const Tensor& spans,
                     int64_t, const Tensor& delimiters, bool merge, const Tensor& ends, const Tensor& count,
                     const Tensor& after_delimiter, const Tensor& open_length, const Tensor& open_sum,
                     const Tensor& embeddings, const Tensor& text) {
  const TokenIds ids(token_ids);
  check(spans, "spans", ScalarType::Long, {4, -1});
  check(delimiters, "delimiters", ScalarType::Bool, {-1});
  check(ends, "ends", ScalarType::Int, {-1, -1});
  const int64_t num_rows = ends.size(0);
  check(count, "count", ScalarType::Long, {num_rows});
  check(after_delimiter, "after_delimiter", ScalarType::Bool, {num_rows});
  check(open_length, "open_length", ScalarType::Float, {num_rows});
  check(text, "text", ScalarType::Int, {num_rows, -1});
  STD_TORCH_CHECK(text.is_contiguous(), "skipkv_cpu: text must be contiguous");
  const int64_t longest = text.size(1);
  const bool embeds = hidden.has_value();
  const int64_t width = embeds ? hidden->size(1) : 0, held = embeds ? embeddings.size(1) - 1 : 0;
  Dtype from = Dtype::kFloat32, to = Dtype::kFloat32;
  int64_t hidden_row = 0;
  const char* states = nullptr;
  float* sums = nullptr;
  char* units = nullptr;
  if (embeds) {
    STD_TORCH_CHECK(hidden->is_cpu() && hidden->dim() == 2 && hidden->stride(1) == 1,
                    "skipkv_cpu: hidden must be [tokens, E] on the CPU, with contiguous rows");
    check(open_sum, "open_sum", ScalarType::Float, {num_rows, width});
    check(embeddings, "embeddings", embeddings.scalar_type(), {num_rows, -1, width});
    STD_TORCH_CHECK(held > 0 && embeddings.is_contiguous() && open_sum.is_contiguous(),
                    "skipkv_cpu: embeddings [rows, S + 1, E] and open_sum must be contiguous, with S > 0");
    from = float_type(*hidden, "hidden");
    to = float_type(embeddings, "embeddings");
    hidden_row = hidden->stride(0) * static_cast<int64_t>(hidden->element_size());
    states = static_cast<const char*>(hidden->const_data_ptr());
    sums = open_sum.mutable_data_ptr<float>();
    units = static_cast<char*>(embeddings.mutable_data_ptr());
  }
  STD_TORCH_CHECK(ends.stride(1) == 1 && count.is_contiguous() && after_delimiter.is_contiguous() &&
                      open_length.is_contiguous() && delimiters.is_contiguous(),
                  "skipkv_cpu: the state of the tracker must be contiguous");
  const Tensor table = packed(spans);
  const int64_t requests = spans.size(1), vocabulary = delimiters.size(0), most = ends.size(1) - 1;
  const int64_t* const span = table.const_data_ptr<int64_t>();
  const bool* const is_delimiter = delimiters.const_data_ptr<bool>();
  const int64_t unit_row = embeds ? width * static_cast<int64_t>(embeddings.element_size()) : 0;
  const Kernels& kernel = kernels();
  for (int64_t r = 0; r < requests; ++r) {
    const int64_t row = span[r], begin = span[requests + r], tokens = span[2 * requests + r];
    const int64_t position = span[3 * requests + r];
    STD_TORCH_CHECK(row >= 0 && row < num_rows, "skipkv_cpu: row ", row, " of ", num_rows);
    STD_TORCH_CHECK(begin >= 0 && tokens >= 0 && begin + tokens <= ids.size() &&
                        (!embeds || begin + tokens <= hidden->size(0)),
                    "skipkv_cpu: a span of ", tokens, " tokens from ", begin, " exceeds the step");
    int32_t* const end = ends.mutable_data_ptr<int32_t>() + row * ends.stride(0);
    int64_t closed = count.const_data_ptr<int64_t>()[row];
    bool after = after_delimiter.const_data_ptr<bool>()[row];
    float length = open_length.const_data_ptr<float>()[row];
    float* const sum = embeds ? sums + row * width : nullptr;
    if (longest > 0) {
      STD_TORCH_CHECK(position >= 0 && position + tokens <= longest,
                      "skipkv_cpu: a request has more than ", longest, " tokens");
      int32_t* const to_text = text.mutable_data_ptr<int32_t>() + row * longest + position;
      for (int64_t t = 0; t < tokens; ++t) to_text[t] = static_cast<int32_t>(ids.at(begin + t, vocabulary));
    }
    for (int64_t t = 0; t < tokens; ++t) {
      const bool delimiter = is_delimiter[ids.at(begin + t, vocabulary)], closes = delimiter && !(merge && after);
      after = delimiter;
      if (embeds && (closes || !delimiter)) {
        kernel.accumulate(states + (begin + t) * hidden_row, from, sum, width);
        length += 1;
      }
      if (closes) {
        STD_TORCH_CHECK(closed < most, "skipkv_cpu: a request has more than ", most, " sentences");
        if (embeds) {
          kernel.normalise(sum, length, units + (row * (held + 1) + closed % held) * unit_row, to, width);
          length = 0;
        }
        ++closed;
      }
      if (delimiter && closed > 0) end[closed - 1] = static_cast<int32_t>(position + t);
    }
    count.mutable_data_ptr<int64_t>()[row] = closed;
    after_delimiter.mutable_data_ptr<bool>()[row] = after;
    if (embeds) open_length.mutable_data_ptr<float>()[row] = length;
  }
}

}  // namespace skipkv
