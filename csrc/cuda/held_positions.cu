// `held_positions` and `token_penalties`: a thread for every resident token.
#include "arguments.h"
#include "device.cuh"
#include "launch.cuh"
#include "operators.h"

namespace skipkv {
namespace {

constexpr int kThreads = 256;

struct Held {
  const int32_t *sidecar, *table, *placed, *evicted;
  int64_t table_stride, pages, total;
  int layers, heads, size, length;
  int32_t* out;
};

__global__ void __launch_bounds__(kThreads) read_positions(Held s) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= s.total) return;
  const int slot = static_cast<int>(i % s.length);
  const int64_t row = i / s.length, head = row % s.heads, layer = row / s.heads % s.layers;
  const int64_t r = row / s.heads / s.layers;
  if (slot < s.placed[r]) {
    const int64_t page = s.table[r * s.table_stride + slot / s.size];
    s.out[i] = s.sidecar[((layer * s.pages + page) * s.heads + head) * s.size + slot % s.size];
  } else {
    s.out[i] = slot + s.evicted[r];
  }
}

struct Penalties {
  const int32_t* ends;
  const float* penalties;
  const int64_t *first, *rows;
  const int32_t* positions;
  int64_t ends_stride, penalty_stride, most, of_request, total;
  float* out;
};

__global__ void __launch_bounds__(kThreads) look_up_penalties(Penalties s) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= s.total) return;
  const int64_t row = s.rows[i / s.of_request], position = s.positions[i];
  float found = 0.0f;
  if (position >= s.first[row]) {
    // The first sentence that does not end before the position.
    const int32_t* const ends = s.ends + row * s.ends_stride;
    int64_t low = 0, high = s.most - 1;
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (ends[middle] < position) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    found = s.penalties[row * s.penalty_stride + low];
  }
  s.out[i] = found;
}

}  // namespace

Tensor held_positions(const Tensor& sidecar, const Tensor& table, const Tensor& num_placed, const Tensor& num_evicted,
                      int64_t length) {
  check(sidecar, "sidecar", ScalarType::Int, {-1, -1, -1, -1});
  STD_TORCH_CHECK(sidecar.is_contiguous(), "skipkv_cuda: sidecar must be contiguous");
  STD_TORCH_CHECK(length >= 0 && length <= INT32_MAX, "skipkv_cuda: length=", length, " is out of range");
  check(table, "table", ScalarType::Int, {-1, -1});
  const int64_t requests = table.size(0), layers = sidecar.size(0), heads = sidecar.size(2);
  check_vector(num_placed, "num_placed", ScalarType::Int, requests);
  check_vector(num_evicted, "num_evicted", ScalarType::Int, requests);
  const Tensor tables = packed(table);
  const Tensor out = scratch(sidecar, {requests, layers, heads, length}, ScalarType::Int);
  const Guard guard(sidecar.get_device_index());
  const Held s{data<const int32_t>(sidecar),
               data<const int32_t>(tables),
               data<const int32_t>(num_placed),
               data<const int32_t>(num_evicted),
               table.size(1),
               sidecar.size(1),
               out.numel(),
               static_cast<int>(layers),
               static_cast<int>(heads),
               static_cast<int>(sidecar.size(3)),
               static_cast<int>(length),
               data<int32_t>(out)};
  launch(read_positions, ceil_div(s.total, kThreads), kThreads, 0, current_stream(sidecar), s);
  return out;
}

Tensor token_penalties(const Tensor& ends, const Tensor& penalties, const Tensor& first, const Tensor& rows,
                       const Tensor& positions) {
  const int64_t num_rows = ends.size(0), most = ends.size(1), requests = rows.numel();
  check(ends, "ends", ScalarType::Int, {num_rows, -1});
  check(penalties, "penalties", ScalarType::Float, {num_rows, most});
  check_vector(first, "first", ScalarType::Long, num_rows);
  check_vector(rows, "rows", ScalarType::Long, requests);
  check(positions, "positions", ScalarType::Int, {requests, -1, -1, -1});
  STD_TORCH_CHECK(ends.stride(1) == 1 && penalties.stride(1) == 1 && most > 0,
                  "skipkv_cuda: the last dimensions of ends and penalties must be contiguous");
  const Tensor held = packed(positions);
  const Tensor out = scratch(positions, {requests, positions.size(1), positions.size(2), positions.size(3)},
                             ScalarType::Float);
  const Guard guard(ends.get_device_index());
  const Penalties s{data<const int32_t>(ends),
                    data<const float>(penalties),
                    data<const int64_t>(first),
                    data<const int64_t>(rows),
                    data<const int32_t>(held),
                    ends.stride(0),
                    penalties.stride(0),
                    most,
                    positions.size(1) * positions.size(2) * positions.size(3),
                    out.numel(),
                    data<float>(out)};
  launch(look_up_penalties, ceil_div(s.total, kThreads), kThreads, 0, current_stream(ends), s);
  return out;
}

}  // namespace skipkv
