// `record_queries` and `steer_add`, fit for CUDA graphs: one launch each, and no device values read on the host.
#include "device.cuh"
#include "launch.cuh"
#include "operators.h"
#include "pages.h"

namespace skipkv {
namespace {

constexpr int kThreads = 256;

struct Queries {
  const void* query;
  const int64_t* index;
  void* ring;
  // In units.
  int64_t token_stride, head_stride, row_stride;
  int width, size;
};

// Copies `query[t]` to `ring[index[t]]`; a block a token.
template <class Unit>
__global__ void __launch_bounds__(kThreads) copy_queries(Queries q) {
  const Unit* from = static_cast<const Unit*>(q.query) + blockIdx.x * q.token_stride;
  Unit* to = static_cast<Unit*>(q.ring) + q.index[blockIdx.x] * q.row_stride;
  for (int i = static_cast<int>(threadIdx.x); i < q.size; i += kThreads) {
    to[i] = from[i / q.width * q.head_stride + i % q.width];
  }
}

template <class Unit>
void copy(Queries q, int64_t tokens, int element, cudaStream_t stream) {
  constexpr int kUnit = static_cast<int>(sizeof(Unit));
  q.token_stride = q.token_stride * element / kUnit;
  q.head_stride = q.head_stride * element / kUnit;
  q.row_stride = q.row_stride * element / kUnit;
  q.width = q.width * element / kUnit;
  q.size = q.size * element / kUnit;
  launch(copy_queries<Unit>, tokens, kThreads, 0, stream, q);
}

struct Steering {
  const void* hidden;
  const float* coefficient;
  const int* choice;
  const float* vectors;
  void* out;
  int64_t hidden_stride, vector_stride;
  int size;
};

// Adds the steering vector of a token; a block a token. Not fused, because PyTorch rounds the product.
template <class T>
__global__ void __launch_bounds__(kThreads) add_steering(Steering s) {
  const int64_t token = blockIdx.x;
  const T* hidden = static_cast<const T*>(s.hidden) + token * s.hidden_stride;
  T* out = static_cast<T*>(s.out) + token * s.size;
  const int choice = s.choice[token];
  if (choice == 0) {
    for (int i = static_cast<int>(threadIdx.x); i < s.size; i += kThreads) out[i] = hidden[i];
    return;
  }
  const float coefficient = s.coefficient[token];
  const float* vector = s.vectors + choice * s.vector_stride;
  for (int i = static_cast<int>(threadIdx.x); i < s.size; i += kThreads) {
    out[i] = from_float<T>(__fadd_rn(to_float(hidden[i]), __fmul_rn(coefficient, vector[i])));
  }
}

}  // namespace

void record_queries(const Tensor& query, const Tensor& index, const Tensor& ring) {
  const ScalarType type = query.scalar_type();
  check(query, "query", type, {-1, -1, -1});
  const int64_t tokens = query.size(0), heads = query.size(1), dim = query.size(2);
  check(ring, "ring", type, {-1, heads, dim});
  check_vector(index, "index", ScalarType::Long, index.numel());
  STD_TORCH_CHECK(index.numel() >= tokens, "skipkv_cuda: index has ", index.numel(), " entries for ", tokens,
                  " tokens");
  STD_TORCH_CHECK((dim <= 1 || ring.stride(2) == 1) && (heads <= 1 || ring.stride(1) == dim),
                  "skipkv_cuda: rows of the ring must be contiguous");

  const Guard guard(query.get_device_index());
  const Tensor from = dim <= 1 || query.stride(2) == 1 ? query : torch::stable::contiguous(query);
  const int element = static_cast<int>(query.element_size());
  // A single head or token has no next one.
  const int64_t head_stride = heads > 1 ? from.stride(1) : dim;
  const int64_t token_stride = tokens > 1 ? from.stride(0) : 0;
  const Queries q{from.const_data_ptr(), data<const int64_t>(index), ring.mutable_data_ptr(),
                  token_stride,           head_stride,                ring.stride(0),
                  static_cast<int>(dim),  static_cast<int>(heads * dim)};
  const int unit =
      copy_unit({dim * element, head_stride * element, token_stride * element, q.row_stride * element}, {from, ring});
  const cudaStream_t stream = current_stream(query);
  switch (unit) {
    case 16:
      return copy<uint4>(q, tokens, element, stream);
    case 8:
      return copy<uint2>(q, tokens, element, stream);
    case 4:
      return copy<uint32_t>(q, tokens, element, stream);
    case 2:
      return copy<uint16_t>(q, tokens, element, stream);
    default:
      return copy<uint8_t>(q, tokens, element, stream);
  }
}

Tensor steer_add(const Tensor& hidden, const Tensor& coefficient, const Tensor& choice, const Tensor& vectors) {
  const ScalarType type = hidden.scalar_type();
  check(hidden, "hidden", type, {-1, -1});
  const int64_t tokens = hidden.size(0), size = hidden.size(1);
  check_vector(coefficient, "coefficient", ScalarType::Float, coefficient.numel());
  check_vector(choice, "choice", ScalarType::Int, choice.numel());
  check(vectors, "vectors", ScalarType::Float, {-1, size});
  STD_TORCH_CHECK(coefficient.numel() >= tokens && choice.numel() >= tokens,
                  "skipkv_cuda: coefficient and choice have ", coefficient.numel(), " and ", choice.numel(),
                  " entries for ", tokens, " tokens");
  STD_TORCH_CHECK(size <= 1 || vectors.stride(1) == 1, "skipkv_cuda: vectors must have contiguous rows");

  const Guard guard(hidden.get_device_index());
  const Tensor before = size <= 1 || hidden.stride(1) == 1 ? hidden : torch::stable::contiguous(hidden);
  Tensor out = scratch(hidden, {tokens, size}, type);
  const Steering s{before.const_data_ptr(), data<const float>(coefficient), data<const int>(choice),
                   data<const float>(vectors), out.mutable_data_ptr(), before.stride(0),
                   vectors.stride(0), static_cast<int>(size)};
  const cudaStream_t stream = current_stream(hidden);
  if (type == ScalarType::Float) {
    launch(add_steering<float>, tokens, kThreads, 0, stream, s);
  } else if (type == ScalarType::Half) {
    launch(add_steering<__half>, tokens, kThreads, 0, stream, s);
  } else {
    STD_TORCH_CHECK(type == ScalarType::BFloat16, "skipkv_cuda: hidden must be float32, float16 or bfloat16, not ",
                    torch::headeronly::toString(type));
    launch(add_steering<__nv_bfloat16>, tokens, kThreads, 0, stream, s);
  }
  return out;
}

}  // namespace skipkv
