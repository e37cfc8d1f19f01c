// `held_positions` and `token_penalties`: the positions and the penalties of resident tokens.
#include "arguments.h"
#include "operators.h"

#include <algorithm>
#include <cstring>

namespace skipkv {
namespace {

// Returns how many rows of n numbers are worth a thread.
int64_t grain(int64_t n) { return std::max<int64_t>(1, 16384 / std::max<int64_t>(1, n)); }

}  // namespace

Tensor held_positions(const Tensor& sidecar, const Tensor& table, const Tensor& num_placed, const Tensor& num_evicted,
                      int64_t length) {
  check(sidecar, "sidecar", ScalarType::Int, {-1, -1, -1, -1});
  STD_TORCH_CHECK(sidecar.is_contiguous(), "skipkv_cpu: sidecar must be contiguous");
  STD_TORCH_CHECK(length >= 0, "skipkv_cpu: length=", length, " must not be negative");
  check(table, "table", ScalarType::Int, {-1, -1});
  const int64_t requests = table.size(0), width = table.size(1);
  check(num_placed, "num_placed", ScalarType::Int, {requests});
  check(num_evicted, "num_evicted", ScalarType::Int, {requests});
  const int64_t layers = sidecar.size(0), num_pages = sidecar.size(1), heads = sidecar.size(2), size = sidecar.size(3);
  const Tensor tables = packed(table), all_placed = packed(num_placed), all_evicted = packed(num_evicted);
  const int32_t *const ids = tables.const_data_ptr<int32_t>(), *const placed = all_placed.const_data_ptr<int32_t>();
  const int32_t* const evicted = all_evicted.const_data_ptr<int32_t>();
  const auto stored = [&](int64_t r) { return std::min<int64_t>(std::max<int32_t>(placed[r], 0), length); };
  for (int64_t r = 0; r < requests; ++r) {
    check_table(ids + r * width, width, (stored(r) + size - 1) / size, num_pages, "table");
  }
  Tensor positions = torch::stable::new_empty(sidecar, {requests, layers, heads, length});
  const int32_t* const entries = sidecar.const_data_ptr<int32_t>();
  int32_t* const out = positions.mutable_data_ptr<int32_t>();
  torch::stable::parallel_for(0, requests * layers * heads, grain(length), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const int64_t r = row / (layers * heads), layer = row / heads % layers, head = row % heads, moved = stored(r);
      int32_t* const to = out + row * length;
      for (int64_t first = 0; first < moved; first += size) {
        const int64_t page = ids[r * width + first / size];
        std::memcpy(to + first, entries + ((layer * num_pages + page) * heads + head) * size,
                    static_cast<size_t>(std::min(size, moved - first)) * sizeof(int32_t));
      }
      for (int64_t slot = moved; slot < length; ++slot) to[slot] = static_cast<int32_t>(slot) + evicted[r];
    }
  });
  return positions;
}

Tensor token_penalties(const Tensor& ends, const Tensor& penalties, const Tensor& first, const Tensor& rows,
                       const Tensor& positions) {
  check(ends, "ends", ScalarType::Int, {-1, -1});
  const int64_t num_rows = ends.size(0), most = ends.size(1);
  check(penalties, "penalties", ScalarType::Float, {num_rows, most});
  check(first, "first", ScalarType::Long, {num_rows});
  check(rows, "rows", ScalarType::Long, {-1});
  const int64_t requests = rows.size(0);
  check(positions, "positions", ScalarType::Int, {requests, -1, -1, -1});
  STD_TORCH_CHECK(ends.is_contiguous() && penalties.is_contiguous() && most > 0,
                  "skipkv_cpu: ends and penalties must be contiguous");
  const Tensor all_positions = packed(positions), all_rows = packed(rows), firsts = packed(first);
  const int64_t lines = positions.size(1) * positions.size(2), length = positions.size(3);
  const int32_t* const position = all_positions.const_data_ptr<int32_t>();
  const int64_t* const row_of = all_rows.const_data_ptr<int64_t>();
  Tensor out = torch::stable::new_empty(positions, {requests, positions.size(1), positions.size(2), length},
                                        ScalarType::Float);
  float* const to = out.mutable_data_ptr<float>();
  std::vector<float> by_position;
  for (int64_t r = 0; r < requests; ++r) {
    const int64_t row = row_of[r];
    STD_TORCH_CHECK(row >= 0 && row < num_rows, "skipkv_cpu: row ", row, " of ", num_rows);
    const int32_t* const end = ends.const_data_ptr<int32_t>() + row * most;
    const float* const penalty = penalties.const_data_ptr<float>() + row * most;
    const int64_t begins = firsts.const_data_ptr<int64_t>()[row];
    const int32_t* const held = position + r * lines * length;
    // Rows have mostly the same positions, so the penalty of each position is looked up once. Entries past a request's
    // tokens may be any number.
    int64_t longest = 0;
    for (int64_t i = 0; i < lines * length; ++i) longest = std::max<int64_t>(longest, held[i] + int64_t{1});
    by_position.assign(std::min(longest, most), 0.0f);
    int64_t number = 0;
    for (int64_t p = std::max<int64_t>(begins, 0); p < static_cast<int64_t>(by_position.size()); ++p) {
      while (number + 1 < most && end[number] < p) ++number;
      by_position[p] = penalty[number];
    }
    const int64_t known = static_cast<int64_t>(by_position.size());
    torch::stable::parallel_for(0, lines, grain(length), [&](int64_t begin_line, int64_t end_line) {
      for (int64_t i = begin_line * length; i < end_line * length; ++i) {
        to[r * lines * length + i] = held[i] >= 0 && held[i] < known ? by_position[held[i]] : 0.0f;
      }
    });
  }
  return out;
}

}  // namespace skipkv
