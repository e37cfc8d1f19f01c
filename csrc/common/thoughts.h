// The state of a request in `track_thoughts`, and how a token changes it.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define SKIPKV_HOST_DEVICE __host__ __device__
#else
#define SKIPKV_HOST_DEVICE
#endif

namespace skipkv {

// Flags of a token, and the bit where its keyword class begins: `THOUGHT` and `KEYWORD_SHIFT` of
// torch_backend/thoughts.py.
constexpr int32_t kSplit = 1, kDelimiter = 2, kBegin = 4, kEnd = 8, kKeywordShift = 4;

// A row of `state`; its columns are `STATE` of torch_backend/thoughts.py.
struct ThoughtState {
  int32_t vector, thinking, kinds, machine, after_delimiter, latched, execution, reflection, transition, steered;
};
constexpr int64_t kThoughtStateSize = sizeof(ThoughtState) / sizeof(int32_t);

// Advances a state by one token. Returns whether the token lies between two thoughts and is steered.
//
//   flags: of the token.
//   step: entry of `keywords` for the machine's state and the token's class.
//   strength: alpha0, gamma and the largest alpha of the request.
//   merge: whether a delimiter right after another one closes nothing.
//   latches: whether N is taken over after this token.
//   coefficient: receives the strength of a steered token; 0 means that it stays as it is.
SKIPKV_HOST_DEVICE inline bool advance(ThoughtState& now, int32_t flags, int32_t step, const float* strength,
                                       bool merge, bool latches, float* coefficient) {
  now.machine = step >> 2;
  now.kinds |= step & 3;
  if (flags & (kBegin | kEnd)) now.thinking = !(flags & kEnd);
  const bool steers = now.thinking && (flags & kSplit);
  if (steers) {
    // In double precision the product is exact, so a fused multiply-add changes nothing.
    const double alpha = strength[0] + static_cast<double>(strength[1]) * now.latched, most = strength[2];
    *coefficient = static_cast<float>(alpha < most ? alpha : most);
    now.steered += *coefficient != 0;
  }
  if (flags & kDelimiter) {
    if (!(merge && now.after_delimiter)) {
      ++(now.kinds & 1 ? now.reflection : now.kinds & 2 ? now.transition : now.execution);
    }
    now.machine = now.kinds = 0;
  }
  now.after_delimiter = (flags & kDelimiter) != 0;
  if (latches) now.latched = now.reflection + now.transition;
  return steers;
}

}  // namespace skipkv
