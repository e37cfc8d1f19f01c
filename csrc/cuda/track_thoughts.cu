// `track_thoughts`: one block a request. All threads fetch the flags of the tokens; thread 0 processes them in order.
// In a decoding step that is one token.
#include "arguments.h"
#include "device.cuh"
#include "launch.cuh"
#include "operators.h"

#include "common/thoughts.h"

namespace skipkv {
namespace {

constexpr int kThreads = 128;

struct Thoughts {
  TokenIds ids;
  const int64_t* spans;
  int64_t requests;
  const int* vocabulary;
  const int* keywords;
  int classes;
  bool merge;
  int64_t interval;
  const float* strengths;
  ThoughtState* state;
  int* choice;
  float* coefficient;
};

__global__ void __launch_bounds__(kThreads) track(Thoughts s) {
  __shared__ int fetched[kThreads];
  const int64_t request = blockIdx.x;
  const int64_t row = s.spans[request], begin = s.spans[s.requests + request];
  const int64_t number = s.spans[2 * s.requests + request], position = s.spans[3 * s.requests + request];
  const float* strength = s.strengths + row * 3;
  const int thread = static_cast<int>(threadIdx.x);
  ThoughtState now = s.state[row];
  for (int64_t first = 0; first < number; first += kThreads) {
    const int64_t own = begin + first + thread;
    if (first + thread < number) {
      fetched[thread] = s.vocabulary[s.ids[own]];
    }
    __syncthreads();
    const int count = static_cast<int>(number - first < kThreads ? number - first : kThreads);
    for (int i = 0; thread == 0 && i < count; ++i) {
      const int flags = fetched[i];
      const int step = s.keywords[now.machine * s.classes + (flags >> kKeywordShift)];
      const bool latches = (position + first + i + 1) % s.interval == 0;
      float alpha;
      if (advance(now, flags, step, strength, s.merge, latches, &alpha)) {
        s.coefficient[begin + first + i] = alpha;
        s.choice[begin + first + i] = alpha == 0 ? 0 : now.vector;
      }
    }
    __syncthreads();
  }
  if (thread == 0) s.state[row] = now;
}

}  // namespace

void track_thoughts(const Tensor& token_ids, const Tensor& spans, const Tensor& vocabulary, const Tensor& keywords,
                    bool merge, int64_t interval, const Tensor& strengths, const Tensor& state, int64_t written,
                    const Tensor& choice, const Tensor& coefficient) {
  const int64_t requests = spans.size(1), num_rows = state.size(0), most = choice.numel();
  const bool wide = token_ids.scalar_type() == ScalarType::Long;
  check_vector(token_ids, "token_ids", wide ? ScalarType::Long : ScalarType::Int, token_ids.numel());
  check(spans, "spans", ScalarType::Long, {4, requests});
  check_vector(vocabulary, "vocabulary", ScalarType::Int, vocabulary.numel());
  check(keywords, "keywords", ScalarType::Int, {-1, -1});
  check(state, "state", ScalarType::Int, {num_rows, kThoughtStateSize});
  check(strengths, "strengths", ScalarType::Float, {num_rows, 3});
  check_vector(choice, "choice", ScalarType::Int, most);
  check_vector(coefficient, "coefficient", ScalarType::Float, most);
  STD_TORCH_CHECK(keywords.is_contiguous() && state.is_contiguous() && strengths.is_contiguous(),
                  "skipkv_cuda: keywords, state and strengths must be contiguous");
  STD_TORCH_CHECK(interval > 0 && written >= 0 && written <= most, "skipkv_cuda: interval=", interval,
                  " must be positive and written=", written, " at most ", most);
  const Tensor table = packed(spans);
  const Guard guard(state.get_device_index());
  const cudaStream_t stream = current_stream(state);
  if (written > 0) clear_async(choice.mutable_data_ptr(), static_cast<size_t>(written) * sizeof(int), stream);
  launch(track, requests, kThreads, 0, stream,
         Thoughts{{token_ids.const_data_ptr(), wide}, data<const int64_t>(table), requests,
                  data<const int>(vocabulary), data<const int>(keywords), static_cast<int>(keywords.size(1)), merge,
                  interval, data<const float>(strengths), static_cast<ThoughtState*>(state.mutable_data_ptr()),
                  data<int>(choice), data<float>(coefficient)});
}

}  // namespace skipkv
