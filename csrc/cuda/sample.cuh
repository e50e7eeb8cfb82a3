// The sample of old tokens that a miss keeps as its entry's anchors: drawn by the warps while they stream over the
// tokens, cut and sorted by the CTA that finishes the KV head. See ../sample.h.
//
// Everything is log2 and relative to tau: a token's `lead` is log2(w / tau), its key log2(w / tau / u). Traffic: 8
// bytes of every candidate, written once and read twice.
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
  bool known = usable_tau(tau);
#pragma unroll 4
  for (int g = 0; g < G; ++g) known = known && fabsf(last_lse[g]) < INFINITY;
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
    const float tau = piece.begin < piece.work.old_tiles ? sample_tau(p, piece) : 0.f;
    draws = tau > 0.f, count = 0, shared = &room;
    if (!draws) return;
    if (ptx::lane_id() == 0) room.seed = sample_seed(piece.work.seq_len - 1, piece.kv_head, p.layer);
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

// What the candidates are cut and sorted in: shared memory that the stages no longer need.
struct SampleScratch {
  uint32_t key[kCandidateRoom * kMaxAnchors];  // positive floats, whose bits are ordered like them
  unsigned long long chosen[kMaxAnchors];      // position and lead, so that the order is the positions'
};

// The (wanted + 1)-th largest of the keys, of which there are more than `wanted`. The whole block takes part.
MAC_DEVICE uint32_t first_key_cut(SampleScratch& scratch, int count, int wanted) {
  __shared__ int warp_counts[2][kWarps];
  uint32_t cut = 0;
#pragma unroll 1
  for (int bit = 30; bit >= 0; --bit) {
    const uint32_t trial = cut | 1u << bit;
    int above = 0;
#pragma unroll 4
    for (int i = threadIdx.x; i < count; i += kThreads) above += scratch.key[i] >= trial;
    above = ptx::reduce_add(above);
    int (&warp_count)[kWarps] = warp_counts[bit % 2];
    if (ptx::lane_id() == 0) warp_count[threadIdx.x / 32] = above;
    ptx::sync_block();
    above = 0;
    for (int i = 0; i < kWarps; ++i) above += warp_count[i];
    if (above > wanted) cut = trial;
  }
  return cut;
}

// Sorts by position, bitonically. The whole block takes part.
MAC_DEVICE void sort_chosen(SampleScratch& scratch, int count) {
  int padded = 1;
  while (padded < count) padded *= 2;
#pragma unroll 1
  for (int i = count + threadIdx.x; i < padded; i += kThreads) scratch.chosen[i] = ~0ull;
  ptx::sync_block();
#pragma unroll 1
  for (int run = 2; run <= padded; run *= 2) {
#pragma unroll 1
    for (int stride = run / 2; stride > 0; stride /= 2) {
#pragma unroll 1
      for (int i = threadIdx.x; i < padded / 2; i += kThreads) {
        const int low = (i & ~(stride - 1)) * 2 + (i & (stride - 1)), high = low + stride;
        const unsigned long long a = scratch.chosen[low], b = scratch.chosen[high];
        if ((a > b) == ((low & run) == 0)) scratch.chosen[low] = b, scratch.chosen[high] = a;
      }
      ptx::sync_block();
    }
  }
}

// Cuts the sample that a KV head has drawn and sorts it; returns how many are left. `raise`: log2 of what tau has
// risen to, by tau. The whole block takes part.
MAC_DEVICE int choose_sample(const AmendParams& p, const AmendWorkspace& w, const Piece& piece, bool served,
                             SampleScratch& scratch, float& raise) {
  __shared__ int num_chosen;
  const int size = sample_size(p.num_anchors, piece.work.old_end), group = piece.kv_group(p);
  const int sampled = ptx::load_volatile(w.sampled + group);
  const int count = served && sampled <= kCandidateRoom * size ? sampled : 0;
  const uint32_t seed = sample_seed(piece.work.seq_len - 1, piece.kv_head, p.layer);
  const Candidate* candidates = w.candidate + static_cast<int64_t>(group) * kCandidateRoom * p.num_anchors;
#pragma unroll 4
  for (int i = threadIdx.x; i < count; i += kThreads) {
    const Candidate c = candidates[i];
    scratch.key[i] = float_bits(c.lead - ptx::lg2(uniform(seed, c.token)));
  }
  if (threadIdx.x == 0) num_chosen = 0;
  ptx::sync_block();
  if (threadIdx.x == 0) {
    w.sampled[group] = 0;  // as the next call wants to find it; all have read it
    if (served) p.sampled[group] = sampled;
  }
  const uint32_t cut = count > size ? first_key_cut(scratch, count, size) : 0;
#pragma unroll 1
  for (int i = threadIdx.x; i < count; i += kThreads) {
    if (count > size && scratch.key[i] <= cut) continue;
    const Candidate c = candidates[i];
    const auto token = static_cast<unsigned long long>(c.token);
    scratch.chosen[ptx::atomic_add(&num_chosen, 1)] = token << 32 | float_bits(c.lead);
  }
  ptx::sync_block();
  raise = bits_float(cut);
  const int chosen = num_chosen;
  sort_chosen(scratch, chosen);
  return chosen;
}

// Writes the anchors of a KV head's new entry: none, if it has drawn no sample. The whole block takes part.
MAC_DEVICE void write_sample(const AmendParams& p, const AmendWorkspace& w, const Piece& piece, bool served,
                             SampleScratch& scratch) {
  float raise = 0.f;
  const int S = p.num_anchors;
  const int chosen = sample_tau(p, piece) > 0.f ? choose_sample(p, w, piece, served, scratch, raise) : 0;
#pragma unroll 1
  for (int i = threadIdx.x; i < S; i += kThreads) {
    const unsigned long long anchor = i < chosen ? scratch.chosen[i] : 0;
    const float lead = bits_float(static_cast<uint32_t>(anchor));
    const int64_t place = static_cast<int64_t>(piece.kv_group(p)) * S + i;
    p.anchors[place] = i < chosen ? static_cast<int32_t>(anchor >> 32) : kNoAnchor;
    p.anchor_weights[place] = i < chosen ? fmaxf(ptx::ex2(raise - lead) - 1.f, 0.f) : 0.f;
  }
}

}  // namespace mac_attn::cuda
