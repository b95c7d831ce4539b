// The operators on CUDA tensors: checks, tiles, launches on the current stream.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>

#include "../operands.h"
#include "launch.h"

#ifdef CREPA_ARCHITECTURES
#define CREPA_TEXT(x) #x
#define CREPA_TEXT_OF(x) CREPA_TEXT(x)
// Read from the file, before it is loaded: loading registers the kernels, for every card.
extern "C" __attribute__((used)) const char crepa_kernels_built_for[] =
    "crepa_kernels built for " CREPA_TEXT_OF(CREPA_ARCHITECTURES) " by CUDA " CREPA_TEXT_OF(CUDART_VERSION);
#endif

namespace crepa {
namespace {

// Enough blocks for every card to be busy, and then as many rows a block as possible: they share their sources.
constexpr int64_t kManyBlocks = 1024;

Storage storage_of(const Tensor& tokens) {
  switch (tokens.scalar_type()) {
    case ScalarType::Float: return Storage::kFloat;
    case ScalarType::Double: return Storage::kDouble;
    case ScalarType::BFloat16: return Storage::kBFloat16;
    case ScalarType::Half: return Storage::kHalf;
    default: unsupported(tokens.scalar_type());
  }
}

FrameOffsets joined_axes(const Tensor& tokens, int& axes) {
  FrameOffsets frames;
  for (int i = 0; i < kAxes; ++i) frames.size[i] = 1, frames.stride[i] = 0;
  axes = 0;
  for (int64_t axis = 0; axis < tokens.dim() - 2; ++axis) {
    const int64_t size = tokens.size(axis), stride = tokens.stride(axis);
    if (size == 1) continue;
    if (axes > 0 && axes <= kAxes && frames.stride[axes - 1] == stride * size) {
      frames.size[axes - 1] *= static_cast<unsigned>(size);
      frames.stride[axes - 1] = stride;
      continue;
    }
    if (axes < kAxes) frames.size[axes] = static_cast<unsigned>(size), frames.stride[axes] = stride;
    ++axes;
  }
  return frames;
}

// How a tensor lies in memory. `tensor` becomes a copy where that is needed.
Rows lay_out(Tensor& tensor, bool& aligned) {
  tensor = Frames(tensor).tensor;
  int axes = 0;
  FrameOffsets frames = joined_axes(tensor, axes);
  if (axes > kAxes) {
    tensor = torch::stable::contiguous(tensor);
    frames = joined_axes(tensor, axes);
  }
  const int64_t size = static_cast<int64_t>(tensor.element_size()), row_stride = tensor.stride(tensor.dim() - 2);
  const void* data = tensor.const_data_ptr();
  bool whole = reinterpret_cast<uintptr_t>(data) % 16 == 0 && row_stride * size % 16 == 0 &&
               tensor.size(tensor.dim() - 1) * size % 16 == 0;
  for (int i = 0; i < kAxes; ++i) whole = whole && frames.stride[i] * size % 16 == 0;
  aligned = aligned && whole;
  return {data, frames, row_stride};
}

Gather<int> make_gather(int64_t source, int64_t target, bool antialias, bool adjoint) {
  STD_TORCH_CHECK(source * target < (int64_t(1) << 28), "an axis of ", source, " to ", target,
                  " tokens is too long for the CUDA kernels: source x target must be below ", int64_t(1) << 28);
  return {make_axis<int>(static_cast<int>(source), static_cast<int>(target), antialias), adjoint};
}

int64_t frames_of(const Tensor& tokens) {
  int64_t frames = 1;
  for (int64_t axis = 0; axis < tokens.dim() - 2; ++axis) frames *= tokens.size(axis);
  return frames;
}

Task make_task(Tensor& from, const Tensor& out, const Grid& source, const Grid& target, bool antialias, bool adjoint) {
  Task task{};
  task.vertical = make_gather(source[0], target[0], antialias, adjoint);
  task.horizontal = make_gather(source[1], target[1], antialias, adjoint);
  task.aligned = reinterpret_cast<uintptr_t>(out.mutable_data_ptr()) % 16 == 0;
  task.from = lay_out(from, task.aligned);
  task.out = out.mutable_data_ptr();
  const int64_t frames = frames_of(from), channels = from.size(from.dim() - 1);
  STD_TORCH_CHECK(frames < (int64_t(1) << 31) && channels < (int64_t(1) << 28), "too many frames (", frames,
                  ") or channels (", channels, ")");
  task.frames = static_cast<unsigned>(frames);
  task.channels = static_cast<int>(channels);
  task.width_from = task.horizontal.from();
  task.height_to = task.vertical.to();
  task.width_to = task.horizontal.to();
  return task;
}

// An upper bound: tables of both axes and, for LayerNorm, the statistics of the lines that one line reads.
int64_t shared_bytes(const Task& task, int64_t size, bool statistics) {
  const int64_t v = task.vertical.most(), h = task.horizontal.most();
  const int64_t step = divide_up(task.horizontal.from(), task.horizontal.to());
  const int64_t stripe = std::min<int64_t>(task.width_from, (task.columns - 1) * step + h);
  return task.lines * (8 + v * size) + task.columns * (8 + h * size) + 64 +
         (statistics ? stripe * (2 * v * size + 4) : 0);
}

void choose_tile(Task& task, int lines, int columns, int64_t size, bool statistics) {
  task.lines = std::min(lines, task.height_to);
  task.columns = std::min(columns, task.width_to);
  while (task.lines > 1 && (blocks_of(task) < kManyBlocks || shared_bytes(task, size, statistics) > kSharedBytes))
    task.lines = (task.lines + 1) / 2;
  while (task.columns > 1 && shared_bytes(task, size, statistics) > kSharedBytes) task.columns = (task.columns + 1) / 2;
  STD_TORCH_CHECK(shared_bytes(task, size, statistics) <= kSharedBytes, "a token reads ", task.vertical.most(), " x ",
                  task.horizontal.most(), " others: their weights need more than ", kSharedBytes,
                  " bytes of shared memory");
  STD_TORCH_CHECK(blocks_of(task) < (int64_t(1) << 31), "too many tokens for one launch: ", blocks_of(task), " blocks");
}

cudaStream_t current_stream(const Tensor& tensor) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

int64_t weight_size(const Tensor& tokens) { return tokens.scalar_type() == ScalarType::Double ? 8 : 4; }

Tensor resampled(Tensor tokens, const Grid& source, const Grid& target, bool antialias, bool adjoint) {
  check_grids(source, target);
  check_tokens(tokens, adjoint ? target : source, adjoint ? "gradients" : "tokens");
  const Storage storage = storage_of(tokens);
  const torch::stable::accelerator::DeviceGuard guard(tokens.get_device_index());
  Tensor out = torch::stable::new_empty(tokens, shape_on(tokens, adjoint ? source : target));
  if (out.numel() == 0) return out;
  Task task = make_task(tokens, out, source, target, antialias, adjoint);
  choose_tile(task, 4, 8, weight_size(tokens), false);
  launch_resample(task, storage, current_stream(tokens));
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return out;
}

Tensor resample_tokens(const Tensor& tokens, Grid source, Grid target, bool antialias) {
  return resampled(tokens, source, target, antialias, false);
}

Tensor resample_tokens_adjoint(const Tensor& grad, Grid source, Grid target, bool antialias) {
  return resampled(grad, source, target, antialias, true);
}

std::tuple<Tensor, Tensor, Tensor> layer_norm_resample(const Tensor& input, Grid source, Grid target, bool antialias,
                                                       double eps, std::optional<Tensor> in_loss) {
  check_grids(source, target);
  check_tokens(input, source, "tokens");
  check_in_loss(in_loss, input);
  const Storage storage = storage_of(input);
  const torch::stable::accelerator::DeviceGuard guard(input.get_device_index());
  Tensor tokens = input, out = torch::stable::new_empty(tokens, shape_on(tokens, target));
  const Grid row_shape(tokens.sizes().begin(), tokens.sizes().end() - 1);
  // Tokens that no row of the result reads keep the zeros.
  Tensor mean = torch::stable::new_zeros(tokens, row_shape, statistics_type(tokens));
  Tensor inverse_std = torch::stable::new_zeros(tokens, row_shape, statistics_type(tokens));
  if (out.numel() == 0) return {out, mean, inverse_std};
  Task task = make_task(tokens, out, source, target, antialias, false);
  task.mean = mean.mutable_data_ptr();
  task.inverse_std = inverse_std.mutable_data_ptr();
  task.eps = eps;
  if (in_loss) in_loss = torch::stable::contiguous(*in_loss);
  task.in_loss = in_loss ? static_cast<const bool*>(in_loss->const_data_ptr()) : nullptr;
  choose_tile(task, task.height_to, 8, weight_size(tokens), true);
  launch_layer_norm_resample(task, storage, current_stream(tokens));
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return {out, mean, inverse_std};
}

void layer_norm_resample_backward_out(const Tensor& grad, const Tensor& tokens, const Tensor& mean,
                                    const Tensor& inverse_std, Grid source, Grid target, bool antialias,
                                      Tensor out, std::optional<Tensor> in_loss, std::optional<Tensor> scale) {
  check_backward(grad, tokens, mean, inverse_std, source, target);
  check_in_loss(in_loss, tokens);
  check_scale(scale, tokens);
  const Storage storage = storage_of(tokens);
  const torch::stable::accelerator::DeviceGuard guard(tokens.get_device_index());
  check_out(out, tokens);
  if (out.numel() == 0) return;
  const Tensor means = torch::stable::contiguous(mean), inverses = torch::stable::contiguous(inverse_std);
  Tensor from = grad, normalized = tokens;
  Task task = make_task(from, out, source, target, antialias, true);
  task.tokens = lay_out(normalized, task.aligned);
  task.mean = means.mutable_data_ptr();
  task.inverse_std = inverses.mutable_data_ptr();
  if (in_loss) in_loss = torch::stable::contiguous(*in_loss);
  task.in_loss = in_loss ? static_cast<const bool*>(in_loss->const_data_ptr()) : nullptr;
  task.scale = scale ? scale->const_data_ptr() : nullptr;
  choose_tile(task, 1, 4, weight_size(tokens), false);
  launch_layer_norm_resample_backward(task, storage, current_stream(tokens));
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(crepa_kernels, CUDA, library) {
  library.impl("resample_tokens", TORCH_BOX(&resample_tokens));
  library.impl("resample_tokens_adjoint", TORCH_BOX(&resample_tokens_adjoint));
  library.impl("layer_norm_resample", TORCH_BOX(&layer_norm_resample));
  library.impl("layer_norm_resample_backward_out", TORCH_BOX(&layer_norm_resample_backward_out));
}

}  // namespace crepa
