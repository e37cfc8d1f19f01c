// `sentence_similarity` of a range of a request's sentences. Compiled once per instruction set.
#include "isa_kernels.h"
#include "tile.h"

namespace skipkv {
namespace SKIPKV_ISA {
namespace {

template <class T>
void similar_as(const SentenceRange& all, int64_t begin, int64_t end, float* scratch) {
  const int64_t width = all.width, newest = all.last - 1;
  const int64_t first_new = all.first > begin + 1 ? all.first : begin + 1;
  float* const panel = scratch;
  float* const floats = scratch + width * kTileColumns;
  float* const tile = floats + width * kTileRows;
  const auto unit = [&](int64_t n) { return static_cast<const T*>(all.units) + n % all.held * width; };
  // Panels of later sentences from the newest, so that the latest hit comes first.
  for (int64_t to = newest; to >= first_new; to -= kTileColumns) {
    const int64_t from = to - kTileColumns + 1 > first_new ? to - kTileColumns + 1 : first_new;
    for (int64_t c = 0; c < kTileColumns; ++c) {
      const T* const x = unit(from + c <= to ? from + c : to);
      for (int64_t d = 0; d < width; ++d) panel[d * kTileColumns + c] = to_float(x[d]);
    }
    // No sentence is later than those of its own panel.
    const int64_t stop = end < to ? end : to;
    for (int64_t i = begin; i < stop; i += kTileRows) {
      const float* rows[kTileRows];
      for (int64_t m = 0; m < kTileRows; ++m) {
        const T* const x = unit(i + m < stop ? i + m : i);
        float* const copy = floats + m * width;
        for (int64_t d = 0; d < width; ++d) copy[d] = to_float(x[d]);
        rows[m] = copy;
      }
      products(rows, panel, width, tile);
      for (int64_t m = 0; m < kTileRows && i + m < stop; ++m) {
        float& best = all.best[i + m - all.oldest];
        // From the latest, which alone counts by the rule "last".
        for (int64_t c = to - from; c >= 0 && from + c > i + m; --c) {
          if (all.only_last && best > -__builtin_inff()) break;
          const float cosine = tile[m * kTileColumns + c];
          if (cosine > all.threshold && cosine > best) best = cosine;
        }
      }
    }
  }
}

}  // namespace

void similar(const SentenceRange& all, int64_t begin, int64_t end, float* scratch) {
  switch (all.dtype) {
    case Dtype::kFloat32:
      return similar_as<Float32>(all, begin, end, scratch);
    case Dtype::kBFloat16:
      return similar_as<BFloat16>(all, begin, end, scratch);
    case Dtype::kFloat16:
      return similar_as<Float16>(all, begin, end, scratch);
  }
}

int64_t similar_scratch(int64_t width) { return width * (kTileColumns + kTileRows) + kTileRows * kTileColumns; }

}  // namespace SKIPKV_ISA
}  // namespace skipkv
