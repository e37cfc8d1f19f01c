// The operators; `skipkv_vllm/ops/batched.py` defines what they compute.
#pragma once

#include <tuple>
#include <vector>

#include "arguments.h"

namespace skipkv {

Tensor score_tokens(const std::vector<Tensor>& caches, const Tensor& pointers, int64_t layout, const Tensor& table,
                    const Tensor& positions, const Tensor& num_resident, const Tensor& queries,
                    const std::optional<Tensor>& penalty, int64_t pool, double mix, double threshold);

Tensor measure_attention(const std::vector<Tensor>& caches, const Tensor& pointers, int64_t layout, const Tensor& table,
                         const Tensor& positions, const Tensor& num_resident, const Tensor& queries,
                         const Tensor& num_queries, const Tensor& newest, bool output_error);

Tensor key_similarity(const std::vector<Tensor>& caches, const Tensor& pointers, int64_t layout, const Tensor& table,
                      const Tensor& num_resident, int64_t length);

std::tuple<Tensor, Tensor, Tensor> select_keep(const Tensor& scores, const Tensor& positions,
                                               const Tensor& num_resident, const Tensor& num_keep,
                                               const Tensor& pin_below, const Tensor& pin_from, int64_t max_moves);

void compact_pages(const std::vector<Tensor>& caches, const Tensor& pointers, int64_t layout, const Tensor& sidecar,
                   const Tensor& positions, const Tensor& source_table, const Tensor& target_table,
                   const Tensor& num_keep, const Tensor& source, const Tensor& hole, const Tensor& count);

void track_sentences(const Tensor& token_ids, const std::optional<Tensor>& hidden, const Tensor& spans,
                     int64_t num_tokens, const Tensor& delimiters, bool merge, const Tensor& ends, const Tensor& count,
                     const Tensor& after_delimiter, const Tensor& open_length, const Tensor& open_sum,
                     const Tensor& embeddings, const Tensor& text);

void sentence_similarity(const Tensor& embeddings, const Tensor& slots, const Tensor& count, const Tensor& compared,
                         const Tensor& penalties, double threshold, int64_t rule);

Tensor held_positions(const Tensor& sidecar, const Tensor& table, const Tensor& num_placed, const Tensor& num_evicted,
                      int64_t length);

Tensor token_penalties(const Tensor& ends, const Tensor& penalties, const Tensor& first, const Tensor& slots,
                       const Tensor& positions);

void observe_queries(const Tensor& query, const Tensor& index, const Tensor& rows);

void track_thoughts(const Tensor& token_ids, const Tensor& spans, const Tensor& vocabulary, const Tensor& keywords,
                    bool merge, int64_t interval, const Tensor& strengths, const Tensor& state, int64_t written,
                    const Tensor& row, const Tensor& coefficient);

Tensor steer_add(const Tensor& hidden, const Tensor& coefficient, const Tensor& row, const Tensor& vectors);

// Bytes of scratch memory that a thread of `score_tokens` takes for a row of this length.
int64_t score_scratch(int64_t length, int64_t dim, int64_t window, int64_t group);

}  // namespace skipkv
