// Checks of arguments, and small views of tensors.
#pragma once

#include <vector>

#include "device.h"
#include "kernels.h"

#include "common/check.h"

namespace skipkv {

inline Dtype float_type(const Tensor& tensor, const char* name) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return Dtype::kFloat32;
    case ScalarType::BFloat16:
      return Dtype::kBFloat16;
    case ScalarType::Half:
      return Dtype::kFloat16;
    default:
      STD_TORCH_CHECK(false, "skipkv_cpu: ", name, " must be float32, bfloat16 or float16");
  }
}

inline KeyType key_type(const Tensor& cache) {
  switch (cache.scalar_type()) {
    case ScalarType::Float:
      return KeyType::kFloat32;
    case ScalarType::BFloat16:
      return KeyType::kBFloat16;
    case ScalarType::Half:
      return KeyType::kFloat16;
    case ScalarType::Float8_e4m3fn:
      return KeyType::kFloat8E4M3;
    case ScalarType::Float8_e5m2:
      return KeyType::kFloat8E5M2;
    default:
      STD_TORCH_CHECK(false, "skipkv_cpu: caches to score must be float32, bfloat16, float16, float8_e4m3fn or "
                             "float8_e5m2");
  }
}

// The token ids of a step, int32 or int64 as the model runner has them.
class TokenIds {
 public:
  explicit TokenIds(const Tensor& ids)
      : data_(ids.const_data_ptr()), size_(ids.numel()), narrow_(ids.scalar_type() == ScalarType::Int) {
    STD_TORCH_CHECK(ids.is_cpu() && ids.dim() == 1 && ids.is_contiguous() &&
                        (narrow_ || ids.scalar_type() == ScalarType::Long),
                    "skipkv_cpu: token_ids must be contiguous int32 or int64 [tokens] on the CPU");
  }

  int64_t size() const { return size_; }

  // Returns token i, which must be below the size of the vocabulary.
  int64_t at(int64_t i, int64_t vocabulary) const {
    const int64_t id = narrow_ ? static_cast<const int32_t*>(data_)[i] : static_cast<const int64_t*>(data_)[i];
    STD_TORCH_CHECK(id >= 0 && id < vocabulary, "skipkv_cpu: token id ", id, " of ", vocabulary);
    return id;
  }

 private:
  const void* data_;
  int64_t size_;
  bool narrow_;
};

// The caches of all layers and how they are packed.
struct Caches {
  Pages pages;
  int64_t num_pages, heads;
  std::vector<char*> layers;

  Caches(const std::vector<Tensor>& caches, int64_t layout) {
    STD_TORCH_CHECK(!caches.empty(), "skipkv_cpu: caches must not be empty");
    const Tensor& first = caches[0];
    const bool latent = layout == kLatent;
    STD_TORCH_CHECK(first.is_cpu() && first.dim() == 4 && (latent ? first.size(3) > kRotated : first.size(3) % 2 == 0),
                    "skipkv_cpu: caches must be [pages, heads, page size, 2 * D] on the CPU, or D of latents");
    STD_TORCH_CHECK(first.stride(3) == 1, "skipkv_cpu: the last dimension of caches must be contiguous");
    STD_TORCH_CHECK(layout >= kRows && layout <= kLatent, "skipkv_cpu: layout must be 0 to 3, not ", layout);
    num_pages = first.size(0);
    heads = first.size(1);
    const int64_t width = first.size(3), dim = latent ? width : width / 2;
    pages = {layout,
             first.size(2),
             dim,
             first.stride(0),
             first.stride(1),
             first.stride(2),
             static_cast<int64_t>(first.element_size()),
             width,
             latent ? 0 : dim,
             latent ? dim - kRotated : dim};
    if (!pages.in_rows()) {
      STD_TORCH_CHECK(pages.token_stride == 2 * pages.dim || pages.size == 1,
                      "skipkv_cpu: cells of packed pages must be contiguous");
    }
    if (layout == kAmx) {
      STD_TORCH_CHECK(pages.size % 16 == 0 && pages.dim % 16 == 0,
                      "skipkv_cpu: page size and head size of the AMX layout must be multiples of 16");
    }
    for (const Tensor& cache : caches) {
      bool same = cache.scalar_type() == first.scalar_type() && cache.dim() == 4;
      for (int64_t i = 0; same && i < 4; ++i) {
        same = cache.size(i) == first.size(i) && cache.stride(i) == first.stride(i);
      }
      STD_TORCH_CHECK(same, "skipkv_cpu: caches must be alike in shape, dtype and strides");
      layers.push_back(static_cast<char*>(cache.mutable_data_ptr()));
    }
  }

  int64_t num_layers() const { return static_cast<int64_t>(layers.size()); }
};

// Checks that the first `used` ids of a table are pages of the cache; a wrong one would reach foreign memory.
inline void check_table(const int32_t* row, int64_t width, int64_t used, int64_t num_pages, const char* name) {
  STD_TORCH_CHECK(used <= width, "skipkv_cpu: ", name, " has ", width, " pages; ", used, " are needed");
  for (int64_t i = 0; i < used; ++i) {
    STD_TORCH_CHECK(row[i] >= 0 && row[i] < num_pages, "skipkv_cpu: ", name, " names page ", row[i], " of ", num_pages);
  }
}

}  // namespace skipkv
