// `record_queries` and `steer_add`, which run at every step and layer.
#include "arguments.h"
#include "operators.h"

#include <algorithm>
#include <cstring>
#include <vector>

namespace skipkv {

namespace {

bool is_narrow(const Tensor& tensor) {
  return tensor.scalar_type() == ScalarType::Float8_e4m3fn || tensor.scalar_type() == ScalarType::Float8_e5m2;
}

// Returns the scale of each query head.
std::vector<float> head_scales(const Tensor& scale, int64_t heads) {
  STD_TORCH_CHECK(scale.is_cpu() && scale.scalar_type() == ScalarType::Float,
                  "skipkv_cpu: scale must be float32 on the CPU");
  const int64_t number = scale.numel();
  STD_TORCH_CHECK(number > 0 && heads % number == 0, "skipkv_cpu: ", heads, " query heads do not share ", number,
                  " scales");
  const Tensor all = packed(scale);
  std::vector<float> scales(heads);
  for (int64_t h = 0; h < heads; ++h) scales[h] = all.const_data_ptr<float>()[h / (heads / number)];
  return scales;
}

}  // namespace

void record_queries(const Tensor& query, const Tensor& index, const Tensor& ring, const std::optional<Tensor>& scale) {
  STD_TORCH_CHECK(query.dim() == 3 && query.is_cpu(), "skipkv_cpu: query must be [tokens, heads, D] on the CPU");
  const int64_t tokens = query.size(0), heads = query.size(1), dim = query.size(2);
  const bool narrow = is_narrow(query);
  check(ring, "ring", narrow ? ring.scalar_type() : query.scalar_type(), {-1, heads, dim});
  check(index, "index", ScalarType::Long, {-1});
  STD_TORCH_CHECK(index.size(0) >= tokens, "skipkv_cpu: index has ", index.size(0), " rows; ", tokens, " are needed");
  STD_TORCH_CHECK(ring.stride(2) == 1 && index.stride(0) == 1, "skipkv_cpu: ring and index must be contiguous");
  STD_TORCH_CHECK(narrow == scale.has_value(), "skipkv_cpu: queries of 8 bits, and only they, have a scale");
  const Dtype dtype = float_type(ring, "ring");
  const std::vector<float> scales = narrow ? head_scales(*scale, heads) : std::vector<float>();
  const Tensor from = query.stride(2) == 1 ? query : torch::stable::contiguous(query);
  const int64_t size = static_cast<int64_t>(query.element_size()), num_rows = ring.size(0);
  const int64_t own_size = static_cast<int64_t>(ring.element_size());
  const char* const source = static_cast<const char*>(from.const_data_ptr());
  char* const target = static_cast<char*>(ring.mutable_data_ptr());
  const int64_t* const to_row = index.const_data_ptr<int64_t>();
  const bool whole = !narrow && from.stride(1) == dim && ring.stride(1) == dim;
  const int64_t pieces = whole ? 1 : heads, elements = (whole ? heads : 1) * dim;
  const Kernels& kernel = kernels();
  for (int64_t t = 0; t < tokens; ++t) {
    STD_TORCH_CHECK(to_row[t] >= 0 && to_row[t] < num_rows, "skipkv_cpu: index names row ", to_row[t], " of ",
                    num_rows);
    // Nobody reads the last row.
    if (to_row[t] == num_rows - 1) continue;
    for (int64_t h = 0; h < pieces; ++h) {
      const char* const x = source + (t * from.stride(0) + h * from.stride(1)) * size;
      char* const y = target + (to_row[t] * ring.stride(0) + h * ring.stride(1)) * own_size;
      if (narrow) {
        kernel.dequantise(x, key_type(query), scales[h], y, dtype, elements);
      } else {
        std::memcpy(y, x, elements * size);
      }
    }
  }
}

Tensor steer_add(const Tensor& hidden, const Tensor& coefficient, const Tensor& choice, const Tensor& vectors) {
  STD_TORCH_CHECK(hidden.dim() == 2 && hidden.is_cpu(), "skipkv_cpu: hidden must be [tokens, E] on the CPU");
  const int64_t tokens = hidden.size(0), width = hidden.size(1);
  const Dtype dtype = float_type(hidden, "hidden");
  check(coefficient, "coefficient", ScalarType::Float, {-1});
  check(choice, "choice", ScalarType::Int, {-1});
  check(vectors, "vectors", ScalarType::Float, {-1, width});
  STD_TORCH_CHECK(coefficient.size(0) >= tokens && choice.size(0) >= tokens,
                  "skipkv_cpu: coefficient and choice must have an entry for each token");
  const Tensor from = hidden.stride(1) == 1 ? hidden : torch::stable::contiguous(hidden);
  const Tensor directions = packed(vectors), strengths = packed(coefficient), all_choices = packed(choice);
  Tensor out = torch::stable::new_empty(hidden, {tokens, width});
  const int64_t size = static_cast<int64_t>(hidden.element_size()), stride = from.stride(0);
  const char* const source = static_cast<const char*>(from.const_data_ptr());
  char* const target = static_cast<char*>(out.mutable_data_ptr());
  const float *const strength = strengths.const_data_ptr<float>(), *const vector = directions.const_data_ptr<float>();
  const int32_t* const chosen = all_choices.const_data_ptr<int32_t>();
  for (int64_t t = 0; t < tokens; ++t) {
    STD_TORCH_CHECK(chosen[t] >= 0 && chosen[t] < vectors.size(0), "skipkv_cpu: choice names vector ", chosen[t],
                    " of ", vectors.size(0));
  }
  const Kernels& kernel = kernels();
  torch::stable::parallel_for(0, tokens, std::max<int64_t>(1, 32768 / std::max<int64_t>(1, width)),
                              [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const char* const x = source + t * stride * size;
      char* const y = target + t * width * size;
      if (chosen[t] == 0) {
        std::memcpy(y, x, width * size);
      } else {
        kernel.steer(x, strength[t], vector + chosen[t] * width, y, dtype, width);
      }
    }
  });
  return out;
}

}  // namespace skipkv
