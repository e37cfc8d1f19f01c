// Shared by the operators that read keys and values. A row is one (request, layer, kv head), numbered in this order.
#pragma once

#include <cuda_runtime.h>

#include "device.cuh"
#include "pages.h"

#include "common/epsilon.h"

namespace skipkv {

constexpr int kMaxDim = 256;
// Scratch memory of a launch; more rows take several launches.
constexpr int64_t kScratchBytes = int64_t{256} << 20;

// The types that go with keys of type T: that of the queries, and the one that tensor cores multiply.
template <class T>
struct Types {
  using Query = T;
  using Factor = T;
};
template <>
struct Types<__nv_fp8_e4m3> {
  using Query = float;
  using Factor = __half;
};
template <>
struct Types<__nv_fp8_e5m2> {
  using Query = float;
  using Factor = __half;
};

struct Row {
  int request, layer, head;
};

__device__ inline Row row_of(const Pages& pages, int64_t row) {
  const int64_t heads = pages.heads, layers = pages.layers;
  return {static_cast<int>(row / (layers * heads)), static_cast<int>(row / heads % layers),
          static_cast<int>(row % heads)};
}

template <class T>
__device__ const T* head_pages(const Pages& pages, const Row& row) {
  return reinterpret_cast<const T*>(pages.pointers[row.layer]) + row.head * pages.head_stride;
}

// Returns the offset from `head_pages` to the key of a cell (page * size + offset in the page), in elements.
__device__ inline int64_t cell_offset(const Pages& pages, int cell) {
  return cell / pages.size * pages.page_stride + cell % pages.size * pages.token_stride;
}

// Returns the cell of a slot, by its request's page table.
__device__ inline int cell_of(const Pages& pages, const int* table, int slot) {
  return table[slot / pages.size] * pages.size + slot % pages.size;
}

// Copies the vectors of `number` cells to rows of shared memory as floats, with zeros past `dim` and for negative
// cells; called by all THREADS of a block. `from` is `head_pages` for keys and `head_pages` + D for values. With
// `vectors`, reads have 16 bytes.
template <int THREADS, class T>
__device__ void load_cells(const Pages& pages, const T* from, const int* cells, int number, bool vectors, float* to,
                           int stride) {
  const int dim = pages.dim, thread = static_cast<int>(threadIdx.x);
  if (vectors) {
    // D is a multiple of a chunk, so there is no padding.
    constexpr int kChunk = Chunk<T>::kSize;
    const int chunks = dim / kChunk;
#pragma unroll 4
    for (int i = thread; i < number * chunks; i += THREADS) {
      const int k = i / chunks, d = i % chunks * kChunk;
      Chunk<T> chunk = {};
      if (cells[k] >= 0) chunk = read_chunk(from + cell_offset(pages, cells[k]) + d);
#pragma unroll
      for (int e = 0; e < kChunk; e += 4) {
        *reinterpret_cast<float4*>(to + k * stride + d + e) =
            make_float4(to_float(chunk.values[e]), to_float(chunk.values[e + 1]), to_float(chunk.values[e + 2]),
                        to_float(chunk.values[e + 3]));
      }
    }
    return;
  }
  const int padded = (dim + 3) / 4 * 4;
  for (int i = thread; i < number * padded; i += THREADS) {
    const int k = i / padded, d = i % padded;
    to[k * stride + d] = cells[k] >= 0 && d < dim ? to_float(from[cell_offset(pages, cells[k]) + d]) : 0.0f;
  }
}

// Returns whether pages allow reads of 16 bytes.
inline bool in_chunks(const Pages& pages, const std::vector<Tensor>& caches) {
  return vector_unit(pages, pages.dim, caches) == 16;
}

// Calls `work` with an element of the type of the caches.
template <class Work>
void with_type(ScalarType type, const Work& work) {
  if (type == ScalarType::Float) {
    work(float{});
  } else if (type == ScalarType::Half) {
    work(__half{});
  } else if (type == ScalarType::Float8_e4m3fn) {
    work(__nv_fp8_e4m3{});
  } else if (type == ScalarType::Float8_e5m2) {
    work(__nv_fp8_e5m2{});
  } else {
    work(__nv_bfloat16{});
  }
}

inline bool is_narrow(ScalarType type) {
  return type == ScalarType::Float8_e4m3fn || type == ScalarType::Float8_e5m2;
}

// Checks that kernels can read keys of this type.
inline void check_keys(const Pages& pages, ScalarType type) {
  STD_TORCH_CHECK(is_narrow(type) || type == ScalarType::Float || type == ScalarType::Half ||
                      type == ScalarType::BFloat16,
                  "skipkv_cuda: scoring reads float32, float16, bfloat16, float8_e4m3fn or float8_e5m2 caches, not ",
                  torch::headeronly::toString(type));
  STD_TORCH_CHECK(pages.dim <= kMaxDim, "skipkv_cuda: head size must be at most ", kMaxDim, ", not ", pages.dim);
}

// Checks queries `[R, L, n, Hq, D]` for these caches.
inline void check_queries(const Tensor& queries, const Pages& pages, ScalarType type, int64_t requests) {
  check(queries, "queries", is_narrow(type) ? ScalarType::Float : type, {requests, pages.layers, -1, -1, pages.dim});
  STD_TORCH_CHECK(queries.size(3) % pages.heads == 0, "skipkv_cuda: ", queries.size(3),
                  " query heads are no multiple of ", pages.heads, " kv heads");
}

inline void check_table(const Tensor& table, int64_t requests) {
  check(table, "table", ScalarType::Int, {requests, -1});
  STD_TORCH_CHECK(table.stride(1) == 1 || table.size(1) <= 1, "skipkv_cuda: rows of table must be contiguous");
}

}  // namespace skipkv
