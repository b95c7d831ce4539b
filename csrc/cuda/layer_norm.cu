// LayerNorm fused with resampling: every token is fetched from memory once, forward and backward.
#include "gather.cuh"

namespace crepa {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;

template <typename A>
__device__ __forceinline__ A warp_sum(A value) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) value += __shfl_xor_sync(0xffffffffu, value, offset);
  return value;
}

// Mean and 1/std of a row, by one warp; the second pass over the row finds it in the cache. 1/std is NaN where the
// variance overflowed: the row would be zeros.
template <int kWidth, typename T, typename A>
__device__ __forceinline__ void row_statistics(const T* row, int packs, A channels, A eps, A& mean, A& inverse_std) {
  const int lane = threadIdx.x % 32;
  A sum = A(0);
  for (int pack = lane; pack < packs; pack += 32) {
    const Pack<T, kWidth> values = read<kWidth>(row + pack * kWidth);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) sum += widen(values.value[i]);
  }
  mean = warp_sum(sum) / channels;
  // What the rounded mean is off by is found on the way, so that it is exact to its last bit.
  A squares = A(0);
  sum = A(0);
  for (int pack = lane; pack < packs; pack += 32) {
    const Pack<T, kWidth> values = read<kWidth>(row + pack * kWidth);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      const A centred = widen(values.value[i]) - mean;
      sum += centred;
      squares += centred * centred;
    }
  }
  const A residue = warp_sum(sum) / channels;
  mean += residue;
  const A variance = warp_sum(squares) / channels - residue * residue;
  inverse_std = A(1) / sqrt(max(variance, A(0)) + eps) + (variance - variance);
}

// A block walks down a stripe of `columns` columns over `lines` lines of the result. The statistics of the source
// lines that the current line reads are in shared memory, line l in slot l % (most lines that one line reads).
template <typename T, int kWidth>
__global__ void __launch_bounds__(kThreads, 3) layer_norm_resample_kernel(const Task task, int stripe) {
  using A = Accumulate<T>;
  extern __shared__ double shared[];
  const Place place(task);
  char* tables = reinterpret_cast<char*>(shared);
  const Table<A> v = make_table<A>(tables, task.vertical, place.y, task.lines);
  const Table<A> h = make_table<A>(tables, task.horizontal, place.x, task.columns);
  A* means = reinterpret_cast<A*>(tables);
  A* inverses = means + v.most * stripe;
  int* is_read = reinterpret_cast<int*>(inverses + v.most * stripe);
  __syncthreads();
  const int left = h.window[0].x, across = h.window[place.columns - 1].y - left;
  for (int i = threadIdx.x; i < across; i += kThreads) {
    const Window<int> readers = task.horizontal.axis.targets(left + i);
    is_read[i] = readers.begin < readers.end;
  }

  const T* from = static_cast<const T*>(task.from.data) + frame_offset(task.from.frames, place.frame);
  const int64_t first_token = static_cast<int64_t>(place.frame) * task.vertical.axis.source * task.width_from;
  A* all_means = static_cast<A*>(task.mean) + first_token;
  A* all_inverses = static_cast<A*>(task.inverse_std) + first_token;
  const int64_t first = (static_cast<int64_t>(place.frame) * task.height_to + place.y) * task.width_to + place.x;
  T* out = static_cast<T*>(task.out) + first * task.channels;
  const int packs = task.channels / kWidth;
  if (task.in_loss && !task.in_loss[place.frame]) {
    for (int y = 0; y < place.lines; ++y, out += static_cast<int64_t>(task.width_to) * task.channels)
      for (int i = threadIdx.x; i < place.columns * packs; i += kThreads) {
        const A none[kWidth] = {};
        write<kWidth>(out + static_cast<int64_t>(i) * kWidth, none);
      }
    return;
  }
  int known = 0;
  for (int y = 0; y < place.lines; ++y, out += static_cast<int64_t>(task.width_to) * task.channels) {
    const int2 lines = v.window[y];
    const int fresh_line = max(known, lines.x), fresh = (lines.y - fresh_line) * across;
    known = lines.y;
    __syncthreads();  // the line before has used the slots
    for (int i = threadIdx.x / 32; i < fresh; i += kWarps) {
      const int line = fresh_line + i / across, column = i % across;
      if (!is_read[column]) continue;
      const int64_t token = static_cast<int64_t>(line) * task.width_from + left + column;
      A mean, inverse;
      row_statistics<kWidth>(from + token * task.from.row_stride, packs, static_cast<A>(task.channels),
                             static_cast<A>(task.eps), mean, inverse);
      if (threadIdx.x % 32 != 0) continue;
      const int slot = line % v.most * stripe + column;
      means[slot] = mean;
      inverses[slot] = inverse;
      // Blocks that share a token write the same bits.
      all_means[token] = mean;
      all_inverses[token] = inverse;
    }
    __syncthreads();
    for (int i = threadIdx.x; i < place.columns * packs; i += kThreads) {
      const int x = i / packs, channel = i % packs * kWidth;
      const int2 columns = h.window[x];
      A sum[kWidth];
#pragma unroll
      for (int k = 0; k < kWidth; ++k) sum[k] = A(0);
      for (int line = lines.x; line < lines.y; ++line) {
        const A weight = v.weights(y)[line - lines.x];
        const int slots = line % v.most * stripe - left;
        const T* row = from + (static_cast<int64_t>(line) * task.width_from + columns.x) * task.from.row_stride + channel;
#pragma unroll 2
        for (int column = columns.x; column < columns.y; ++column, row += task.from.row_stride)
          add(sum, read<kWidth>(row), weight * h.weights(x)[column - columns.x] * inverses[slots + column],
              means[slots + column]);
      }
      write<kWidth>(out + static_cast<int64_t>(x) * task.channels + channel, sum);
    }
  }
}

// Sums of two numbers over the block; `scratch` is the caller's alone until the next but one call.
template <typename A>
__device__ __forceinline__ void block_sum(A& a, A& b, A* scratch) {
  a = warp_sum(a);
  b = warp_sum(b);
  const int warps = blockDim.x / 32;
  if (threadIdx.x % 32 == 0) {
    scratch[threadIdx.x / 32] = a;
    scratch[32 + threadIdx.x / 32] = b;
  }
  __syncthreads();
  a = b = A(0);
  for (int i = 0; i < warps; ++i) {
    a += scratch[i];
    b += scratch[32 + i];
  }
}

// A block makes a run of `columns` rows of dh. Each thread holds kHeld packs of dx and h; with kHeld = 0 rows are too
// long to be held, and are gathered a second time.
template <typename T, int kWidth, int kHeld>
__global__ void __launch_bounds__(512, 1) layer_norm_resample_backward_kernel(const Task task) {
  using A = Accumulate<T>;
  constexpr int kSlots = kHeld > 0 ? kHeld : 1;
  extern __shared__ double shared[];
  __shared__ A scratch[2][64];
  const Place place(task);  // one line
  char* tables = reinterpret_cast<char*>(shared);
  const Table<A> v = make_table<A>(tables, task.vertical, place.y, 1);
  const Table<A> h = make_table<A>(tables, task.horizontal, place.x, task.columns);
  __syncthreads();

  const T* from = static_cast<const T*>(task.from.data) + frame_offset(task.from.frames, place.frame);
  const T* tokens = static_cast<const T*>(task.tokens.data) + frame_offset(task.tokens.frames, place.frame);
  const int packs = task.channels / kWidth, rounds = (packs + blockDim.x - 1) / blockDim.x;
  const int2 lines = v.window[0];
  const bool outside = task.in_loss && !task.in_loss[place.frame];
  const A scale = task.scale ? *static_cast<const A*>(task.scale) : A(1);
  for (int x = 0; x < place.columns; ++x) {
    const int2 columns = h.window[x];
    const int64_t token = static_cast<int64_t>(place.y) * task.width_to + place.x + x;
    const int64_t row = static_cast<int64_t>(place.frame) * task.height_to * task.width_to + token;
    const T* source = tokens + token * task.tokens.row_stride;
    T* out = static_cast<T*>(task.out) + row * task.channels;
    const bool read_by_none = outside || lines.x >= lines.y || columns.x >= columns.y;
    const A mean = static_cast<const A*>(task.mean)[row], inverse = static_cast<const A*>(task.inverse_std)[row];
    Pack<T, kWidth> held[kSlots];
    A dx[kSlots][kWidth];
    A sum = A(0), along = A(0);
    const auto fetch = [&](int slot, int channel) {
      held[slot] = read<kWidth>(source + channel);
      gather_rows<kWidth>(dx[slot], from, task.from.row_stride, task.width_from, lines, columns, v.weights(0),
                          h.weights(x), channel);
    };
    const auto reduce = [&](int slot, int channel) {
      fetch(slot, channel);
#pragma unroll
      for (int i = 0; i < kWidth; ++i) {
        sum += dx[slot][i];
        along += dx[slot][i] * ((widen(held[slot].value[i]) - mean) * inverse);
      }
    };
    if (!read_by_none) {
      if constexpr (kHeld > 0) {
#pragma unroll
        for (int slot = 0; slot < kHeld; ++slot)
          if (slot * blockDim.x + threadIdx.x < packs) reduce(slot, (slot * blockDim.x + threadIdx.x) * kWidth);
      } else {
        for (int pack = threadIdx.x; pack < packs; pack += blockDim.x) reduce(0, pack * kWidth);
      }
    }
    block_sum(sum, along, scratch[x % 2]);
    const A outer = scale * inverse;
    const A shift = outer * sum / static_cast<A>(task.channels);
    // The inverse stays with the row: its square underflows where the row is large.
    const A slope = outer * along / static_cast<A>(task.channels);
    const auto finish = [&](int slot, int channel) {
      A gradient[kWidth];
#pragma unroll
      for (int i = 0; i < kWidth; ++i)
        gradient[i] = read_by_none ? A(0)
                                   : outer * dx[slot][i] - shift -
                                         slope * ((widen(held[slot].value[i]) - mean) * inverse);
      write<kWidth>(out + channel, gradient);
    };
    if constexpr (kHeld > 0) {
#pragma unroll
      for (int slot = 0; slot < kHeld; ++slot)
        if (slot * blockDim.x + threadIdx.x < packs) finish(slot, (slot * blockDim.x + threadIdx.x) * kWidth);
    } else {
      for (int round = 0; round < rounds; ++round) {
        const int pack = round * blockDim.x + threadIdx.x;
        if (pack >= packs) break;
        if (!read_by_none) fetch(0, pack * kWidth);
        finish(0, pack * kWidth);
      }
    }
  }
}

template <typename T, int kWidth>
void launch_backward(const Task& task, cudaStream_t stream) {
  using A = Accumulate<T>;
  const int64_t packs = task.channels / kWidth;
  const int held = packs <= 512 ? 1 : packs <= 1024 ? 2 : packs <= 2048 ? 4 : 0;
  const int threads = held ? static_cast<int>(divide_up(divide_up(packs, held), 32) * 32) : 512;
  const int64_t shared = table_bytes<A>(task.vertical, 1) + table_bytes<A>(task.horizontal, task.columns) + 16;
  const auto launch = [&](auto kernel) {
    kernel<<<static_cast<unsigned>(blocks_of(task)), threads, shared, stream>>>(task);
  };
  if constexpr (kWidth > 1) {
    if (held == 1) return launch(layer_norm_resample_backward_kernel<T, kWidth, 1>);
    if (held == 2) return launch(layer_norm_resample_backward_kernel<T, kWidth, 2>);
    if (held == 4) return launch(layer_norm_resample_backward_kernel<T, kWidth, 4>);
  }
  launch(layer_norm_resample_backward_kernel<T, kWidth, 0>);
}

// Most source columns that one stripe reads.
int widest_stripe(const Task& task) {
  int widest = 0;
  for (int x = 0; x < task.width_to; x += task.columns) {
    const int end = x + task.columns < task.width_to ? x + task.columns : task.width_to;
    const int across = task.horizontal.window(end - 1).end - task.horizontal.window(x).begin;
    widest = across > widest ? across : widest;
  }
  return widest;
}

}  // namespace

void launch_layer_norm_resample(const Task& task, Storage type, cudaStream_t stream) {
  dispatch(type, task.aligned, [&](auto zero, auto width) {
    using T = decltype(zero);
    using A = Accumulate<T>;
    const int64_t stripe = widest_stripe(task);
    const int64_t shared = table_bytes<A>(task.vertical, task.lines) + table_bytes<A>(task.horizontal, task.columns) +
                           2 * task.vertical.most() * stripe * sizeof(A) + stripe * sizeof(int) + 16;
    layer_norm_resample_kernel<T, decltype(width)::value>
        <<<static_cast<unsigned>(blocks_of(task)), kThreads, shared, stream>>>(task, static_cast<int>(stripe));
  });
}

void launch_layer_norm_resample_backward(const Task& task, Storage type, cudaStream_t stream) {
  dispatch(type, task.aligned, [&](auto zero, auto width) {
    launch_backward<decltype(zero), decltype(width)::value>(task, stream);
  });
}

}  // namespace crepa
