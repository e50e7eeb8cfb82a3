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

// A hit with anchors, from log-sum-exps of the entry's state, of the anchors as its query attends to them and of
// all that the new query attends to. Without the anchors the entry's sums move by `log_ratio` and join the fresh
// ones:
//     out = out_entry entry + out_replaced replaced + out_fresh fresh.
// As anchors answer for others (sample.h), now and then they leave with more than there was: the sums are signed.
// What would take most of the fresh sum away is left out.
constexpr float kLeastOfFresh = 0.25f;

struct HitWeights {
  float entry;
  float replaced;
  float fresh;
  float lse;
};

MAC_HOST_DEVICE inline HitWeights hit_weights(float entry, float replaced, float log_ratio, float fresh) {
  const float taken = std::exp(replaced - entry), moved = entry + log_ratio;
  const HitWeights without{0.f, 0.f, 1.f, fresh};
  if (moved == -std::numeric_limits<float>::infinity()) return without;
  const float high = moved > fresh ? moved : fresh;
  const float old_sum = std::exp(moved - high), fresh_sum = std::exp(fresh - high);
  const float sum = old_sum * (1.f - taken) + fresh_sum;
  if (sum < kLeastOfFresh * fresh_sum) return without;
  return {old_sum / sum, -taken * old_sum / sum, fresh_sum / sum, high + std::log(sum)};
}

// Whether what the anchors leave of an entry's sum is little more than rounding errors: the difference, and by what
// the anchors stand for, `log_light`, so that a difference that happens to be none does not count. Then log_ratio
// is -inf.
constexpr float kLeastRest = 1.f / 1024;

MAC_HOST_DEVICE inline bool nothing_left(float entry, float replaced, float log_light) {
  const float rest = 1.f - std::exp(replaced - entry);
  return rest < kLeastRest && rest > -kLeastRest && std::exp(log_light - entry) < kLeastRest;
}

}  // namespace mac_attn
