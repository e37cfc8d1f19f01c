// `track_thoughts`: runs before every step in which a steered request takes part.
#include <algorithm>

#include "ops.h"

namespace skipkv {

namespace {

// Flags of a token, and how its keyword class is packed with them; `THOUGHT` and `KEYWORD_SHIFT` of ops/batched.py.
constexpr int32_t kSplit = 1, kDelimiter = 2, kBegin = 4, kEnd = 8, kKeywordShift = 4;

// A row of `state`; the columns are `STATE` of ops/batched.py.
struct State {
  int32_t vector, thinking, kinds, machine, after_delimiter, latched, execution, reflection, transition, steered;
};
constexpr int64_t kStateSize = sizeof(State) / sizeof(int32_t);

}  // namespace

void track_thoughts(const Tensor& token_ids, const Tensor& spans, const Tensor& vocabulary, const Tensor& keywords,
                    bool merge, int64_t interval, const Tensor& strengths, const Tensor& state, int64_t written,
                    const Tensor& row, const Tensor& coefficient) {
  const TokenIds ids(token_ids);
  check(spans, "spans", ScalarType::Long, {4, -1});
  check(vocabulary, "vocabulary", ScalarType::Int, {-1});
  check(keywords, "keywords", ScalarType::Int, {-1, -1});
  check(state, "state", ScalarType::Int, {-1, kStateSize});
  const int64_t num_slots = state.size(0), most = row.size(0);
  check(strengths, "strengths", ScalarType::Float, {num_slots, 3});
  check(row, "row", ScalarType::Int, {-1});
  check(coefficient, "coefficient", ScalarType::Float, {most});
  STD_TORCH_CHECK(vocabulary.is_contiguous() && keywords.is_contiguous() && state.is_contiguous() &&
                      strengths.is_contiguous() && row.is_contiguous() && coefficient.is_contiguous(),
                  "skipkv_cpu: the arguments of track_thoughts must be contiguous");
  STD_TORCH_CHECK(interval > 0 && written >= 0 && written <= most, "skipkv_cpu: interval=", interval,
                  " must be positive and written=", written, " at most ", most);
  const Tensor table = packed(spans);
  const int64_t requests = spans.size(1), tokens = ids.size();
  const int64_t* const span = table.const_data_ptr<int64_t>();
  const int32_t* const flags_of = vocabulary.const_data_ptr<int32_t>();
  const int32_t* const machine = keywords.const_data_ptr<int32_t>();
  const int64_t states = keywords.size(0), classes = keywords.size(1);
  int32_t* const rows = row.mutable_data_ptr<int32_t>();
  float* const coefficients = coefficient.mutable_data_ptr<float>();
  std::fill(rows, rows + written, 0);
  for (int64_t r = 0; r < requests; ++r) {
    const int64_t slot = span[r], begin = span[requests + r], number = span[2 * requests + r];
    const int64_t position = span[3 * requests + r];
    STD_TORCH_CHECK(slot >= 0 && slot < num_slots, "skipkv_cpu: slot ", slot, " of ", num_slots);
    STD_TORCH_CHECK(begin >= 0 && number >= 0 && begin + number <= std::min(tokens, most), "skipkv_cpu: a span of ",
                    number, " tokens from ", begin, " exceeds the step");
    State& now = reinterpret_cast<State*>(state.mutable_data_ptr<int32_t>())[slot];
    const float* const strength = strengths.const_data_ptr<float>() + slot * 3;
    for (int64_t t = begin; t < begin + number; ++t) {
      const int32_t flags = flags_of[ids.at(t, vocabulary.size(0))], column = flags >> kKeywordShift;
      STD_TORCH_CHECK(column >= 0 && column < classes && now.machine >= 0 && now.machine < states,
                      "skipkv_cpu: keywords has no entry for state ", now.machine, " and class ", column);
      const int32_t step = machine[now.machine * classes + column];
      now.machine = step >> 2;
      now.kinds |= step & 3;
      if (flags & (kBegin | kEnd)) now.thinking = !(flags & kEnd);
      if (now.thinking && (flags & kSplit)) {
        // In double precision the product is exact, so that a fused multiply-add changes nothing.
        const double alpha = strength[0] + static_cast<double>(strength[1]) * now.latched;
        coefficients[t] = static_cast<float>(std::min(alpha, static_cast<double>(strength[2])));
        rows[t] = coefficients[t] == 0 ? 0 : now.vector;
        now.steered += coefficients[t] != 0;
      }
      if (flags & kDelimiter) {
        if (!(merge && now.after_delimiter)) {
          ++(now.kinds & 1 ? now.reflection : now.kinds & 2 ? now.transition : now.execution);
        }
        now.machine = now.kinds = 0;
      }
      now.after_delimiter = (flags & kDelimiter) != 0;
      if ((position + t - begin + 1) % interval == 0) now.latched = now.reflection + now.transition;
    }
  }
}

}  // namespace skipkv
