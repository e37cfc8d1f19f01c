// The operators; `skipkv_vllm/ops/batched.py` defines what they compute.
#pragma once

#include <optional>
#include <tuple>
#include <vector>

#include "check.h"

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

// The strides of `[pages, H, P, 2 * D]` caches with K and V side by side, in elements; all layers are alike.
struct Pages {
  const int64_t* pointers;
  int64_t page_stride, head_stride, token_stride;
  int layers, heads, size, dim;
};

// Checks the caches of all layers.
inline Pages pages_of(const std::vector<Tensor>& caches, const Tensor& pointers, int64_t layout) {
  STD_TORCH_CHECK(layout == 0, "skipkv_cuda: layout must be 0 (K and V side by side), not ", layout);
  STD_TORCH_CHECK(!caches.empty(), "skipkv_cuda: caches must not be empty");
  const Tensor& first = caches[0];
  STD_TORCH_CHECK(on_gpu(first) && first.dim() == 4 && first.size(3) % 2 == 0 && first.stride(3) == 1,
                  "skipkv_cuda: caches must be [pages, heads, page size, 2 * D] on a GPU, contiguous in the last");
  check_vector(pointers, "pointers", ScalarType::Long, static_cast<int64_t>(caches.size()));
  return {static_cast<const int64_t*>(pointers.const_data_ptr()),
          first.stride(0),
          first.stride(1),
          first.stride(2),
          static_cast<int>(caches.size()),
          static_cast<int>(first.size(1)),
          static_cast<int>(first.size(2)),
          static_cast<int>(first.size(3) / 2)};
}

// Bytes, at most 16, that all addresses and lengths of a copy are multiples of.
inline int copy_unit(std::initializer_list<int64_t> lengths, const std::vector<Tensor>& tensors) {
  for (int unit = 16; unit > 1; unit /= 2) {
    bool fits = true;
    for (int64_t length : lengths) fits = fits && length % unit == 0;
    for (const Tensor& tensor : tensors) fits = fits && reinterpret_cast<uintptr_t>(tensor.data_ptr()) % unit == 0;
    if (fits) return unit;
  }
  return 1;
}

}  // namespace skipkv
