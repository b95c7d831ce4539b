#include <cstdlib>
#include <cstring>

#include "alignment.h"

namespace crepa {

#define CREPA_DECLARE(level)                           \
  namespace level {                                    \
  template <typename T>                                \
  Kernels<T> table();                                  \
  template <typename P, typename Y, typename Q>        \
  AlignKernel<P, Y, Q> align_table();                  \
  template <typename Y, typename A>                    \
  InverseNormKernel<Y, A> inverse_norm_table();        \
  template <typename Q, typename P>                    \
  AlignBackwardKernel<Q, P> align_backward_table();    \
  template <typename T>                                \
  NormalizeKernel<T> normalize_table();                \
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

#if defined(CREPA_LEVELS)
#define CREPA_NEWEST(...) \
  (level() == 2 ? avx512::__VA_ARGS__ : level() == 1 ? avx2::__VA_ARGS__ : generic::__VA_ARGS__)
#else
#define CREPA_NEWEST(...) generic::__VA_ARGS__
#endif

}  // namespace

template <typename T>
const Kernels<T>& kernels() {
  static const Kernels<T> chosen = CREPA_NEWEST(table<T>());
  return chosen;
}

template const Kernels<float>& kernels<float>();
template const Kernels<double>& kernels<double>();
template const Kernels<BFloat16>& kernels<BFloat16>();
template const Kernels<Float16>& kernels<Float16>();

template <typename P, typename Y, typename Q>
AlignKernel<P, Y, Q> align_kernel() {
  return CREPA_NEWEST(align_table<P, Y, Q>());
}
template <typename Y, typename A>
InverseNormKernel<Y, A> inverse_norm_kernel() {
  return CREPA_NEWEST(inverse_norm_table<Y, A>());
}
template <typename Q, typename P>
AlignBackwardKernel<Q, P> align_backward_kernel() {
  return CREPA_NEWEST(align_backward_table<Q, P>());
}
template <typename T>
NormalizeKernel<T> normalize_kernel() {
  return CREPA_NEWEST(normalize_table<T>());
}

#define CREPA_DEFINE(P, Y, Q) template AlignKernel<P, Y, Q> align_kernel<P, Y, Q>();
CREPA_ALIGN_TYPES(CREPA_DEFINE)
#undef CREPA_DEFINE
#define CREPA_DEFINE(Q, P) template AlignBackwardKernel<Q, P> align_backward_kernel<Q, P>();
CREPA_ALIGN_BACKWARD_TYPES(CREPA_DEFINE)
#undef CREPA_DEFINE
template InverseNormKernel<float, float> inverse_norm_kernel<float, float>();
template InverseNormKernel<BFloat16, float> inverse_norm_kernel<BFloat16, float>();
template InverseNormKernel<Float16, float> inverse_norm_kernel<Float16, float>();
template InverseNormKernel<double, double> inverse_norm_kernel<double, double>();
template NormalizeKernel<float> normalize_kernel<float>();
template NormalizeKernel<BFloat16> normalize_kernel<BFloat16>();
template NormalizeKernel<Float16> normalize_kernel<Float16>();
template NormalizeKernel<double> normalize_kernel<double>();

const char* instruction_set() {
  static const char* const names[] = {"generic", "avx2", "avx512"};
  return names[level()];
}

}  // namespace crepa
