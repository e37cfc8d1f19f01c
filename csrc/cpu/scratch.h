// Scratch memory of the threads.
#pragma once

#include <cstdlib>
#include <memory>
#include <new>

namespace skipkv {

struct Free {
  void operator()(void* memory) const { std::free(memory); }
};
using Memory = std::unique_ptr<void, Free>;

inline Memory aligned(size_t bytes) {
  void* const memory = std::aligned_alloc(64, (bytes + 63) / 64 * 64);
  if (memory == nullptr) throw std::bad_alloc();
  return Memory(memory);
}

// A thread's memory for a row. Up to a size it is kept between calls: the page faults of new memory take as long as
// scoring a short row.
class RowScratch {
 public:
  explicit RowScratch(size_t bytes) {
    constexpr size_t kMostKept = 4 << 20;
    thread_local Memory kept;
    thread_local size_t size = 0;
    if (bytes > kMostKept) {
      own_ = aligned(bytes);
      return;
    }
    if (bytes > size) {
      kept = aligned(bytes);
      size = bytes;
    }
    memory_ = kept.get();
  }
  void* get() const { return own_ ? own_.get() : memory_; }

 private:
  Memory own_;
  void* memory_ = nullptr;
};

}  // namespace skipkv
