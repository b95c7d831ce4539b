// The tasks of kernels.h. The including file sets CREPA_LEVEL, the name of its instruction set, and its target.
// Everything is in an unnamed namespace: a function shared with other files could run on an older processor.

namespace crepa {
namespace CREPA_LEVEL {
namespace {

#include "numbers.h"
#include "rows.h"

template <typename A>
struct Buffer {
  A* data;
  explicit Buffer(int64_t count) : data(static_cast<A*>(::aligned_alloc(64, (count * sizeof(A) + 127) / 64 * 64))) {}
  ~Buffer() { ::free(data); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
};

template <typename A>
CREPA_INLINE int64_t last(const Taps<A>& taps, int64_t index) {
  return taps.begin[index] + taps.first[index + 1] - taps.first[index];
}

// Source rows of one row (y, x) of the result, with the product of the two axes' weights.
template <typename T, typename A>
int64_t collect(const Task<T>& task, const T* frame, int64_t y, int64_t x, const A* mean, const A* inverse_std,
                Tap<T, A>* taps) {
  const Taps<A>&v = task.vertical, &h = task.horizontal;
  int64_t count = 0;
  for (int64_t i = v.first[y]; i < v.first[y + 1]; ++i) {
    const int64_t line = (v.begin[y] + i - v.first[y]) * h.from;
    for (int64_t j = h.first[x]; j < h.first[x + 1]; ++j) {
      const int64_t token = line + h.begin[x] + j - h.first[x];
      const A weight = v.weight[i] * h.weight[j];
      taps[count++] = {frame + token * task.from.row_stride, mean ? weight * inverse_std[token] : weight,
                       mean ? mean[token] : A(0)};
    }
  }
  return count;
}

// A row is too short for the processor to see by itself which one comes next.
template <typename T>
CREPA_INLINE void prefetch_row(const T* row, int64_t channels) {
  const char* bytes = reinterpret_cast<const char*>(row);
  for (int64_t i = 0; i < channels * static_cast<int64_t>(sizeof(T)); i += 64) __builtin_prefetch(bytes + i, 0, 2);
}

// Rows of the result, through a buffer where they go past the caches.
template <typename T>
struct Output {
  const Task<T>& task;
  Buffer<T> staged;
  explicit Output(const Task<T>& task) : task(task), staged(task.stream ? task.channels : 0) {}
  ~Output() {
    if (task.stream) stream_end();
  }
  T* at(int64_t row) { return task.stream ? staged.data : task.out + row * task.channels; }
  void done(int64_t row) {
    if (task.stream) stream_row(task.out + row * task.channels, staged.data, task.channels);
  }
};

template <typename T>
void resample(const Task<T>& task, int64_t begin, int64_t end) {
  using A = Accumulate<T>;
  const int64_t lines = task.vertical.to, columns = task.horizontal.to;
  Buffer<Tap<T, A>> taps(task.vertical.most * task.horizontal.most);
  Buffer<A> partial(task.channels);
  Output<T> out(task);
  for (int64_t item = begin; item < end; ++item) {
    const T* frame = task.from.data + task.from.frame_offset[item / lines];
    for (int64_t x = 0; x < columns; ++x) {
      const int64_t row = item * columns + x;
      const A* none = nullptr;
      const int64_t count = collect(task, frame, item % lines, x, none, none, taps.data);
      if (count > 0 && x + 2 < columns) prefetch_row(taps.data[count - 1].row + 2 * task.from.row_stride, task.channels);
      combine_all<false>(count, taps.data, partial.data, out.at(row), task.channels);
      out.done(row);
    }
  }
}

template <typename T>
void layer_norm_resample(const Task<T>& task, int64_t begin, int64_t end) {
  using A = Accumulate<T>;
  const Taps<A>&v = task.vertical, &h = task.horizontal;
  const int64_t tokens = v.from * h.from;
  Buffer<Tap<T, A>> taps(v.most * h.most);
  Buffer<A> partial(task.channels), mean(tokens), inverse_std(tokens);
  Buffer<int64_t> read(h.from + 2);  // columns that some row of the result reads, the last one three times
  int64_t columns = 0;
  for (int64_t x = 0, j = 0; x < h.to; ++x)
    for (j = j > h.begin[x] ? j : h.begin[x]; j < last(h, x); ++j) read.data[columns++] = j;
  read.data[columns] = read.data[columns + 1] = read.data[columns - 1];
  Output<T> out(task);
  int64_t known = 0;  // lines of the frame whose statistics this thread has, or need not have
  for (int64_t item = begin; item < end; ++item) {
    const int64_t frame = item / v.to, y = item % v.to;
    const T* rows = task.from.data + task.from.frame_offset[frame];
    const int64_t others = y == 0 ? 0 : last(v, y - 1);  // earlier lines' to write
    if (y == 0) known = 0;
    if (task.in_loss && !task.in_loss[frame]) {
      for (int64_t row = item * h.to; row < (item + 1) * h.to; ++row) {
        combine_all<true>(0, taps.data, partial.data, out.at(row), task.channels);
        out.done(row);
      }
      continue;
    }
    for (int64_t line = known > v.begin[y] ? known : v.begin[y]; line < last(v, y); ++line) {
      for (int64_t i = 0; i < columns; ++i) {
        const int64_t token = line * h.from + read.data[i];
        prefetch_row(rows + (line * h.from + read.data[i + 2]) * task.from.row_stride, task.channels);
        A low;
        row_statistics(rows + token * task.from.row_stride, task.channels, static_cast<A>(task.eps), mean.data + token,
                       &low, inverse_std.data + token);
        if (line < others) continue;
        task.mean[frame * tokens + token] = mean.data[token];
        task.inverse_std[frame * tokens + token] = inverse_std.data[token];
      }
    }
    known = last(v, y);
    for (int64_t x = 0; x < h.to; ++x) {
      const int64_t row = item * h.to + x;
      const int64_t count = collect(task, rows, y, x, mean.data, inverse_std.data, taps.data);
      combine_all<true>(count, taps.data, partial.data, out.at(row), task.channels);
      out.done(row);
    }
  }
}

template <typename T>
void layer_norm_resample_backward(const Task<T>& task, int64_t begin, int64_t end) {
  using A = Accumulate<T>;
  const int64_t lines = task.vertical.to, columns = task.horizontal.to;
  Buffer<Tap<T, A>> taps(task.vertical.most * task.horizontal.most);
  Buffer<A> partial(task.channels), gradient(task.channels);
  Output<T> out(task);
  for (int64_t item = begin; item < end; ++item) {
    const int64_t frame = item / lines, y = item % lines;
    const T* gradients = task.from.data + task.from.frame_offset[frame];
    const T* tokens = task.tokens.data + task.tokens.frame_offset[frame];
    for (int64_t x = 0; x < columns; ++x) {
      const int64_t row = item * columns + x;
      const A* none = nullptr;
      const bool inside = !task.in_loss || task.in_loss[frame];
      const int64_t count = inside ? collect(task, gradients, y, x, none, none, taps.data) : 0;
      if (count == 0) {
        combine_all<false>(0, taps.data, partial.data, out.at(row), task.channels);
      } else {
        combine_all<false>(count, taps.data, partial.data, gradient.data, task.channels);
        if (x + 2 < columns && task.horizontal.first[x + 3] > task.horizontal.first[x + 2])
          prefetch_row(tokens + (y * columns + x + 2) * task.tokens.row_stride, task.channels);
        normalization_backward(gradient.data, tokens + (y * columns + x) * task.tokens.row_stride, task.mean[row],
                               task.inverse_std[row], task.scale, task.channels, out.at(row));
      }
      out.done(row);
    }
  }
}

#include "alignment_rows.h"

}  // namespace

template <typename T>
Kernels<T> table() {
  return {resample<T>, layer_norm_resample<T>, layer_norm_resample_backward<T>};
}

template Kernels<float> table<float>();
template Kernels<double> table<double>();
template Kernels<BFloat16> table<BFloat16>();
template Kernels<Float16> table<Float16>();

template <typename P, typename Y, typename Q>
AlignKernel<P, Y, Q> align_table() {
  return align<P, Y, Q>;
}
template <typename Y, typename A>
InverseNormKernel<Y, A> inverse_norm_table() {
  return inverse_norms<Y, A>;
}
template <typename Q, typename P>
AlignBackwardKernel<Q, P> align_backward_table() {
  return align_backward<Q, P>;
}
template <typename T>
NormalizeKernel<T> normalize_table() {
  return normalize<T>;
}

#define CREPA_DEFINE(P, Y, Q) template AlignKernel<P, Y, Q> align_table<P, Y, Q>();
CREPA_ALIGN_TYPES(CREPA_DEFINE)
#undef CREPA_DEFINE
#define CREPA_DEFINE(Q, P) template AlignBackwardKernel<Q, P> align_backward_table<Q, P>();
CREPA_ALIGN_BACKWARD_TYPES(CREPA_DEFINE)
#undef CREPA_DEFINE
template InverseNormKernel<float, float> inverse_norm_table<float, float>();
template InverseNormKernel<BFloat16, float> inverse_norm_table<BFloat16, float>();
template InverseNormKernel<Float16, float> inverse_norm_table<Float16, float>();
template InverseNormKernel<double, double> inverse_norm_table<double, double>();
template NormalizeKernel<float> normalize_table<float>();
template NormalizeKernel<BFloat16> normalize_table<BFloat16>();
template NormalizeKernel<Float16> normalize_table<Float16>();
template NormalizeKernel<double> normalize_table<double>();

}  // namespace CREPA_LEVEL
}  // namespace crepa
