// The sample of old tokens that a miss keeps as its entry's anchors: drawn by the warps while they stream over the
// tokens, cut and put in order by the CTA that finishes the KV head. See ../sample.h.
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

// What the candidates are cut and put in order in: shared memory that the stages no longer need.
struct alignas(16) SampleScratch {
  static constexpr int kBins = 2048;
  union {
    uint32_t key[kCandidateRoom * kMaxAnchors];  // positive floats, whose bits are ordered like them
    struct {
      Candidate token[kMaxAnchors];
      int end[kBins];  // of a bin of positions: where its tokens end in `token`
    } sorted;
  };
  union {
    int bin[kBins];  // keys with a digit
    Candidate chosen[kMaxAnchors];
  };
};
// Of every thread, side by side.
constexpr int kThreadBins = SampleScratch::kBins / kThreads;

MAC_DEVICE int sum_of_bins(const int* bins) {
  int sum = 0;
#pragma unroll
  for (int i = 0; i < kThreadBins; i += 4) {
    const uint4 four = ptx::load_16(bins + i);
    sum += static_cast<int>(four.x + four.y + four.z + four.w);
  }
  return sum;
}

MAC_DEVICE void clear_bins(int* bins) {
#pragma unroll
  for (int i = 4 * threadIdx.x; i < SampleScratch::kBins; i += 4 * kThreads) ptx::store_16(bins + i, {0, 0, 0, 0});
}

// The (wanted + 1)-th largest of the keys, of which there are more than `wanted`: one digit after another, by
// counting. The whole block takes part.
MAC_DEVICE uint32_t first_key_cut(SampleScratch& scratch, int count, int wanted) {
  __shared__ int warp_sum[kWarps], digit, greater;
  uint32_t cut = 0;  // its bits from `known` on; the sign is 0
#pragma unroll 1
  for (int known = 31, shift = 20; known > 0; known = shift, shift -= 10) {
    clear_bins(scratch.bin);
    ptx::sync_block();
#pragma unroll 4
    for (int i = threadIdx.x; i < count; i += kThreads) {
      const uint32_t key = scratch.key[i];
      // A bin more than the digit has bits is one that all of these keys have.
      if ((key ^ cut) >> known == 0) ptx::atomic_add(&scratch.bin[(key >> shift) % SampleScratch::kBins], 1);
    }
    ptx::sync_block();
    // From the greatest digit down.
    int bin = SampleScratch::kBins - 1 - static_cast<int>(threadIdx.x) * kThreadBins, all = 0;
    const int mine = sum_of_bins(scratch.bin + bin - (kThreadBins - 1));
    int before = sum_before(mine, warp_sum, all);
    if (before <= wanted && wanted < before + mine) {
      for (; before + scratch.bin[bin] <= wanted; --bin) before += scratch.bin[bin];
      digit = bin, greater = before;
    }
    ptx::sync_block();
    cut |= static_cast<uint32_t>(digit) << shift;
    wanted -= greater;
  }
  return cut;
}

// Calls `use` with each of a thread's candidates and its place. Some are read at a time, whatever their number: a
// loop unrolled by the compiler reads what is over one after another.
template <int kHeadDim, typename Use>
MAC_DEVICE void each_candidate(const Candidate* candidates, int count, const Use& use) {
  constexpr int kAtOnce = kHeadDim <= 128 ? 4 : 3;  // registers are short with the greatest
#pragma unroll 1
  for (int first = threadIdx.x; first < count; first += kAtOnce * kThreads) {
    Candidate c[kAtOnce];
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) {
      if (first + j * kThreads < count) c[j] = candidates[first + j * kThreads];
    }
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) {
      if (first + j * kThreads < count) use(first + j * kThreads, c[j]);
    }
  }
}

// Cuts the sample that a KV head has drawn; returns how many are left, in `chosen`. `raise`: log2 of what tau has
// risen to, by tau. The whole block takes part.
template <int kHeadDim>
MAC_DEVICE int choose_sample(const AmendParams& p, const AmendWorkspace& w, const Piece& piece, int count,
                             SampleScratch& scratch, float& raise) {
  __shared__ int warp_sum[kWarps];
  const int size = sample_size(p.num_anchors, piece.work.old_end);
  const uint32_t seed = sample_seed(piece.work.position, piece.kv_head, p.layer);
  const Candidate* candidates =
      w.candidate + static_cast<int64_t>(piece.kv_group(p)) * kCandidateRoom * p.num_anchors;
  each_candidate<kHeadDim>(candidates, count, [&](int i, Candidate c) {
    scratch.key[i] = float_bits(c.lead - ptx::lg2(uniform(seed, c.token)));
  });
  ptx::sync_block();
  const uint32_t cut = count > size ? first_key_cut(scratch, count, size) : 0;
  const auto stays = [&](int i) { return count <= size || scratch.key[i] > cut; };
  int mine = 0, all = 0;
#pragma unroll 4
  for (int i = threadIdx.x; i < count; i += kThreads) mine += stays(i);
  int place = sum_before(mine, warp_sum, all);
  each_candidate<kHeadDim>(candidates, count, [&](int i, Candidate c) {
    if (stays(i)) scratch.chosen[place++] = c;
  });
  ptx::sync_block();
  raise = bits_float(cut);
  return all;
}

// Writes the chosen in the order of their positions, so that it does not hang on that of the threads: they are
// counted by bins of positions, few for each, and within a bin compared. The whole block takes part.
MAC_DEVICE void write_in_order(SampleScratch& scratch, int count, int old_end, float raise, int32_t* anchors,
                               float* weights) {
  __shared__ int warp_sum[kWarps];
  int shift = 0, all = 0;
  while ((old_end - 1) >> shift >= SampleScratch::kBins) ++shift;
  int* end = scratch.sorted.end;
  clear_bins(end);
  ptx::sync_block();
#pragma unroll 4
  for (int i = threadIdx.x; i < count; i += kThreads) ptx::atomic_add(&end[scratch.chosen[i].token >> shift], 1);
  ptx::sync_block();
  int* bins = end + threadIdx.x * kThreadBins;
  uint32_t before = sum_before(sum_of_bins(bins), warp_sum, all);
#pragma unroll
  for (int i = 0; i < kThreadBins; i += 4) {
    const uint4 four = ptx::load_16(bins + i);
    const uint32_t second = before + four.x, third = second + four.y, fourth = third + four.z;
    ptx::store_16(bins + i, {before, second, third, fourth});
    before = fourth + four.w;
  }
  ptx::sync_block();
#pragma unroll 4
  for (int i = threadIdx.x; i < count; i += kThreads) {
    const Candidate c = scratch.chosen[i];
    scratch.sorted.token[ptx::atomic_add(&end[c.token >> shift], 1)] = c;
  }
  ptx::sync_block();
#pragma unroll 2
  for (int i = threadIdx.x; i < count; i += kThreads) {
    const Candidate c = scratch.sorted.token[i];
    const int bin = c.token >> shift;
    int place = bin > 0 ? end[bin - 1] : 0;
    for (int other = place; other < end[bin]; ++other) place += scratch.sorted.token[other].token < c.token;
    anchors[place] = c.token, weights[place] = fmaxf(ptx::ex2(raise - c.lead) - 1.f, 0.f);
  }
}

// Writes the anchors of a KV head's new entry, S each: none, if it has drawn no sample or more than there is room
// for. `sampled`: candidates, kNotSampled for none. The whole block takes part.
template <int kHeadDim>
MAC_DEVICE void write_sample(const AmendParams& p, const AmendWorkspace& w, const Piece& piece, int sampled,
                             SampleScratch& scratch, int32_t* anchors, float* weights) {
  const int room = kCandidateRoom * sample_size(p.num_anchors, piece.work.old_end);
  float raise = 0.f;
  int chosen = 0;
  if (sampled > 0 && sampled <= room) {
    chosen = choose_sample<kHeadDim>(p, w, piece, sampled, scratch, raise);
    write_in_order(scratch, chosen, piece.work.old_end, raise, anchors, weights);
  }
#pragma unroll 1
  for (int i = chosen + static_cast<int>(threadIdx.x); i < p.num_anchors; i += kThreads) {
    anchors[i] = kNoAnchor, weights[i] = 0.f;
  }
}

}  // namespace mac_attn::cuda
