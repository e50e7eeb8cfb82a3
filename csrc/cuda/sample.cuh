// Drawing the sample of old tokens that a miss keeps as its entry's anchors, while the warps stream over the
// tokens. See ../sample.h; cut_sample.cuh makes of it what the entry keeps.
//
// Traffic: 8 bytes of every candidate, written once.
#pragma once

#include "log2.cuh"
#include "ptx/barrier.h"
#include "ptx/memory.h"
#include "ptx/warp.h"
#include "schedule.cuh"

namespace mac_attn::cuda {

// tau that a KV head's sample is drawn by, 0 if none is drawn.
MAC_DEVICE float sample_tau(const AmendParams& p, const Piece& piece) {
  const int G = p.shape.group_size;
  if (p.num_anchors == 0 || piece.work.hit() || piece.work.old_end == 0) return 0.f;
  if (p.matched.stored[piece.kv_group(p)] == kNoHistory) return 0.f;
  const int64_t slot = p.requests.slots[piece.request];
  const float tau = *p.ring.tau(slot, piece.kv_head), *last_lse = p.ring.last_lse(slot, piece.kv_head);
  bool known = usable_tau(tau) & draws_sample(*p.ring.missed(slot, piece.kv_head));
  // No `&&`: each load would wait for the one before.
#pragma unroll 4
  for (int g = 0; g < G; ++g) known &= fabsf(last_lse[g]) < INFINITY;
  return known ? tau : 0.f;
}

// A warp's part of drawing. Candidates gather in shared memory, so that the warp seldom waits for the counter.
template <int kHeadBlocks>
struct Sampler {
  static constexpr int kRoom = 64, kMostOfStrip = kWarpTokens;
  struct Shared {                // of the warp
    float bar[8 * kHeadBlocks];  // log2 logit of each head at which w is tau
    uint32_t seed;               // here, as registers are short with the largest heads
    Candidate gathered[kRoom];
  };
  bool draws;
  int count;
  Shared* shared;

  // A barrier of the warp has to follow.
  MAC_DEVICE void begin(const AmendParams& p, const Piece& piece, Shared& room) {
    // The heads of the first query token draw, which are all in the first pass.
    const bool asked = piece.begin < piece.work.old_tiles && piece.head_tile == 0;
    const float tau = asked ? sample_tau(p, piece) : 0.f;
    draws = tau > 0.f, count = 0, shared = &room;
    if (!draws) return;
    if (ptx::lane_id() == 0) room.seed = sample_seed(piece.work.position, piece.kv_head, p.layer);
    const float* last_lse = p.ring.last_lse(p.requests.slots[piece.request], piece.kv_head);
    const int g = ptx::lane_id();
    if (g < 8 * kHeadBlocks) room.bar[g] = g < p.shape.group_size ? last_lse[g] * kLog2E + ptx::lg2(tau) : INFINITY;
  }
  // Which token of a strip a lane answers for, with one other: they have half of its heads each.
  MAC_DEVICE static int token_of_lane() { return ptx::lane_id() / 4 + ptx::lane_id() % 2 * 8; }
  // The greatest lead that those heads give it. NaN is none.
  MAC_DEVICE float lead(const float (&x)[kHeadBlocks][4]) const {
    float high[2] = {-INFINITY, -INFINITY};
#pragma unroll
    for (int b = 0; b < kHeadBlocks; ++b) {
      const float* bars = shared->bar + b * 8 + ptx::lane_id() % 4 * 2;
      for (int i = 0; i < 4; ++i) high[i / 2] = fmaxf(high[i / 2], x[b][i] - bars[i % 2]);
    }
    const bool odd = ptx::lane_id() % 2;
    return fmaxf(odd ? high[1] : high[0], ptx::shfl_xor(odd ? high[0] : high[1], 1));
  }
  // Takes down the candidates of the strip from `first` on. Its leads, and what they have to exceed, are the
  // lanes'.
  MAC_DEVICE void take(const AmendParams& p, const AmendWorkspace& w, int group, int first, float lead,
                       float bound) {
    const int lane = ptx::lane_id();
    lead = fmaxf(lead, ptx::shfl_xor(lead, 2));
    const bool taken = lane % 4 < 2 && lead > bound;
    const uint32_t votes = ptx::ballot(taken);
    if (taken)
      shared->gathered[count + ptx::count_bits(votes & ((1u << lane) - 1))] = {first + token_of_lane(), lead};
    count += ptx::count_bits(votes);
    if (count > kRoom - kMostOfStrip) hand_over(p, w, group);
  }
  MAC_DEVICE void hand_over(const AmendParams& p, const AmendWorkspace& w, int group) {
    if (count == 0) return;
    const int lane = ptx::lane_id(), room = kCandidateRoom * p.num_anchors;
    int begin = 0;
    if (lane == 0) begin = ptx::atomic_add(w.sampled + group, count);
    begin = ptx::shfl(begin, 0);
    ptx::sync_warp();  // all lanes' candidates are there
#pragma unroll 1
    for (int i = lane; i < count && begin + i < room; i += 32) {
      w.candidate[static_cast<int64_t>(group) * room + begin + i] = shared->gathered[i];
    }
    ptx::sync_warp();
    count = 0;
  }
};

}  // namespace mac_attn::cuda
