// `record_queries` and `steer_add`, fit for CUDA graphs: one launch each, and no device values read on the host.
#include "device.cuh"
#include "launch.cuh"
#include "operators.h"
#include "pages.h"
#include "rows.cuh"

namespace skipkv {
namespace {

constexpr int kThreads = 256;
// Elements of 8 bits that a thread converts at once; as float32 they have 16 bytes.
constexpr int kPack = 4;

struct Queries {
  const void* query;
  const int64_t* index;
  void* ring;
  // In units.
  int64_t token_stride, head_stride, row_stride;
  int width, size;
  // Of the ring. It is nobody's, so it is not written.
  int64_t last_row;
};

// Copies `query[t]` to `ring[index[t]]`; a block a token.
template <class Unit>
__global__ void __launch_bounds__(kThreads) copy_queries(Queries q) {
  const int64_t row = q.index[blockIdx.x];
  if (row == q.last_row) return;
  const Unit* from = static_cast<const Unit*>(q.query) + blockIdx.x * q.token_stride;
  Unit* to = static_cast<Unit*>(q.ring) + row * q.row_stride;
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

// Elements that are read or written at once.
template <class T, int N>
struct alignas(sizeof(T) * N) Pack {
  T values[N];
};

// As `copy_queries`, for queries of 8 bits with a scale for each `heads_of_scale` heads; N elements at once.
template <class From, class To, int N>
__global__ void __launch_bounds__(kThreads) dequantise_queries(Queries q, const float* scale, int heads_of_scale) {
  const int64_t row = q.index[blockIdx.x];
  if (row == q.last_row) return;
  const From* from = static_cast<const From*>(q.query) + blockIdx.x * q.token_stride;
  To* to = static_cast<To*>(q.ring) + row * q.row_stride;
  for (int i = static_cast<int>(threadIdx.x) * N; i < q.size; i += kThreads * N) {
    const int head = i / q.width;
    const float by = scale[head / heads_of_scale];
    const Pack<From, N> pack = *reinterpret_cast<const Pack<From, N>*>(from + head * q.head_stride + i % q.width);
    Pack<To, N> made;
#pragma unroll
    for (int k = 0; k < N; ++k) made.values[k] = from_float<To>(to_float(pack.values[k]) * by);
    *reinterpret_cast<Pack<To, N>*>(to + i) = made;
  }
}

template <class From, class To>
void dequantise_as(const Queries& q, int64_t tokens, const float* scale, int heads_of_scale, bool packs,
                   cudaStream_t stream) {
  if (packs) {
    launch(dequantise_queries<From, To, kPack>, tokens, kThreads, 0, stream, q, scale, heads_of_scale);
  } else {
    launch(dequantise_queries<From, To, 1>, tokens, kThreads, 0, stream, q, scale, heads_of_scale);
  }
}

template <class From>
void dequantise_to(ScalarType type, const Queries& q, int64_t tokens, const float* scale, int heads_of_scale,
                   bool packs, cudaStream_t stream) {
  if (type == ScalarType::Float) {
    dequantise_as<From, float>(q, tokens, scale, heads_of_scale, packs, stream);
  } else if (type == ScalarType::Half) {
    dequantise_as<From, __half>(q, tokens, scale, heads_of_scale, packs, stream);
  } else {
    STD_TORCH_CHECK(type == ScalarType::BFloat16, "skipkv_cuda: ring must be float32, float16 or bfloat16, not ",
                    torch::headeronly::toString(type));
    dequantise_as<From, __nv_bfloat16>(q, tokens, scale, heads_of_scale, packs, stream);
  }
}

// Launches the dequantising copy. `from` are the queries, `q` describes them in elements.
void dequantise(const Queries& q, const Tensor& from, const Tensor& ring, const Tensor& scale, cudaStream_t stream) {
  const int64_t heads = from.size(1), scales = scale.numel();
  STD_TORCH_CHECK(on_device(scale) && scale.scalar_type() == ScalarType::Float && scale.is_contiguous(),
                  "skipkv_cuda: scale must be contiguous float32 on ", kDevice);
  STD_TORCH_CHECK(scales > 0 && heads % scales == 0, "skipkv_cuda: ", heads, " query heads do not share ", scales,
                  " scales");
  const int64_t element = static_cast<int64_t>(ring.element_size());
  const bool packs =
      copy_unit({q.width, q.head_stride, q.token_stride}, {from}) >= kPack &&
      copy_unit({q.width * element, q.row_stride * element}, {ring}) >= kPack * static_cast<int>(element);
  const int heads_of_scale = static_cast<int>(heads / scales);
  if (from.scalar_type() == ScalarType::Float8_e4m3fn) {
    dequantise_to<__nv_fp8_e4m3>(ring.scalar_type(), q, from.size(0), data<const float>(scale), heads_of_scale, packs,
                                 stream);
  } else {
    dequantise_to<__nv_fp8_e5m2>(ring.scalar_type(), q, from.size(0), data<const float>(scale), heads_of_scale, packs,
                                 stream);
  }
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

void record_queries(const Tensor& query, const Tensor& index, const Tensor& ring, const std::optional<Tensor>& scale) {
  const ScalarType type = query.scalar_type();
  check(query, "query", type, {-1, -1, -1});
  const int64_t tokens = query.size(0), heads = query.size(1), dim = query.size(2);
  check(ring, "ring", is_narrow(type) ? ring.scalar_type() : type, {-1, heads, dim});
  check_vector(index, "index", ScalarType::Long, index.numel());
  STD_TORCH_CHECK(index.numel() >= tokens, "skipkv_cuda: index has ", index.numel(), " entries for ", tokens,
                  " tokens");
  STD_TORCH_CHECK((dim <= 1 || ring.stride(2) == 1) && (heads <= 1 || ring.stride(1) == dim),
                  "skipkv_cuda: rows of the ring must be contiguous");
  STD_TORCH_CHECK(is_narrow(type) == scale.has_value(), "skipkv_cuda: queries of 8 bits, and only they, have a scale");

  const Guard guard(query.get_device_index());
  const Tensor from = dim <= 1 || query.stride(2) == 1 ? query : torch::stable::contiguous(query);
  const int element = static_cast<int>(query.element_size());
  // A single head or token has no next one.
  const int64_t head_stride = heads > 1 ? from.stride(1) : dim;
  const int64_t token_stride = tokens > 1 ? from.stride(0) : 0;
  const Queries q{from.const_data_ptr(), data<const int64_t>(index),    ring.mutable_data_ptr(), token_stride,
                  head_stride,           ring.stride(0),                static_cast<int>(dim),
                  static_cast<int>(heads * dim), ring.size(0) - 1};
  const cudaStream_t stream = current_stream(query);
  if (scale.has_value()) return dequantise(q, from, ring, *scale, stream);
  const int unit =
      copy_unit({dim * element, head_stride * element, token_stride * element, q.row_stride * element}, {from, ring});
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
