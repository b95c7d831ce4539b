// Rows as weighted sums of rows: what the kernels share.
#pragma once

#include "../geometry.h"
#include "launch.h"
#include "vector.cuh"

namespace crepa {

__device__ __forceinline__ int64_t frame_offset(const FrameOffsets& frames, unsigned frame) {
  int64_t offset = 0;
#pragma unroll
  for (int axis = kAxes - 1; axis >= 0; --axis) {
    offset += frame % frames.size[axis] * frames.stride[axis];
    frame /= frames.size[axis];
  }
  return offset;
}

// What a tile's rows read along one axis, in shared memory: 64-bit divisions stay out of the loops.
template <typename A>
struct Table {
  int2* window;  // (count), [begin, end)
  A* weight;     // (count, most)
  int most;

  __device__ __forceinline__ const A* weights(int index) const { return weight + index * most; }
};

template <typename A>
__host__ __device__ inline int64_t table_bytes(const Gather<int>& gather, int64_t count) {
  return count * (sizeof(int2) + gather.most() * sizeof(A)) + sizeof(A);
}

// The table of `count` rows from `first`; `shared` moves on behind it.
template <typename A>
__device__ __forceinline__ Table<A> make_table(char*& shared, const Gather<int>& gather, int first, int count) {
  Table<A> table;
  table.most = static_cast<int>(gather.most());
  table.window = reinterpret_cast<int2*>(shared);
  table.weight = reinterpret_cast<A*>(shared + count * sizeof(int2));
  shared += (table_bytes<A>(gather, count) + 7) / 8 * 8;
  for (int i = threadIdx.x; i < count * table.most; i += blockDim.x) {
    const int row = i / table.most;
    const int index = first + row;
    if (index >= gather.to()) continue;
    const Window<int> window = gather.window(index);
    const int k = window.begin + i % table.most;
    if (i % table.most == 0) table.window[row] = make_int2(window.begin, window.end);
    if (k >= window.end) continue;
    const int o = gather.adjoint ? k : index, j = gather.adjoint ? index : k;
    table.weight[i] = static_cast<A>(gather.axis.numerator(o, j)) / static_cast<A>(gather.axis.denominator(o));
  }
  return table;
}

// Which rows a block makes: `lines` x `columns` from (y, x) of one frame.
struct Place {
  int frame, y, x, lines, columns;

  __device__ __forceinline__ explicit Place(const Task& task) {
    const unsigned across = (task.width_to + task.columns - 1) / task.columns;
    const unsigned down = (task.height_to + task.lines - 1) / task.lines;
    x = blockIdx.x % across * task.columns;
    y = blockIdx.x / across % down * task.lines;
    frame = blockIdx.x / across / down;
    lines = min(task.lines, task.height_to - y);
    columns = min(task.columns, task.width_to - x);
  }
};

// sum += weight * (row - mean)
template <int kWidth, typename T, typename A>
__device__ __forceinline__ void add(A (&sum)[kWidth], const Pack<T, kWidth>& pack, A weight, A mean = A(0)) {
#pragma unroll
  for (int i = 0; i < kWidth; ++i) sum[i] += weight * (widen(pack.value[i]) - mean);
}

// sum = the rows of `lines` x `columns` weighted with the products of v and h, kWidth channels from `channel`.
// Two rows are asked for before either is used: with the block's other warps that keeps the memory busy.
template <int kWidth, typename T, typename A>
__device__ __forceinline__ void gather_rows(A (&sum)[kWidth], const T* frame, int64_t row_stride, int width,
                                            int2 lines, int2 columns, const A* v, const A* h, int channel) {
#pragma unroll
  for (int i = 0; i < kWidth; ++i) sum[i] = A(0);
  const int count = columns.y - columns.x;
  for (int line = lines.x; line < lines.y; ++line) {
    const T* row = frame + (static_cast<int64_t>(line) * width + columns.x) * row_stride + channel;
    const A weight = v[line - lines.x];
    int k = 0;
    for (; k + 2 <= count; k += 2, row += 2 * row_stride) {
      const Pack<T, kWidth> a = read<kWidth>(row), b = read<kWidth>(row + row_stride);
      add(sum, a, weight * h[k]);
      add(sum, b, weight * h[k + 1]);
    }
    if (k < count) add(sum, read<kWidth>(row), weight * h[k]);
  }
}

}  // namespace crepa
