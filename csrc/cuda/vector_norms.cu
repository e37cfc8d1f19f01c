// `vector_norms`: one block a part of a row, a warp a token. With a centre it reads the vectors twice.
#include <algorithm>
#include <cmath>

#include "launch.cuh"
#include "operators.h"
#include "order_rows.cuh"
#include "rows.cuh"

namespace skipkv {
namespace {

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / kWarp;
constexpr int kEach = kMaxDim / kWarp;  // elements of a vector in a lane
constexpr int kUncentred = 256;         // tokens of a block without a centre

// The arguments of a launch over `count` rows from `first` on; rows of `order` are numbered from 0.
struct Measured {
  Pages pages;
  int64_t first, count;
  int n, norm, part;  // `part` tokens a block
  bool values, centred;
  const int* table;
  int64_t table_stride;
  const int* num_resident;
  const int* order;      // [count, n], or null where slots do as well
  const float* weights;  // [rows, n] by slot, or null
  float* out;            // [rows, n] by slot
};

template <class T>
__global__ void __launch_bounds__(kThreads) measure_vectors(Measured s) {
  __shared__ float sums[kWarps][kMaxDim];
  const int64_t parts = ceil_div(s.n, s.part);
  const int64_t row = blockIdx.x / parts, line = (s.first + row) * s.n;
  const Row at = row_of(s.pages, s.first + row);
  const int length = s.num_resident[at.request], dim = s.pages.dim;
  const int begin = static_cast<int>(blockIdx.x % parts) * s.part, end = min(begin + s.part, length);
  const int thread = static_cast<int>(threadIdx.x), lane = thread % kWarp, warp = thread / kWarp;
  const int* table = s.table + at.request * s.table_stride;
  const T* pages = head_pages<T>(s.pages, at) + (s.values ? dim : 0);

  float vector[kEach], centre[kEach] = {};
  // Reads a lane's part of a token's vector and returns its slot.
  const auto read = [&](int rank) {
    const int slot = s.order == nullptr ? rank : s.order[row * s.n + rank];
    const T* from = pages + cell_offset(s.pages, cell_of(s.pages, table, slot));
#pragma unroll
    for (int e = 0; e < kEach; ++e) {
      const int d = lane + e * kWarp;
      vector[e] = d < dim ? to_float(from[d]) : 0.0f;
    }
    return slot;
  };
  if (s.centred) {
    for (int rank = begin + warp; rank < end; rank += kWarps) {
      const int slot = read(rank);
      const float weight = s.weights == nullptr ? 1.0f : s.weights[line + slot];
#pragma unroll
      for (int e = 0; e < kEach; ++e) centre[e] += weight * vector[e];
    }
#pragma unroll
    for (int e = 0; e < kEach; ++e) sums[warp][lane + e * kWarp] = centre[e];
    __syncthreads();
    const float each = s.weights == nullptr ? 1.0f / static_cast<float>(end - begin) : 1.0f;
#pragma unroll
    for (int e = 0; e < kEach; ++e) {
      centre[e] = 0.0f;
      for (int w = 0; w < kWarps; ++w) centre[e] += sums[w][lane + e * kWarp];
      centre[e] *= each;
    }
  }
  for (int rank = begin + warp; rank < end; rank += kWarps) {
    const int slot = read(rank);
    float sum = 0.0f;
#pragma unroll
    for (int e = 0; e < kEach; ++e) {
      const float x = vector[e] - centre[e];
      sum += s.norm == 1 ? fabsf(x) : x * x;
    }
    sum = warp_sum(sum);
    if (lane == 0) s.out[line + slot] = s.norm == 1 ? sum : sqrtf(sum);
  }
  const int last = min(begin + s.part, s.n);
  for (int slot = max(begin, length) + thread; slot < last; slot += kThreads) s.out[line + slot] = 0.0f;
}

}  // namespace

Tensor vector_norms(const std::vector<Tensor>& caches, const Tensor& pointers, int64_t layout, const Tensor& table,
                    const Tensor& positions, const Tensor& num_resident, bool values, int64_t norm, int64_t part,
                    const std::optional<Tensor>& weights) {
  const Pages pages = pages_of(caches, pointers, layout);
  const ScalarType type = caches[0].scalar_type();
  const int64_t requests = table.size(0), n = positions.size(-1), rows = requests * pages.layers * pages.heads;
  check_keys(pages, type);
  check_table(table, requests);
  check(positions, "positions", ScalarType::Int, {requests, pages.layers, pages.heads, n});
  check_vector(num_resident, "num_resident", ScalarType::Int, requests);
  STD_TORCH_CHECK(norm == 1 || norm == 2, "skipkv_cuda: norm=", norm, " must be 1 or 2");
  STD_TORCH_CHECK(part >= 0, "skipkv_cuda: part=", part, " must not be negative");
  if (weights) check(*weights, "weights", ScalarType::Float, {requests, pages.layers, pages.heads, n});

  const Guard guard(positions.get_device_index());
  const cudaStream_t stream = current_stream(positions);
  const Tensor places = packed(positions), shares = weights ? packed(*weights) : places;
  const Tensor out = scratch(places, {requests, pages.layers, pages.heads, n}, ScalarType::Float);
  if (rows * n == 0) return out;
  // The order matters only where a row has several centres.
  const bool ordered = part > 0 && part < n;
  const int64_t at_once = ordered ? std::min(rows, std::max<int64_t>(1, kScratchBytes / (4 * n))) : rows;
  const Tensor order = scratch(out, {ordered ? at_once : 0, n}, ScalarType::Int);

  Measured s{};
  s.pages = pages;
  s.n = static_cast<int>(n);
  s.norm = static_cast<int>(norm);
  s.part = static_cast<int>(std::min<int64_t>(part == 0 ? kUncentred : part, n));
  s.values = values;
  s.centred = part > 0;
  s.table = data<const int>(table);
  s.table_stride = table.stride(0);
  s.num_resident = data<const int>(num_resident);
  s.order = ordered ? data<const int>(order) : nullptr;
  s.weights = weights ? data<const float>(shares) : nullptr;
  s.out = data<float>(out);
  for (; s.first < rows; s.first += at_once) {
    s.count = std::min(at_once, rows - s.first);
    if (ordered) {
      order_by_position({data<const int>(places), s.num_resident, s.first, s.count, s.n, pages.layers * pages.heads,
                         data<int>(order)},
                        stream);
    }
    with_type(type, [&](auto element) {
      launch(measure_vectors<decltype(element)>, s.count * ceil_div(n, s.part), kThreads, 0, stream, s);
    });
  }
  return out;
}

}  // namespace skipkv
