// vLLM's pages on a GPU.
#pragma once

#include "arguments.h"

namespace skipkv {

// Members of `Layout`: K and V side by side, and latents.
constexpr int64_t kSideBySide = 0, kLatent = 3;

// Caches `[pages, H, P, 2 * D]` with K and V side by side, or `[pages, H, P, D]` of latents, all alike. Strides are in
// elements.
struct Pages {
  const int64_t* pointers;
  int64_t page_stride, head_stride, token_stride;
  int layers, heads, size, dim;
};

// Describes the caches of all layers, after checking them; for operators that read latents, too, if `latents`.
inline Pages pages_of(const std::vector<Tensor>& caches, const Tensor& pointers, int64_t layout, bool latents = false) {
  STD_TORCH_CHECK(layout == kSideBySide || (latents && layout == kLatent),
                  "skipkv_cuda: layout must be 0 (K and V side by side)", latents ? " or 3 (latents)" : "", ", not ",
                  layout);
  STD_TORCH_CHECK(!caches.empty(), "skipkv_cuda: caches must not be empty");
  const Tensor& first = caches[0];
  const int64_t vectors = layout == kLatent ? 1 : 2;
  STD_TORCH_CHECK(on_device(first) && first.dim() == 4 && first.size(3) % vectors == 0 && first.stride(3) == 1,
                  "skipkv_cuda: caches must be [pages, heads, page size, ", vectors,
                  " * D] on a GPU, contiguous in the last");
  check_vector(pointers, "pointers", ScalarType::Long, static_cast<int64_t>(caches.size()));
  return {static_cast<const int64_t*>(pointers.const_data_ptr()),
          stride_of(first, 0),
          stride_of(first, 1),
          stride_of(first, 2),
          static_cast<int>(caches.size()),
          static_cast<int>(first.size(1)),
          static_cast<int>(first.size(2)),
          static_cast<int>(first.size(3) / vectors)};
}

// Returns the largest number of bytes, at most 16, that divides all addresses and lengths of a copy.
inline int copy_unit(std::initializer_list<int64_t> lengths, const std::vector<Tensor>& tensors) {
  for (int unit = 16; unit > 1; unit /= 2) {
    bool fits = true;
    for (int64_t length : lengths) fits = fits && length % unit == 0;
    for (const Tensor& tensor : tensors) fits = fits && reinterpret_cast<uintptr_t>(tensor.data_ptr()) % unit == 0;
    if (fits) return unit;
  }
  return 1;
}

// Returns the same for vectors of `width` elements in pages.
inline int vector_unit(const Pages& pages, int64_t width, const std::vector<Tensor>& caches) {
  const int64_t element = static_cast<int64_t>(caches[0].element_size());
  return copy_unit(
      {width * element, pages.page_stride * element, pages.head_stride * element, pages.token_stride * element},
      caches);
}

}  // namespace skipkv
