// Orders the tokens of rows by position.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace skipkv {

// `count` rows from `first` on, of which `rows_per_request` after each other belong to a request.
struct Ordering {
  const int* positions;     // [rows, n] by slot, distinct in a row
  const int* num_resident;  // [requests]
  int64_t first, count;
  int n, rows_per_request;
  int* order;  // [count, n]: the slots in ascending position, those past the length last
};

void order_by_position(const Ordering& s, cudaStream_t stream);

}  // namespace skipkv
