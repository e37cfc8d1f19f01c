// Orders a row's tokens by position in linear time: positions are distinct, so a bit set sorts them.
#include "order_rows.cuh"

#include "device.cuh"
#include "launch.cuh"

namespace skipkv {
namespace {

constexpr int kThreads = 256;
constexpr int kWords = 2048;
constexpr int kSpan = kWords * 32;

// Sets `order[rank] = slot` in a row; slots past the length keep their places. One block a row.
__global__ void __launch_bounds__(kThreads) order_rows(Ordering s) {
  __shared__ unsigned bits[kWords];
  __shared__ int before[kWords];
  __shared__ int warp_totals[kThreads / kWarp];
  __shared__ int highest;
  const int64_t row = blockIdx.x;
  const int length = s.num_resident[(s.first + row) / s.rows_per_request];
  const int thread = static_cast<int>(threadIdx.x), lane = thread % kWarp, warp = thread / kWarp;
  const int* positions = s.positions + (s.first + row) * s.n;
  int* order = s.order + row * s.n;

  if (thread == 0) highest = 0;
  __syncthreads();
  int own = 0;
  for (int slot = thread; slot < s.n; slot += kThreads) {
    if (slot < length) {
      own = max(own, positions[slot]);
    } else {
      order[slot] = slot;
    }
  }
  atomicMax(&highest, own);
  __syncthreads();
  const int last = highest;

  int placed = 0;
  // 64 bits, as the last span may end past the largest int.
  for (int64_t base = 0; base <= last; base += kSpan) {
    for (int word = thread; word < kWords; word += kThreads) bits[word] = 0;
    __syncthreads();
    for (int slot = thread; slot < length; slot += kThreads) {
      const int64_t place = positions[slot] - base;
      if (place >= 0 && place < kSpan) atomicOr(&bits[place / 32], 1u << (place % 32));
    }
    __syncthreads();
    // Each thread counts the bits of a run of words; a scan over the threads counts those before each word.
    constexpr int kRun = kWords / kThreads;
    int count = 0;
    for (int i = 0; i < kRun; ++i) count += __popc(bits[thread * kRun + i]);
    const int up_to = warp_scan(count, lane);
    if (lane == kWarp - 1) warp_totals[warp] = up_to;
    __syncthreads();
    int sum = placed + up_to - count;
    int all = 0;
    for (int i = 0; i < kThreads / kWarp; ++i) {
      if (i < warp) sum += warp_totals[i];
      all += warp_totals[i];
    }
    for (int i = 0; i < kRun; ++i) {
      before[thread * kRun + i] = sum;
      sum += __popc(bits[thread * kRun + i]);
    }
    __syncthreads();
    for (int slot = thread; slot < length; slot += kThreads) {
      const int64_t place = positions[slot] - base;
      if (place >= 0 && place < kSpan) {
        const unsigned lower = bits[place / 32] & ((1u << (place % 32)) - 1);
        order[before[place / 32] + __popc(lower)] = slot;
      }
    }
    placed += all;
    __syncthreads();
  }
}

}  // namespace

void order_by_position(const Ordering& s, cudaStream_t stream) {
  launch(order_rows, s.count, kThreads, 0, stream, s);
}

}  // namespace skipkv
