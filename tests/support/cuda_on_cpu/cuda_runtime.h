// CUDA's names, as far as csrc/cuda uses them, for a C++ compiler and one block of threads at a time.
#pragma once

#include <cmath>
#include <cstdint>

#include "block.h"

#define __global__ static
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))

#define threadIdx (::cuda_on_cpu::builtins.thread)
#define blockIdx (::cuda_on_cpu::builtins.block)
#define blockDim (::cuda_on_cpu::builtins.threads)
#define __syncthreads() ::cuda_on_cpu::barrier(__LINE__)
#define __shfl_xor_sync(mask, value, offset) ::cuda_on_cpu::exchange(mask, value, offset, __LINE__)

using cudaStream_t = void*;

struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) int2 {
  int x, y;
};
inline int2 make_int2(int x, int y) { return {x, y}; }

template <typename T>
inline T __ldg(const T* from) {
  return *from;
}
template <typename T>
inline void __stcs(T* to, T value) {
  *to = value;
}

// Of a number and NaN, CUDA's take the number.
inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }
inline float max(float a, float b) { return fmaxf(a, b); }
inline double max(double a, double b) { return fmax(a, b); }
using std::sqrt;
