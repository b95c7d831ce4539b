// The tasks of alignment.h. Included once for each instruction set, inside its namespace, after rows.h.

template <typename A>
CREPA_INLINE A norm_floor() {
  return A(1e-12);
}

// NaN for a norm that overflowed, whose row would be zeros.
template <typename A>
CREPA_INLINE A inverse_of(A norm) {
  return A(1) / (norm <= norm_floor<A>() ? norm_floor<A>() : norm) + (norm - norm);
}

template <typename Y, typename A>
void inverse_norms(const Y* rows, int64_t stride, int64_t features, A* out, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const Y* y = rows + row * stride;
    A square = 0;
#pragma omp simd reduction(+ : square)
    for (int64_t e = 0; e < features; ++e) {
      const A value = load(y + e);
      square += value * value;
    }
    out[row] = inverse_of<A>(__builtin_sqrt(square));
  }
}

// p of one row, from what was projected.
template <bool kFolded, bool kOffset, typename P, typename A>
struct Row {
  const P* data;
  A scale, shift;
  const A* row_sums;
  const A* offset;
  CREPA_INLINE A operator[](int64_t e) const {
    A value = load(data + e);
    if (kFolded) value = scale * value + shift * row_sums[e];
    if (kOffset) value += offset[e];
    return value;
  }
};

// Writes q, if it is asked for, and <p, z> and <p, y> over |p|, 1 / |p|, <q, p>.
template <typename R, typename Y, typename A, typename Q>
void align_row(const R p, const A* z, const Y* y, A y_scale, int64_t features, Q* q, A* total, A* own, A* inverse_norm,
               A* q_dot_p) {
  A pp = 0, pz = 0, py = 0;
#pragma omp simd reduction(+ : pp, pz, py)
  for (int64_t e = 0; e < features; ++e) {
    const A value = p[e];
    pp += value * value;
    pz += value * z[e];
    py += value * load(y + e);
  }
  const A norm = __builtin_sqrt(pp);
  const bool floored = norm <= norm_floor<A>();
  const A inverse = inverse_of(norm);
  *total = pz * inverse;
  *own = py * y_scale * inverse;
  *inverse_norm = inverse;
  // Below the norm's floor the row is divided by a constant: nothing to project out, and <q, p> stays.
  *q_dot_p = floored ? pz : A(0);
  if (!q) return;
  const A along = floored ? A(0) : pz * inverse * inverse;
#pragma omp simd
  for (int64_t e = 0; e < features; ++e) store(q + e, z[e] - along * p[e]);
}

template <typename P, typename Y, typename Q>
void align(const AlignTask<P, Y, Q>& task, int64_t begin, int64_t end) {
  using A = Accumulate<P>;
  const int64_t features = task.features;
  Buffer<A> z(features), partial(features);
  Buffer<Tap<Y, A>> taps(task.offset_count + 1);
  for (int64_t row = begin; row < end; ++row) {
    Q* q = task.q ? task.q + row * features : nullptr;
    if (row < task.start || row >= task.stop) {
      task.own[row] = task.total[row] = task.inverse_norm[row] = task.q_dot_p[row] = 0;
      for (int64_t e = 0; q && e < features; ++e) store(q + e, A(0));
      continue;
    }
    const int64_t frame = task.first + row / task.tokens, token = row % task.tokens;
    const int64_t here = frame - task.base;
    int64_t count = 0;
    taps.data[count++] = {task.teacher[here] + token * task.teacher_stride[here],
                          task.teacher_inverse[here * task.tokens + token], A(0)};
    for (int64_t i = 0; i < task.offset_count; ++i) {
      const int64_t other = frame + task.offsets[i];
      if (other < 0 || other >= task.clip_frames) continue;
      const A weight = task.weights[frame * task.clip_frames + other];
      if (weight == 0) continue;
      const int64_t there = other - task.base;
      taps.data[count++] = {task.teacher[there] + token * task.teacher_stride[there],
                            weight * task.teacher_inverse[there * task.tokens + token], A(0)};
    }
    const Tap<Y, A> own = taps.data[0];
    combine_all<false>(count, taps.data, partial.data, z.data, features);
    const P* p = task.projected + row * features;
    const auto with = [&](auto row_of) {
      align_row(row_of, z.data, own.row, own.weight, features, q, task.total + row, task.own + row,
                task.inverse_norm + row, task.q_dot_p + row);
    };
    const A scale = task.mean ? task.inverse_std[row] : A(1), shift = task.mean ? -scale * task.mean[row] : A(0);
    if (task.mean && task.offset)
      with(Row<true, true, P, A>{p, scale, shift, task.row_sums, task.offset});
    else if (task.mean)
      with(Row<true, false, P, A>{p, scale, shift, task.row_sums, task.offset});
    else if (task.offset)
      with(Row<false, true, P, A>{p, scale, shift, task.row_sums, task.offset});
    else
      with(Row<false, false, P, A>{p, scale, shift, task.row_sums, task.offset});
  }
}

template <bool kG, bool kScaled, typename Q, typename P, typename A>
A gradient_row(const Q* q, const A* offset, A scale, A inverse_std, P* g, P* scaled, A* sum, int64_t features) {
  A dot = 0;
#pragma omp simd reduction(+ : dot)
  for (int64_t e = 0; e < features; ++e) {
    const A value = load(q + e) * scale;
    sum[e] += value;
    dot += value * offset[e];
    if (kG) store(g + e, value);
    if (kScaled) store(scaled + e, value * inverse_std);
  }
  return dot;
}

template <typename Q, typename P>
void align_backward(const AlignBackwardTask<Q, P>& task, int64_t begin, int64_t end) {
  using A = Accumulate<P>;
  const int64_t features = task.features;
  Buffer<A> zeros(features), sum(features);
  for (int64_t e = 0; e < features; ++e) zeros.data[e] = 0;
  const A* offset = task.offset ? task.offset : zeros.data;
  const auto gradient = task.g && task.scaled ? gradient_row<true, true, Q, P, A>
                        : task.g             ? gradient_row<true, false, Q, P, A>
                        : task.scaled        ? gradient_row<false, true, Q, P, A>
                                             : gradient_row<false, false, Q, P, A>;
  for (int64_t block = begin; block < end; ++block) {
    for (int64_t e = 0; e < features; ++e) sum.data[e] = 0;
    const int64_t from = block * kRowsPerBlock, to = from + kRowsPerBlock < task.rows ? from + kRowsPerBlock : task.rows;
    for (int64_t row = from; row < to; ++row) {
      const A scale = task.grad[row / task.tokens] / static_cast<A>(task.tokens) * task.inverse_norm[row];
      const A inverse_std = task.along ? task.inverse_std[row] : A(0);
      const A dot = gradient(task.q + row * features, offset, scale, inverse_std,
                             task.g ? task.g + row * features : nullptr,
                             task.scaled ? task.scaled + row * features : nullptr, sum.data, features);
      if (task.along)
        task.along[row] = (dot - task.q_dot_p[row] * scale) * inverse_std / static_cast<A>(task.width);
    }
    A* out = task.sum + block * features;
    for (int64_t e = 0; e < features; ++e) out[e] = sum.data[e];
  }
}

template <typename T>
void normalize(const NormalizeTask<T>& task, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const T* h = task.tokens.data + task.tokens.frame_offset[row / task.per_frame] +
                 row % task.per_frame * task.tokens.row_stride;
    if (task.measure)
      row_statistics(h, task.channels, static_cast<Accumulate<T>>(task.eps), task.mean + row, task.low + row,
                     task.inverse_std + row);
    if (!task.out) continue;
    T* out = task.out + row * task.channels;
    const auto mean = task.mean[row], low = task.low[row], inverse_std = task.inverse_std[row];
#pragma omp simd
    for (int64_t c = 0; c < task.channels; ++c) store(out + c, (load(h + c) - mean - low) * inverse_std);
  }
}
