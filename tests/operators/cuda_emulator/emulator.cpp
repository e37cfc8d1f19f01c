// Runs CUDA kernels on the CPU, one block at a time, to test them without a GPU. Every thread of a block is a coroutine
// that runs until it waits at a barrier of its block or warp. Threads run in random order, so that a missing barrier
// shows; a barrier that some thread never reaches aborts the process. Races inside a warp are not found.
#include <cuda_runtime.h>
#include <ucontext.h>

#include <cstdio>
#include <vector>

emulator::Index threadIdx, blockIdx;

namespace emulator {

char* shared;

namespace {

constexpr size_t kStack = 128 * 1024;

struct Thread {
  ucontext_t context;
  bool done;
};

struct Warp {
  int arrived;
  long round;
  // The values of the lanes in this round and in the last, which some lanes may still be reading.
  char shown[2][kLanes * kSlot];
};

std::vector<Thread> threads;
std::vector<std::vector<char>> stacks;
std::vector<Warp> warps;
ucontext_t scheduler;
const std::function<void()>* body;
int current, arrived, votes, result;
long round_of_block, progress;

void wait() { swapcontext(&threads[current].context, &scheduler); }

void start() {
  (*body)();
  threads[current].done = true;
  ++progress;
  wait();
}

void run_block() {
  for (size_t i = 0; i < threads.size(); ++i) {
    ucontext_t& context = threads[i].context;
    threads[i].done = false;
    getcontext(&context);
    context.uc_stack.ss_sp = stacks[i].data();
    context.uc_stack.ss_size = kStack;
    context.uc_link = &scheduler;
    makecontext(&context, start, 0);
  }
  std::vector<int> order(threads.size());
  for (size_t i = 0; i < order.size(); ++i) order[i] = static_cast<int>(i);
  for (int left = 1; left > 0;) {
    const long before = progress;
    for (size_t i = order.size() - 1; i > 0; --i) std::swap(order[i], order[std::rand() % (i + 1)]);
    left = 0;
    for (int i : order) {
      if (threads[i].done) continue;
      current = i;
      threadIdx = {static_cast<unsigned>(i), 0, 0};
      swapcontext(&scheduler, &threads[i].context);
      left += !threads[i].done;
    }
    if (left > 0 && progress == before) {
      std::fprintf(stderr, "block %u: %d threads wait at a barrier that others never reach\n", blockIdx.x, left);
      std::abort();
    }
  }
}

}  // namespace

int lane() { return current % kLanes; }

int barrier(int vote) {
  votes |= vote != 0;
  ++progress;
  const long round = round_of_block;
  if (++arrived == static_cast<int>(threads.size())) {
    result = votes;
    arrived = votes = 0;
    ++round_of_block;
  }
  while (round_of_block == round) wait();
  return result;
}

const char* show(const void* data, size_t bytes) {
  Warp& warp = warps[current / kLanes];
  const long round = warp.round;
  char* shown = warp.shown[round & 1];
  std::memcpy(shown + lane() * kSlot, data, bytes);
  ++progress;
  if (++warp.arrived == kLanes) {
    warp.arrived = 0;
    ++warp.round;
  }
  while (warp.round == round) wait();
  return shown;
}

void run(int64_t blocks, int count, int64_t shared_bytes, const std::function<void()>& kernel) {
  if (count % kLanes != 0) std::abort();
  body = &kernel;
  threads.resize(count);
  while (static_cast<int>(stacks.size()) < count) stacks.emplace_back(kStack);
  std::vector<char> memory(shared_bytes + 16);
  shared = memory.data() + (16 - reinterpret_cast<uintptr_t>(memory.data()) % 16) % 16;
  for (int64_t i = 0; i < blocks; ++i) {
    // Not zero, so that reading uninitialised memory shows.
    std::fill(memory.begin(), memory.end(), static_cast<char>(0xff));
    blockIdx = {static_cast<unsigned>(i), 0, 0};
    warps.assign(count / kLanes, {});
    arrived = votes = 0;
    run_block();
  }
}

}  // namespace emulator
