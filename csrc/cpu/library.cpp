// Registers the operators as `torch.ops.skipkv_cpu.*`; `skipkv_vllm/ops/native.py` loads them. Their list and their
// schemas are in `operators.h`, which csrc/generate.py writes.
#include <torch/csrc/stable/library.h>

#include "kernels.h"
#include "operators.h"

namespace skipkv {
namespace {

// Returns the bytes of scratch memory that a thread of `score_tokens` takes for a row of this length.
int64_t score_scratch(int64_t length, int64_t dim, int64_t window, int64_t group) {
  return static_cast<int64_t>(kernels().score_scratch(length, dim, window, group));
}

}  // namespace
}  // namespace skipkv

#define SKIPKV_DEFINE(name, schema) m.def(#name schema);
#define SKIPKV_IMPLEMENT(name, schema) m.impl(#name, TORCH_BOX(&skipkv::name));

STABLE_TORCH_LIBRARY(skipkv_cpu, m) {
  SKIPKV_OPERATORS(SKIPKV_DEFINE)
  m.def("limit_isa(int level) -> int");
  m.def("score_scratch(int length, int dim, int window, int group) -> int");
}

STABLE_TORCH_LIBRARY_IMPL(skipkv_cpu, CPU, m) { SKIPKV_OPERATORS(SKIPKV_IMPLEMENT) }

STABLE_TORCH_LIBRARY_IMPL(skipkv_cpu, CompositeExplicitAutograd, m) {
  m.impl("limit_isa", TORCH_BOX(&skipkv::limit_isa));
  m.impl("score_scratch", TORCH_BOX(&skipkv::score_scratch));
}
