// Shared by the operators that read keys and values, row by row. A row is a layer and kv head of a request.
#pragma once

#include <algorithm>

#include "arguments.h"

namespace skipkv {

// The resident tokens of R requests.
class Held {
 public:
  // Checks that each request has more resident tokens than a window, and at most `most`.
  Held(const std::vector<Tensor>& caches, int64_t layout, const Tensor& table, const Tensor& num_resident,
       int64_t window, int64_t most)
      : caches_(caches, layout), type_(key_type(caches[0])) {
    check(num_resident, "num_resident", ScalarType::Int, {-1});
    requests_ = num_resident.size(0);
    check(table, "table", ScalarType::Int, {requests_, -1});
    table_ = packed(table);
    lengths_ = packed(num_resident);
    for (int64_t r = 0; r < requests_; ++r) {
      const int64_t length = this->length(r), width = table.size(1);
      STD_TORCH_CHECK(window < length && length <= most, "skipkv_cpu: num_resident=", length, " must be above ",
                      window > 0 ? "the window of " : "", window, " and at most ", most);
      check_table(pages_of(r), width, (length + caches_.pages.size - 1) / caches_.pages.size, caches_.num_pages,
                  "table");
      longest_ = std::max(longest_, length);
    }
  }

  int64_t requests() const { return requests_; }
  int64_t layers() const { return caches_.num_layers(); }
  int64_t heads() const { return caches_.heads; }
  int64_t dim() const { return caches_.pages.dim; }
  int64_t rows() const { return requests_ * layers() * heads(); }
  int64_t longest() const { return longest_; }
  int64_t request(int64_t row) const { return row / (layers() * heads()); }

  HeldRow row(int64_t row) const {
    const int64_t r = request(row);
    return {&caches_.pages, caches_.layers[row / heads() % layers()], type_, row % heads(), pages_of(r), length(r)};
  }

 private:
  int64_t length(int64_t r) const { return lengths_.const_data_ptr<int32_t>()[r]; }
  const int32_t* pages_of(int64_t r) const { return table_.const_data_ptr<int32_t>() + r * table_.size(1); }

  Caches caches_;
  KeyType type_;
  Tensor table_, lengths_;
  int64_t requests_, longest_ = 0;
};

// Queries `[R, L, n, Hq, D]`, in the dtype of the caches; float32 for caches of 8 bits.
class Queries {
 public:
  Queries(const Tensor& queries, const Tensor& cache, const Held& held)
      : all_(packed(queries)), heads_(held.heads()), size_(static_cast<int64_t>(queries.element_size())) {
    check(queries, "queries", cache.element_size() == 1 ? ScalarType::Float : cache.scalar_type(),
          {held.requests(), held.layers(), -1, -1, held.dim()});
    STD_TORCH_CHECK(queries.size(3) % heads_ == 0, "skipkv_cpu: ", queries.size(3), " query heads do not share ",
                    heads_, " kv heads");
  }

  int64_t number() const { return all_.size(2); }
  int64_t group() const { return all_.size(3) / heads_; }

  // Returns the last `number` queries of a row.
  RowQueries last(int64_t row, int64_t number) const {
    const int64_t dim = all_.size(4), stride = all_.size(3) * dim;
    const int64_t first = (row / heads_ * all_.size(2) + all_.size(2) - number) * stride;
    const char* const data = static_cast<const char*>(all_.const_data_ptr());
    return {data + (first + row % heads_ * group() * dim) * size_, number, group(), stride};
  }

 private:
  Tensor all_;
  int64_t heads_, size_;
};

}  // namespace skipkv
