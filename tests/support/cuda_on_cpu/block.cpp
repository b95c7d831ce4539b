#include "block.h"

#include <csetjmp>
#include <stdexcept>
#include <ucontext.h>

namespace cuda_on_cpu {

Builtins builtins;

namespace {

enum class State { kRuns, kAtBarrier, kAtShuffle, kLeft };

struct Thread {
  State state;
  int line;
  int offset;
  uint64_t bits;
  bool begun = false;
  jmp_buf place;
};

Thread threads[kMostThreads];
alignas(16) char stacks[kMostThreads][kStackBytes];
ucontext_t beginning;
jmp_buf scheduler;
Launch now;
std::string error;
unsigned launches = 0;

// Without ucontext's system calls: a fiber is begun once and then kept, also for later launches.
void leave() {
  if (_setjmp(threads[memory.thread].place) == 0) _longjmp(scheduler, 1);
}

void live() {
  for (;;) {
    now.call(now.kernel);
    threads[memory.thread].state = State::kLeft;
    leave();
  }
}

// The fibers are left where they are, and begun anew.
[[noreturn]] void give_up(const std::string& what) {
  for (Thread& each : threads) each.begun = false;
  throw std::runtime_error("block " + std::to_string(builtins.block.x) + ": " + what);
}

void resume(int thread) {
  memory.thread = thread;
  memory.stack = stacks[thread];
  builtins.thread.x = thread;
  if (_setjmp(scheduler) == 0) {
    if (threads[memory.thread].begun) _longjmp(threads[memory.thread].place, 1);
    threads[memory.thread].begun = true;
    getcontext(&beginning);
    beginning.uc_stack.ss_sp = stacks[memory.thread];
    beginning.uc_stack.ss_size = kStackBytes;
    makecontext(&beginning, live, 0);
    setcontext(&beginning);
  }
  memory.thread = -1;
  if (!error.empty()) give_up(error);
}

std::string where(int thread) {
  const Thread& each = threads[thread];
  const std::string name = "thread " + std::to_string(thread);
  if (each.state == State::kLeft) return name + " has left";
  const char* what = each.state == State::kAtBarrier ? "barrier" : "shuffle";
  return name + " waits at a " + what + " in line " + std::to_string(each.line);
}

// The lanes of a warp that wait at one shuffle get one another's values; whether there were any.
bool shuffle(int warp) {
  Thread* lanes = threads + warp * kWarp;
  if (lanes[0].state != State::kAtShuffle) return false;
  for (int lane = 1; lane < kWarp; ++lane)
    if (lanes[lane].state != State::kAtShuffle || lanes[lane].line != lanes[0].line ||
        lanes[lane].offset != lanes[0].offset)
      return false;
  uint64_t sent[kWarp];
  for (int lane = 0; lane < kWarp; ++lane) sent[lane] = lanes[lane].bits;
  for (int lane = 0; lane < kWarp; ++lane) {
    lanes[lane].bits = sent[lane ^ lanes[lane].offset];
    lanes[lane].state = State::kRuns;
  }
  return true;
}

// Every other launch takes blocks and threads from the last to the first: what depends on the order differs.
int turn(int64_t i, int64_t count) { return static_cast<int>(launches % 2 ? i : count - 1 - i); }

void run_block() {
  new_block();
  for (int i = 0; i < now.threads; ++i) threads[i].state = State::kRuns;
  const int warps = (now.threads + kWarp - 1) / kWarp;
  for (;;) {
    // A warp goes from shuffle to shuffle, until its threads wait for others.
    for (int i = 0; i < warps; ++i) {
      const int warp = turn(i, warps), first = warp * kWarp;
      const int lanes = now.threads - first < kWarp ? now.threads - first : kWarp;
      do {
        for (int lane = 0; lane < lanes; ++lane) {
          const int thread = first + turn(lane, lanes);
          if (threads[thread].state == State::kRuns) resume(thread);
        }
      } while (lanes == kWarp && shuffle(warp));
    }
    const Thread& first = threads[0];
    for (int i = 1; i < now.threads; ++i)
      if (threads[i].state != first.state || (first.state != State::kLeft && threads[i].line != first.line))
        give_up(where(0) + ", " + where(i));
    if (first.state == State::kLeft) return;
    if (first.state == State::kAtShuffle) give_up("a warp is not whole, and " + where(0));
    for (int i = 0; i < now.threads; ++i) threads[i].state = State::kRuns;
    new_epoch();
  }
}

}  // namespace

void fail(const std::string& what) {
  error = "thread " + std::to_string(memory.thread) + " " + what;
  _longjmp(scheduler, 1);
}

void at_most(int threads) {
  if (now.threads > threads)
    fail("is in a block of " + std::to_string(now.threads) + " threads, beyond its launch bounds");
}

void barrier(int line) {
  threads[memory.thread].state = State::kAtBarrier;
  threads[memory.thread].line = line;
  leave();
}

uint64_t exchange_bits(unsigned mask, uint64_t bits, int offset, int line) {
  if (mask != 0xffffffffu || offset <= 0 || offset >= kWarp) fail("shuffles over part of its warp, or beyond it");
  Thread& thread = threads[memory.thread];
  thread.state = State::kAtShuffle;
  thread.line = line;
  thread.offset = offset;
  thread.bits = bits;
  leave();
  return threads[memory.thread].bits;
}

void run(const Launch& launch) {
  if (launch.blocks < 1 || launch.threads < 1 || launch.threads > kMostThreads || launch.shared > kSharedBytes)
    throw std::runtime_error("not a launch: " + std::to_string(launch.blocks) + " blocks of " +
                             std::to_string(launch.threads) + " threads with " + std::to_string(launch.shared) +
                             " bytes of shared memory");
  now = launch;
  error.clear();
  memory.kernel = launch.kernel;
  memory.kernel_bytes = launch.kernel_bytes;
  builtins.threads.x = launch.threads;
  ++launches;
  new_launch(launch.shared);
  for (int64_t i = 0; i < launch.blocks; ++i) {
    builtins.block.x = turn(i, launch.blocks);
    run_block();
  }
}

}  // namespace cuda_on_cpu
