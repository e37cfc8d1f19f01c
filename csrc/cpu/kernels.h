// The arithmetic that gains from wide vectors. It is compiled once per instruction set and chosen at run time.
//
// These translation units use no templates and no inline functions of the standard library. The linker keeps one copy
// of each such function, and that copy must not contain instructions that the processor may lack.
#pragma once

#include <cstddef>
#include <cstdint>

#include "pages.h"

#include "common/effects.h"

namespace skipkv {

enum class Dtype : int { kFloat32, kBFloat16, kFloat16 };
// Caches may also have elements of 8 bits.
enum class KeyType : int { kFloat32, kBFloat16, kFloat16, kFloat8E4M3, kFloat8E5M2 };

// The resident tokens of a row, which is a layer and kv head of a request. L = length.
struct HeldRow {
  const Pages* pages;
  const void* cache;
  KeyType type;
  int64_t head;
  const int32_t* table;
  int64_t length;
};

// Queries of a row, from the first query head of the group on; float32 for 8-bit caches, else in the cache's dtype.
struct RowQueries {
  const void* data;  // [number, Hq, D]
  int64_t number, group, stride;
};

// One row of `score_tokens`.
struct ScoreRow : HeldRow {
  RowQueries queries;  // of the window
  const int32_t* positions;
  const float* penalty;  // or null
  int64_t pool;
  float mix, threshold;
  float* scores;  // [L]
};

// One row of `measure_attention`, with at least one query that counts; `queries` are those.
struct AttentionRow : HeldRow {
  RowQueries queries;
  const int32_t* positions;
  int64_t newest;
  const float* sinks;  // [group], logits; or null
  Effect effect;
  float log_negligible;  // the logarithm of the share
  float* sums;           // [L]
};

// One row of `vector_norms`.
struct NormsRow : HeldRow {
  const int32_t* positions;
  bool values;
  int64_t norm, part;
  const float* weights;  // [L] or null
  float* norms;          // [L]
};

// One row of `pool_neighbours`; L = length.
struct PoolRow {
  const float* scores;
  const int32_t* positions;
  int64_t length, window, pool;
  float* pooled;  // [L]
};

// One row of `central_tokens`, with S = `segments`.
struct CentralRow : HeldRow {
  const int32_t* positions;
  const int32_t* quota;  // [S]
  int64_t segments, begin, end, longest;
  bool* chosen;  // [L]
};

// The sentences of a request, for `sentence_similarity`. Sentence n is row `n % held` of `units`. Sentences before
// `oldest` have been overwritten; those from `first` to `last` have not been compared yet.
struct SentenceRange {
  const void* units;
  Dtype dtype;
  int64_t width, held, oldest, first, last;
  float threshold;
  bool only_last;  // the latest similar sentence counts instead of the most similar one
  float* best;     // the cosine that counts for each sentence from `oldest` on, else minus infinity
};

struct Kernels {
  const char* name;
  // Returns the bytes of scratch that `score` needs for a row; O(length).
  size_t (*score_scratch)(int64_t length, int64_t dim, int64_t window, int64_t group);
  void (*score)(const ScoreRow& row, void* scratch);
  size_t (*attention_scratch)(int64_t length, int64_t dim);
  void (*attention)(const AttentionRow& row, void* scratch);
  size_t (*cosines_scratch)(int64_t length, int64_t dim);
  // Computes the cosine of each key of a row with the mean of their unit vectors.
  void (*cosines)(const HeldRow& row, float* cosines, void* scratch);
  size_t (*norms_scratch)(int64_t length, int64_t dim);
  void (*norms)(const NormsRow& row, void* scratch);
  size_t (*pool_scratch)(int64_t length);
  void (*pool)(const PoolRow& row, void* scratch);
  size_t (*central_scratch)(int64_t length, int64_t dim);
  void (*central)(const CentralRow& row, void* scratch);
  // out = hidden + coefficient * vector, element by element and rounded twice, like PyTorch.
  void (*steer)(const void* hidden, float coefficient, const float* vector, void* out, Dtype dtype, int64_t n);
  // out = x * scale, x of 8 bits; rounded to `to`.
  void (*dequantise)(const void* x, KeyType type, float scale, void* out, Dtype to, int64_t n);
  // Fills `best`, minus infinity before, of the sentences from `begin` to `end`.
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

// Returns the fastest table that this processor can run and `limit_isa` allows.
const Kernels& kernels();

// Uses no instruction set beyond this level: 0 generic, 1 AVX2, 2 AVX-512. Returns the level in use.
int64_t limit_isa(int64_t level);

}  // namespace skipkv
