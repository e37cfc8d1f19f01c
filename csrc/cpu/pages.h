// The layouts of vLLM's pages, which `skipkv_vllm/ops/paging.py` describes.
#pragma once

#include <cstdint>

namespace skipkv {

enum Layout : int64_t { kRows = 0, kVec = 1, kAmx = 2 };

// The pages of one layer; strides in elements.
struct Pages {
  int64_t layout, size, dim;
  int64_t page_stride, head_stride, token_stride;
  int64_t element_size;

  int64_t cell(int64_t page, int64_t head) const { return page * page_stride + head * head_stride; }
};

}  // namespace skipkv
