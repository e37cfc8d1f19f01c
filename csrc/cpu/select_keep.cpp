// `select_keep`: the best tokens of every row, found without sorting.
#include "arguments.h"
#include "operators.h"
#include "parallel.h"

#include <cstring>

namespace skipkv {
namespace {

// Returns a key that is higher for a higher score. Zeros of both signs are one score.
uint32_t order_of(float score) {
  const float value = score + 0.0f;
  uint32_t u;
  std::memcpy(&u, &value, 4);
  return u & 0x80000000u ? ~u : u | 0x80000000u;
}

struct Threshold {
  uint32_t key;    // the lowest kept key
  int64_t missing;  // how many tokens with that key are kept
};

// Finds the `count`-th largest of `n` keys, count >= 1, digit by digit. Overwrites `keys`.
Threshold find_threshold(uint32_t* keys, int64_t n, int64_t count, int32_t* buckets) {
  constexpr int kBits = 8, kBuckets = 1 << kBits;
  uint32_t prefix = 0;
  for (int shift = 32 - kBits; shift >= 0; shift -= kBits) {
    std::fill(buckets, buckets + kBuckets, 0);
    for (int64_t i = 0; i < n; ++i) ++buckets[keys[i] >> shift & (kBuckets - 1)];
    uint32_t digit = kBuckets - 1;
    while (buckets[digit] < count) count -= buckets[digit--];
    prefix |= digit << shift;
    if (buckets[digit] == n) continue;
    int64_t left = 0;
    for (int64_t i = 0; i < n; ++i) {
      keys[left] = keys[i];
      left += (keys[i] >> shift & (kBuckets - 1)) == digit;
    }
    n = left;
  }
  return {prefix, count};
}

struct SelectScratch {
  std::vector<uint32_t> keys, work;
  std::vector<int32_t> buckets;
  std::vector<uint8_t> kept;

  explicit SelectScratch(int64_t n) : keys(n), work(n), buckets(256), kept(n) {}
};

void keep_best(const float* scores, const int32_t* positions, int64_t length, int64_t keep, int32_t pin_below,
               int32_t pin_from, SelectScratch& s) {
  std::fill(s.kept.begin(), s.kept.begin() + length, 0);
  if (keep <= 0) return;
  constexpr uint32_t kPinned = 0xff800000u;  // the key of plus infinity
  for (int64_t i = 0; i < length; ++i) {
    const bool pinned = positions[i] < pin_below || positions[i] >= pin_from;
    s.work[i] = s.keys[i] = pinned ? kPinned : order_of(scores[i]);
  }
  const Threshold best = find_threshold(s.work.data(), length, keep, s.buckets.data());
  int64_t ties = 0;
  for (int64_t i = 0; i < length; ++i) {
    s.kept[i] = s.keys[i] >= best.key;
    if (s.keys[i] == best.key) s.work[ties++] = ~(static_cast<uint32_t>(positions[i]) ^ 0x80000000u);
  }
  if (ties == best.missing) return;
  // Of equal scores the lower positions stay.
  const Threshold lowest = find_threshold(s.work.data(), ties, best.missing, s.buckets.data());
  for (int64_t i = 0; i < length; ++i) {
    const uint32_t position = ~(static_cast<uint32_t>(positions[i]) ^ 0x80000000u);
    if (s.keys[i] == best.key && position < lowest.key) s.kept[i] = 0;
  }
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> select_keep(const Tensor& scores, const Tensor& positions,
                                               const Tensor& num_resident, const Tensor& num_keep,
                                               const Tensor& pin_below, const Tensor& pin_from, int64_t max_moves) {
  check(positions, "positions", ScalarType::Int, {-1, -1, -1, -1});
  const int64_t requests = positions.size(0), layers = positions.size(1), heads = positions.size(2);
  const int64_t slots = positions.size(3);
  check(scores, "scores", ScalarType::Float, {requests, layers, heads, slots});
  for (const Tensor& each : {num_resident, num_keep, pin_below, pin_from}) {
    check(each, "num_resident, num_keep, pin_below and pin_from", ScalarType::Int, {requests});
  }
  STD_TORCH_CHECK(max_moves >= 0, "skipkv_cpu: max_moves must not be negative");
  const Tensor all_scores = packed(scores), all_positions = packed(positions);
  const Tensor lengths = packed(num_resident), keeps = packed(num_keep);
  const Tensor lows = packed(pin_below), highs = packed(pin_from);
  const int32_t *length = lengths.const_data_ptr<int32_t>(), *keep = keeps.const_data_ptr<int32_t>();
  for (int64_t r = 0; r < requests; ++r) {
    STD_TORCH_CHECK(0 <= keep[r] && keep[r] <= length[r] && length[r] <= slots, "skipkv_cpu: num_keep=", keep[r],
                    ", num_resident=", length[r], " and ", slots, " slots do not fit each other");
    STD_TORCH_CHECK(std::min(keep[r], length[r] - keep[r]) <= max_moves, "skipkv_cpu: max_moves=", max_moves,
                    " is too small for num_keep=", keep[r], " of num_resident=", length[r]);
  }
  Tensor source = torch::stable::new_zeros(positions, {requests, layers, heads, max_moves}, ScalarType::Int);
  Tensor hole = torch::stable::new_zeros(positions, {requests, layers, heads, max_moves}, ScalarType::Int);
  Tensor count = torch::stable::new_zeros(positions, {requests, layers, heads}, ScalarType::Int);
  const float* const from_scores = all_scores.const_data_ptr<float>();
  const int32_t* const from_positions = all_positions.const_data_ptr<int32_t>();
  const int32_t *low = lows.const_data_ptr<int32_t>(), *high = highs.const_data_ptr<int32_t>();
  int32_t *const sources = source.mutable_data_ptr<int32_t>(), *const holes = hole.mutable_data_ptr<int32_t>();
  int32_t* const counts = count.mutable_data_ptr<int32_t>();
  parallel_rows(requests * layers * heads, [&](const auto& next) {
    SelectScratch scratch(slots);
    for (int64_t row = next(); row >= 0; row = next()) {
      const int64_t r = row / (layers * heads);
      keep_best(from_scores + row * slots, from_positions + row * slots, length[r], keep[r], low[r], high[r], scratch);
      int32_t *const to_source = sources + row * max_moves, *const to_hole = holes + row * max_moves;
      int64_t moves = 0, found = 0;
      for (int32_t slot = keep[r]; slot < length[r]; ++slot) {
        if (scratch.kept[slot]) to_source[moves++] = slot;
      }
      for (int32_t slot = 0; slot < keep[r]; ++slot) {
        if (!scratch.kept[slot]) to_hole[found++] = slot;
      }
      counts[row] = static_cast<int32_t>(moves);
    }
  });
  return {source, hole, count};
}

}  // namespace skipkv
