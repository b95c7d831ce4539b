// Storage types to and from the type of the sums. Without branches, so that loops over them vectorise.
// Included once for each instruction set, inside its namespace.

#define CREPA_INLINE inline __attribute__((always_inline))

template <typename To, typename From>
CREPA_INLINE To bits_of(From value) {
  static_assert(sizeof(To) == sizeof(From));
  To out;
  __builtin_memcpy(&out, &value, sizeof(out));
  return out;
}

CREPA_INLINE float load(const float* p) { return *p; }
CREPA_INLINE double load(const double* p) { return *p; }
CREPA_INLINE void store(float* p, float value) { *p = value; }
CREPA_INLINE void store(double* p, double value) { *p = value; }

CREPA_INLINE float load(const BFloat16* p) { return bits_of<float>(static_cast<uint32_t>(p->bits) << 16); }

CREPA_INLINE void store(BFloat16* p, float value) {
  const uint32_t bits = bits_of<uint32_t>(value);
  const uint32_t nearest_even = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  p->bits = static_cast<uint16_t>(value != value ? 0x7fc0u : nearest_even);
}

// The exponents of the two formats are aligned by multiplying with powers of two, subnormals by adding a magic number.
CREPA_INLINE float load(const Float16* p) {
  const uint32_t word = static_cast<uint32_t>(p->bits) << 16;
  const uint32_t magnitude = word + word;
  const float normal = bits_of<float>((magnitude >> 4) + (0xe0u << 23)) * 0x1p-112f;
  const float subnormal = bits_of<float>((magnitude >> 17) | (126u << 23)) - 0.5f;
  const uint32_t bits = magnitude < (1u << 27) ? bits_of<uint32_t>(subnormal) : bits_of<uint32_t>(normal);
  return bits_of<float>((word & 0x80000000u) | bits);
}

CREPA_INLINE void store(Float16* p, float value) {
  const uint32_t word = bits_of<uint32_t>(value);
  const uint32_t magnitude = word + word;
  const float scaled = bits_of<float>(word & 0x7fffffffu) * 0x1p+112f * 0x1p-110f;
  const uint32_t exponent = magnitude & 0xff000000u;
  const uint32_t bias = exponent < 0x71000000u ? 0x71000000u : exponent;
  const uint32_t rounded = bits_of<uint32_t>(bits_of<float>((bias >> 1) + 0x07800000u) + scaled);
  const uint32_t finite = ((rounded >> 13) & 0x7c00u) + (rounded & 0x0fffu);
  p->bits = static_cast<uint16_t>(((word & 0x80000000u) >> 16) | (magnitude > 0xff000000u ? 0x7e00u : finite));
}
