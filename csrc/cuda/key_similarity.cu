// `key_similarity`: one block a row, which reads the keys twice: for their mean, and for the cosines with it.
#include "launch.cuh"
#include "operators.h"
#include "rows.cuh"

namespace skipkv {
namespace {

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / kWarp;
constexpr int kEach = kMaxDim / kWarp;  // elements of a key in a lane

struct Comparing {
  Pages pages;
  const int* table;
  int64_t table_stride;
  const int* num_resident;
  int n;
  float* out;  // [rows, n]
};

template <class T>
__global__ void __launch_bounds__(kThreads) compare_keys(Comparing s) {
  __shared__ float sums[kWarps][kMaxDim];
  const Row at = row_of(s.pages, blockIdx.x);
  const int length = s.num_resident[at.request], dim = s.pages.dim;
  const int thread = static_cast<int>(threadIdx.x), lane = thread % kWarp, warp = thread / kWarp;
  const int* table = s.table + at.request * s.table_stride;
  const T* pages = head_pages<T>(s.pages, at);
  float* out = s.out + static_cast<int64_t>(blockIdx.x) * s.n;

  // Reads a lane's part of a key. Returns the factor that makes the key a unit vector.
  float key[kEach];
  const auto read = [&](int slot) {
    const T* from = pages + cell_offset(s.pages, cell_of(s.pages, table, slot));
    float square = 0.0f;
#pragma unroll
    for (int e = 0; e < kEach; ++e) {
      const int d = lane + e * kWarp;
      key[e] = d < dim ? to_float(from[d]) : 0.0f;
      square += key[e] * key[e];
    }
    return 1.0f / (sqrtf(warp_sum(square)) + kEpsilon);
  };
  float mean[kEach] = {};
  for (int slot = warp; slot < length; slot += kWarps) {
    const float inverse = read(slot);
#pragma unroll
    for (int e = 0; e < kEach; ++e) mean[e] += key[e] * inverse;
  }
#pragma unroll
  for (int e = 0; e < kEach; ++e) sums[warp][lane + e * kWarp] = mean[e];
  __syncthreads();
  float square = 0.0f;
#pragma unroll
  for (int e = 0; e < kEach; ++e) {
    mean[e] = 0.0f;
    for (int w = 0; w < kWarps; ++w) mean[e] += sums[w][lane + e * kWarp];
    mean[e] /= static_cast<float>(length);
    square += mean[e] * mean[e];
  }
  const float inverse_of_mean = 1.0f / (sqrtf(warp_sum(square)) + kEpsilon);
  for (int slot = warp; slot < length; slot += kWarps) {
    const float inverse = read(slot);
    float product = 0.0f;
#pragma unroll
    for (int e = 0; e < kEach; ++e) product += key[e] * mean[e];
    product = warp_sum(product);
    if (lane == 0) out[slot] = product * inverse * inverse_of_mean;
  }
  for (int slot = length + thread; slot < s.n; slot += kThreads) out[slot] = 0.0f;
}

}  // namespace

Tensor key_similarity(const std::vector<Tensor>& caches, const Tensor& pointers, int64_t layout, const Tensor& table,
                      const Tensor& num_resident, int64_t length) {
  const Pages pages = pages_of(caches, pointers, layout);
  const ScalarType type = caches[0].scalar_type();
  const int64_t requests = table.size(0);
  check_keys(pages, type);
  check_table(table, requests);
  check_vector(num_resident, "num_resident", ScalarType::Int, requests);
  const Guard guard(table.get_device_index());
  const Tensor out = scratch(table, {requests, pages.layers, pages.heads, length}, ScalarType::Float);
  const Comparing s{pages,          data<const int>(table),   table.stride(0), data<const int>(num_resident),
                    static_cast<int>(length), data<float>(out)};
  with_type(type, [&](auto element) {
    launch(compare_keys<decltype(element)>, requests * pages.layers * pages.heads, kThreads, 0, current_stream(table),
           s);
  });
  return out;
}

}  // namespace skipkv
