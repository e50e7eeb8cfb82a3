// The sample of old tokens that an entry keeps as its anchors: a weighted sample without replacement (priority and
// threshold sampling; Duffield, Lund, Thorup, JACM 2007), drawn while a miss streams over the tokens.
//
//   w_i = max over the group's heads of exp(logit_h(i) - last_lse_h)      u_i in (0, 1] by a hash
//   A token whose key w_i / u_i exceeds tau is a candidate. If there are more than S (see sample_size), tau rises
//   to the (S + 1)-th largest key, and those above it stay. Each was taken with probability pi_i = min(1, w_i /
//   tau), and stands for a_i = 1 / pi_i - 1 tokens besides itself.
// last_lse is the log-sum-exp of the slot's last step: any weight known when the token passes is right.
#pragma once

#include <cstdint>

#include "state.h"

namespace mac_attn {

// How many an entry keeps at most, of `anchors` places: no more than a share of its old tokens, as a hit has to be
// worth taking.
MAC_HOST_DEVICE constexpr int32_t sample_size(int32_t anchors, int32_t old_end) {
  constexpr int32_t kShare = 6;
  const int32_t most = old_end / kShare > 1 ? old_end / kShare : 1;
  return anchors < most ? anchors : most;
}

// Candidates that there is room for, in multiples of S. An entry that had more is not stored.
constexpr int32_t kCandidateRoom = 4;
constexpr int64_t kCandidateBytes = 8;  // of one that the CUDA kernels hand on
constexpr int32_t kNotSampled = -1;     // in `sampled`: there was no log-sum-exp or tau to go by

// A hash of 32 bits in which each bit of the argument moves each bit of the result (Wellons' lowbias32).
MAC_HOST_DEVICE constexpr uint32_t mix(uint32_t x) {
  x = (x ^ x >> 16) * 0x7feb352du;
  x = (x ^ x >> 15) * 0x846ca68bu;
  return x ^ x >> 16;
}

// What the hash of an entry's tokens begins with: entries, KV heads and layers draw independently.
MAC_HOST_DEVICE constexpr uint32_t sample_seed(int32_t position, int32_t kv_head, int32_t layer) {
  return mix(mix(mix(static_cast<uint32_t>(position)) + static_cast<uint32_t>(kv_head)) +
             static_cast<uint32_t>(layer));
}

// u of a token: a multiple of 2^-24 in (0, 1]. The last step of `mix` is left out, it moves no bit used here.
MAC_HOST_DEVICE constexpr float uniform(uint32_t seed, int32_t token) {
  uint32_t x = seed + static_cast<uint32_t>(token);
  x = (x ^ x >> 16) * 0x7feb352du;
  x = (x ^ x >> 15) * 0x846ca68bu;
  return static_cast<float>((x >> 8) + 1) * 0x1p-24f;
}

// tau of a slot that has drawn no sample yet.
MAC_HOST_DEVICE constexpr float first_tau(int32_t size) {
  return 1.f / static_cast<float>(size);
}

// tau for the slot's next miss, from the candidates of this one: so that there are about 1.5 S.
MAC_HOST_DEVICE constexpr float next_tau(float tau, int32_t sampled, int32_t size) {
  const float wanted = 1.5f * static_cast<float>(size), least = 1.f / (64.f * static_cast<float>(size));
  const float ratio = static_cast<float>(sampled) / wanted;
  const float next = tau * (ratio < 0.25f ? 0.25f : ratio > 4.f ? 4.f : ratio);
  return next < least ? least : next > 64.f ? 64.f : next;
}

// How many tokens an anchor is counted as where a hit attends to it, both by the new query and by the entry's: 1 +
// b with 1 / b = 1 / a + S_c / E(c). So the sample moves the mean of the rest, too: a control variate, in which no
// token answers for more others than one of an even sample of `size` out of `old_end` would. b <= a; on an equal
// query what it adds is what it takes.
MAC_HOST_DEVICE constexpr float counted(float a, float density) {
  return 1.f + a / (1.f + a * density);
}
MAC_HOST_DEVICE constexpr float sample_density(int32_t anchors, int32_t old_end) {
  return static_cast<float>(sample_size(anchors, old_end)) / static_cast<float>(old_end > 1 ? old_end : 1);
}

// Whether a tau read from a slot can be gone by.
MAC_HOST_DEVICE constexpr bool usable_tau(float tau) {
  return tau > 0.f && tau <= 64.f;
}

}  // namespace mac_attn
