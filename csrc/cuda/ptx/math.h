// Conversions and the fast exponential (PTX ISA 9.7.3: ex2, lg2; 9.7.9: cvt).
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <type_traits>

#include "../simt.h"

namespace mac_attn::ptx {

// 2^x within 2 ulp; subnormal results are 0.
MAC_DEVICE float ex2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

MAC_DEVICE float lg2(float x) {
  return log2f(x);
}
MAC_DEVICE float tanh_exact(float x) {
  return tanhf(x);
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

template <typename T>
MAC_DEVICE float to_float(T value) {
  return unpack2<T>(value.bits).x;
}

template <typename T>
MAC_DEVICE T from_float(float value) {
  return {static_cast<uint16_t>(pack2<T>(value, 0.f))};
}

}  // namespace mac_attn::ptx
