// `select_keep`: the exact best K of every row and the moves that bring them to the front; one block a row.
#include "arguments.h"
#include "device.cuh"
#include "launch.cuh"
#include "operators.h"

namespace skipkv {
namespace {

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / kWarp;
constexpr int kDigits = 256;

struct Selection {
  const float* scores;
  const int* positions;
  const int *num_resident, *num_keep, *pin_below, *pin_from;
  int *source, *hole, *count;
  int n, rows_per_request;
  int64_t max_moves;
};

// Returns distinct integers that rise with the score and, among equal scores, fall with the position: 32 bits of the
// score in an order-preserving form, then 31 bits of the inverted position. Pinned tokens have the score infinity.
__device__ uint64_t ranking(float score, int position, int below, int from) {
  if (position < below || position >= from) score = INFINITY;
  // Minus zero equals zero.
  const unsigned bits = score == 0.0f ? 0u : __float_as_uint(score);
  const unsigned rising = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
  return static_cast<uint64_t>(rising) << 31 | (0x7fffffffu - static_cast<unsigned>(position));
}

struct Digit {
  // The digit of the K-th highest ranking, how many tokens have a higher one, and how many have this one.
  int digit, above, equal;
};

// Finds the digit in a histogram, by one warp; 1 <= wanted <= sum of the histogram.
__device__ void find_digit(const int* histogram, int wanted, int lane, Digit* result) {
  constexpr int kRun = kDigits / kWarp;
  // Lane 0 has the highest digits.
  const int highest = kDigits - 1 - lane * kRun;
  int count = 0;
  for (int i = 0; i < kRun; ++i) count += histogram[highest - i];
  const int up_to = warp_scan(count, lane);
  int above = up_to - count;
  if (above < wanted && up_to >= wanted) {
    int digit = highest;
    while (above + histogram[digit] < wanted) above += histogram[digit--];
    *result = {digit, above, histogram[digit]};
  }
}

__global__ void __launch_bounds__(kThreads) select_row(Selection s) {
  __shared__ int histogram[kDigits];
  __shared__ Digit found;
  __shared__ int warp_sources[kWarps], warp_holes[kWarps];
  const int64_t row = blockIdx.x;
  const int request = static_cast<int>(row / s.rows_per_request);
  const int length = s.num_resident[request], keep = s.num_keep[request];
  const int below = s.pin_below[request], from = s.pin_from[request];
  const float* scores = s.scores + row * s.n;
  const int* positions = s.positions + row * s.n;
  int* source = s.source + row * s.max_moves;
  int* hole = s.hole + row * s.max_moves;
  const int thread = static_cast<int>(threadIdx.x), lane = thread % kWarp, warp = thread / kWarp;

  // Tokens with a ranking of at least `bound` stay. Find it digit by digit from the top, until all tokens of a digit
  // stay.
  uint64_t bound = keep == 0 ? ~uint64_t{0} : 0;
  if (keep > 0 && keep < length) {
    int wanted = keep;
    for (int shift = 56; shift >= 0; shift -= 8) {
      for (int i = thread; i < kDigits; i += kThreads) histogram[i] = 0;
      __syncthreads();
      for (int slot = thread; slot < length; slot += kThreads) {
        const uint64_t own = ranking(scores[slot], positions[slot], below, from);
        // The bits above the digit must agree; a shift by 64 bits would be undefined.
        if (shift == 56 || (own ^ bound) >> (shift + 8) == 0) atomicAdd(&histogram[own >> shift & 255], 1);
      }
      __syncthreads();
      if (warp == 0) find_digit(histogram, wanted, lane, &found);
      __syncthreads();
      bound |= static_cast<uint64_t>(found.digit) << shift;
      wanted -= found.above;
      if (found.equal == wanted) break;
    }
  }

  int sources = 0, holes = 0;
  for (int start = 0; start < length; start += kThreads) {
    const int slot = start + thread;
    const bool inside = slot < length;
    const bool kept = inside && ranking(scores[slot], positions[slot], below, from) >= bound;
    const bool moves = kept && slot >= keep, is_hole = inside && !kept && slot < keep;
    const unsigned move_mask = __ballot_sync(kAllLanes, moves), hole_mask = __ballot_sync(kAllLanes, is_hole);
    // All threads have read the totals of the last round.
    __syncthreads();
    if (lane == 0) {
      warp_sources[warp] = __popc(move_mask);
      warp_holes[warp] = __popc(hole_mask);
    }
    __syncthreads();
    const unsigned lower = (1u << lane) - 1;
    int at_source = sources + __popc(move_mask & lower), at_hole = holes + __popc(hole_mask & lower);
    for (int i = 0; i < kWarps; ++i) {
      if (i < warp) {
        at_source += warp_sources[i];
        at_hole += warp_holes[i];
      }
      sources += warp_sources[i];
      holes += warp_holes[i];
    }
    if (moves && at_source < s.max_moves) source[at_source] = slot;
    if (is_hole && at_hole < s.max_moves) hole[at_hole] = slot;
  }
  if (thread == 0) s.count[row] = sources;
  for (int64_t i = sources + thread; i < s.max_moves; i += kThreads) {
    source[i] = 0;
    hole[i] = 0;
  }
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> select_keep(const Tensor& scores, const Tensor& positions,
                                               const Tensor& num_resident, const Tensor& num_keep,
                                               const Tensor& pin_below, const Tensor& pin_from, int64_t max_moves) {
  const int64_t requests = num_resident.size(0);
  check(positions, "positions", ScalarType::Int, {requests, -1, -1, -1});
  const int64_t layers = positions.size(1), heads = positions.size(2), n = positions.size(3);
  check(scores, "scores", ScalarType::Float, {requests, layers, heads, n});
  check_vector(num_resident, "num_resident", ScalarType::Int, requests);
  check_vector(num_keep, "num_keep", ScalarType::Int, requests);
  check_vector(pin_below, "pin_below", ScalarType::Int, requests);
  check_vector(pin_from, "pin_from", ScalarType::Int, requests);
  STD_TORCH_CHECK(max_moves >= 0, "skipkv_cuda: max_moves must not be negative");

  const Guard guard(positions.get_device_index());
  const Tensor score = packed(scores), position = packed(positions);
  Tensor source = scratch(positions, {requests, layers, heads, max_moves}, ScalarType::Int);
  Tensor hole = scratch(positions, {requests, layers, heads, max_moves}, ScalarType::Int);
  Tensor count = scratch(positions, {requests, layers, heads}, ScalarType::Int);
  const Selection s{data<const float>(score),       data<const int>(position), data<const int>(num_resident),
                    data<const int>(num_keep),      data<const int>(pin_below), data<const int>(pin_from),
                    data<int>(source),              data<int>(hole),            data<int>(count),
                    static_cast<int>(n),            static_cast<int>(layers * heads), max_moves};
  launch(select_row, requests * layers * heads, kThreads, 0, current_stream(positions), s);
  return {source, hole, count};
}

}  // namespace skipkv
