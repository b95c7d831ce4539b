// Windows and weights of bilinear resampling with half-pixel centres, for the CPU and the CUDA kernels.
//
// Both filters are one tent. Target o lies at in (o + 1/2) / out - 1/2 on the source axis, and source j contributes
//     n(o, j) = max(0, 2 u - |out (2 j + 1) - in (2 o + 1)|),    weight(o, j) = n(o, j) / sum over j of n(o, j),
// with u = in where the filter is widened (antialiasing of an axis that shrinks), else u = out. Everything up to the
// last division is an integer, so a weight is correctly rounded and the same on every device.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define CREPA_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define CREPA_HOST_DEVICE inline
#endif

namespace crepa {

// Indices [begin, end).
struct Window {
  int64_t begin;
  int64_t end;
};

CREPA_HOST_DEVICE int64_t floor_divide(int64_t a, int64_t b) {
  return a >= 0 ? a / b : -((b - 1 - a) / b);
}

struct Axis {
  int64_t source;
  int64_t target;
  int64_t reach;  // 2 u

  // Source tokens that target token o reads.
  CREPA_HOST_DEVICE Window sources(int64_t o) const {
    return open_interval(source * (2 * o + 1) - target, 2 * target, source);
  }

  // Target tokens that read source token j; none where the plain filter passes over it.
  CREPA_HOST_DEVICE Window targets(int64_t j) const {
    return open_interval(target * (2 * j + 1) - source, 2 * source, target);
  }

  CREPA_HOST_DEVICE int64_t numerator(int64_t o, int64_t j) const {
    const int64_t distance = target * (2 * j + 1) - source * (2 * o + 1);
    const int64_t n = reach - (distance < 0 ? -distance : distance);
    return n > 0 ? n : 0;
  }

  CREPA_HOST_DEVICE int64_t denominator(int64_t o) const {
    const Window window = sources(o);
    int64_t sum = 0;
    for (int64_t j = window.begin; j < window.end; ++j) sum += numerator(o, j);
    return sum;
  }

  // Most tokens that one token reads, of sources or of targets.
  CREPA_HOST_DEVICE int64_t most_sources() const { return at_most(reach, target, source); }
  CREPA_HOST_DEVICE int64_t most_targets() const { return at_most(reach, source, target); }

 private:
  // Indices k of [0, count) with |step k - centre| < reach.
  CREPA_HOST_DEVICE Window open_interval(int64_t centre, int64_t step, int64_t count) const {
    const int64_t begin = floor_divide(centre - reach, step) + 1;
    const int64_t end = -floor_divide(-(centre + reach), step);
    return {begin < 0 ? 0 : begin, end > count ? count : end};
  }

  // An open interval of length reach / step holds at most that many integers, rounded up.
  CREPA_HOST_DEVICE static int64_t at_most(int64_t reach, int64_t step, int64_t count) {
    const int64_t most = (reach + step - 1) / step;
    return most < count ? most : count;
  }
};

CREPA_HOST_DEVICE Axis make_axis(int64_t source, int64_t target, bool antialias) {
  return {source, target, 2 * (antialias && source > target ? source : target)};
}

// One axis of a gather: rows of `to` are made from rows of `from`, by R (adjoint false) or R'.
struct Gather {
  Axis axis;
  bool adjoint;

  CREPA_HOST_DEVICE int64_t from() const { return adjoint ? axis.target : axis.source; }
  CREPA_HOST_DEVICE int64_t to() const { return adjoint ? axis.source : axis.target; }
  CREPA_HOST_DEVICE int64_t most() const { return adjoint ? axis.most_targets() : axis.most_sources(); }
  CREPA_HOST_DEVICE Window window(int64_t index) const {
    return adjoint ? axis.targets(index) : axis.sources(index);
  }

  // Weight of `from` row k in `to` row `index`; denominators[o] are those of the axis.
  template <typename T, typename Denominators>
  CREPA_HOST_DEVICE T weight(int64_t index, int64_t k, const Denominators& denominators) const {
    const int64_t o = adjoint ? k : index, j = adjoint ? index : k;
    return static_cast<T>(axis.numerator(o, j)) / static_cast<T>(denominators[o]);
  }
};

}  // namespace crepa
