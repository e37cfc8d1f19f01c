// `track_sentences`: one launch a step, one block a request.
#include "arguments.h"
#include "device.cuh"
#include "launch.cuh"
#include "operators.h"

#include "common/epsilon.h"

namespace skipkv {
namespace {

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / kWarp;
constexpr int kNone = INT32_MAX;

struct Tracking {
  TokenIds ids;
  const void* hidden;
  int64_t hidden_stride;
  const int64_t* spans;
  int64_t requests;
  const bool* delimiters;
  bool merge;
  int* ends;
  int64_t ends_stride;
  int64_t* count;
  bool* after_delimiter;
  float* open_length;
  float* open_sum;
  void* embeddings;
  // 0 float32, 1 float16, 2 bfloat16.
  int stored;
  int64_t held;
  int width;
  // [rows, longest], or null.
  int* text;
  int64_t longest;
};

__device__ bool is_delimiter(const Tracking& s, int64_t token) { return s.delimiters[s.ids[token]]; }

// Returns the first delimiter of the tokens from `from` to `end`, or kNone; called by all threads of the block.
__device__ int next_delimiter(const Tracking& s, int64_t begin, int from, int end, int* found) {
  for (int start = from; start < end; start += kThreads) {
    const int own = start + static_cast<int>(threadIdx.x);
    const bool hit = own < end && is_delimiter(s, begin + own);
    // All threads have read the previous result.
    __syncthreads();
    if (threadIdx.x == 0) *found = kNone;
    __syncthreads();
    if (hit) atomicMin(found, own);
    __syncthreads();
    if (*found != kNone) return *found;
  }
  return kNone;
}

__device__ float block_sum(float x, float* sums) {
  x = warp_sum(x);
  __syncthreads();
  if (threadIdx.x % kWarp == 0) sums[threadIdx.x / kWarp] = x;
  __syncthreads();
  float all = 0.0f;
  for (int i = 0; i < kWarps; ++i) all += sums[i];
  return all;
}

__device__ void store(const Tracking& s, int64_t at, float x) {
  if (s.stored == 0) {
    static_cast<float*>(s.embeddings)[at] = x;
  } else if (s.stored == 1) {
    static_cast<__half*>(s.embeddings)[at] = from_float<__half>(x);
  } else {
    static_cast<__nv_bfloat16*>(s.embeddings)[at] = from_float<__nv_bfloat16>(x);
  }
}

// Closes the sentences of a request; one block a request. A thread sums its own features only, so the sums need no
// barrier. All threads of the block take the same branches.
template <class T>
__global__ void __launch_bounds__(kThreads) track(Tracking s) {
  __shared__ int found;
  __shared__ float sums[kWarps];
  const int64_t request = blockIdx.x;
  const int64_t row = s.spans[request], begin = s.spans[s.requests + request];
  const int tokens = static_cast<int>(s.spans[2 * s.requests + request]);
  const int position = static_cast<int>(s.spans[3 * s.requests + request]);
  const int thread = static_cast<int>(threadIdx.x);
  if (s.text != nullptr) {
    int* line = s.text + row * s.longest + position;
    for (int t = thread; t < tokens; t += kThreads) line[t] = static_cast<int>(s.ids[begin + t]);
  }
  int* ends = s.ends + row * s.ends_stride;
  const T* hidden = static_cast<const T*>(s.hidden);
  float* open = s.open_sum + row * s.width;
  int64_t closed = s.count[row];
  bool after = s.after_delimiter[row];
  float length = hidden == nullptr ? 0.0f : s.open_length[row];

  int i = 0;
  while (i < tokens) {
    const int at = next_delimiter(s, begin, i, tokens, &found);
    if (s.merge && after && at == i) {
      if (thread == 0 && closed > 0) ends[closed - 1] = position + i;
      ++i;
      continue;
    }
    const bool closes = at != kNone;
    const int stop = closes ? at + 1 : tokens;
    if (hidden != nullptr) {
      length += static_cast<float>(stop - i);
      float squares = 0.0f;
      for (int e = thread; e < s.width; e += kThreads) {
        float sum = open[e];
#pragma unroll 8
        for (int t = i; t < stop; ++t) sum += to_float(hidden[(begin + t) * s.hidden_stride + e]);
        open[e] = sum;
        squares += sum / length * (sum / length);
      }
      if (closes) {
        const float norm = sqrtf(block_sum(squares, sums)) + kEpsilon;
        const int64_t line = (row * (s.held + 1) + closed % s.held) * s.width;
        for (int e = thread; e < s.width; e += kThreads) {
          store(s, line + e, open[e] / length / norm);
          open[e] = 0.0f;
        }
        length = 0.0f;
      }
    }
    if (closes) {
      if (thread == 0) ends[closed] = position + at;
      ++closed;
    }
    after = closes;
    i = stop;
  }
  // All threads have read the old state.
  __syncthreads();
  if (thread == 0) {
    s.count[row] = closed;
    s.after_delimiter[row] = after;
    if (hidden != nullptr) s.open_length[row] = length;
  }
}

int stored_as(ScalarType type) { return type == ScalarType::Float ? 0 : type == ScalarType::Half ? 1 : 2; }

void check_float(const Tensor& tensor, const char* name) {
  const ScalarType type = tensor.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::Half || type == ScalarType::BFloat16,
                  "skipkv_cuda: ", name, " must be float32, float16 or bfloat16, not ",
                  torch::headeronly::toString(type));
}

}  // namespace

void track_sentences(const Tensor& token_ids, const std::optional<Tensor>& hidden, const Tensor& spans, int64_t,
                     const Tensor& delimiters, bool merge, const Tensor& ends, const Tensor& count,
                     const Tensor& after_delimiter, const Tensor& open_length, const Tensor& open_sum,
                     const Tensor& embeddings, const Tensor& text) {
  const int64_t num_rows = ends.size(0), requests = spans.size(1);
  const bool wide = token_ids.scalar_type() == ScalarType::Long;
  check_vector(token_ids, "token_ids", wide ? ScalarType::Long : ScalarType::Int, token_ids.numel());
  check(spans, "spans", ScalarType::Long, {4, requests});
  check_vector(delimiters, "delimiters", ScalarType::Bool, delimiters.numel());
  check(ends, "ends", ScalarType::Int, {num_rows, -1});
  check_vector(count, "count", ScalarType::Long, num_rows);
  check_vector(after_delimiter, "after_delimiter", ScalarType::Bool, num_rows);
  check_vector(open_length, "open_length", ScalarType::Float, num_rows);
  check(text, "text", ScalarType::Int, {num_rows, -1});
  STD_TORCH_CHECK(text.is_contiguous(), "skipkv_cuda: text must be contiguous");
  STD_TORCH_CHECK(ends.stride(1) == 1 || ends.size(1) <= 1, "skipkv_cuda: rows of ends must be contiguous");

  Tracking s{};
  const Tensor table = packed(spans);
  s.ids = {token_ids.const_data_ptr(), wide};
  s.spans = data<const int64_t>(table);
  s.requests = requests;
  s.delimiters = data<const bool>(delimiters);
  s.merge = merge;
  s.ends = data<int>(ends);
  s.ends_stride = ends.stride(0);
  s.count = data<int64_t>(count);
  s.after_delimiter = data<bool>(after_delimiter);
  s.longest = text.size(1);
  s.text = s.longest > 0 ? data<int>(text) : nullptr;
  const Guard guard(ends.get_device_index());
  const cudaStream_t stream = current_stream(ends);
  if (!hidden) return launch(track<float>, requests, kThreads, 0, stream, s);

  const ScalarType type = hidden->scalar_type();
  check(*hidden, "hidden", type, {-1, -1});
  check_float(*hidden, "hidden");
  check_float(embeddings, "embeddings");
  const int64_t width = hidden->size(1);
  check(open_sum, "open_sum", ScalarType::Float, {num_rows, width});
  check(embeddings, "embeddings", embeddings.scalar_type(), {num_rows, -1, width});
  STD_TORCH_CHECK(embeddings.size(1) > 1 && embeddings.is_contiguous() && open_sum.is_contiguous(),
                  "skipkv_cuda: embeddings [rows, S + 1, E] and open_sum must be contiguous, with S > 0");
  const Tensor states = width <= 1 || hidden->stride(1) == 1 ? *hidden : torch::stable::contiguous(*hidden);
  s.hidden = states.const_data_ptr();
  s.hidden_stride = states.stride(0);
  s.open_length = data<float>(open_length);
  s.open_sum = data<float>(open_sum);
  s.embeddings = embeddings.mutable_data_ptr();
  s.stored = stored_as(embeddings.scalar_type());
  s.held = embeddings.size(1) - 1;
  s.width = static_cast<int>(width);
  if (type == ScalarType::Float) {
    launch(track<float>, requests, kThreads, 0, stream, s);
  } else if (type == ScalarType::Half) {
    launch(track<__half>, requests, kThreads, 0, stream, s);
  } else {
    launch(track<__nv_bfloat16>, requests, kThreads, 0, stream, s);
  }
}

}  // namespace skipkv
