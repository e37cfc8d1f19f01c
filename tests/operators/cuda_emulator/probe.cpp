// Shows tests what results cannot: how many bytes at a time the operators move.
#include "pages.h"

namespace skipkv {
namespace {

int64_t cell_unit(const std::vector<Tensor>& caches, const Tensor& pointers) {
  const Pages pages = pages_of(caches, pointers, 0);
  return vector_unit(pages, 2 * pages.dim, caches);
}

}  // namespace
}  // namespace skipkv

STABLE_TORCH_LIBRARY(skipkv_cuda_probe, m) { m.def("cell_unit(Tensor[] caches, Tensor pointers) -> int"); }

STABLE_TORCH_LIBRARY_IMPL(skipkv_cuda_probe, CPU, m) { m.impl("cell_unit", TORCH_BOX(&skipkv::cell_unit)); }
