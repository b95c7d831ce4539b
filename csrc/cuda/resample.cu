// Resampling and its adjoint: a block makes a tile of rows, so that neighbouring rows meet their sources in its cache.
#include "gather.cuh"

namespace crepa {
namespace {

constexpr int kThreads = 256;

template <typename T, int kWidth>
__global__ void __launch_bounds__(kThreads, 3) resample_kernel(const Task task) {
  using A = Accumulate<T>;
  extern __shared__ double shared[];
  const Place place(task);
  char* tables = reinterpret_cast<char*>(shared);
  const Table<A> v = make_table<A>(tables, task.vertical, place.y, task.lines);
  const Table<A> h = make_table<A>(tables, task.horizontal, place.x, task.columns);
  __syncthreads();

  const T* from = static_cast<const T*>(task.from.data) + frame_offset(task.from.frames, place.frame);
  const int64_t first = (static_cast<int64_t>(place.frame) * task.height_to + place.y) * task.width_to + place.x;
  T* out = static_cast<T*>(task.out) + first * task.channels;
  const int packs = task.channels / kWidth, stride = min(packs, kThreads), rows_at_once = kThreads / stride;
  if (threadIdx.x >= rows_at_once * stride) return;
  for (int row = threadIdx.x / stride; row < place.lines * place.columns; row += rows_at_once) {
    const int y = row / place.columns, x = row % place.columns;
    T* to = out + (static_cast<int64_t>(y) * task.width_to + x) * task.channels;
    for (int pack = threadIdx.x % stride; pack < packs; pack += stride) {
      A sum[kWidth];
      gather_rows<kWidth>(sum, from, task.from.row_stride, task.width_from, v.window[y], h.window[x], v.weights(y),
                          h.weights(x), pack * kWidth);
      write<kWidth>(to + pack * kWidth, sum);
    }
  }
}

}  // namespace

void launch_resample(const Task& task, Storage type, cudaStream_t stream) {
  dispatch(type, task.aligned, [&](auto zero, auto width) {
    using T = decltype(zero);
    using A = Accumulate<T>;
    const int64_t shared = table_bytes<A>(task.vertical, task.lines) + table_bytes<A>(task.horizontal, task.columns) + 16;
    resample_kernel<T, decltype(width)::value>
        <<<static_cast<unsigned>(blocks_of(task)), kThreads, shared, stream>>>(task);
  });
}

}  // namespace crepa
