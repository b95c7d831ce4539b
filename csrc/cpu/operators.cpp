// The operators on CPU tensors: checks, tables of weights, threads over lines of tokens.
#include "../operands.h"

#include "kernels.h"

namespace crepa {
namespace {

// Rows of a frame are still in a core's cache when the next operator reads them; from here on they are not.
constexpr int64_t kStreamBytes = int64_t(4) << 20;
constexpr int64_t kBytesPerThread = int64_t(64) << 10;

template <typename A>
struct Table {
  Gather<int64_t> gather;
  std::vector<int64_t> begin, first;
  std::vector<A> weight;

  Table(int64_t source, int64_t target, bool antialias, bool adjoint)
      : gather{make_axis<int64_t>(source, target, antialias), adjoint} {
    std::vector<int64_t> denominator(target);
    for (int64_t o = 0; o < target; ++o) denominator[o] = gather.axis.denominator(o);
    first.push_back(0);
    for (int64_t index = 0; index < gather.to(); ++index) {
      const Window<int64_t> window = gather.window(index);
      begin.push_back(window.begin);
      for (int64_t k = window.begin; k < window.end; ++k) weight.push_back(gather.weight<A>(index, k, denominator));
      first.push_back(static_cast<int64_t>(weight.size()));
    }
  }

  Taps<A> taps() const {
    return {gather.from(), gather.to(), begin.data(), first.data(), weight.data(), gather.most()};
  }
};

std::vector<int64_t> offsets(const Frames& frames) {
  std::vector<int64_t> offset(frames.count);
  for (int64_t frame = 0; frame < frames.count; ++frame) offset[frame] = frames.offset(frame);
  return offset;
}

// Calls `body` with a value of the storage type of `tokens`.
template <typename F>
void dispatch(const Tensor& tokens, const F& body) {
  switch (tokens.scalar_type()) {
    case ScalarType::Float: return body(float());
    case ScalarType::Double: return body(double());
    case ScalarType::BFloat16: return body(BFloat16());
    case ScalarType::Half: return body(Float16());
    default: unsupported(tokens.scalar_type());
  }
}

template <typename T>
using Kernel = void (*)(const Task<T>&, int64_t, int64_t);

struct Statistics {
  const Tensor* mean = nullptr;
  const Tensor* inverse_std = nullptr;
  double eps = 0;
  const Tensor* in_loss = nullptr;
  const Tensor* scale = nullptr;
};

// out = R rows or R' rows, with the statistics' part where there are some.
template <typename T>
void run(const Tensor& from_tensor, const Tensor& out, const Tensor* tokens_tensor, const Grid& source,
         const Grid& target, bool antialias, bool adjoint, const Statistics& statistics, Kernel<T> kernel) {
  using A = Accumulate<T>;
  const Frames from(from_tensor);
  const Table<A> vertical(source[0], target[0], antialias, adjoint), horizontal(source[1], target[1], antialias, adjoint);
  const std::vector<int64_t> from_offset = offsets(from);
  Task<T> task{};
  task.vertical = vertical.taps();
  task.horizontal = horizontal.taps();
  task.from = {static_cast<const T*>(from.tensor.const_data_ptr()), from_offset.data(), from.row_stride};
  task.out = static_cast<T*>(out.mutable_data_ptr());
  task.channels = from.channels;
  const int64_t line_bytes = task.horizontal.to * from.channels * static_cast<int64_t>(sizeof(T));
  const int64_t lines = from.count * task.vertical.to;
  task.stream = lines * line_bytes > kStreamBytes;
  if (statistics.mean) {
    task.mean = static_cast<A*>(statistics.mean->mutable_data_ptr());
    task.inverse_std = static_cast<A*>(statistics.inverse_std->mutable_data_ptr());
    task.eps = statistics.eps;
  }
  std::optional<Tensor> in_loss;
  if (statistics.in_loss) in_loss = torch::stable::contiguous(*statistics.in_loss);
  task.in_loss = in_loss ? static_cast<const bool*>(in_loss->const_data_ptr()) : nullptr;
  task.scale = statistics.scale ? *static_cast<const A*>(statistics.scale->const_data_ptr()) : A(1);
  const Frames tokens(tokens_tensor ? *tokens_tensor : from_tensor);
  const std::vector<int64_t> tokens_offset = tokens_tensor ? offsets(tokens) : std::vector<int64_t>();
  task.tokens = {static_cast<const T*>(tokens.tensor.const_data_ptr()), tokens_offset.data(), tokens.row_stride};
  const int64_t grain = line_bytes > kBytesPerThread ? 1 : kBytesPerThread / (line_bytes + 1) + 1;
  torch::stable::parallel_for(0, lines, grain, [&](int64_t begin, int64_t end) { kernel(task, begin, end); });
}

Tensor resampled(const Tensor& tokens, const Grid& source, const Grid& target, bool antialias, bool adjoint) {
  check_grids(source, target);
  check_tokens(tokens, adjoint ? target : source, adjoint ? "gradients" : "tokens");
  Tensor out = torch::stable::new_empty(tokens, shape_on(tokens, adjoint ? source : target));
  dispatch(tokens, [&](auto zero) {
    using T = decltype(zero);
    if (out.numel() > 0) run<T>(tokens, out, nullptr, source, target, antialias, adjoint, {}, kernels<T>().resample);
  });
  return out;
}

Tensor resample_tokens(const Tensor& tokens, Grid source, Grid target, bool antialias) {
  return resampled(tokens, source, target, antialias, false);
}

Tensor resample_tokens_adjoint(const Tensor& grad, Grid source, Grid target, bool antialias) {
  return resampled(grad, source, target, antialias, true);
}

std::tuple<Tensor, Tensor, Tensor> layer_norm_resample(const Tensor& tokens, Grid source, Grid target, bool antialias,
                                                       double eps, std::optional<Tensor> in_loss) {
  check_grids(source, target);
  check_tokens(tokens, source, "tokens");
  check_in_loss(in_loss, tokens);
  Tensor out = torch::stable::new_empty(tokens, shape_on(tokens, target));
  const Grid row_shape(tokens.sizes().begin(), tokens.sizes().end() - 1);
  // Tokens that no row of the result reads keep the zeros.
  Tensor mean = torch::stable::new_zeros(tokens, row_shape, statistics_type(tokens));
  Tensor inverse_std = torch::stable::new_zeros(tokens, row_shape, statistics_type(tokens));
  dispatch(tokens, [&](auto zero) {
    using T = decltype(zero);
    if (out.numel() == 0) return;
    run<T>(tokens, out, nullptr, source, target, antialias, false, {&mean, &inverse_std, eps, pointer(in_loss)},
           kernels<T>().layer_norm_resample);
  });
  return {out, mean, inverse_std};
}

void layer_norm_resample_backward_out(const Tensor& grad, const Tensor& tokens, const Tensor& mean,
                                    const Tensor& inverse_std, Grid source, Grid target, bool antialias,
                                      Tensor out, std::optional<Tensor> in_loss, std::optional<Tensor> scale) {
  check_backward(grad, tokens, mean, inverse_std, source, target);
  check_out(out, tokens);
  check_in_loss(in_loss, tokens);
  check_scale(scale, tokens);
  const Tensor means = torch::stable::contiguous(mean), inverses = torch::stable::contiguous(inverse_std);
  dispatch(tokens, [&](auto zero) {
    using T = decltype(zero);
    if (out.numel() == 0) return;
    run<T>(grad, out, &tokens, source, target, antialias, true, {&means, &inverses, 0, pointer(in_loss), pointer(scale)},
           kernels<T>().layer_norm_resample_backward);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(crepa_kernels, CPU, library) {
  library.impl("resample_tokens", TORCH_BOX(&resample_tokens));
  library.impl("resample_tokens_adjoint", TORCH_BOX(&resample_tokens_adjoint));
  library.impl("layer_norm_resample", TORCH_BOX(&layer_norm_resample));
  library.impl("layer_norm_resample_backward_out", TORCH_BOX(&layer_norm_resample_backward_out));
}

}  // namespace crepa

extern "C" const char* crepa_kernels_instruction_set() { return crepa::instruction_set(); }
