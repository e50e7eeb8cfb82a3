// Conversions and the fast exponential (PTX ISA 9.7.3: ex2; 9.7.9: cvt).
#pragma once

#include <type_traits>

#include "../simt.h"

#if defined(__CUDACC__)
#include <cuda_fp16.h>
#endif

namespace mac_attn::ptx {

// Two fp8 numbers, given in the upper byte of each half, as fp16 at 2^-8 of their value: sign and the other bits go
// to where an fp16 has them, with an exponent whose bias is greater by 8. Of a NaN, and nothing else, the next
// greater number has the highest bit of an fp16's exponent; with it it is NaN there.
MAC_DEVICE uint32_t fp8_in_fp16(uint32_t high_bytes) {
  const uint32_t half = (high_bytes & 0x80008000u) | (high_bytes & 0x7f007f00u) >> 1;
  return half | ((half + 0x00800080u) & 0x40004000u);
}

#if defined(__CUDACC__)

// 2^x within 2 ulp; subnormal results are 0.
MAC_DEVICE float ex2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// log2(x) within 2^-22 of the greater of 1 and the result; subnormals count as 0.
MAC_DEVICE float lg2(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// x / y within 2 ulp, for y up to 2^126.
MAC_DEVICE float divide(float x, float y) {
  return __fdividef(x, y);
}

// Sine and cosine of pi * x within 2 ulp.
MAC_DEVICE float2 sin_cos_pi(float x) {
  float2 result;
  sincospif(x, &result.x, &result.y);
  return result;
}

// Two floats, rounded to nearest even, in one register.
template <typename T>
MAC_DEVICE uint32_t pack2(float low, float high) {
  uint32_t pair;
  if constexpr (std::is_same_v<T, bf16>) {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  } else {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  }
  return pair;
}

template <typename T>
MAC_DEVICE float2 unpack2(uint32_t pair) {
  if constexpr (std::is_same_v<T, bf16>) {
    return {__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u)};
  } else {
    return __half22float2(*reinterpret_cast<const __half2*>(&pair));
  }
}

// Four fp8 numbers as fp16, exactly: the lower two, the upper two. NaN stays NaN. (cvt of e4m3: sm_89)
MAC_DEVICE uint2 fp8_to_fp16(uint32_t four) {
  uint2 pairs;
#if __CUDA_ARCH__ >= 890
  asm("{ .reg .b16 low, high; mov.b32 {low, high}, %2;\n"
      "cvt.rn.f16x2.e4m3x2 %0, low; cvt.rn.f16x2.e4m3x2 %1, high; }"
      : "=r"(pairs.x), "=r"(pairs.y)
      : "r"(four));
#else
  constexpr uint32_t kTwice256 = 0x5c005c00;
  const uint32_t low = fp8_in_fp16(__byte_perm(four, 0, 0x1404)), high = fp8_in_fp16(__byte_perm(four, 0, 0x3424));
  asm("mul.f16x2 %0, %1, %2;" : "=r"(pairs.x) : "r"(low), "r"(kTwice256));
  asm("mul.f16x2 %0, %1, %2;" : "=r"(pairs.y) : "r"(high), "r"(kTwice256));
#endif
  return pairs;
}

// Bytes 0, 2, 1 and 3.
MAC_DEVICE uint32_t swap_middle_bytes(uint32_t four) {
  return __byte_perm(four, 0, 0x3120);
}

#else

inline float ex2(float x) {
  const float y = exp2f(x);
  return y < 0x1p-126f ? 0.f : y;
}

inline float lg2(float x) {
  return log2f(x);
}
inline float divide(float x, float y) {
  return x / y;
}
inline float2 sin_cos_pi(float x) {
  const double angle = 3.14159265358979323846 * x;
  return {static_cast<float>(std::sin(angle)), static_cast<float>(std::cos(angle))};
}

template <typename T>
inline uint32_t round_to_16_bits(float x) {
  const uint32_t bits = float_bits(x), magnitude = bits & 0x7fffffffu;
  if constexpr (std::is_same_v<T, bf16>) {
    if (magnitude > 0x7f800000u) return 0x7fffu;  // cvt's canonical NaN
    return (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  } else {
    const uint32_t sign = (bits >> 16) & 0x8000u;
    if (magnitude > 0x7f800000u) return 0x7fffu;
    if (magnitude >= 0x477ff000u) return sign | 0x7c00u;  // 65520 and above: infinity
    // A subnormal result is rounded by adding 0.5, whose last place is the half's.
    if (magnitude < 0x38800000u) return sign | (float_bits(bits_float(magnitude) + 0.5f) - 0x3f000000u);
    return sign | ((magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13);
  }
}

template <typename T>
inline float from_16_bits(uint32_t bits) {
  if constexpr (std::is_same_v<T, bf16>) {
    return bits_float(bits << 16);
  } else {
    // Exponent and mantissa into place, then rebias by a product (right for subnormals too); infinities and
    // NaNs get their full exponent back.
    const uint32_t magnitude = (bits & 0x7fffu) << 13;
    const uint32_t special = magnitude >= 0x0f800000u ? 0x7f800000u : 0u;
    return bits_float(float_bits(bits_float(magnitude) * 0x1p112f) | special | (bits & 0x8000u) << 16);
  }
}

template <typename T>
inline uint32_t pack2(float low, float high) {
  return round_to_16_bits<T>(low) | round_to_16_bits<T>(high) << 16;
}

template <typename T>
inline float2 unpack2(uint32_t pair) {
  return {from_16_bits<T>(pair & 0xffffu), from_16_bits<T>(pair >> 16)};
}

inline uint2 fp8_to_fp16(uint32_t four) {
  const auto scaled = [](uint32_t high_bytes) {
    const float2 x = unpack2<fp16>(fp8_in_fp16(high_bytes));
    return pack2<fp16>(256 * x.x, 256 * x.y);
  };
  return {scaled((four & 0xffu) << 8 | (four & 0xff00u) << 16),
          scaled((four >> 8 & 0xff00u) | (four & 0xff000000u))};
}
inline uint32_t swap_middle_bytes(uint32_t four) {
  return (four & 0xff0000ffu) | (four & 0xff00u) << 8 | (four >> 8 & 0xff00u);
}

#endif

// 1 - 2 / (e^2x + 1), within 3e-7. A NaN stays one, which fminf would not let it.
MAC_DEVICE float tanh(float x) {
  const float power = ex2(2.88539008f * x);
  return 1.f - divide(2.f, (power > 0x1p100f ? 0x1p100f : power) + 1.f);
}

template <typename T>
MAC_DEVICE float to_float(T value) {
  return unpack2<T>(value.bits).x;
}

template <typename T>
MAC_DEVICE T from_float(float value) {
  return {static_cast<uint16_t>(pack2<T>(value, 0.f))};
}

}  // namespace mac_attn::ptx
