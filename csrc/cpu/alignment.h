// Rows of projected tokens against rows of the teacher: what the kernels of one instruction set offer. No torch here.
#pragma once

#include "kernels.h"

namespace crepa {

// Projected tokens of type P, teacher rows of type Y, kept gradient of type Q. Rows are frame-major, `tokens` a frame.
template <typename P, typename Y, typename Q>
struct AlignTask {
  using A = Accumulate<P>;
  const P* projected;   // (rows, features)
  // p = inverse_std (projected - mean row_sums) + offset: what centred weights make of tokens that are not normalized.
  const A* mean;         // (rows) or null: p = projected + offset
  const A* inverse_std;  // (rows)
  const A* row_sums;     // (features)
  const A* offset;       // (features) or null
  const Y* const* teacher;        // (tokens, features) of teacher frame base + i
  const int64_t* teacher_stride;  // elements from one row to the next
  const A* teacher_inverse;       // 1 / max(norm, floor) of their rows, (teacher frames, tokens)
  const A* weights;               // (frames of the clip, frames of the clip)
  const int64_t* offsets;         // of neighbours, both directions
  int64_t offset_count;
  int64_t base, first, clip_frames, tokens, features;
  int64_t start, stop;  // rows outside are not in the loss
  Q* q;                 // (rows, features) or null
  A* own;
  A* total;
  A* inverse_norm;
  A* q_dot_p;
};

template <typename P, typename Y, typename Q>
using AlignKernel = void (*)(const AlignTask<P, Y, Q>&, int64_t begin, int64_t end);
template <typename P, typename Y, typename Q>
AlignKernel<P, Y, Q> align_kernel();

// out[i] = 1 / max(norm of row i, floor)
template <typename Y, typename A>
using InverseNormKernel = void (*)(const Y* rows, int64_t stride, int64_t features, A* out, int64_t begin, int64_t end);
template <typename Y, typename A>
InverseNormKernel<Y, A> inverse_norm_kernel();

// Blocks of rows, so that sums over rows do not depend on the number of threads.
constexpr int64_t kRowsPerBlock = 64;

template <typename Q, typename P>
struct AlignBackwardTask {
  using A = Accumulate<P>;
  const Q* q;             // (rows, features)
  const A* grad;          // of each frame's total
  const A* inverse_norm;  // (rows)
  const A* q_dot_p;       // (rows)
  const A* offset;        // (features) or null
  const A* inverse_std;   // (rows), with `along`
  int64_t rows, tokens, features, width;
  P* g;       // (rows, features) or null
  P* scaled;  // g inverse_std, (rows, features) or null, with `along`
  A* along;   // (rows) or null
  A* sum;     // of g over each block's rows, (blocks, features)
};

template <typename Q, typename P>
using AlignBackwardKernel = void (*)(const AlignBackwardTask<Q, P>&, int64_t begin_block, int64_t end_block);
template <typename Q, typename P>
AlignBackwardKernel<Q, P> align_backward_kernel();

// x = (h - mean - low) inverse_std. The mean is kept in two parts: of a token far from zero one would lose what is left.
template <typename T>
struct NormalizeTask {
  using A = Accumulate<T>;
  Rows<const T> tokens;
  int64_t per_frame, channels;
  A* mean;
  A* low;
  A* inverse_std;
  bool measure;  // writes the three, else reads them
  double eps;
  T* out;  // contiguous, or null
};

template <typename T>
using NormalizeKernel = void (*)(const NormalizeTask<T>&, int64_t begin, int64_t end);
template <typename T>
NormalizeKernel<T> normalize_kernel();

// Every combination of types that there are kernels of: X(P, Y, Q), rows of other types are converted first.
#define CREPA_ALIGN_TYPES(X)             \
  X(float, float, float)                 \
  X(float, BFloat16, float)              \
  X(float, Float16, float)               \
  X(float, float, Float16)               \
  X(float, BFloat16, Float16)            \
  X(float, Float16, Float16)             \
  X(float, float, BFloat16)              \
  X(float, BFloat16, BFloat16)           \
  X(float, Float16, BFloat16)            \
  X(BFloat16, float, BFloat16)           \
  X(BFloat16, BFloat16, BFloat16)        \
  X(BFloat16, Float16, BFloat16)         \
  X(double, double, double)

// X(Q, P)
#define CREPA_ALIGN_BACKWARD_TYPES(X) \
  X(float, float)                     \
  X(Float16, float)                   \
  X(BFloat16, float)                  \
  X(BFloat16, BFloat16)               \
  X(double, double)

}  // namespace crepa
