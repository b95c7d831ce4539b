// What a thread may read and write: its stack, its arguments, the tensors that were lent, and its block's shared
// memory, where what it reads was written before the last barrier, or by itself.
#include "block.h"

#include <vector>

namespace cuda_on_cpu {

Memory memory{nullptr, 0, nullptr, -1};

namespace {

struct Region {
  const char* begin;
  size_t bytes;
  bool writable;

  bool holds(const char* address, size_t size) const {
    return address >= begin && address + size <= begin + bytes;
  }
};

struct Static {
  int line;
  Region region;
};

// The accesses since the block began; epochs are never used twice.
struct Byte {
  uint64_t written = 0, read = 0;
  int writer = 0, reader = 0;
  bool read_by_several = false;
};

constexpr size_t kArena = 2 * kSharedBytes;
constexpr size_t kGap = 64;     // between arrays of shared memory
constexpr size_t kNear = 4096;  // to a tensor that is meant
alignas(16) char arena[kArena];
Byte bytes[kArena];
Region dynamic;
std::vector<Static> statics;
std::vector<Region> tensors;
uint64_t epoch = 0, block_began = 0;

std::string what(const char* address, size_t size, bool write) {
  const std::string access = (write ? "writes " : "reads ") + std::to_string(size) + " bytes ";
  if (Region{arena, kArena, true}.holds(address, size))
    return access + "of shared memory at " + std::to_string(address - arena);
  for (const Region& each : tensors)
    if (address + kNear >= each.begin && address < each.begin + each.bytes + kNear)
      return access + "at " + std::to_string(address - each.begin) + " of a tensor of " + std::to_string(each.bytes) +
             (each.writable ? "" : " that is only read");
  return access + "of no tensor";
}

void check_shared(const char* address, size_t size, bool write) {
  bool inside = dynamic.holds(address, size);
  for (const Static& each : statics) inside = inside || each.region.holds(address, size);
  if (!inside) fail(what(address, size, write) + ", beyond the " + std::to_string(dynamic.bytes) + " it asked for");
  for (Byte* byte = bytes + (address - arena); size > 0; --size, ++byte) {
    if (byte->written == epoch && byte->writer != memory.thread)
      fail(what(address, size, write) + ", which thread " + std::to_string(byte->writer) +
           " writes with no barrier in between");
    if (write) {
      if (byte->read == epoch && (byte->reader != memory.thread || byte->read_by_several))
        fail(what(address, size, write) + ", which another thread reads with no barrier in between");
      byte->written = epoch;
      byte->writer = memory.thread;
    } else {
      if (byte->written < block_began) fail(what(address, size, write) + ", which nothing has written");
      byte->read_by_several = byte->read == epoch && (byte->read_by_several || byte->reader != memory.thread);
      byte->reader = memory.thread;
      byte->read = epoch;
    }
  }
}

void check(const void* where, size_t size, bool write) {
  if (memory.thread < 0) return;
  const char* address = static_cast<const char*>(where);
  if (Region{memory.stack, kStackBytes, true}.holds(address, size)) return;
  if (size <= 16 && reinterpret_cast<uintptr_t>(address) % size != 0)
    fail(what(address, size, write) + ", an address that is no multiple of them");
  if (Region{arena, kArena, true}.holds(address, size)) return check_shared(address, size, write);
  for (const Region& each : tensors)
    if (each.holds(address, size) && (each.writable || !write)) return;
  const Region arguments{static_cast<const char*>(memory.kernel), memory.kernel_bytes, false};
  const Region indices{reinterpret_cast<const char*>(&builtins), sizeof builtins, false};
  if (!write && (arguments.holds(address, size) || indices.holds(address, size))) return;
  fail(what(address, size, write) + ", which it may not");
}

}  // namespace

void lend(const void* data, size_t size, bool writable) {
  tensors.push_back({static_cast<const char*>(data), size, writable});
}

DeviceGuard::~DeviceGuard() { tensors.clear(); }

void new_launch(int64_t shared) { dynamic = {arena, static_cast<size_t>(shared), true}; }

void new_block() {
  std::memset(arena, 0xff, kArena);  // NaN
  statics.clear();
  block_began = ++epoch;
}

void new_epoch() { ++epoch; }

void* dynamic_shared() { return arena; }

void* static_shared(int line, size_t size) {
  for (const Static& each : statics)
    if (each.line == line) return const_cast<char*>(each.region.begin);
  size_t end = dynamic.bytes, total = dynamic.bytes + size;
  for (const Static& each : statics) {
    end = each.region.begin + each.region.bytes - arena;
    total += each.region.bytes;
  }
  if (total > kSharedBytes) fail("is in a block that needs " + std::to_string(total) + " bytes of shared memory");
  char* begin = arena + (end + kGap + 15) / 16 * 16;
  statics.push_back({line, {begin, size, true}});
  return begin;
}

}  // namespace cuda_on_cpu

// What the compiler calls before each load and store.
#define ACCESS(name, size)                                                                          \
  void __tsan_read##name(void* address) { cuda_on_cpu::check(address, size, false); }               \
  void __tsan_write##name(void* address) { cuda_on_cpu::check(address, size, true); }
extern "C" {
ACCESS(1, 1)
ACCESS(2, 2)
ACCESS(4, 4)
ACCESS(8, 8)
ACCESS(16, 16)
void __tsan_read_range(void* address, size_t size) { cuda_on_cpu::check(address, size, false); }
void __tsan_write_range(void* address, size_t size) { cuda_on_cpu::check(address, size, true); }
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
}
