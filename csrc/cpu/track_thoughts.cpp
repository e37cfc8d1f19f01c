// `track_thoughts`: runs before every step that schedules a steered request.
#include "arguments.h"
#include "operators.h"

#include "common/thoughts.h"

#include <algorithm>

namespace skipkv {

void track_thoughts(const Tensor& token_ids, const Tensor& spans, const Tensor& vocabulary, const Tensor& keywords,
                    bool merge, int64_t interval, const Tensor& strengths, const Tensor& state, int64_t written,
                    const Tensor& choice, const Tensor& coefficient) {
  const TokenIds ids(token_ids);
  check(spans, "spans", ScalarType::Long, {4, -1});
  check(vocabulary, "vocabulary", ScalarType::Int, {-1});
  check(keywords, "keywords", ScalarType::Int, {-1, -1});
  check(state, "state", ScalarType::Int, {-1, kThoughtStateSize});
  const int64_t num_rows = state.size(0), most = choice.size(0);
  check(strengths, "strengths", ScalarType::Float, {num_rows, 3});
  check(choice, "choice", ScalarType::Int, {-1});
  check(coefficient, "coefficient", ScalarType::Float, {most});
  STD_TORCH_CHECK(vocabulary.is_contiguous() && keywords.is_contiguous() && state.is_contiguous() &&
                      strengths.is_contiguous() && choice.is_contiguous() && coefficient.is_contiguous(),
                  "skipkv_cpu: the arguments of track_thoughts must be contiguous");
  STD_TORCH_CHECK(interval > 0 && written >= 0 && written <= most, "skipkv_cpu: interval=", interval,
                  " must be positive and written=", written, " at most ", most);
  const Tensor table = packed(spans);
  const int64_t requests = spans.size(1), tokens = ids.size();
  const int64_t* const span = table.const_data_ptr<int64_t>();
  const int32_t* const flags_of = vocabulary.const_data_ptr<int32_t>();
  const int32_t* const machine = keywords.const_data_ptr<int32_t>();
  const int64_t states = keywords.size(0), classes = keywords.size(1);
  int32_t* const choices = choice.mutable_data_ptr<int32_t>();
  float* const coefficients = coefficient.mutable_data_ptr<float>();
  std::fill(choices, choices + written, 0);
  for (int64_t r = 0; r < requests; ++r) {
    const int64_t row = span[r], begin = span[requests + r], number = span[2 * requests + r];
    const int64_t position = span[3 * requests + r];
    STD_TORCH_CHECK(row >= 0 && row < num_rows, "skipkv_cpu: row ", row, " of ", num_rows);
    STD_TORCH_CHECK(begin >= 0 && number >= 0 && begin + number <= std::min(tokens, most), "skipkv_cpu: a span of ",
                    number, " tokens from ", begin, " exceeds the step");
    ThoughtState& now = reinterpret_cast<ThoughtState*>(state.mutable_data_ptr<int32_t>())[row];
    const float* const strength = strengths.const_data_ptr<float>() + row * 3;
    for (int64_t t = begin; t < begin + number; ++t) {
      const int32_t flags = flags_of[ids.at(t, vocabulary.size(0))], column = flags >> kKeywordShift;
      STD_TORCH_CHECK(column >= 0 && column < classes && now.machine >= 0 && now.machine < states,
                      "skipkv_cpu: keywords has no entry for state ", now.machine, " and class ", column);
      const int32_t step = machine[now.machine * classes + column];
      const bool latches = (position + t - begin + 1) % interval == 0;
      float alpha;
      if (advance(now, flags, step, strength, merge, latches, &alpha)) {
        coefficients[t] = alpha;
        choices[t] = alpha == 0 ? 0 : now.vector;
      }
    }
  }
}

}  // namespace skipkv
