// Runs the blocks of a launch one after another. Each thread is a fiber, which runs until it waits at a barrier or at a
// shuffle. Every load and store of a kernel is seen, since the compiler is told to look for races (-fsanitize=thread)
// and is given memory.cpp for a run-time library. Errors are std::runtime_error from launch().
#pragma once

#include <cstdint>
#include <cstring>
#include <memory>
#include <optional>
#include <string>

namespace cuda_on_cpu {

constexpr int kMostThreads = 1024;
constexpr int kWarp = 32;
constexpr int64_t kSharedBytes = 48 << 10;  // what a kernel gets without asking for more

struct Index {
  unsigned x;
};
struct Builtins {
  Index thread, block, threads;
};
extern Builtins builtins;

struct Launch {
  int64_t blocks;
  int threads;
  int64_t shared;  // bytes
  const void* kernel;
  size_t kernel_bytes;
  void (*call)(const void* kernel);
};
void run(const Launch& launch);

// `kernel` holds its arguments.
template <typename F>
void launch(unsigned blocks, int threads, int64_t shared, void* stream, const F& kernel) {
  static_cast<void>(stream);
  const auto call = [](const void* f) { (*static_cast<const F*>(f))(); };
  run({blocks, threads, shared, std::addressof(kernel), sizeof(F), call});
}

// For the kernels. `line` is the place in the source: all must wait at the same one.
void barrier(int line);
uint64_t exchange_bits(unsigned mask, uint64_t bits, int offset, int line);
void at_most(int threads);
void* dynamic_shared();
void* static_shared(int line, size_t bytes);

template <typename T>
T exchange(unsigned mask, T value, int offset, int line) {
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = exchange_bits(mask, bits, offset, line);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

// Global memory: what a kernel may read, and write, until the guard goes.
void lend(const void* data, size_t bytes, bool writable);
struct DeviceGuard {
  explicit DeviceGuard(int) {}
  ~DeviceGuard();
  DeviceGuard(const DeviceGuard&) = delete;
};

template <typename Tensor>
void* lent(const Tensor& tensor, bool writable) {
  int64_t elements = 1;
  for (int64_t axis = 0; axis < tensor.dim(); ++axis) elements += (tensor.size(axis) - 1) * tensor.stride(axis);
  void* data = const_cast<void*>(tensor.const_data_ptr());
  if (tensor.numel() > 0) lend(data, elements * tensor.element_size(), writable);
  return data;
}

template <typename Tensor>
void* lent(const std::optional<Tensor>& tensor, bool writable) {
  return lent(*tensor, writable);
}

inline int current_stream(int, void** stream) {
  *stream = nullptr;
  return 0;
}

// Between block.cpp and memory.cpp.
[[noreturn]] void fail(const std::string& what);  // by the thread that runs
struct Memory {
  const void* kernel;
  size_t kernel_bytes;
  const char* stack;  // of the thread that runs
  int thread;         // -1: none runs, and nothing is checked
};
extern Memory memory;
// No power of two: the tops of the stacks would share a few lines of the cache.
constexpr size_t kStackBytes = (32 << 10) + 576;
void new_launch(int64_t shared);
void new_block();
void new_epoch();  // all have met at a barrier

}  // namespace cuda_on_cpu
