// `compact_pages`: moves the kept tokens to the front of their request's pages, in place.
#include "arguments.h"
#include "operators.h"
#include "parallel.h"

#include <cstring>

namespace skipkv {
namespace {

// Copies `n` elements between cells whose elements lie `stride` apart.
template <class T>
inline void copy_strided(const T* from, T* to, int64_t n, int64_t stride) {
  for (int64_t i = 0; i < n; ++i) to[i * stride] = from[i * stride];
}

// Moves the token at `from_offset` of one cell to `to_offset` of another.
template <class T>
inline void move_token(const Pages& p, const T* from, int64_t from_offset, T* to, int64_t to_offset) {
  const int64_t dim = p.dim;
  if (p.in_rows()) {
    std::memcpy(to + to_offset * p.token_stride, from + from_offset * p.token_stride, p.width * sizeof(T));
  } else if (p.layout == kVec) {
    copy_strided(from + from_offset, to + to_offset, dim, p.size);
    const int64_t values = p.size * dim;
    std::memcpy(to + values + to_offset * dim, from + values + from_offset * dim, dim * sizeof(T));
  } else {
    // Keys: pairs along D, 16 tokens apart. Values: 16 features of a pair of tokens, then the next 16.
    const T* k_from = from + from_offset / 16 * 16 * dim + from_offset % 16 * 2;
    T* k_to = to + to_offset / 16 * 16 * dim + to_offset % 16 * 2;
    for (int64_t d = 0; d < dim; d += 2, k_from += 32, k_to += 32) std::memcpy(k_to, k_from, 2 * sizeof(T));
    const int64_t values = p.size * dim;
    const T* v_from = from + values + from_offset / 2 * 32 + from_offset % 2;
    T* v_to = to + values + to_offset / 2 * 32 + to_offset % 2;
    for (int64_t d = 0; d < dim; d += 16, v_from += 16 * p.size, v_to += 16 * p.size) copy_strided(v_from, v_to, 16, 2);
  }
}

// Copies a head's part of a page.
inline void copy_cell(const Pages& p, const char* from, char* to) {
  const int64_t row = p.width * p.element_size, stride = p.token_stride * p.element_size;
  if (stride == row) {
    std::memcpy(to, from, p.size * row);
  } else {
    for (int64_t t = 0; t < p.size; ++t) std::memcpy(to + t * stride, from + t * stride, row);
  }
}

// The compaction of one row.
struct Job {
  const int32_t *source_table, *target_table, *positions;
  int64_t keep;
  const int32_t *source, *hole;
  int64_t moves;
};

template <class T>
void move_tokens(const Pages& p, const Job& job, T* layer, int64_t head) {
  for (int64_t m = 0; m < job.moves; ++m) {
    const int64_t s = job.source[m], h = job.hole[m];
    const T* const from = layer + p.cell(job.source_table[s / p.size], head);
    T* const to = layer + p.cell(job.target_table[h / p.size], head);
    move_token(p, from, s % p.size, to, h % p.size);
  }
}

void compact_head(const Pages& p, const Job& job, char* layer, int64_t head) {
  const int64_t used = (job.keep + p.size - 1) / p.size;
  for (int64_t i = 0; i < used; ++i) {
    const int64_t old = job.source_table[i], fresh = job.target_table[i];
    if (old == fresh) continue;
    copy_cell(p, layer + p.cell(old, head) * p.element_size, layer + p.cell(fresh, head) * p.element_size);
  }
  switch (p.element_size) {
    case 1:
      return move_tokens(p, job, reinterpret_cast<uint8_t*>(layer), head);
    case 2:
      return move_tokens(p, job, reinterpret_cast<uint16_t*>(layer), head);
    default:
      return move_tokens(p, job, reinterpret_cast<uint32_t*>(layer), head);
  }
}

// Checks the moves, of which a wrong one would reach foreign memory, and the page ids of sources past `keep`.
void check_moves(const Pages& p, const Job& job, int64_t old_width, int64_t width, int64_t num_pages,
                 int64_t max_moves) {
  STD_TORCH_CHECK(0 <= job.moves && job.moves <= max_moves, "skipkv_cpu: count=", job.moves, " of ", max_moves);
  const int64_t slots = std::min(old_width * p.size, width);
  for (int64_t m = 0; m < job.moves; ++m) {
    const int64_t s = job.source[m], h = job.hole[m];
    STD_TORCH_CHECK(0 <= s && s < slots && 0 <= h && h < job.keep, "skipkv_cpu: move from slot ", s, " to ", h,
                    " does not fit ", slots, " slots and num_keep=", job.keep);
    const int64_t page = job.source_table[s / p.size];
    STD_TORCH_CHECK(0 <= page && page < num_pages, "skipkv_cpu: source_table names page ", page, " of ", num_pages);
  }
}

}  // namespace

void compact_pages(const std::vector<Tensor>& caches, const Tensor&, int64_t layout, const Tensor& sidecar,
                   const Tensor& positions, const Tensor& source_table, const Tensor& target_table,
                   const Tensor& num_keep, const Tensor& source, const Tensor& hole, const Tensor& count) {
  const Caches all(caches, layout);
  const Pages& p = all.pages;
  STD_TORCH_CHECK(p.element_size == 1 || p.element_size == 2 || p.element_size == 4,
                  "skipkv_cpu: elements of caches must have 1, 2 or 4 bytes, not ", p.element_size);
  const int64_t layers = all.num_layers(), heads = all.heads;
  check(positions, "positions", ScalarType::Int, {-1, layers, heads, -1});
  const int64_t requests = positions.size(0), slots = positions.size(3), max_moves = source.size(3);
  check(sidecar, "sidecar", ScalarType::Int, {layers, all.num_pages, heads, p.size});
  check(source_table, "source_table", ScalarType::Int, {requests, -1});
  check(target_table, "target_table", ScalarType::Int, {requests, -1});
  check(num_keep, "num_keep", ScalarType::Int, {requests});
  check(source, "source", ScalarType::Int, {requests, layers, heads, -1});
  check(hole, "hole", ScalarType::Int, {requests, layers, heads, max_moves});
  check(count, "count", ScalarType::Int, {requests, layers, heads});
  const Tensor keeps = packed(num_keep), old_tables = packed(source_table), new_tables = packed(target_table);
  const Tensor all_positions = packed(positions), sources = packed(source), holes = packed(hole);
  const Tensor counts = packed(count);
  const int32_t* const keep = keeps.const_data_ptr<int32_t>();
  const int32_t* const old_table = old_tables.const_data_ptr<int32_t>();
  const int32_t* const new_table = new_tables.const_data_ptr<int32_t>();
  const int64_t old_width = source_table.size(1), new_width = target_table.size(1);
  const int32_t* const from_positions = all_positions.const_data_ptr<int32_t>();
  const int32_t* const from_source = sources.const_data_ptr<int32_t>();
  const int32_t* const to_hole = holes.const_data_ptr<int32_t>();
  const int32_t* const moves = counts.const_data_ptr<int32_t>();
  int32_t* const entries = sidecar.mutable_data_ptr<int32_t>();
  const int64_t entry_stride[4] = {sidecar.stride(0), sidecar.stride(1), sidecar.stride(2), sidecar.stride(3)};
  for (int64_t r = 0; r < requests; ++r) {
    STD_TORCH_CHECK(0 <= keep[r] && keep[r] <= slots, "skipkv_cpu: num_keep=", keep[r], " of ", slots, " slots");
    const int64_t used = (keep[r] + p.size - 1) / p.size;
    check_table(new_table + r * new_width, new_width, used, all.num_pages, "target_table");
    check_table(old_table + r * old_width, old_width, used, all.num_pages, "source_table");
  }
  parallel_rows(requests * layers * heads, [&](const auto& next) {
    for (int64_t row = next(); row >= 0; row = next()) {
      const int64_t r = row / (layers * heads), i = row / heads % layers, head = row % heads;
      const Job job = {old_table + r * old_width, new_table + r * new_width,     from_positions + row * slots, keep[r],
                       from_source + row * max_moves, to_hole + row * max_moves, moves[row]};
      check_moves(p, job, old_width, slots, all.num_pages, max_moves);
      compact_head(p, job, all.layers[i], head);
      int32_t* const to = entries + i * entry_stride[0] + head * entry_stride[2];
      const auto entry = [&](int64_t slot) -> int32_t& {
        return to[job.target_table[slot / p.size] * entry_stride[1] + slot % p.size * entry_stride[3]];
      };
      for (int64_t slot = 0; slot < job.keep; ++slot) entry(slot) = job.positions[slot];
      for (int64_t m = 0; m < job.moves; ++m) entry(job.hole[m]) = job.positions[job.source[m]];
    }
  });
}

}  // namespace skipkv
