// What the kernels of one instruction set offer to the operators. No torch here, and nothing of the standard library
// that could be instantiated inside a file compiled for a newer processor and then be shared by all.
#pragma once

#include <cstdint>

namespace crepa {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

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

// Along one axis, row i is the sum of weight[k] * (row begin[i] + k - first[i]) over k in [first[i], first[i + 1]).
template <typename A>
struct Taps {
  int64_t from;
  int64_t to;
  const int64_t* begin;
  const int64_t* first;
  const A* weight;
  int64_t most;
};

template <typename T>
struct Rows {
  T* data;
  const int64_t* frame_offset;  // elements, one a frame
  int64_t row_stride;
};

template <typename T>
struct Task {
  Taps<Accumulate<T>> vertical;
  Taps<Accumulate<T>> horizontal;
  Rows<const T> from;
  T* out;  // contiguous
  int64_t channels;
  bool stream;  // the result is too large to be read from a cache later

  // LayerNorm: one number a token, contiguous. The forward pass writes them, the backward pass reads them.
  Accumulate<T>* mean;
  Accumulate<T>* inverse_std;
  double eps;
  const bool* in_loss;   // one a frame: what is outside is neither read nor has a gradient; null: all are inside
  Rows<const T> tokens;  // what was normalized; backward pass only
  Accumulate<T> scale;   // of the result; backward pass only
};

// Each works on lines [begin, end) of all frames' lines of the result.
template <typename T>
struct Kernels {
  void (*resample)(const Task<T>&, int64_t begin, int64_t end);
  void (*layer_norm_resample)(const Task<T>&, int64_t begin, int64_t end);
  void (*layer_norm_resample_backward)(const Task<T>&, int64_t begin, int64_t end);
};

// Those of the newest instruction set that this processor has.
template <typename T>
const Kernels<T>& kernels();

// "default", "avx2" or "avx512"; CREPA_KERNELS_CPU in the environment asks for an older one.
const char* instruction_set();

}  // namespace crepa
