// Runs independent rows on PyTorch's threads.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>
#include <mutex>

namespace skipkv {

// Runs `worker(next)` on several threads. `next()` returns the numbers below `count` in order, then -1: rows differ in
// length and cost, so they are not divided among the threads beforehand. `most` limits the threads, as waking one takes
// tens of microseconds.
template <class Worker>
void parallel_rows(int64_t count, const Worker& worker, int64_t most = INT64_MAX) {
  std::atomic<int64_t> taken{0};
  const auto next = [&taken, count]() -> int64_t {
    const int64_t row = taken.fetch_add(1, std::memory_order_relaxed);
    return row < count ? row : -1;
  };
  const int64_t threads = std::min<int64_t>({count, most, torch::stable::get_num_threads()});
  if (threads <= 1) {
    if (count > 0) worker(next);
    return;
  }
  // The C interface of `parallel_for` would lose the message of an exception.
  std::exception_ptr error;
  std::mutex one_at_a_time;
  torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    try {
      worker(next);
    } catch (...) {
      const std::lock_guard<std::mutex> lock(one_at_a_time);
      error = std::current_exception();
    }
  });
  if (error) std::rethrow_exception(error);
}

}  // namespace skipkv
