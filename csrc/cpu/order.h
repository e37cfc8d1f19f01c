// Ranks the tokens of a row by position.
#pragma once

#include "vectors.h"

namespace skipkv {
namespace SKIPKV_ISA {
namespace {

constexpr int64_t kDigit = 11, kBuckets = 1 << kDigit;

struct SortScratch {
  uint32_t *keys, *other_keys;
  int32_t *slots, *other_slots;
  int32_t* buckets;

  SortScratch(Arena& arena, int64_t length)
      : keys(arena.take<uint32_t>(length)),
        other_keys(arena.take<uint32_t>(length)),
        slots(arena.take<int32_t>(length)),
        other_slots(arena.take<int32_t>(length)),
        buckets(arena.take<int32_t>(kBuckets)) {}
};

// Sets `rank[slot]` to the number of tokens at lower positions. Slots that are in order already take one pass. Others
// take a radix sort, which skips digits that are the same in all positions.
inline void rank_by_position(const int32_t* positions, int64_t length, SortScratch s, int32_t* rank) {
  bool sorted = true;
  for (int64_t i = 1; i < length; ++i) sorted &= positions[i - 1] < positions[i];
  if (sorted) {
    for (int64_t i = 0; i < length; ++i) rank[i] = static_cast<int32_t>(i);
    return;
  }
  uint32_t all_and = ~0u, all_or = 0;
  for (int64_t i = 0; i < length; ++i) {
    s.keys[i] = static_cast<uint32_t>(positions[i]) ^ 0x80000000u;
    s.slots[i] = static_cast<int32_t>(i);
    all_and &= s.keys[i];
    all_or |= s.keys[i];
  }
  const uint32_t varying = all_and ^ all_or;
  for (int64_t shift = 0; shift < 32; shift += kDigit) {
    if ((varying >> shift & (kBuckets - 1)) == 0) continue;
    for (int64_t b = 0; b < kBuckets; ++b) s.buckets[b] = 0;
    for (int64_t i = 0; i < length; ++i) ++s.buckets[s.keys[i] >> shift & (kBuckets - 1)];
    int32_t start = 0;
    for (int64_t b = 0; b < kBuckets; ++b) {
      const int32_t count = s.buckets[b];
      s.buckets[b] = start;
      start += count;
    }
    for (int64_t i = 0; i < length; ++i) {
      const int32_t to = s.buckets[s.keys[i] >> shift & (kBuckets - 1)]++;
      s.other_keys[to] = s.keys[i];
      s.other_slots[to] = s.slots[i];
    }
    uint32_t* const keys = s.keys;
    int32_t* const slots = s.slots;
    s.keys = s.other_keys, s.other_keys = keys;
    s.slots = s.other_slots, s.other_slots = slots;
  }
  for (int64_t i = 0; i < length; ++i) rank[s.slots[i]] = static_cast<int32_t>(i);
}

}  // namespace
}  // namespace SKIPKV_ISA
}  // namespace skipkv
