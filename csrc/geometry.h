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

// Indices [begin, end). I is a signed integer that holds 4 x source x target of an axis.
template <typename I>
struct Window {
  I begin;
  I end;
};

template <typename I>
CREPA_HOST_DEVICE I floor_divide(I a, I b) {
  return a >= 0 ? a / b : -((b - 1 - a) / b);
}

template <typename I>
struct Axis {
  I source;
  I target;
  I reach;  // 2 u

  // Source tokens that target token o reads.
  CREPA_HOST_DEVICE Window<I> sources(I o) const {
    return open_interval(source * (2 * o + 1) - target, 2 * target, source);
  }

  // Target tokens that read source token j; none where the plain filter passes over it.
  CREPA_HOST_DEVICE Window<I> targets(I j) const {
    return open_interval(target * (2 * j + 1) - source, 2 * source, target);
  }

  CREPA_HOST_DEVICE I numerator(I o, I j) const {
    const I distance = target * (2 * j + 1) - source * (2 * o + 1);
    const I n = reach - (distance < 0 ? -distance : distance);
    return n > 0 ? n : 0;
  }

  CREPA_HOST_DEVICE I denominator(I o) const {
    const Window<I> window = sources(o);
    I sum = 0;
    for (I j = window.begin; j < window.end; ++j) sum += numerator(o, j);
    return sum;
  }

  // Most tokens that one token reads, of sources or of targets.
  CREPA_HOST_DEVICE I most_sources() const { return at_most(reach, target, source); }
  CREPA_HOST_DEVICE I most_targets() const { return at_most(reach, source, target); }

 private:
  // Indices k of [0, count) with |step k - centre| < reach.
  CREPA_HOST_DEVICE Window<I> open_interval(I centre, I step, I count) const {
    const I begin = floor_divide(centre - reach, step) + 1;
    const I end = -floor_divide(-(centre + reach), step);
    return {begin < 0 ? 0 : begin, end > count ? count : end};
  }

  // An open interval of length reach / step holds at most that many integers, rounded up.
  CREPA_HOST_DEVICE static I at_most(I reach, I step, I count) {
    const I most = (reach + step - 1) / step;
    return most < count ? most : count;
  }
};

template <typename I>
CREPA_HOST_DEVICE Axis<I> make_axis(I source, I target, bool antialias) {
  return {source, target, 2 * (antialias && source > target ? source : target)};
}

// One axis of a gather: rows of `to` are made from rows of `from`, by R (adjoint false) or R'.
template <typename I>
struct Gather {
  Axis<I> axis;
  bool adjoint;

  CREPA_HOST_DEVICE I from() const { return adjoint ? axis.target : axis.source; }
  CREPA_HOST_DEVICE I to() const { return adjoint ? axis.source : axis.target; }
  CREPA_HOST_DEVICE I most() const { return adjoint ? axis.most_targets() : axis.most_sources(); }
  CREPA_HOST_DEVICE Window<I> window(I index) const {
    return adjoint ? axis.targets(index) : axis.sources(index);
  }

  // Weight of `from` row k in `to` row `index`; denominators[o] are those of the axis.
  template <typename T, typename Denominators>
  CREPA_HOST_DEVICE T weight(I index, I k, const Denominators& denominators) const {
    const I o = adjoint ? k : index, j = adjoint ? index : k;
    return static_cast<T>(axis.numerator(o, j)) / static_cast<T>(denominators[o]);
  }
};

}  // namespace crepa
