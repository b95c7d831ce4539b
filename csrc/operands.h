// The operators' arguments: checks with the numbers in them, and how their memory is laid out.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "geometry.h"

namespace crepa {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Grid = std::vector<int64_t>;

inline std::string numbers(torch::headeronly::IntHeaderOnlyArrayRef values) {
  std::string text = "(";
  for (size_t i = 0; i < values.size(); ++i) text += (i ? ", " : "") + std::to_string(values[i]);
  return text + ")";
}

// a x b of sizes that are not negative; an error where that takes more than 64 bits.
inline int64_t product(int64_t a, int64_t b) {
  STD_TORCH_CHECK(b == 0 || a <= INT64_MAX / b, a, " x ", b, " is too large for 64 bits");
  return a * b;
}

inline void check_grid(const Grid& grid, const char* name) {
  STD_TORCH_CHECK(grid.size() == 2 && grid[0] > 0 && grid[1] > 0, name,
                  " must be (height, width), two positive integers, got ", numbers(grid));
  product(grid[0], grid[1]);
}

// Both grids, and the integers that weights between them are made of: 4 x source x target of an axis.
inline void check_grids(const Grid& source, const Grid& target) {
  check_grid(source, "source_grid");
  check_grid(target, "target_grid");
  for (int axis = 0; axis < 2; ++axis) product(4, product(source[axis], target[axis]));
}

inline void check_tokens(const Tensor& tokens, const Grid& grid, const char* name) {
  check_grid(grid, "the grid");
  STD_TORCH_CHECK(tokens.dim() >= 2 && tokens.size(tokens.dim() - 2) == grid[0] * grid[1], name, " of shape ",
                  numbers(tokens.sizes()), " do not lie on the grid ", numbers(grid), ": the last axis but one must be ",
                  grid[0], " x ", grid[1], " = ", grid[0] * grid[1]);
}

inline void check_match(const Tensor& tensor, const Tensor& like, const char* name) {
  STD_TORCH_CHECK(tensor.device() == like.device(), name, " is on device ", static_cast<int>(tensor.device().type()),
                  ":", tensor.get_device_index(), ", the tokens on ", static_cast<int>(like.device().type()), ":",
                  like.get_device_index());
  STD_TORCH_CHECK(tensor.scalar_type() == like.scalar_type(), name, " is ",
                  torch::headeronly::toString(tensor.scalar_type()), ", the tokens are ",
                  torch::headeronly::toString(like.scalar_type()));
}

// The same leading axes, and for the gradient the same channels.
inline void check_shape(const Tensor& tensor, const Tensor& tokens, int64_t rows, bool channels, const char* name) {
  Grid expected(tokens.sizes().begin(), tokens.sizes().end() - 2);
  expected.push_back(rows);
  if (channels) expected.push_back(tokens.size(tokens.dim() - 1));
  bool same = static_cast<size_t>(tensor.dim()) == expected.size();
  for (size_t i = 0; same && i < expected.size(); ++i) same = tensor.size(i) == expected[i];
  STD_TORCH_CHECK(same, name, " must have shape ", numbers(expected), ", got ", numbers(tensor.sizes()));
}

[[noreturn]] inline void unsupported(ScalarType type) {
  throw std::runtime_error(std::string("tokens must be float64, float32, float16 or bfloat16, got ") +
                           torch::headeronly::toString(type));
}

// (..., N, C) on `grid` and `source_grid` -> the shape on the other grid.
inline Grid shape_on(const Tensor& tokens, const Grid& grid) {
  Grid shape(tokens.sizes().begin(), tokens.sizes().end());
  shape[shape.size() - 2] = grid[0] * grid[1];
  int64_t count = 1;
  for (const int64_t size : shape) count = product(size, count);
  return shape;
}

inline ScalarType statistics_type(const Tensor& tokens) {
  return tokens.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// Backward of LayerNorm and resampling: the gradient is on `target`, the tokens and their statistics on `source`.
inline void check_backward(const Tensor& grad, const Tensor& tokens, const Tensor& mean, const Tensor& inverse_std,
                           const Grid& source, const Grid& target) {
  check_grids(source, target);
  check_tokens(tokens, source, "tokens");
  check_shape(grad, tokens, target[0] * target[1], true, "grad");
  check_match(grad, tokens, "grad");
  for (const Tensor* statistic : {&mean, &inverse_std}) {
    check_shape(*statistic, tokens, source[0] * source[1], false, "mean or inverse_std");
    STD_TORCH_CHECK(statistic->device() == tokens.device() && statistic->scalar_type() == statistics_type(tokens),
                    "mean and inverse_std must be on the tokens' device, in ",
                    torch::headeronly::toString(statistics_type(tokens)), ", got ",
                    torch::headeronly::toString(statistic->scalar_type()));
  }
}

inline const Tensor* pointer(const std::optional<Tensor>& tensor) { return tensor ? &*tensor : nullptr; }

// One bool for each frame: where it is false the frame is neither read nor has a gradient.
inline void check_in_loss(const std::optional<Tensor>& in_loss, const Tensor& tokens) {
  if (!in_loss) return;
  const Grid frames(tokens.sizes().begin(), tokens.sizes().end() - 2);
  bool same = static_cast<size_t>(in_loss->dim()) == frames.size();
  for (size_t i = 0; same && i < frames.size(); ++i) same = in_loss->size(i) == frames[i];
  STD_TORCH_CHECK(same, "in_loss must have shape ", numbers(frames), ", got ", numbers(in_loss->sizes()));
  STD_TORCH_CHECK(in_loss->scalar_type() == ScalarType::Bool && in_loss->device() == tokens.device(),
                  "in_loss must be bool, on the tokens' device, got ",
                  torch::headeronly::toString(in_loss->scalar_type()));
}

inline void check_scale(const std::optional<Tensor>& scale, const Tensor& tokens) {
  STD_TORCH_CHECK(!scale || (scale->numel() == 1 && scale->scalar_type() == statistics_type(tokens) &&
                             scale->device() == tokens.device()),
                  "scale must be one number, on the tokens' device, in ",
                  torch::headeronly::toString(statistics_type(tokens)));
}

inline void check_out(const Tensor& out, const Tensor& tokens) {
  check_match(out, tokens, "out");
  check_shape(out, tokens, tokens.size(tokens.dim() - 2), true, "out");
  STD_TORCH_CHECK(out.is_contiguous(), "out must be contiguous, got strides ", numbers(out.strides()));
}

// Leading axes as a list of frames; rows and channels as they lie.
struct Frames {
  Tensor tensor;
  int64_t count = 1;
  int64_t row_stride;
  int64_t channels;

  // Copies only where the channels of a token are not contiguous.
  explicit Frames(const Tensor& tokens) : tensor(tokens) {
    const int64_t last = tokens.dim() - 1;
    if (tokens.size(last) > 1 && tokens.stride(last) != 1) tensor = torch::stable::contiguous(tokens);
    for (int64_t axis = 0; axis < last - 1; ++axis) count *= tensor.size(axis);
    row_stride = tensor.stride(last - 1);
    channels = tensor.size(last);
  }

  // Elements from the first frame to `frame`.
  int64_t offset(int64_t frame) const {
    int64_t elements = 0;
    for (int64_t axis = tensor.dim() - 3; axis >= 0; --axis) {
      elements += frame % tensor.size(axis) * tensor.stride(axis);
      frame /= tensor.size(axis);
    }
    return elements;
  }
};

}  // namespace crepa
