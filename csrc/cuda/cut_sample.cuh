// What an entry keeps of the candidates that a miss has drawn: cut to their greatest keys, in the order of their
// positions. See ../sample.h. At the end of complete, whose blocks are wide and all of a call's at once; the op
// that is amend alone has them at its own end.
//
// Everything is log2 and relative to tau: a token's `lead` is log2(w / tau), its key log2(w / tau / u). Traffic: 8
// bytes of every candidate, read twice.
#pragma once

#include "log2.cuh"
#include "ptx/barrier.h"
#include "ptx/memory.h"
#include "ptx/warp.h"
#include "schedule.cuh"

namespace mac_attn::cuda {

// What the candidates are cut and put in order in: shared memory.
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
template <int kBlock>
constexpr int kThreadBins = SampleScratch::kBins / kBlock;

template <int kBlock>
MAC_DEVICE int sum_of_bins(const int* bins) {
  int sum = 0;
#pragma unroll
  for (int i = 0; i < kThreadBins<kBlock>; i += 4) {
    const uint4 four = ptx::load_16(bins + i);
    sum += static_cast<int>(four.x + four.y + four.z + four.w);
  }
  return sum;
}

template <int kBlock>
MAC_DEVICE void clear_bins(int* bins) {
#pragma unroll
  for (int i = 4 * threadIdx.x; i < SampleScratch::kBins; i += 4 * kBlock) ptx::store_16(bins + i, {0, 0, 0, 0});
}

// The (wanted + 1)-th largest of the keys, of which there are more than `wanted`: one digit after another, by
// counting. The whole block takes part.
template <int kBlock>
MAC_DEVICE uint32_t first_key_cut(SampleScratch& scratch, int count, int wanted) {
  __shared__ int warp_sum[kBlock / 32], digit, greater;
  uint32_t cut = 0;  // its bits from `known` on; the sign is 0
#pragma unroll 1
  for (int known = 31, shift = 20; known > 0; known = shift, shift -= 10) {
    clear_bins<kBlock>(scratch.bin);
    ptx::sync_block();
#pragma unroll 4
    for (int i = threadIdx.x; i < count; i += kBlock) {
      const uint32_t key = scratch.key[i];
      // A bin more than the digit has bits is one that all of these keys have.
      if ((key ^ cut) >> known == 0) ptx::atomic_add(&scratch.bin[(key >> shift) % SampleScratch::kBins], 1);
    }
    ptx::sync_block();
    // From the greatest digit down.
    int bin = SampleScratch::kBins - 1 - static_cast<int>(threadIdx.x) * kThreadBins<kBlock>, all = 0;
    const int mine = sum_of_bins<kBlock>(scratch.bin + bin - (kThreadBins<kBlock> - 1));
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
template <int kBlock, typename Use>
MAC_DEVICE void each_candidate(const Candidate* candidates, int count, const Use& use) {
  constexpr int kAtOnce = kBlock > 128 ? 2 : 3;  // in amend registers are short with the greatest heads
#pragma unroll 1
  for (int first = threadIdx.x; first < count; first += kAtOnce * kBlock) {
    Candidate c[kAtOnce];
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) {
      if (first + j * kBlock < count) c[j] = candidates[first + j * kBlock];
    }
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) {
      if (first + j * kBlock < count) use(first + j * kBlock, c[j]);
    }
  }
}

// What a KV head has drawn.
struct Drawn {
  const Candidate* candidates;
  int count;  // of them; those without room too, kNotSampled if none was drawn
  int old_end;
  uint32_t seed;  // of the entry that they are for
};

// Cuts a sample to `size`; returns how many are left, in `chosen`. `raise`: log2 of what tau has risen to, by tau.
// The whole block takes part.
template <int kBlock>
MAC_DEVICE int choose_sample(const Drawn& drawn, int size, SampleScratch& scratch, float& raise) {
  __shared__ int warp_sum[kBlock / 32];
  const int count = drawn.count;
  each_candidate<kBlock>(drawn.candidates, count, [&](int i, Candidate c) {
    scratch.key[i] = float_bits(c.lead - ptx::lg2(uniform(drawn.seed, c.token)));
  });
  ptx::sync_block();
  const uint32_t cut = count > size ? first_key_cut<kBlock>(scratch, count, size) : 0;
  const auto stays = [&](int i) { return count <= size || scratch.key[i] > cut; };
  int mine = 0, all = 0;
#pragma unroll 4
  for (int i = threadIdx.x; i < count; i += kBlock) mine += stays(i);
  int place = sum_before(mine, warp_sum, all);
  each_candidate<kBlock>(drawn.candidates, count, [&](int i, Candidate c) {
    if (stays(i)) scratch.chosen[place++] = c;
  });
  ptx::sync_block();
  raise = bits_float(cut);
  return all;
}

// Writes the chosen in the order of their positions, so that it does not hang on that of the threads: they are
// counted by bins of positions, few for each, and within a bin compared. The whole block takes part.
template <int kBlock>
MAC_DEVICE void write_in_order(SampleScratch& scratch, int count, int old_end, float raise, int32_t* anchors,
                               float* weights) {
  __shared__ int warp_sum[kBlock / 32];
  int shift = 0, all = 0;
  while ((old_end - 1) >> shift >= SampleScratch::kBins) ++shift;
  int* end = scratch.sorted.end;
  clear_bins<kBlock>(end);
  ptx::sync_block();
#pragma unroll 4
  for (int i = threadIdx.x; i < count; i += kBlock) ptx::atomic_add(&end[scratch.chosen[i].token >> shift], 1);
  ptx::sync_block();
  int* bins = end + threadIdx.x * kThreadBins<kBlock>;
  uint32_t before = sum_before(sum_of_bins<kBlock>(bins), warp_sum, all);
#pragma unroll
  for (int i = 0; i < kThreadBins<kBlock>; i += 4) {
    const uint4 four = ptx::load_16(bins + i);
    const uint32_t second = before + four.x, third = second + four.y, fourth = third + four.z;
    ptx::store_16(bins + i, {before, second, third, fourth});
    before = fourth + four.w;
  }
  ptx::sync_block();
#pragma unroll 4
  for (int i = threadIdx.x; i < count; i += kBlock) {
    const Candidate c = scratch.chosen[i];
    scratch.sorted.token[ptx::atomic_add(&end[c.token >> shift], 1)] = c;
  }
  ptx::sync_block();
#pragma unroll 2
  for (int i = threadIdx.x; i < count; i += kBlock) {
    const Candidate c = scratch.sorted.token[i];
    const int bin = c.token >> shift;
    int place = bin > 0 ? end[bin - 1] : 0;
    for (int other = place; other < end[bin]; ++other) place += scratch.sorted.token[other].token < c.token;
    anchors[place] = c.token, weights[place] = fmaxf(ptx::ex2(raise - c.lead) - 1.f, 0.f);
  }
}

// Writes the anchors of a new entry, `places` each: none, if no sample was drawn, or more candidates than there is
// room for. The whole block of kBlock threads takes part.
template <int kBlock>
MAC_DEVICE void write_sample(const Drawn& drawn, int places, SampleScratch& scratch, int32_t* anchors,
                             float* weights) {
  const int size = sample_size(places, drawn.old_end);
  float raise = 0.f;
  int chosen = 0;
  if (drawn.count > 0 && drawn.count <= kCandidateRoom * size) {
    chosen = choose_sample<kBlock>(drawn, size, scratch, raise);
    write_in_order<kBlock>(scratch, chosen, drawn.old_end, raise, anchors, weights);
  }
#pragma unroll 1
  for (int i = chosen + static_cast<int>(threadIdx.x); i < places; i += kBlock) {
    anchors[i] = kNoAnchor, weights[i] = 0.f;
  }
}

}  // namespace mac_attn::cuda
