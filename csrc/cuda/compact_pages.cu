// `compact_pages`: first whole pages, then single cells, K and V together, or latents. Cells are copied bit by bit, in
// the widest unit that divides all addresses. Two launches on one stream, because a move may fill a hole of a page that
// was just copied.
#include "device.cuh"
#include "launch.cuh"
#include "operators.h"
#include "pages.h"

namespace skipkv {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
// Moves of a warp.
constexpr int kMoves = 4;

struct Compaction {
  const int64_t* pointers;
  // In units.
  int64_t page_stride, head_stride, token_stride;
  int layers, heads, page_size, width;
  int* sidecar;
  int64_t sidecar_stride;
  const int* positions;
  const int *source_table, *target_table;
  int64_t source_stride, target_stride;
  int pages;
  const int* num_keep;
  const int *source, *hole, *count;
  int64_t n, max_moves;
};

// Copies replaced pages and records the positions of the first K slots; a block a (request, layer, page).
template <class Unit>
__global__ void __launch_bounds__(kThreads) copy_pages(Compaction c) {
  const int index = static_cast<int>(blockIdx.x % c.pages);
  const int layer = static_cast<int>(blockIdx.x / c.pages % c.layers);
  const int request = static_cast<int>(blockIdx.x / c.pages / c.layers);
  const int keep = c.num_keep[request];
  const int first = index * c.page_size;
  if (first >= keep) return;
  const int64_t old = c.source_table[request * c.source_stride + index];
  const int64_t fresh = c.target_table[request * c.target_stride + index];
  const int cells = c.heads * c.page_size, thread = static_cast<int>(threadIdx.x);

  const int* known = c.positions + (static_cast<int64_t>(request) * c.layers + layer) * c.heads * c.n + first;
  int* noted = c.sidecar + layer * c.sidecar_stride + fresh * cells;
  for (int cell = thread; cell < cells; cell += kThreads) {
    const int offset = cell % c.page_size;
    if (first + offset < keep) noted[cell] = known[cell / c.page_size * c.n + offset];
  }
  if (old == fresh) return;

  Unit* base = reinterpret_cast<Unit*>(c.pointers[layer]);
  const Unit* from = base + old * c.page_stride;
  Unit* to = base + fresh * c.page_stride;
  for (int i = thread; i < cells * c.width; i += kThreads) {
    const int cell = i / c.width;
    const int64_t at = cell / c.page_size * c.head_stride + cell % c.page_size * c.token_stride + i % c.width;
    to[at] = from[at];
  }
}

// Moves cells of one row and their positions; a warp takes `kMoves` cells.
template <class Unit>
__global__ void __launch_bounds__(kThreads) move_cells(Compaction c) {
  const int64_t blocks = ceil_div(c.max_moves, kWarps * kMoves);
  const int64_t row = blockIdx.x / blocks;
  const int warp = static_cast<int>(threadIdx.x) / kWarp, lane = static_cast<int>(threadIdx.x) % kWarp;
  const int start = (static_cast<int>(blockIdx.x % blocks) * kWarps + warp) * kMoves;
  const int end = min(start + kMoves, c.count[row]);
  const int head = static_cast<int>(row % c.heads);
  const int layer = static_cast<int>(row / c.heads % c.layers);
  const int64_t request = row / c.heads / c.layers;
  Unit* base = reinterpret_cast<Unit*>(c.pointers[layer]) + head * c.head_stride;
  for (int i = start; i < end; ++i) {
    const int from = c.source[row * c.max_moves + i], to = c.hole[row * c.max_moves + i];
    const int64_t from_page = c.source_table[request * c.source_stride + from / c.page_size];
    const int64_t to_page = c.target_table[request * c.target_stride + to / c.page_size];
    const Unit* read = base + from_page * c.page_stride + from % c.page_size * c.token_stride;
    Unit* write = base + to_page * c.page_stride + to % c.page_size * c.token_stride;
    for (int unit = lane; unit < c.width; unit += kWarp) write[unit] = read[unit];
    if (lane == 0) {
      c.sidecar[layer * c.sidecar_stride + (to_page * c.heads + head) * c.page_size + to % c.page_size] =
          c.positions[row * c.n + from];
    }
  }
}

template <class Unit>
void run(Compaction c, int64_t requests, int element, cudaStream_t stream) {
  constexpr int kUnit = static_cast<int>(sizeof(Unit));
  c.page_stride = c.page_stride * element / kUnit;
  c.head_stride = c.head_stride * element / kUnit;
  c.token_stride = c.token_stride * element / kUnit;
  c.width = c.width * element / kUnit;
  launch(copy_pages<Unit>, requests * c.layers * c.pages, kThreads, 0, stream, c);
  const int64_t blocks = ceil_div(c.max_moves, kWarps * kMoves);
  launch(move_cells<Unit>, requests * c.layers * c.heads * blocks, kThreads, 0, stream, c);
}

}  // namespace

void compact_pages(const std::vector<Tensor>& caches, const Tensor& pointers, int64_t layout, const Tensor& sidecar,
                   const Tensor& positions, const Tensor& source_table, const Tensor& target_table,
                   const Tensor& num_keep, const Tensor& source, const Tensor& hole, const Tensor& count) {
  const Pages pages = pages_of(caches, pointers, layout, true);
  const int64_t requests = num_keep.size(0), n = positions.size(-1), max_moves = source.size(-1);
  check(sidecar, "sidecar", ScalarType::Int, {pages.layers, caches[0].size(0), pages.heads, pages.size});
  STD_TORCH_CHECK(sidecar.is_contiguous(), "skipkv_cuda: sidecar must be contiguous");
  check(positions, "positions", ScalarType::Int, {requests, pages.layers, pages.heads, n});
  check(source_table, "source_table", ScalarType::Int, {requests, -1});
  check(target_table, "target_table", ScalarType::Int, {requests, -1});
  STD_TORCH_CHECK((source_table.stride(1) == 1 || source_table.size(1) <= 1) &&
                      (target_table.stride(1) == 1 || target_table.size(1) <= 1),
                  "skipkv_cuda: rows of tables must be contiguous");
  check_vector(num_keep, "num_keep", ScalarType::Int, requests);
  check(source, "source", ScalarType::Int, {requests, pages.layers, pages.heads, max_moves});
  check(hole, "hole", ScalarType::Int, {requests, pages.layers, pages.heads, max_moves});
  check(count, "count", ScalarType::Int, {requests, pages.layers, pages.heads});

  const Guard guard(positions.get_device_index());
  const Tensor position = packed(positions), from = packed(source), to = packed(hole), number = packed(count);
  Compaction c{};
  c.pointers = pages.pointers;
  c.page_stride = pages.page_stride;
  c.head_stride = pages.head_stride;
  c.token_stride = pages.token_stride;
  c.layers = pages.layers;
  c.heads = pages.heads;
  c.page_size = pages.size;
  c.width = static_cast<int>(caches[0].size(3));
  c.sidecar = data<int>(sidecar);
  c.sidecar_stride = sidecar.stride(0);
  c.positions = data<const int>(position);
  c.source_table = data<const int>(source_table);
  c.target_table = data<const int>(target_table);
  c.source_stride = source_table.stride(0);
  c.target_stride = target_table.stride(0);
  c.pages = static_cast<int>(source_table.size(1) < target_table.size(1) ? source_table.size(1) : target_table.size(1));
  c.num_keep = data<const int>(num_keep);
  c.source = data<const int>(from);
  c.hole = data<const int>(to);
  c.count = data<const int>(number);
  c.n = n;
  c.max_moves = max_moves;

  const int element = static_cast<int>(caches[0].element_size());
  const cudaStream_t stream = current_stream(positions);
  switch (vector_unit(pages, c.width, caches)) {
    case 16:
      return run<uint4>(c, requests, element, stream);
    case 8:
      return run<uint2>(c, requests, element, stream);
    case 4:
      return run<uint32_t>(c, requests, element, stream);
    case 2:
      return run<uint16_t>(c, requests, element, stream);
    default:
      return run<uint8_t>(c, requests, element, stream);
  }
}

}  // namespace skipkv
