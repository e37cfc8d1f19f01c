// The layouts of vLLM's pages, which `skipkv_vllm/ops/paging.py` describes.
#pragma once

#include <cstdint>

namespace skipkv {

enum Layout : int64_t { kRows = 0, kVec = 1, kAmx = 2, kLatent = 3 };

constexpr int64_t kRotated = 64;  // features of a key behind its latent

// The pages of one layer; strides in elements.
struct Pages {
  int64_t layout, size, dim;
  int64_t page_stride, head_stride, token_stride;
  int64_t element_size;
  int64_t width;      // elements of a token
  int64_t value;      // offset of a token's value in rows
  int64_t value_dim;  // elements of a value

  // Whether a token is a row: its key, and its value behind that or within it.
  bool in_rows() const { return layout == kRows || layout == kLatent; }

  int64_t cell(int64_t page, int64_t head) const { return page * page_stride + head * head_stride; }
};

}  // namespace skipkv
