#include <cstdlib>
#include <cstring>

#include "kernels.h"

namespace crepa {

#define CREPA_DECLARE(level)  \
  namespace level {           \
  template <typename T>       \
  Kernels<T> table();         \
  }

CREPA_DECLARE(generic)
#if defined(__x86_64__) && defined(__GNUC__)
#define CREPA_LEVELS
CREPA_DECLARE(avx2)
CREPA_DECLARE(avx512)
#endif

namespace {

// 0 generic, 1 AVX2, 2 AVX-512: the micro-architecture levels x86-64-v3 and -v4.
int detect() {
  int level = 0;
#if defined(CREPA_LEVELS)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi") &&
      __builtin_cpu_supports("bmi2"))
    level = 1;
  if (level == 1 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    level = 2;
  if (const char* asked = std::getenv("CREPA_KERNELS_CPU")) {
    const int limit = !std::strcmp(asked, "generic") ? 0 : !std::strcmp(asked, "avx2") ? 1 : 2;
    if (limit < level) level = limit;
  }
#endif
  return level;
}

int level() {
  static const int chosen = detect();
  return chosen;
}

template <typename T>
Kernels<T> choose() {
#if defined(CREPA_LEVELS)
  if (level() == 2) return avx512::table<T>();
  if (level() == 1) return avx2::table<T>();
#endif
  return generic::table<T>();
}

}  // namespace

template <typename T>
const Kernels<T>& kernels() {
  static const Kernels<T> chosen = choose<T>();
  return chosen;
}

template const Kernels<float>& kernels<float>();
template const Kernels<double>& kernels<double>();
template const Kernels<BFloat16>& kernels<BFloat16>();
template const Kernels<Float16>& kernels<Float16>();

const char* instruction_set() {
  static const char* const names[] = {"generic", "avx2", "avx512"};
  return names[level()];
}

}  // namespace crepa
