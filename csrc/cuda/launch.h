// The kernels' arguments and launchers. Everything is already checked.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "../geometry.h"

namespace crepa {

// Leading axes of a tensor, joined where the strides allow; the rest have size 1.
constexpr int kAxes = 4;

struct FrameOffsets {
  unsigned size[kAxes];
  int64_t stride[kAxes];
};

struct Rows {
  const void* data;
  FrameOffsets frames;
  int64_t row_stride;
};

struct Task {
  Gather<int> vertical;
  Gather<int> horizontal;
  Rows from;
  void* out;  // contiguous
  unsigned frames;
  int channels;
  bool aligned;  // every row begins at a multiple of 16 bytes and is one long
  int width_from;
  int height_to;
  int width_to;
  int lines;  // rows of the result that a block makes: lines x columns
  int columns;

  // LayerNorm: one number a token, contiguous. The forward pass writes them, the backward pass reads them.
  void* mean;
  void* inverse_std;
  double eps;
  const bool* in_loss;  // one a frame: what is outside is neither read nor has a gradient; null: all are inside
  Rows tokens;          // what was normalized; backward pass only
  const void* scale;    // of the result, one number; null: 1; backward pass only
};

enum class Storage { kFloat, kDouble, kBFloat16, kHalf };

void launch_resample(const Task& task, Storage type, cudaStream_t stream);
void launch_layer_norm_resample(const Task& task, Storage type, cudaStream_t stream);
void launch_layer_norm_resample_backward(const Task& task, Storage type, cudaStream_t stream);

inline int64_t blocks_of(const Task& task) {
  const int64_t across = (task.width_to + task.columns - 1) / task.columns;
  return task.frames * across * ((task.height_to + task.lines - 1) / task.lines);
}

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Shared memory that every card has without asking, 48 KB, less what a kernel declares for itself.
constexpr int64_t kSharedBytes = 47 << 10;

}  // namespace crepa
