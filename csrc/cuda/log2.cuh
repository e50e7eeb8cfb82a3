// Softmax in powers of two: logits are multiplied by log2(e), so that a weight is one ex2.
#pragma once

#include "ptx/math.h"
#include "simt.h"

namespace mac_attn::cuda {

constexpr float kLog2E = 1.44269504f;
constexpr float kLn2 = 0.693147181f;

// What a maximum is subtracted as: -inf (no token yet) would make NaN of the -inf it is subtracted from.
MAC_DEVICE float finite_or_zero(float max) {
  return max == -INFINITY ? 0.f : max;
}

// log2 of sum * 2^max.
MAC_DEVICE float log2_total(float max, float sum) {
  return sum == 0.f ? -INFINITY : max + ptx::lg2(sum);
}

}  // namespace mac_attn::cuda
