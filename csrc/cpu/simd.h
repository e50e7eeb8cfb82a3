// One vector of floats, `vf`, as wide as the target's registers, and what the kernels do with it.
//
// This header is included once per instruction set, each time inside its own namespace (see
// level_*.cpp), hence no include guard. Plain operators come from the GCC/Clang vector extension and
// compile anywhere; intrinsics appear only where the extension has no word for the instruction.
// MAC_LEVEL is 0 (any machine), 1 (AVX2, FMA, F16C), 2 (AVX-512) or 3 (AVX-512 with bf16 dot products). On aarch64
// it is 0, and MAC_NEON tells what there is besides: see common.h.

#define MAC_INLINE inline __attribute__((always_inline))
// For a loop that needs all registers: inlined into another it would share them with what that one keeps.
#define MAC_ALONE __attribute__((noinline))

#if MAC_LEVEL >= 2
constexpr int kLanes = 16;
#elif MAC_LEVEL == 1
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float vf __attribute__((vector_size(kLanes * 4)));
typedef uint32_t vu __attribute__((vector_size(kLanes * 4)));
typedef int32_t vi __attribute__((vector_size(kLanes * 4)));
typedef uint16_t vh __attribute__((vector_size(kLanes * 2)));
typedef uint8_t vb __attribute__((vector_size(kLanes)));

// Storage types of the 16-bit formats; arithmetic is always float.
struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};
struct float8 {  // e4m3fn: no infinities, NaN is 0x7f and 0xff (OCP 8-bit floating point specification)
  uint8_t bits;
};

// What a loaded 1 stands for: float8 comes at 2^-8 of its value, which costs nothing where sums are scaled anyway.
template <typename T>
constexpr float kUnit = 1.f;
template <>
constexpr float kUnit<float8> = 256.f;

MAC_INLINE vf broadcast(float x) {
#if MAC_LEVEL >= 2
  return (vf)_mm512_set1_ps(x);
#elif MAC_LEVEL == 1
  return (vf)_mm256_set1_ps(x);
#else
  return vf{} + x;
#endif
}

MAC_INLINE vu bits_of(vf x) {
  vu u;
  std::memcpy(&u, &x, sizeof u);
  return u;
}
MAC_INLINE vf float_of(vu u) {
  vf x;
  std::memcpy(&x, &u, sizeof x);
  return x;
}

MAC_INLINE vf load(const float* p) {
  vf x;
  std::memcpy(&x, p, sizeof x);
  return x;
}
MAC_INLINE vf load(const bfloat16* p) {
#if MAC_LEVEL >= 2  // GCC makes five instructions of what follows
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16);
#elif MAC_LEVEL == 1
  const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return (vf)_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16);
#else
  vh h;
  std::memcpy(&h, p, sizeof h);
  return float_of(__builtin_convertvector(h, vu) << 16);
#endif
}
MAC_INLINE vf load(const float16* p) {
#if MAC_LEVEL >= 2
  return (vf)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif MAC_LEVEL == 1
  return (vf)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#elif MAC_NEON
  return (vf)vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(&p->bits)));
#else
  // Shift exponent and mantissa into place, rebias by a multiplication (right for subnormals too),
  // and give infinities and NaNs their full exponent back.
  vh h;
  std::memcpy(&h, p, sizeof h);
  const vu u = __builtin_convertvector(h, vu);
  const vu magnitude = (u & 0x7fffu) << 13;
  const vu special = (vu)(magnitude >= 0x0f800000u) & 0x7f800000u;
  const vu value = bits_of(float_of(magnitude) * 0x1p112f) | special;
  return float_of(value | ((u & 0x8000u) << 16));
#endif
}
// In units of kUnit.
MAC_INLINE vf load(const float8* p) {
#if MAC_LEVEL >= 1
  // Sign and the other bits go to where a float16 has them, with an exponent whose bias is greater by 8. Of a NaN,
  // and nothing else, the next greater number has the highest bit of a float16's exponent; with it it is NaN there.
#if MAC_LEVEL >= 2
  const __m256i wide = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  const __m256i half = _mm256_and_si256(_mm256_slli_epi16(wide, 7), _mm256_set1_epi16(short(0xbf80)));
  const __m256i next = _mm256_add_epi16(half, _mm256_set1_epi16(0x80));
  constexpr int kAOrBAndC = 0xf8;
  return (vf)_mm512_cvtph_ps(_mm256_ternarylogic_epi32(half, next, _mm256_set1_epi16(0x4000), kAOrBAndC));
#else
  const __m128i wide = _mm_cvtepi8_epi16(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
  const __m128i half = _mm_and_si128(_mm_slli_epi16(wide, 7), _mm_set1_epi16(short(0xbf80)));
  const __m128i next = _mm_and_si128(_mm_add_epi16(half, _mm_set1_epi16(0x80)), _mm_set1_epi16(0x4000));
  return (vf)_mm256_cvtph_ps(_mm_or_si128(half, next));
#endif
#else
  vb b;
  std::memcpy(&b, p, sizeof b);
  const vu u = __builtin_convertvector(b, vu);
  const vu magnitude = u & 0x7fu;
  const vu normal = (magnitude << 20) + (112u << 23);
  const vu small = bits_of(__builtin_convertvector((vi)magnitude, vf) * 0x1p-17f);
  const vu is_small = (vu)(magnitude < 8u);
  const vu is_nan = (vu)(magnitude == 0x7fu) & 0x7fc00000u;
  return float_of((small & is_small) | (normal & ~is_small) | is_nan | (u & 0x80u) << 24);
#endif
}

MAC_INLINE void store(float* p, vf x) {
  std::memcpy(p, &x, sizeof x);
}
MAC_INLINE void store(bfloat16* p, vf x) {
  // Round to nearest even; a NaN keeps its sign and becomes quiet, as rounding could make it an inf.
  const vu u = bits_of(x);
  const vu rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  const vu is_nan = (vu)((u & 0x7fffffffu) > 0x7f800000u);
  const vh h = __builtin_convertvector((rounded & ~is_nan) | (((u >> 16) | 0x40u) & is_nan), vh);
  std::memcpy(p, &h, sizeof h);
}
MAC_INLINE void store(float16* p, vf x) {
#if MAC_LEVEL >= 2
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT));
#elif MAC_LEVEL == 1
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT));
#elif MAC_NEON
  vst1_u16(&p->bits, vreinterpret_u16_f16(vcvt_f16_f32((float32x4_t)x)));
#else
  // A subnormal result is rounded by adding 0.5, whose last place is the half's; a normal one by
  // adding half of its last place, ties to even; 65520 and above is infinite.
  const vu u = bits_of(x);
  const vu sign = (u >> 16) & 0x8000u;
  const vu magnitude = u & 0x7fffffffu;
  const vu small = bits_of(float_of(magnitude) + 0.5f) - 0x3f000000u;
  const vu normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  const vu is_small = (vu)(magnitude < 0x38800000u);
  const vu is_large = (vu)(magnitude >= 0x477ff000u);
  const vu is_nan = (vu)(magnitude > 0x7f800000u);
  vu half = (small & is_small) | (normal & ~is_small);
  half = (half & ~is_large) | (is_large & 0x7c00u) | (is_nan & 0x0200u);
  const vh h = __builtin_convertvector(half | sign, vh);
  std::memcpy(p, &h, sizeof h);
#endif
}

MAC_INLINE vf vmax(vf a, vf b) {
  return a > b ? a : b;
}
MAC_INLINE vf vmin(vf a, vf b) {
  return a < b ? a : b;
}

MAC_INLINE float hsum(vf x) {
#if MAC_LEVEL >= 2
  return _mm512_reduce_add_ps((__m512)x);
#elif MAC_LEVEL == 1
  const __m128 four = _mm256_castps256_ps128((__m256)x) + _mm256_extractf128_ps((__m256)x, 1);
  const __m128 two = four + _mm_movehl_ps(four, four);
  return _mm_cvtss_f32(two + _mm_movehdup_ps(two));
#elif MAC_NEON
  return vaddvq_f32((float32x4_t)x);
#else
  float sum = x[0];
  for (int i = 1; i < kLanes; ++i) sum += x[i];
  return sum;
#endif
}
MAC_INLINE float hmax(vf x) {
#if MAC_LEVEL >= 2
  return _mm512_reduce_max_ps((__m512)x);
#elif MAC_LEVEL == 1
  const __m128 four = _mm_max_ps(_mm256_castps256_ps128((__m256)x), _mm256_extractf128_ps((__m256)x, 1));
  const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ps(two, _mm_movehdup_ps(two)));
#elif MAC_NEON
  return vmaxnmvq_f32((float32x4_t)x);  // not of a NaN, as the others
#else
  float high = x[0];
  for (int i = 1; i < kLanes; ++i) high = x[i] > high ? x[i] : high;
  return high;
#endif
}

// The lanes in which a is above b, as bits.
MAC_INLINE uint32_t lanes_above(vf a, vf b) {
#if MAC_LEVEL >= 2
  return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_GT_OQ);
#elif MAC_LEVEL == 1
  return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps((__m256)a, (__m256)b, _CMP_GT_OQ)));
#else
  uint32_t lanes = 0;
  for (int i = 0; i < kLanes; ++i) lanes |= static_cast<uint32_t>(a[i] > b[i]) << i;
  return lanes;
#endif
}

// `uniform` of tokens, see sample.h.
MAC_INLINE vf uniforms(uint32_t seed, vu tokens) {
  vu x = tokens + seed;
  x = (x ^ x >> 16) * 0x7feb352du;
  x = (x ^ x >> 15) * 0x846ca68bu;
  return __builtin_convertvector((vi)((x >> 8) + 1u), vf) * 0x1p-24f;
}
// The numbers from `first` on.
MAC_INLINE vu count_from(int32_t first) {
  vu numbers;
  for (int i = 0; i < kLanes; ++i) numbers[i] = i;
  return numbers + static_cast<uint32_t>(first);
}

// The sums of four vectors, to out[0..3].
MAC_INLINE void hsum4(vf a, vf b, vf c, vf d, float* out) {
#if MAC_LEVEL >= 1
  // Add pairs of lanes while interleaving, so that every 128-bit lane holds a part of all four sums.
#if MAC_LEVEL >= 2
  const __m512 va = (__m512)a, vb = (__m512)b, vc = (__m512)c, vd = (__m512)d;
  const __m512 ab = _mm512_unpacklo_ps(va, vb) + _mm512_unpackhi_ps(va, vb);
  const __m512 cd = _mm512_unpacklo_ps(vc, vd) + _mm512_unpackhi_ps(vc, vd);
  const __m512 abcd = _mm512_shuffle_ps(ab, cd, 0x44) + _mm512_shuffle_ps(ab, cd, 0xee);
  const __m256 half =
      _mm512_castps512_ps256(abcd) + _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(abcd), 1));
#else
  const __m256 va = (__m256)a, vb = (__m256)b, vc = (__m256)c, vd = (__m256)d;
  const __m256 ab = _mm256_unpacklo_ps(va, vb) + _mm256_unpackhi_ps(va, vb);
  const __m256 cd = _mm256_unpacklo_ps(vc, vd) + _mm256_unpackhi_ps(vc, vd);
  const __m256 half = _mm256_shuffle_ps(ab, cd, 0x44) + _mm256_shuffle_ps(ab, cd, 0xee);
#endif
  _mm_storeu_ps(out, _mm256_castps256_ps128(half) + _mm256_extractf128_ps(half, 1));
#elif MAC_NEON
  const float32x4_t ab = vpaddq_f32((float32x4_t)a, (float32x4_t)b),
                    cd = vpaddq_f32((float32x4_t)c, (float32x4_t)d);
  vst1q_f32(out, vpaddq_f32(ab, cd));
#else
  out[0] = hsum(a), out[1] = hsum(b), out[2] = hsum(c), out[3] = hsum(d);
#endif
}

// exp(x) for x <= 88: Cody-Waite reduction by ln 2 and a degree-6 polynomial, within 2 ulp; below
// -87.3, where the result would be subnormal, 0. A NaN stays one.
MAC_INLINE vf vexp(vf x) {
  const float kShift = 12582912.f;  // 1.5 * 2^23: adding it rounds to an integer
  const vf shifted = x * 1.44269504f + kShift;
  const vf n = shifted - kShift;
  const vf r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  vf y = broadcast(1.f / 720);
  y = y * r + 1.f / 120;
  y = y * r + 1.f / 24;
  y = y * r + 1.f / 6;
  y = y * r + 0.5f;
  y = y * r + 1.f;
  y = y * r + 1.f;
  const vf scale = float_of((bits_of(shifted) - bits_of(broadcast(kShift)) + 127u) << 23);
  return float_of(bits_of(y * scale) & ~(vu)(x < -87.3f));
}

// tanh(x) = 1 - 2 / (exp(2x) + 1), within 1e-7 of the truth (absolute), which is what a logit needs.
MAC_INLINE vf vtanh(vf x) {
  const vf limited = vmax(vmin(x, broadcast(20.f)), broadcast(-20.f));
  const vf result = 1.f - 2.f / (vexp(2.f * limited) + 1.f);
  return x == x ? result : x;  // the limits swallow a NaN
}

MAC_INLINE void prefetch(const void* p) {
  __builtin_prefetch(p, 0, 3);
}
template <typename T>
constexpr int kLineElements = 64 / static_cast<int>(sizeof(T));  // of a cache line
template <typename T>
MAC_INLINE void prefetch_row(const T* row, int64_t count) {
  for (int64_t d = 0; d < count; d += kLineElements<T>) prefetch(row + d);
}
