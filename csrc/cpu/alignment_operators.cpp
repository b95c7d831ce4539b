// Operators on rows of projected tokens: similarity with the teacher's rows, its gradient, and normalized tokens.
#include <algorithm>
#include <optional>
#include <type_traits>

#include "../operands.h"

#include "alignment.h"

namespace crepa {
namespace {

template <typename T>
constexpr ScalarType scalar_type() {
  if constexpr (std::is_same_v<T, float>) return ScalarType::Float;
  if constexpr (std::is_same_v<T, double>) return ScalarType::Double;
  if constexpr (std::is_same_v<T, BFloat16>) return ScalarType::BFloat16;
  return ScalarType::Half;
}

void check_is(const Tensor& tensor, const char* name, ScalarType type, const Grid& shape) {
  bool same = static_cast<size_t>(tensor.dim()) == shape.size();
  for (size_t i = 0; same && i < shape.size(); ++i) same = tensor.size(i) == shape[i];
  STD_TORCH_CHECK(same && tensor.scalar_type() == type && tensor.is_contiguous() && tensor.device().is_cpu(), name,
                  " must be a contiguous ", torch::headeronly::toString(type), " of shape ", numbers(shape),
                  " on the CPU, got ", torch::headeronly::toString(tensor.scalar_type()), " of shape ",
                  numbers(tensor.sizes()));
}

template <typename T>
const T* in(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}

template <typename T>
T* out(const Tensor& tensor) {
  return tensor.numel() ? static_cast<T*>(tensor.mutable_data_ptr()) : nullptr;
}

int64_t grain(int64_t row_bytes) { return (int64_t(64) << 10) / (row_bytes + 1) + 1; }

struct Alignment {
  Tensor own, total, inverse_norm, q_dot_p;
};

// Of tokens that were projected before they were normalized; all or none.
struct Fold {
  std::optional<Tensor> mean, inverse_std, row_sums;
};

template <typename P, typename Y, typename Q>
void align_rows_of(const Tensor& projected, const Fold& fold, const std::optional<Tensor>& offset,
                   const std::vector<Tensor>& teacher, int64_t base, const Tensor& weights, int64_t first, const std::vector<int64_t>& offsets,
                   int64_t start, int64_t stop, const Tensor& q, const Alignment& result) {
  using A = Accumulate<P>;
  const int64_t rows = projected.size(0), features = projected.size(1), tokens = teacher[0].size(0);
  std::vector<const Y*> data;
  std::vector<int64_t> stride;
  for (const Tensor& frame : teacher) {
    data.push_back(in<Y>(frame));
    stride.push_back(frame.stride(0));
  }
  std::vector<A> inverse(teacher.size() * tokens);
  torch::stable::parallel_for(0, static_cast<int64_t>(inverse.size()), grain(features * sizeof(Y)),
                              [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end;) {
      const int64_t frame = row / tokens, until = std::min(end, (frame + 1) * tokens);
      inverse_norm_kernel<Y, A>()(data[frame], stride[frame], features, inverse.data() + frame * tokens,
                                  row - frame * tokens, until - frame * tokens);
      row = until;
    }
  });
  AlignTask<P, Y, Q> task{};
  task.projected = in<P>(projected);
  if (fold.mean) {
    task.mean = in<A>(*fold.mean);
    task.inverse_std = in<A>(*fold.inverse_std);
    task.row_sums = in<A>(*fold.row_sums);
  }
  task.offset = offset ? in<A>(*offset) : nullptr;
  task.teacher = data.data();
  task.teacher_stride = stride.data();
  task.teacher_inverse = inverse.data();
  task.weights = in<A>(weights);
  task.offsets = offsets.data();
  task.offset_count = static_cast<int64_t>(offsets.size());
  task.base = base, task.first = first, task.clip_frames = weights.size(0);
  task.tokens = tokens, task.features = features;
  task.start = start, task.stop = stop;
  task.q = out<Q>(q);
  task.own = out<A>(result.own), task.total = out<A>(result.total);
  task.inverse_norm = out<A>(result.inverse_norm), task.q_dot_p = out<A>(result.q_dot_p);
  torch::stable::parallel_for(0, rows, grain(features * sizeof(A)), [&](int64_t begin, int64_t end) {
    align_kernel<P, Y, Q>()(task, begin, end);
  });
}

// The frames that some row reads must be among the teacher's.
void check_reach(const std::vector<Tensor>& teacher, int64_t base, int64_t first, int64_t frames, int64_t clip_frames,
                 const std::vector<int64_t>& offsets) {
  const int64_t held = static_cast<int64_t>(teacher.size());
  const auto check = [&](int64_t frame) {
    STD_TORCH_CHECK(base >= 0 && frame >= base && frame - base < held, "teacher frame ", frame, " is not among the ", held,
                    " frames from ", base);
  };
  for (int64_t frame = first; frame < first + frames; ++frame) {
    check(frame);
    for (const int64_t offset : offsets)
      if (frame + offset >= 0 && frame + offset < clip_frames) check(frame + offset);
  }
}

std::tuple<Tensor, Tensor, Tensor, Tensor> align_rows(
    Tensor projected, std::optional<Tensor> mean, std::optional<Tensor> inverse_std, std::optional<Tensor> row_sums,
    std::optional<Tensor> offset, std::vector<Tensor> teacher, int64_t base, Tensor weights, int64_t first,
    std::vector<int64_t> offsets, int64_t start, int64_t stop, Tensor q) {
  const ScalarType wide = statistics_type(projected), p = projected.scalar_type();
  STD_TORCH_CHECK(projected.dim() == 2 && !teacher.empty(), "projected must be (rows, E) with teacher frames, got ",
                  numbers(projected.sizes()), " and ", teacher.size(), " frames");
  const int64_t rows = projected.size(0), features = projected.size(1), tokens = teacher[0].size(0);
  const ScalarType y = teacher[0].scalar_type(), kept = q.scalar_type();
  STD_TORCH_CHECK(tokens > 0 && rows % tokens == 0, rows, " rows are no frames of ", tokens, " tokens");
  check_is(projected, "projected", p, {rows, features});
  STD_TORCH_CHECK(mean.has_value() == inverse_std.has_value() && mean.has_value() == row_sums.has_value(),
                  "mean, inverse_std and row_sums belong together");
  if (mean) {
    check_is(*mean, "mean", wide, {rows});
    check_is(*inverse_std, "inverse_std", wide, {rows});
    check_is(*row_sums, "row_sums", wide, {features});
  }
  if (offset) check_is(*offset, "offset", wide, {features});
  check_is(weights, "weights", wide, {weights.size(0), weights.size(0)});
  if (q.numel()) check_is(q, "q", kept, {rows, features});
  for (const Tensor& frame : teacher)
    STD_TORCH_CHECK(frame.dim() == 2 && frame.size(0) == tokens && frame.size(1) == features &&
                        frame.scalar_type() == y && frame.device().is_cpu() && (features == 1 || frame.stride(1) == 1),
                    "each teacher frame must be (", tokens, ", ", features, ") with contiguous rows of one type, got ",
                    numbers(frame.sizes()), " with strides ", numbers(frame.strides()));
  STD_TORCH_CHECK(first >= 0 && first <= weights.size(0) - rows / tokens, "the ", rows / tokens, " frames from ", first,
                  " are not within a clip of ", weights.size(0));
  // Those that lead out of the clip from every frame are nobody's, and may be too large to add to one.
  const int64_t clip_frames = weights.size(0);
  const auto leads_out = [&](int64_t offset) { return offset <= -clip_frames || offset >= clip_frames; };
  offsets.erase(std::remove_if(offsets.begin(), offsets.end(), leads_out), offsets.end());
  check_reach(teacher, base, first, rows / tokens, weights.size(0), offsets);
  const auto empty = [&] { return torch::stable::new_empty(projected, {rows}, wide); };
  const Alignment result{empty(), empty(), empty(), empty()};
  bool known = false;
#define CREPA_TRY(P, Y, Q)                                                                                         \
  if (p == scalar_type<P>() && y == scalar_type<Y>() && kept == scalar_type<Q>()) {                                \
    align_rows_of<P, Y, Q>(projected, {mean, inverse_std, row_sums}, offset, teacher, base, weights, first, offsets, start, stop, q, result);     \
    known = true;                                                                                                  \
  }
  CREPA_ALIGN_TYPES(CREPA_TRY)
#undef CREPA_TRY
  STD_TORCH_CHECK(known, "there is no kernel for projected rows of ", torch::headeronly::toString(p), ", a teacher of ",
                  torch::headeronly::toString(y), " and q of ", torch::headeronly::toString(kept));
  return {result.own, result.total, result.inverse_norm, result.q_dot_p};
}

template <typename Q, typename P>
void backward_of(const Tensor& q, const Tensor& grad, const Tensor& inverse_norm, const Tensor& q_dot_p,
                 const std::optional<Tensor>& offset, const Tensor& inverse_std, int64_t width, const Tensor& g,
                 const Tensor& scaled, const Tensor& along, const Tensor& sum) {
  using A = Accumulate<P>;
  AlignBackwardTask<Q, P> task{};
  task.q = in<Q>(q);
  task.grad = in<A>(grad);
  task.inverse_norm = in<A>(inverse_norm);
  task.q_dot_p = in<A>(q_dot_p);
  task.offset = offset ? in<A>(*offset) : nullptr;
  task.rows = q.size(0), task.features = q.size(1), task.tokens = task.rows / grad.size(0), task.width = width;
  task.g = out<P>(g);
  task.scaled = out<P>(scaled);
  task.along = out<A>(along);
  if (task.along) task.inverse_std = in<A>(inverse_std);
  const int64_t blocks = (task.rows + kRowsPerBlock - 1) / kRowsPerBlock;
  std::vector<A> sums(blocks * task.features);
  task.sum = sums.data();
  torch::stable::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
    align_backward_kernel<Q, P>()(task, begin, end);
  });
  A* total = out<A>(sum);
  for (int64_t block = 0; block < blocks; ++block)
    for (int64_t e = 0; e < task.features; ++e) total[e] += sums[block * task.features + e];
}

void align_rows_backward(Tensor q, Tensor grad, Tensor inverse_norm, Tensor q_dot_p, std::optional<Tensor> offset,
                         Tensor inverse_std, int64_t width, Tensor g, Tensor scaled, Tensor along, Tensor sum) {
  STD_TORCH_CHECK(q.dim() == 2 && grad.dim() == 1 && grad.size(0) > 0 && q.size(0) % grad.size(0) == 0, "q ",
                  numbers(q.sizes()), " must be the rows of the frames of grad ", numbers(grad.sizes()));
  const int64_t rows = q.size(0), features = q.size(1);
  const ScalarType kept = q.scalar_type(), wide = statistics_type(q), p = g.scalar_type();
  check_is(q, "q", kept, {rows, features});
  check_is(grad, "grad", wide, {grad.size(0)});
  check_is(inverse_norm, "inverse_norm", wide, {rows});
  check_is(q_dot_p, "q_dot_p", wide, {rows});
  check_is(sum, "sum", wide, {features});
  if (offset) check_is(*offset, "offset", wide, {features});
  if (g.numel()) check_is(g, "g", p, {rows, features});
  if (scaled.numel()) check_is(scaled, "scaled", p, {rows, features});
  if (scaled.numel() || along.numel()) {
    check_is(inverse_std, "inverse_std", wide, {rows});
    check_is(along, "along", wide, {rows});
  }
  bool known = false;
#define CREPA_TRY(Q, P)                                                                                          \
  if (kept == scalar_type<Q>() && p == scalar_type<P>()) {                                                       \
    backward_of<Q, P>(q, grad, inverse_norm, q_dot_p, offset, inverse_std, width, g, scaled, along, sum);        \
    known = true;                                                                                                \
  }
  CREPA_ALIGN_BACKWARD_TYPES(CREPA_TRY)
#undef CREPA_TRY
  STD_TORCH_CHECK(known, "there is no kernel for q of ", torch::headeronly::toString(kept), " and g of ",
                  torch::headeronly::toString(p));
}

struct RowStatistics {
  Tensor mean, low, inverse_std;
};

template <typename T>
void normalize_of(const Frames& frames, const RowStatistics& statistics, bool measure, double eps, T* result) {
  using A = Accumulate<T>;
  std::vector<int64_t> offset(frames.count);
  for (int64_t frame = 0; frame < frames.count; ++frame) offset[frame] = frames.offset(frame);
  NormalizeTask<T> task{};
  task.tokens = {in<T>(frames.tensor), offset.data(), frames.row_stride};
  task.per_frame = frames.tensor.size(frames.tensor.dim() - 2), task.channels = frames.channels;
  task.mean = out<A>(statistics.mean), task.low = out<A>(statistics.low);
  task.inverse_std = out<A>(statistics.inverse_std);
  task.measure = measure, task.eps = eps;
  task.out = result;
  torch::stable::parallel_for(0, frames.count * task.per_frame, grain(task.channels * sizeof(T)),
                              [&](int64_t begin, int64_t end) { normalize_kernel<T>()(task, begin, end); });
}

void normalize(const Tensor& tokens, const RowStatistics& statistics, bool measure, double eps, const Tensor& result) {
  if (tokens.numel() == 0) return;
  const Frames frames(tokens);
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    normalize_of<T>(frames, statistics, measure, eps, out<T>(result));
  };
  switch (tokens.scalar_type()) {
    case ScalarType::Float: return run(float());
    case ScalarType::Double: return run(double());
    case ScalarType::BFloat16: return run(BFloat16());
    case ScalarType::Half: return run(Float16());
    default: unsupported(tokens.scalar_type());
  }
}

int64_t row_count(const Tensor& tokens) {
  STD_TORCH_CHECK(tokens.dim() >= 2, "tokens must be (..., N, C), got ", numbers(tokens.sizes()));
  int64_t rows = 1;
  for (int64_t axis = 0; axis < tokens.dim() - 1; ++axis) rows *= tokens.size(axis);
  return rows;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> layer_norm_rows(Tensor tokens, double eps, bool normalized) {
  const int64_t rows = row_count(tokens);
  const auto empty = [&] { return torch::stable::new_empty(tokens, {rows}, statistics_type(tokens)); };
  const RowStatistics statistics{empty(), empty(), empty()};
  Tensor x = torch::stable::new_empty(tokens, {normalized ? rows : 0, tokens.size(tokens.dim() - 1)});
  normalize(tokens, statistics, true, eps, x);
  return {x, statistics.mean, statistics.low, statistics.inverse_std};
}

void normalize_rows(Tensor tokens, Tensor mean, Tensor low, Tensor inverse_std, Tensor result) {
  const int64_t rows = row_count(tokens);
  const ScalarType wide = statistics_type(tokens);
  check_is(mean, "mean", wide, {rows});
  check_is(low, "low", wide, {rows});
  check_is(inverse_std, "inverse_std", wide, {rows});
  check_is(result, "out", tokens.scalar_type(), {rows, tokens.size(tokens.dim() - 1)});
  normalize(tokens, {mean, low, inverse_std}, false, 0, result);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(crepa_kernels, CPU, library) {
  library.impl("align_rows", TORCH_BOX(&align_rows));
  library.impl("align_rows_backward", TORCH_BOX(&align_rows_backward));
  library.impl("layer_norm_rows", TORCH_BOX(&layer_norm_rows));
  library.impl("normalize_rows", TORCH_BOX(&normalize_rows));
}

}  // namespace crepa
