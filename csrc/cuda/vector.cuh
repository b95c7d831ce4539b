// 16 bytes of a row at a time, widened to the type of the sums.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "launch.h"

namespace crepa {

template <typename T>
struct AccumulateType {
  using type = float;
};
template <>
struct AccumulateType<double> {
  using type = double;
};
template <typename T>
using Accumulate = typename AccumulateType<T>::type;

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ double widen(double x) { return x; }
__device__ __forceinline__ float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float widen(__half x) { return __half2float(x); }
template <typename T>
__device__ __forceinline__ T narrow(Accumulate<T> x) {
  return static_cast<T>(x);
}
template <>
__device__ __forceinline__ __nv_bfloat16 narrow<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}
template <>
__device__ __forceinline__ __half narrow<__half>(float x) {
  return __float2half_rn(x);
}

// kWidth neighbouring channels: 16 bytes where rows are aligned to them, else one channel.
template <typename T, int kWidth>
struct alignas(sizeof(T) * kWidth) Pack {
  T value[kWidth];
};

template <typename T>
constexpr int kFullWidth = 16 / sizeof(T);

template <int kWidth, typename T>
__device__ __forceinline__ Pack<T, kWidth> read(const T* row) {
  if constexpr (sizeof(T) * kWidth == 16) {
    const uint4 bits = __ldg(reinterpret_cast<const uint4*>(row));
    return *reinterpret_cast<const Pack<T, kWidth>*>(&bits);
  } else {
    Pack<T, kWidth> pack;
#pragma unroll
    for (int i = 0; i < kWidth; ++i) pack.value[i] = row[i];
    return pack;
  }
}

// The results are not read again soon: they leave the caches to the source rows.
template <int kWidth, typename T>
__device__ __forceinline__ void write(T* row, const Accumulate<T> (&sum)[kWidth]) {
  Pack<T, kWidth> pack;
#pragma unroll
  for (int i = 0; i < kWidth; ++i) pack.value[i] = narrow<T>(sum[i]);
  if constexpr (sizeof(T) * kWidth == 16) {
    __stcs(reinterpret_cast<uint4*>(row), *reinterpret_cast<const uint4*>(&pack));
  } else {
#pragma unroll
    for (int i = 0; i < kWidth; ++i) row[i] = pack.value[i];
  }
}

// Calls `body` with a value of the storage type and the width that fits the rows.
template <typename F>
void dispatch(Storage type, bool aligned, const F& body) {
  auto with_width = [&](auto zero) {
    using T = decltype(zero);
    if (aligned) return body(zero, std::integral_constant<int, kFullWidth<T>>());
    return body(zero, std::integral_constant<int, 1>());
  };
  switch (type) {
    case Storage::kFloat: return with_width(float());
    case Storage::kDouble: return with_width(double());
    case Storage::kBFloat16: return with_width(__nv_bfloat16());
    case Storage::kHalf: return with_width(__half());
  }
}

}  // namespace crepa
