// `central_tokens`: one block a segment of a row.
#include <algorithm>
#include <cmath>

#include "launch.cuh"
#include "operators.h"
#include "order_rows.cuh"
#include "rows.cuh"

#include "common/clusters.h"

namespace skipkv {
namespace {

constexpr int kThreads = 128;

// The arguments of a launch over `rows`.
struct Choosing {
  Pages pages;
  Ordering rows;
  int segments, longest;
  bool vectors;  // 16-byte reads of keys are possible
  const int* table;
  int64_t table_stride;
  const int *begin, *end, *quota;
  bool* out;  // [rows, n] by slot, false before
  // By rank, `[count, n]`: the cluster of a token, and the square of its distance from the centroid.
  int* assigned;
  float* distance;
};

// The tokens of a block: `count` from rank `first` on.
struct Run {
  Row at;
  int first, count, quota;
  const int *order, *table;
  int* assigned;
  float* distance;
  int stride;  // of vectors in shared memory
};

// Returns the lowest rank of a row whose position is not below `position`.
__device__ int rank_from(const Choosing& s, int64_t row, int length, int64_t position) {
  const int* order = s.rows.order + row * s.rows.n;
  const int* positions = s.rows.positions + (s.rows.first + row) * s.rows.n;
  int low = 0, high = length;
  while (low < high) {
    const int middle = (low + high) / 2;
    if (positions[order[middle]] < position) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low;
}

__device__ Run run_of(const Choosing& s, int64_t row, int number) {
  Run run{row_of(s.pages, s.rows.first + row)};
  const int r = run.at.request, length = s.rows.num_resident[r];
  const int64_t begin = s.begin[r] + static_cast<int64_t>(number) * s.longest;
  const int64_t end = min(begin + s.longest, static_cast<int64_t>(s.end[r]));
  run.first = rank_from(s, row, length, begin);
  run.count = max(rank_from(s, row, length, end) - run.first, 0);
  run.quota = s.quota[static_cast<int64_t>(r) * s.segments + number];
  run.order = s.rows.order + row * s.rows.n + run.first;
  run.table = s.table + r * s.table_stride;
  run.assigned = s.assigned + row * s.rows.n + run.first;
  run.distance = s.distance + row * s.rows.n + run.first;
  // 16 bytes more a row, so that 16-byte reads of neighbouring rows hit different banks.
  run.stride = (s.pages.dim + 3) / 4 * 4 + 4;
  return run;
}

// Loads the keys of up to TILE tokens from number `start` of the run on, with zeros past its end.
template <class T, int TILE>
__device__ void load_tile(const Choosing& s, const Run& run, int start, int* cells, float* tile) {
  const int thread = static_cast<int>(threadIdx.x);
  __syncthreads();
  if (thread < TILE) {
    cells[thread] = start + thread < run.count ? cell_of(s.pages, run.table, run.order[start + thread]) : -1;
  }
  __syncthreads();
  load_cells<kThreads>(s.pages, head_pages<T>(s.pages, run.at), cells, TILE, s.vectors, tile, run.stride);
  __syncthreads();
}

// Assigns each token to the nearest of k centroids, the first of those equally near.
template <class T, int TILE>
__device__ void assign(const Choosing& s, const Run& run, int k, const float* centroids, int* cells, float* tile) {
  constexpr int kParts = kThreads / TILE;
  __shared__ float distances[kThreads];
  __shared__ int nearest[kThreads];
  const int thread = static_cast<int>(threadIdx.x), own = thread % TILE;
  for (int start = 0; start < run.count; start += TILE) {
    load_tile<T, TILE>(s, run, start, cells, tile);
    float least = INFINITY;
    int found = 0;
    for (int j = thread / TILE; j < k; j += kParts) {
      float distance = 0.0f;
      for (int d = 0; d < run.stride - 4; d += 4) {
        const float4 a = *reinterpret_cast<const float4*>(tile + own * run.stride + d);
        const float4 b = *reinterpret_cast<const float4*>(centroids + j * run.stride + d);
        const float4 c = make_float4(a.x - b.x, a.y - b.y, a.z - b.z, a.w - b.w);
        distance += c.x * c.x + c.y * c.y + c.z * c.z + c.w * c.w;
      }
      if (distance < least) {
        least = distance;
        found = j;
      }
    }
    distances[thread] = least;
    nearest[thread] = found;
    __syncthreads();
    if (thread >= TILE || start + thread >= run.count) continue;
    for (int other = thread + TILE; other < kThreads; other += TILE) {
      if (distances[other] < least || (distances[other] == least && nearest[other] < found)) {
        least = distances[other];
        found = nearest[other];
      }
    }
    run.assigned[start + thread] = found;
    run.distance[start + thread] = least;
  }
  __syncthreads();
}

// Moves each of k centroids to the mean of its tokens; one without tokens stays. A thread has features of its own.
template <class T, int TILE>
__device__ void move_centroids(const Choosing& s, const Run& run, int k, float* centroids, int* cells, float* tile) {
  __shared__ int size[kMostClusters];
  const int thread = static_cast<int>(threadIdx.x);
  if (thread < k) {
    int tokens = 0;
    for (int t = 0; t < run.count; ++t) tokens += run.assigned[t] == thread;
    size[thread] = tokens;
  }
  __syncthreads();
  for (int i = thread; i < k * run.stride; i += kThreads) {
    if (size[i / run.stride] > 0) centroids[i] = 0.0f;
  }
  for (int start = 0; start < run.count; start += TILE) {
    load_tile<T, TILE>(s, run, start, cells, tile);
    for (int t = 0; t < TILE && start + t < run.count; ++t) {
      float* centroid = centroids + run.assigned[start + t] * run.stride;
      for (int d = thread; d < s.pages.dim; d += kThreads) centroid[d] += tile[t * run.stride + d];
    }
  }
  for (int j = 0; j < k; ++j) {
    if (size[j] == 0) continue;
    for (int d = thread; d < s.pages.dim; d += kThreads) centroids[j * run.stride + d] /= static_cast<float>(size[j]);
  }
  __syncthreads();
}

template <class T, int TILE>
__global__ void __launch_bounds__(kThreads) choose_central(Choosing s) {
  __shared__ int cells[TILE];
  const int64_t row = blockIdx.x / s.segments;
  const Run run = run_of(s, row, static_cast<int>(blockIdx.x % s.segments));
  const int thread = static_cast<int>(threadIdx.x);
  bool* out = s.out + (s.rows.first + row) * s.rows.n;
  if (run.count <= run.quota) {
    for (int t = thread; t < run.count; t += kThreads) out[run.order[t]] = true;
    return;
  }
  const int k = min(run.quota, kMostClusters);
  if (k <= 0) return;
  float* centroids = reinterpret_cast<float*>(dynamic_shared());
  float* tile = centroids + kMostClusters * run.stride;
  // The first centroids are tokens evenly spread over the run.
  for (int j = 0; j < k; j += TILE) {
    __syncthreads();
    if (thread < TILE) {
      const int place = static_cast<int>(static_cast<int64_t>(2 * (j + thread) + 1) * run.count / (2 * k));
      cells[thread] = j + thread < k ? cell_of(s.pages, run.table, run.order[place]) : -1;
    }
    __syncthreads();
    load_cells<kThreads>(s.pages, head_pages<T>(s.pages, run.at), cells, TILE, s.vectors, centroids + j * run.stride,
                         run.stride);
  }
  for (int round = 0; round < kRounds; ++round) {
    assign<T, TILE>(s, run, k, centroids, cells, tile);
    move_centroids<T, TILE>(s, run, k, centroids, cells, tile);
  }
  assign<T, TILE>(s, run, k, centroids, cells, tile);
  if (thread >= k) return;
  float least = INFINITY;
  for (int t = 0; t < run.count; ++t) {
    if (run.assigned[t] == thread) least = fminf(least, run.distance[t]);
  }
  for (int t = 0; t < run.count; ++t) {
    if (run.assigned[t] != thread || !(run.distance[t] <= least * kTie)) continue;
    out[run.order[t]] = true;
    return;
  }
}

template <class T, int TILE>
void run(const Choosing& s, cudaStream_t stream) {
  const int64_t stride = ceil_div(s.pages.dim, 4) * 4 + 4;
  launch(choose_central<T, TILE>, s.rows.count * s.segments, kThreads,
         (kMostClusters + TILE) * stride * static_cast<int64_t>(sizeof(float)), stream, s);
}

}  // namespace

Tensor central_tokens(const std::vector<Tensor>& caches, const Tensor& pointers, int64_t layout, const Tensor& table,
                      const Tensor& positions, const Tensor& num_resident, const Tensor& begin, const Tensor& end,
                      const Tensor& quota, int64_t longest) {
  const Pages pages = pages_of(caches, pointers, layout);
  const ScalarType type = caches[0].scalar_type();
  const int64_t requests = table.size(0), n = positions.size(-1), rows = requests * pages.layers * pages.heads;
  check_keys(pages, type);
  check_table(table, requests);
  check(positions, "positions", ScalarType::Int, {requests, pages.layers, pages.heads, n});
  check_vector(num_resident, "num_resident", ScalarType::Int, requests);
  check_vector(begin, "begin", ScalarType::Int, requests);
  check_vector(end, "end", ScalarType::Int, requests);
  check(quota, "quota", ScalarType::Int, {requests, -1});
  STD_TORCH_CHECK(longest > 0 && longest <= INT32_MAX, "skipkv_cuda: longest=", longest, " must be positive");

  const Guard guard(positions.get_device_index());
  const cudaStream_t stream = current_stream(positions);
  const Tensor places = packed(positions), quotas = packed(quota);
  const Tensor out = scratch(places, {requests, pages.layers, pages.heads, n}, ScalarType::Bool);
  if (rows * n == 0) return out;
  clear_async(out.mutable_data_ptr(), static_cast<size_t>(rows * n), stream);
  if (quota.size(1) == 0) return out;
  const int64_t at_once = std::min(rows, std::max<int64_t>(1, kScratchBytes / (12 * n)));
  const Tensor order = scratch(out, {at_once, n}, ScalarType::Int);
  const Tensor assigned = scratch(out, {at_once, n}, ScalarType::Int);
  const Tensor distance = scratch(out, {at_once, n}, ScalarType::Float);

  Choosing s{};
  s.pages = pages;
  s.rows = {data<const int>(places), data<const int>(num_resident), 0, 0, static_cast<int>(n),
            pages.layers * pages.heads, data<int>(order)};
  s.segments = static_cast<int>(quota.size(1));
  s.longest = static_cast<int>(longest);
  s.vectors = in_chunks(pages, caches);
  s.table = data<const int>(table);
  s.table_stride = table.stride(0);
  s.begin = data<const int>(begin);
  s.end = data<const int>(end);
  s.quota = data<const int>(quotas);
  s.out = data<bool>(out);
  s.assigned = data<int>(assigned);
  s.distance = data<float>(distance);
  for (; s.rows.first < rows; s.rows.first += at_once) {
    s.rows.count = std::min(at_once, rows - s.rows.first);
    order_by_position(s.rows, stream);
    with_type(type, [&](auto element) {
      using T = decltype(element);
      pages.dim <= 128 ? run<T, 32>(s, stream) : run<T, 16>(s, stream);
    });
  }
  return out;
}

}  // namespace skipkv
