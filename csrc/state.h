// The algebra of attention states (design: FlashInfer's cascade attention, arXiv:2501.01005 §3).
//
// A state over a set of tokens is (o, lse): the softmax-weighted mean of their values and the natural
// log of the sum of exp(logit). The empty set is (0, -inf). States of disjoint sets merge exactly:
//     lse = log(exp(l1) + exp(l2)),   o = o1 exp(l1 - lse) + o2 exp(l2 - lse).
#pragma once

#include <cmath>
#include <limits>

#ifdef __CUDACC__
#define MAC_HOST_DEVICE __host__ __device__
#else
#define MAC_HOST_DEVICE
#endif

namespace mac_attn {

struct MergeWeights {
  float first;
  float second;
  float lse;
};

// Both operands may be empty; a NaN in either stays visible.
MAC_HOST_DEVICE inline MergeWeights merge_weights(float lse1, float lse2) {
  const float high = lse1 > lse2 ? lse1 : lse2;
  if (high == -std::numeric_limits<float>::infinity()) {
    const float lse = lse1 + lse2;  // -inf, or NaN if either was
    const float weight = lse == lse ? 0.f : lse;
    return {weight, weight, lse};
  }
  const float w1 = std::exp(lse1 - high);
  const float w2 = std::exp(lse2 - high);
  const float sum = w1 + w2;
  return {w1 / sum, w2 / sum, high + std::log(sum)};
}

// What is left of an entry's state when the tokens attended anew leave it, moved to the new query:
//     out = out_entry first + out_replaced second,   lse = ln(exp(lse_entry) - exp(lse_replaced)) + log_ratio.
// Below this share of the entry's sum it would be rounding errors, and counts as empty.
constexpr float kLeastRest = 1.f / 1024;

MAC_HOST_DEVICE inline MergeWeights rest_weights(float entry, float replaced, float log_ratio) {
  constexpr float kEmpty = -std::numeric_limits<float>::infinity();
  if (entry == kEmpty) return {0.f, 0.f, kEmpty};
  const float taken = std::exp(replaced - entry), share = 1.f - taken;
  if (share < kLeastRest) return {0.f, 0.f, kEmpty};
  return {1.f / share, -taken / share, entry + std::log(share) + log_ratio};
}

}  // namespace mac_attn
