// The functions that are compiled once per instruction set; kernels.cpp puts them into the table of `kernels.h`, which
// also documents them.
#pragma once

#include "kernels.h"

namespace skipkv {
namespace SKIPKV_ISA {

// score_tokens_row.cpp
size_t score_scratch(int64_t length, int64_t dim, int64_t window, int64_t group);
void score(const ScoreRow& row, void* scratch);
// measure_attention_row.cpp
size_t attention_scratch(int64_t length, int64_t dim);
void attention(const AttentionRow& row, void* scratch);
size_t cosines_scratch(int64_t length, int64_t dim);
void cosines(const HeldRow& row, float* cosines, void* scratch);
// vector_norms_row.cpp
size_t norms_scratch(int64_t length, int64_t dim);
void norms(const NormsRow& row, void* scratch);
// pool_neighbours_row.cpp
size_t pool_scratch(int64_t length);
void pool(const PoolRow& row, void* scratch);
// central_tokens_row.cpp
size_t central_scratch(int64_t length, int64_t dim);
void central(const CentralRow& row, void* scratch);
// sentence_similarity_rows.cpp
int64_t similar_scratch(int64_t width);
void similar(const SentenceRange& all, int64_t begin, int64_t end, float* scratch);
// token_vectors.cpp
void steer(const void* hidden, float coefficient, const float* vector, void* out, Dtype dtype, int64_t n);
void dequantise(const void* x, KeyType type, float scale, void* out, Dtype to, int64_t n);
void accumulate(const void* x, Dtype dtype, float* sum, int64_t n);
void normalise(float* sum, float length, void* out, Dtype dtype, int64_t n);

}  // namespace SKIPKV_ISA
}  // namespace skipkv
