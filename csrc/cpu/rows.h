// Loops over the channels of rows. Included once for each instruction set, inside its namespace.

template <typename T, typename A>
struct Tap {
  const T* row;
  A weight;
  A mean;
};

// out = initial + sum over K taps of weight * (row - mean)
template <int K, bool kCentred, bool kResumed, typename T, typename A, typename Out>
void combine(const Tap<T, A>* taps, const A* initial, Out* out, int64_t channels) {
  const T* row[K];
  A weight[K], mean[K];
  for (int k = 0; k < K; ++k) {
    row[k] = taps[k].row;
    weight[k] = taps[k].weight;
    mean[k] = taps[k].mean;
  }
#pragma omp simd
  for (int64_t c = 0; c < channels; ++c) {
    A sum = kResumed ? initial[c] : A(0);
    for (int k = 0; k < K; ++k) {
      A value = load(row[k] + c);
      if (kCentred) value -= mean[k];
      sum += weight[k] * value;
    }
    store(out + c, sum);
  }
}

template <bool kCentred, bool kResumed, typename T, typename A, typename Out>
void combine_up_to_six(int64_t count, const Tap<T, A>* taps, const A* initial, Out* out, int64_t channels) {
  switch (count) {
    case 1: return combine<1, kCentred, kResumed>(taps, initial, out, channels);
    case 2: return combine<2, kCentred, kResumed>(taps, initial, out, channels);
    case 3: return combine<3, kCentred, kResumed>(taps, initial, out, channels);
    case 4: return combine<4, kCentred, kResumed>(taps, initial, out, channels);
    case 5: return combine<5, kCentred, kResumed>(taps, initial, out, channels);
    default: return combine<6, kCentred, kResumed>(taps, initial, out, channels);
  }
}

// out = sum over the taps, in groups whose partial sums stay in `partial` (channels).
template <bool kCentred, typename T, typename A, typename Out>
void combine_all(int64_t count, const Tap<T, A>* taps, A* partial, Out* out, int64_t channels) {
  if (count == 0) {
    for (int64_t c = 0; c < channels; ++c) store(out + c, A(0));
    return;
  }
  if (count <= 6) return combine_up_to_six<kCentred, false>(count, taps, partial, out, channels);
  combine<6, kCentred, false>(taps, partial, partial, channels);
  for (taps += 6, count -= 6; count > 6; taps += 6, count -= 6)
    combine<6, kCentred, true>(taps, partial, partial, channels);
  combine_up_to_six<kCentred, true>(count, taps, partial, out, channels);
}

// Four sums at a time hide the latency of an addition. `low` is what rounding takes off the mean. 1/std is NaN where the
// variance overflowed: the row would be zeros.
template <typename T, typename A>
void row_statistics(const T* row, int64_t channels, A eps, A* mean, A* low, A* inverse_std) {
  const int64_t quarter = channels / 4;
  A a = 0, b = 0, c = 0, d = 0;
#pragma omp simd reduction(+ : a, b, c, d)
  for (int64_t i = 0; i < quarter; ++i) {
    a += load(row + i);
    b += load(row + quarter + i);
    c += load(row + 2 * quarter + i);
    d += load(row + 3 * quarter + i);
  }
  for (int64_t i = 4 * quarter; i < channels; ++i) a += load(row + i);
  const A centre = ((a + b) + (c + d)) / static_cast<A>(channels);
  // What the rounded centre is off by is found on the way: the mean of a row far from zero is exact to its last bit.
  A e = 0, f = 0, g = 0, h = 0;
  a = b = c = d = 0;
#pragma omp simd reduction(+ : a, b, c, d, e, f, g, h)
  for (int64_t i = 0; i < quarter; ++i) {
    const A p = load(row + i) - centre, q = load(row + quarter + i) - centre;
    const A r = load(row + 2 * quarter + i) - centre, s = load(row + 3 * quarter + i) - centre;
    a += p * p, b += q * q, c += r * r, d += s * s;
    e += p, f += q, g += r, h += s;
  }
  for (int64_t i = 4 * quarter; i < channels; ++i) {
    const A p = load(row + i) - centre;
    a += p * p, e += p;
  }
  const A residue = ((e + f) + (g + h)) / static_cast<A>(channels);
  const A variance = ((a + b) + (c + d)) / static_cast<A>(channels) - residue * residue;
  *mean = centre + residue;
  *low = residue - (*mean - centre);
  *inverse_std = A(1) / __builtin_sqrt((variance > 0 ? variance : A(0)) + eps) + (variance - variance);
}

// dh = scale r (g - sum(g) / C - x sum(g x) / C), x = (h - mean) r the normalized row and g its gradient.
template <typename T, typename A>
void normalization_backward(const A* gradient, const T* row, A mean, A r, A scale, int64_t channels, T* out) {
  A sum = 0, along = 0;
#pragma omp simd reduction(+ : sum, along)
  for (int64_t c = 0; c < channels; ++c) {
    sum += gradient[c];
    along += gradient[c] * ((load(row + c) - mean) * r);
  }
  const A outer = scale * r;
  const A shift = outer * sum / static_cast<A>(channels);
  // r stays with the row: r times r underflows where the row is large.
  const A slope = outer * along / static_cast<A>(channels);
#pragma omp simd
  for (int64_t c = 0; c < channels; ++c)
    store(out + c, outer * gradient[c] - shift - slope * ((load(row + c) - mean) * r));
}

#if defined(__SSE2__)
// Past the caches: a line that is written whole need not be read first.
template <typename T>
void stream_row(T* to, const T* from, int64_t count) {
  char* out = reinterpret_cast<char*>(to);
  const char* in = reinterpret_cast<const char*>(from);
  int64_t bytes = count * static_cast<int64_t>(sizeof(T));
  const int64_t head = (64 - (reinterpret_cast<uintptr_t>(out) & 63)) & 63;
  const int64_t before = head < bytes ? head : bytes;
  __builtin_memcpy(out, in, before);
  out += before, in += before, bytes -= before;
  for (; bytes >= 64; bytes -= 64, out += 64, in += 64) {
#if defined(__AVX512F__)
    _mm512_stream_si512(reinterpret_cast<__m512i*>(out), _mm512_loadu_si512(in));
#else
    for (int i = 0; i < 64; i += 16)
      _mm_stream_si128(reinterpret_cast<__m128i*>(out + i), _mm_loadu_si128(reinterpret_cast<const __m128i*>(in + i)));
#endif
  }
  __builtin_memcpy(out, in, bytes);
}

CREPA_INLINE void stream_end() { _mm_sfence(); }
#else
template <typename T>
void stream_row(T* to, const T* from, int64_t count) {
  __builtin_memcpy(to, from, count * sizeof(T));
}

CREPA_INLINE void stream_end() {}
#endif
