// `sentence_similarity`: compares the new sentences of all requests with all earlier ones.
#include "arguments.h"
#include "device.cuh"
#include "launch.cuh"
#include "operators.h"

namespace skipkv {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;

struct Sentences {
  const void* embeddings;
  int64_t row_stride, sentence_stride, penalty_stride;
  const int64_t *rows, *count;
  int64_t* compared;
  float* penalties;
  int64_t requests, held;
  int hidden;
  float threshold;
  bool latest;
};

// Compares earlier sentences with all new ones, oldest first; a warp an earlier sentence.
template <class T>
__global__ void __launch_bounds__(kThreads) compare_sentences(Sentences s) {
  const int64_t blocks = ceil_div(s.held, kWarps);
  const int64_t row = s.rows[blockIdx.x / blocks];
  const int warp = static_cast<int>(threadIdx.x) / kWarp, lane = static_cast<int>(threadIdx.x) % kWarp;
  const int64_t last = s.count[row];
  const int64_t oldest = last > s.held ? last - s.held : 0;
  const int64_t number = oldest + blockIdx.x % blocks * kWarps + warp;
  if (number >= last) return;
  const T* base = static_cast<const T*>(s.embeddings) + row * s.row_stride;
  const T* own = base + number % s.held * s.sentence_stride;
  float* penalty = s.penalties + row * s.penalty_stride + number;
  const float known = *penalty;

  float highest = 0.0f, newest = known;
  const int64_t first = s.compared[row];
  for (int64_t later = first > number ? first : number + 1; later < last; ++later) {
    const T* other = base + later % s.held * s.sentence_stride;
    float cosine = 0.0f;
    for (int e = lane; e < s.hidden; e += kWarp) cosine += to_float(own[e]) * to_float(other[e]);
    cosine = warp_sum(cosine);
    if (cosine > s.threshold) {
      highest = fmaxf(highest, cosine);
      newest = cosine;
    }
  }
  if (lane == 0) *penalty = s.latest ? newest : fmaxf(known, highest);
}

// Updates `compared`, in a launch of its own because every warp of a request reads the old value.
__global__ void note_compared(Sentences s) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i < s.requests) s.compared[s.rows[i]] = s.count[s.rows[i]];
}

template <class T>
void run(const Sentences& s, cudaStream_t stream) {
  launch(compare_sentences<T>, s.requests * ceil_div(s.held, kWarps), kThreads, 0, stream, s);
}

}  // namespace

void sentence_similarity(const Tensor& embeddings, const Tensor& rows, const Tensor& count, const Tensor& compared,
                         const Tensor& penalties, double threshold, int64_t rule) {
  const ScalarType type = embeddings.scalar_type();
  STD_TORCH_CHECK(rule == 0 || rule == 1, "skipkv_cuda: rule must be 0 (max) or 1 (last), not ", rule);
  const int64_t num_rows = embeddings.size(0);
  check(embeddings, "embeddings", type, {num_rows, -1, -1});
  check_vector(rows, "rows", ScalarType::Long, rows.numel());
  check_vector(count, "count", ScalarType::Long, count.numel());
  check_vector(compared, "compared", ScalarType::Long, count.numel());
  check(penalties, "penalties", ScalarType::Float, {-1, -1});
  STD_TORCH_CHECK(embeddings.stride(2) == 1 && penalties.stride(1) == 1,
                  "skipkv_cuda: the last dimensions of embeddings and penalties must be contiguous");
  const int64_t held = embeddings.size(1) - 1;
  STD_TORCH_CHECK(held >= 0, "skipkv_cuda: embeddings must have a row for padding");

  const Guard guard(embeddings.get_device_index());
  const cudaStream_t stream = current_stream(embeddings);
  const Sentences s{embeddings.const_data_ptr(), embeddings.stride(0), embeddings.stride(1),
                    penalties.stride(0),         data<const int64_t>(rows), data<const int64_t>(count),
                    data<int64_t>(compared),     data<float>(penalties), rows.numel(),
                    held,                        static_cast<int>(embeddings.size(2)), static_cast<float>(threshold),
                    rule == 1};
  if (type == ScalarType::Float) {
    run<float>(s, stream);
  } else if (type == ScalarType::Half) {
    run<__half>(s, stream);
  } else {
    STD_TORCH_CHECK(type == ScalarType::BFloat16, "skipkv_cuda: embeddings must be float32, float16 or bfloat16, not ",
                    torch::headeronly::toString(type));
    run<__nv_bfloat16>(s, stream);
  }
  launch(note_compared, ceil_div(s.requests, kThreads), kThreads, 0, stream, s);
}

}  // namespace skipkv
