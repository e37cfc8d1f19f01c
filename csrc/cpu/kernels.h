// The arithmetic that gains from wide vectors. It is compiled once per instruction set and chosen when it runs.
//
// Those translation units use no template or inline function of the standard library: the linker keeps one copy of
// each such function, and must not keep one whose instructions the processor may lack.
#pragma once

#include <cstddef>
#include <cstdint>

#include "pages.h"

namespace skipkv {

enum class Dtype : int { kFloat32, kBFloat16, kFloat16 };
// Caches may also hold elements of 8 bits.
enum class KeyType : int { kFloat32, kBFloat16, kFloat16, kFloat8E4M3, kFloat8E5M2 };

// The tokens of a row: a request's layer and kv head. L = length.
struct HeldRow {
  const Pages* pages;
  const void* cache;
  KeyType type;
  int64_t head;
  const int32_t* table;
  int64_t length;
};

// Queries of a row, at the first query head of the group; float32 for 8-bit caches, else as the cache.
struct RowQueries {
  const void* data;  // [number, Hq, D]
  int64_t number, group, stride;
};

// One row of `score_tokens`.
struct ScoreRow : HeldRow {
  RowQueries queries;  // those of the window
  const int32_t* positions;
  const float* penalty;  // or null
  int64_t pool;
  float mix, threshold;
  float* scores;  // [L]
};

// One row of `measure_attention`; its queries are those that count, at least one.
struct AttentionRow : HeldRow {
  RowQueries queries;
  const int32_t* positions;
  int64_t newest;
  bool output_error;
  float* sums;  // [L]
};

// The sentences of a request, for `sentence_similarity`. Sentence n is row `n % held` of `units`; those before `oldest`
// are no longer held, and those from `first` to `last` were not compared before.
struct SentenceRange {
  const void* units;
  Dtype dtype;
  int64_t width, held, oldest, first, last;
  float threshold;
  bool only_last;  // whether the latest similar sentence counts, or the most similar one
  float* best;     // cosine of what counts for each sentence from `oldest` on; minus infinity where nothing does
};

struct Kernels {
  const char* name;
  // Bytes of scratch that `score` needs for a row of this length; O(length).
  size_t (*score_scratch)(int64_t length, int64_t dim, int64_t window, int64_t group);
  void (*score)(const ScoreRow& row, void* scratch);
  size_t (*attention_scratch)(int64_t length, int64_t dim);
  void (*attention)(const AttentionRow& row, void* scratch);
  size_t (*cosines_scratch)(int64_t length, int64_t dim);
  // Cosine of each key of a row with the mean of their unit vectors.
  void (*cosines)(const HeldRow& row, float* cosines, void* scratch);
  // out = hidden + coefficient * vector, element by element and rounded twice, like PyTorch.
  void (*steer)(const void* hidden, float coefficient, const float* vector, void* out, Dtype dtype, int64_t n);
  // Fills `best` of the sentences from `begin` to `end`, which was minus infinity.
  void (*similar)(const SentenceRange& all, int64_t begin, int64_t end, float* scratch);
  int64_t (*similar_scratch)(int64_t width);  // in floats
  // sum += x
  void (*accumulate)(const void* x, Dtype dtype, float* sum, int64_t n);
  // out = the unit vector of sum / length; sum becomes zero.
  void (*normalise)(float* sum, float length, void* out, Dtype dtype, int64_t n);
};

namespace generic {
extern const Kernels kKernels;
}
#if defined(__x86_64__)
namespace avx2 {
extern const Kernels kKernels;
}
namespace avx512 {
extern const Kernels kKernels;
}
#endif

// The best that this processor can run, unless `limit_isa` chose less.
const Kernels& kernels();

// Use no instruction set beyond this level: 0 generic, 1 AVX2, 2 AVX-512. Returns the level in use.
int64_t limit_isa(int64_t level);

}  // namespace skipkv
