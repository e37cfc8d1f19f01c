// Runs CUDA kernels on the CPU, one block at a time, to test them without a GPU. Every thread of a block is a coroutine
// that runs until it waits at a barrier of its block or warp. Threads run in random order, so that a missing barrier
// shows; a barrier that some thread never reaches aborts the process. Races inside a warp are not found.
#include <cuda_runtime.h>
#include <setjmp.h>
#include <ucontext.h>

#include <cstdio>
#include <deque>
#include <vector>

emulator::Index threadIdx, blockIdx;

namespace emulator {

char* shared;

namespace {

constexpr size_t kStack = 128 * 1024;

struct Copy {
  void* to;
  const void* from;
  size_t bytes;
  bool inside;
  int group;
};

struct Thread {
  std::vector<char> stack;
  ucontext_t context;
  jmp_buf where;
  bool started, done;
  std::vector<Copy> copies;
  int groups;
};

struct Warp {
  int arrived;
  long round;
  // The values of the lanes in this round and in the last, which some lanes may still be reading.
  char shown[2][kLanes * kSlot];
};

// A deque, because threads stay where they are for as long as the process lives.
std::deque<Thread> threads;
std::vector<Warp> warps;
jmp_buf scheduler;
int count;
const std::function<void()>* body;
int current, arrived, votes, result;
long round_of_block, progress;

// `swapcontext` would make a system call at every switch.
void wait() {
  if (_setjmp(threads[current].where) == 0) _longjmp(scheduler, 1);
}

[[noreturn]] void start() {
  for (;;) {
    (*body)();
    threads[current].done = true;
    ++progress;
    wait();
  }
}

[[gnu::noinline]] void resume(Thread& thread) {
  if (_setjmp(scheduler) != 0) return;
  if (thread.started) _longjmp(thread.where, 1);
  thread.started = true;
  setcontext(&thread.context);
}

void add_thread() {
  Thread& thread = threads.emplace_back();
  thread.stack.resize(kStack);
  getcontext(&thread.context);
  thread.context.uc_stack.ss_sp = thread.stack.data();
  thread.context.uc_stack.ss_size = kStack;
  makecontext(&thread.context, start, 0);
}

void run_block() {
  for (int i = 0; i < count; ++i) {
    threads[i].done = false;
    threads[i].copies.clear();
    threads[i].groups = 0;
  }
  std::vector<int> order(count);
  for (int i = 0; i < count; ++i) order[i] = i;
  for (int left = 1; left > 0;) {
    const long before = progress;
    for (size_t i = order.size() - 1; i > 0; --i) std::swap(order[i], order[std::rand() % (i + 1)]);
    left = 0;
    for (int i : order) {
      if (threads[i].done) continue;
      current = i;
      threadIdx = {static_cast<unsigned>(i), 0, 0};
      resume(threads[i]);
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

void copy_later(void* to, const void* from, size_t bytes, bool inside) {
  // Misaligned addresses trap as on a GPU.
  if ((reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(from)) % bytes != 0) std::abort();
  threads[current].copies.push_back({to, from, bytes, inside, threads[current].groups});
}

void end_copies() { ++threads[current].groups; }

void make_copies(int left) {
  Thread& thread = threads[current];
  std::vector<Copy> later;
  for (const Copy& copy : thread.copies) {
    if (copy.group >= thread.groups - left) {
      later.push_back(copy);
    } else if (copy.inside) {
      std::memcpy(copy.to, copy.from, copy.bytes);
    } else {
      std::memset(copy.to, 0, copy.bytes);
    }
  }
  thread.copies = later;
}

int barrier(int vote) {
  votes |= vote != 0;
  ++progress;
  const long round = round_of_block;
  if (++arrived == count) {
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

void run(int64_t blocks, int num_threads, int64_t shared_bytes, const std::function<void()>& kernel) {
  if (num_threads % kLanes != 0) std::abort();
  body = &kernel;
  count = num_threads;
  while (static_cast<int>(threads.size()) < count) add_thread();
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
