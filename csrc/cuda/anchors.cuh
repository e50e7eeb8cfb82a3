// The anchors of a new entry, chosen and taken out of the old state by the CTA that finishes a KV head.
//
// The S heaviest old tokens are taken, by softmax weight, maximum over the heads of the group, up to the width of a
// histogram bin (1/8 log2); in one bin the earlier tokens. They lie in the S strips of 16 tokens whose heaviest
// tokens are the heaviest, so the strips are sorted first, by logits, and then the tokens of those, by weights.
// They leave the old state by subtraction of just what was added for them (the weight as the MMA had it, rounded)
// and join the fresh one. Traffic: G logits of every strip; of each of S strips 16 G weights; one V row of every
// anchor.
#pragma once

#include "log2.cuh"
#include "ptx/barrier.h"
#include "ptx/memory.h"
#include "ptx/warp.h"
#include "schedule.cuh"

namespace mac_attn::cuda {

constexpr int kBins = 255;
constexpr uint32_t kNoBin = 255;
constexpr float kBinsPerLog2 = 8.f;
// Below this share of the old sum, what the subtraction leaves is its own rounding error.
constexpr float kRoundingOfSums = 4.8e-7f;

struct PieceRange {
  int begin, end;
};

// Dynamic shared memory that is free while a KV head is finished: an area of a stage's size in every warp's part.
struct Scratch {
  unsigned char* base;
  int stride;
  MAC_DEVICE float* area(int i) const { return reinterpret_cast<float*>(base + i * stride); }
};

// The merged sums of a pass, per query head, and the choice of a KV head's anchors; in shared memory.
struct AnchorChoice {
  PieceRange pieces[kNumSpans];
  float max[kNumSpans][kMaxTileHeads];
  float sum[kNumSpans][kMaxTileHeads];
  float lse[kMaxTileHeads];  // log2, over all tokens
  int bin[kBins + 1];
  int warp_sum[kWarps];
  int cutoff, room;        // bins below `cutoff` fit, and `room` of that bin
  int strip[kMaxAnchors];  // the chosen ones, ascending
  int token[kMaxAnchors];
  int64_t row[kMaxAnchors];  // where their values begin
  float weight[kWarps][4];
};

// A weight, log2, as a bin: the heavier the lower.
MAC_DEVICE uint32_t bin_of_weight(float weight) {
  if (!(weight > -INFINITY)) return kNoBin;  // NaN too
  const float place = -weight * kBinsPerLog2;
  return place < 0.f ? 0 : place < kBins - 1 ? static_cast<uint32_t>(place) : kBins - 1;
}

MAC_DEVICE void count_bin(uint32_t bin, AnchorChoice& choice) {
  if (bin != kNoBin) ptx::atomic_add(&choice.bin[bin], 1);
}

// The whole block takes part.
MAC_DEVICE void clear_bins(AnchorChoice& choice) {
#pragma unroll 1
  for (int i = threadIdx.x; i <= kBins; i += kThreads) choice.bin[i] = 0;
  if (threadIdx.x == 0) choice.cutoff = kNoBin, choice.room = 0;
  ptx::sync_block();
}

// The heaviest token and head's weight of every strip as a bin: counted, and kept for the choice. A thread looks at
// four strips in each of four blocks at a time: one CTA alone has few loads in flight.
MAC_DEVICE void sort_strips(const AmendParams& p, const AmendWorkspace& w, int group, int num_strips,
                            AnchorChoice& choice) {
  constexpr int kBlocks = 4, kBlock = kThreads * 4;
  const int G = p.shape.group_size;
  const int64_t base = static_cast<int64_t>(group) * w.max_strips;
  float* logits = w.strip_logit + base * G;
  // They are read four at a time: fill up the last four.
#pragma unroll 1
  for (int i = threadIdx.x; i < 4 * G; i += kThreads) {
    const int strip = num_strips / 4 * 4 + i % 4;
    if (strip >= num_strips && num_strips % 4 != 0) logits[int64_t{i / 4} * w.max_strips + strip] = -INFINITY;
  }
  ptx::sync_block();
#pragma unroll 1
  for (int first = threadIdx.x * 4; first < num_strips; first += kBlocks * kBlock) {
    float weight[kBlocks][4];
#pragma unroll
    for (int b = 0; b < kBlocks; ++b) {
      for (int i = 0; i < 4; ++i) weight[b][i] = -INFINITY;
    }
#pragma unroll 2
    for (int g = 0; g < G; ++g) {
      const float* head = logits + static_cast<int64_t>(g) * w.max_strips + first;
      const float lse = choice.lse[g];
#pragma unroll
      for (int b = 0; b < kBlocks; ++b) {
        float4 x{-INFINITY, -INFINITY, -INFINITY, -INFINITY};
        if (first + b * kBlock < num_strips) x = ptx::load_float4(head + b * kBlock);
        weight[b][0] = fmaxf(weight[b][0], x.x - lse), weight[b][1] = fmaxf(weight[b][1], x.y - lse);
        weight[b][2] = fmaxf(weight[b][2], x.z - lse), weight[b][3] = fmaxf(weight[b][3], x.w - lse);
      }
    }
#pragma unroll
    for (int b = 0; b < kBlocks; ++b) {
      if (first + b * kBlock >= num_strips) break;
      uint32_t bins = 0;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const uint32_t bin = bin_of_weight(weight[b][i]);
        count_bin(bin, choice);
        bins |= bin << (8 * i);
      }
      ptx::store_4(w.strip_bin + base + first + b * kBlock, bins);
    }
  }
  // They are read 16 at a time: fill up the last 16.
  const int tail = (num_strips + 3) / 4 * 4 + threadIdx.x * 4;
  if (tail < (num_strips + 15) / 16 * 16) ptx::store_4(w.strip_bin + base + tail, ~0u);
}

// Where a token's weights are, of all heads.
MAC_DEVICE const uint16_t* weights_of(const AmendParams& p, const AmendWorkspace& w, int group, int token) {
  const int64_t first = static_cast<int64_t>(group) * w.max_strips * kWarpTokens;
  return w.token_weight + (first + token) * weight_row(p.shape.group_size);
}

// The same of the tokens of the chosen strips, one after the other, by their weights in the sums.
template <typename T>
MAC_DEVICE void sort_tokens(const AmendParams& p, const AmendWorkspace& w, int group, int num_strips, uint8_t* bins,
                            AnchorChoice& choice) {
  const int G = p.shape.group_size;
  const float* max = w.strip_max + static_cast<int64_t>(group) * w.max_strips * G;
#pragma unroll 1
  for (int i = threadIdx.x; i < num_strips * kWarpTokens; i += kThreads) {
    const int strip = choice.strip[i / kWarpTokens];
    const uint16_t* weights = weights_of(p, w, group, strip * kWarpTokens + i % kWarpTokens);
    float weight = -INFINITY;
#pragma unroll 4
    for (int g = 0; g < G; g += 2) {
      const float2 pair = ptx::unpack2<T>(ptx::load_4(weights + g));
      const float* high = max + static_cast<int64_t>(g) * w.max_strips + strip;
      weight = fmaxf(weight, ptx::lg2(pair.x) + high[0] - choice.lse[g]);
      if (g + 1 < G) weight = fmaxf(weight, ptx::lg2(pair.y) + high[w.max_strips] - choice.lse[g + 1]);
    }
    const uint32_t bin = bin_of_weight(weight);
    count_bin(bin, choice);
    bins[i] = static_cast<uint8_t>(bin);
  }
}

// Writes which of `count` bins are the lowest `wanted`, ascending, to `chosen`; returns how many. The bins are
// counted already; the whole block takes part.
MAC_DEVICE int choose_lowest(const uint8_t* bins, int count, int wanted, int* chosen, AnchorChoice& choice) {
  static_assert(2 * kThreads == kBins + 1, "two bins a thread");
  ptx::sync_block();
  int all = 0;
  const int bin = 2 * threadIdx.x, count0 = choice.bin[bin], count1 = choice.bin[bin + 1];
  const int before = sum_before(count0 + count1, choice.warp_sum, all), between = before + count0;
  if (before <= wanted && between > wanted) {
    choice.cutoff = bin, choice.room = wanted - before;
  } else if (between <= wanted && between + count1 > wanted) {
    choice.cutoff = bin + 1, choice.room = wanted - between;
  }
  ptx::sync_block();

  // In order of position, so that the choice does not depend on timing; 16 a thread at a time.
  const uint32_t cutoff = choice.cutoff;
  const int room = choice.room;
  int taken = 0, edge = 0;  // so far: bins below the cutoff, and the bin at it
#pragma unroll 1
  for (int chunk = 0; chunk < count; chunk += kThreads * 16) {
    const int first = chunk + threadIdx.x * 16;
    uint4 words{~0u, ~0u, ~0u, ~0u};
    if (first < count) words = ptx::load_16(bins + first);
    const auto bin_at = [&](int i) {
      const uint32_t word = i < 8 ? (i < 4 ? words.x : words.y) : (i < 12 ? words.z : words.w);
      return first + i < count ? word >> (i % 4 * 8) & 255u : kNoBin;
    };
    int mine = 0;
#pragma unroll 1
    for (int i = 0; i < 16; ++i) mine += (bin_at(i) < cutoff) + ((bin_at(i) == cutoff) << 16);
    const int upto = sum_before(mine, choice.warp_sum, all);
    int t = taken + (upto & 0xffff), e = edge + (upto >> 16);
#pragma unroll 1
    for (int i = 0; i < 16 && mine; ++i) {
      const uint32_t b = bin_at(i);
      if (b < cutoff) {
        chosen[t + (e < room ? e : room)] = first + i;
        ++t;
      } else if (b == cutoff) {
        if (e < room) chosen[t + e] = first + i;
        ++e;
      }
    }
    taken += all & 0xffff, edge += all >> 16;
  }
  ptx::sync_block();
  return taken + (edge < room ? edge : room);
}

// Writes the anchors to `choice.token`, ascending; returns how many. The whole block takes part.
template <typename T>
MAC_DEVICE int choose_anchors(const AmendParams& p, const AmendWorkspace& w, int group, int num_strips,
                              const Scratch& scratch, AnchorChoice& choice) {
#pragma unroll 1
  for (int g = threadIdx.x; g < p.shape.group_size; g += kThreads) {
    const float old = log2_total(choice.max[kOld][g], choice.sum[kOld][g]);
    const float fresh = log2_total(choice.max[kFresh][g], choice.sum[kFresh][g]);
    const float high = finite_or_zero(fmaxf(old, fresh));
    choice.lse[g] = high + ptx::lg2(ptx::ex2(old - high) + ptx::ex2(fresh - high));
  }
  clear_bins(choice);
  sort_strips(p, w, group, num_strips, choice);
  const uint8_t* strip_bins = w.strip_bin + static_cast<int64_t>(group) * w.max_strips;
  const int strips = choose_lowest(strip_bins, num_strips, p.num_anchors, choice.strip, choice);

  uint8_t* token_bins = reinterpret_cast<uint8_t*>(scratch.area(0));  // [strips, 16]
  clear_bins(choice);
  sort_tokens<T>(p, w, group, strips, token_bins, choice);
  const int count = choose_lowest(token_bins, strips * kWarpTokens, p.num_anchors, choice.token, choice);
#pragma unroll 1
  for (int i = threadIdx.x; i < count; i += kThreads) {
    const int place = choice.token[i];
    choice.token[i] = choice.strip[place / kWarpTokens] * kWarpTokens + place % kWarpTokens;
  }
  ptx::sync_block();
  return count;
}

// The weight that a token has in the sums of head `g`, relative to the old span's maximum.
template <typename T>
MAC_DEVICE float anchor_weight(const AmendParams& p, const AmendWorkspace& w, int group, int g, int token,
                               float old_max) {
  const int64_t row = static_cast<int64_t>(group) * p.shape.group_size + g;
  const float max = w.strip_max[row * w.max_strips + token / kWarpTokens];
  const uint32_t pair = ptx::load_4(weights_of(p, w, group, token) + g / 2 * 2);
  const float2 weight = ptx::unpack2<T>(pair);
  return (g % 2 == 0 ? weight.x : weight.y) * ptx::ex2(max - finite_or_zero(old_max));
}

// Moves the chosen tokens from the old state to the fresh one, four heads at a time: as many lanes as a V row
// has 16-byte pieces sum up some of the anchors, then all of them are added.
template <typename T, int kHeadDim>
MAC_DEVICE void take_out_anchors(const AmendParams& p, const AmendWorkspace& w, int request, int kv_head, int count,
                                 int old_tokens, const Scratch& scratch, AnchorChoice& choice) {
  constexpr int kPieces = kHeadDim / 8, kLanes = kPieces <= 8 ? 8 : kPieces <= 16 ? 16 : 32;
  constexpr int kSharers = kThreads / kLanes, kBlock = 64, kHeads = 4;
  const int G = p.shape.group_size, group = request * p.shape.num_kv_heads + kv_head;
  const int64_t spans = static_cast<int64_t>(p.shape.batch) * p.shape.num_qo_heads();
  const int piece = threadIdx.x % kLanes, sharer = threadIdx.x / kLanes, warp = threadIdx.x / 32;
  const T* values = static_cast<const T*>(p.kv.v) + kv_head * p.kv.v_head_stride;
  float* weights = scratch.area(0);  // [kBlock, kHeads]
  float* sums = scratch.area(1);     // [kWarps, kHeads, D]

  const int32_t* pages = p.kv.block_table + request * p.kv.block_table_stride;
#pragma unroll 1
  for (int i = threadIdx.x; i < count; i += kThreads) {
    const int token = choice.token[i], page = token / p.kv.page_size;
    choice.row[i] = static_cast<int64_t>(pages[page]) * p.kv.v_page_stride +
                    (token - page * p.kv.page_size) * p.kv.v_token_stride;
  }
#pragma unroll 1
  for (int head = 0; head < G; head += kHeads) {
    float out[kHeads][8] = {}, weight[kHeads] = {};
#pragma unroll 1
    for (int first = 0; first < count; first += kBlock) {
      ptx::sync_block();
#pragma unroll 1
      for (int i = threadIdx.x; i < kBlock * kHeads; i += kThreads) {
        const int a = first + i / kHeads, g = head + i % kHeads;
        weights[i] =
            a < count && g < G ? anchor_weight<T>(p, w, group, g, choice.token[a], choice.max[kOld][g]) : 0.f;
      }
      ptx::sync_block();
#pragma unroll 4
      for (int a = sharer; a < kBlock; a += kSharers) {
        if (first + a >= count || piece >= kPieces) continue;
        const uint4 data = ptx::load_16(values + choice.row[first + a] + piece * 8);
        const uint32_t words[4] = {data.x, data.y, data.z, data.w};
        for (int h = 0; h < kHeads; ++h) {
          const float x = weights[a * kHeads + h];
          weight[h] += x;
          for (int i = 0; i < 4; ++i) {
            const float2 v = ptx::unpack2<T>(words[i]);
            out[h][2 * i] += x * v.x, out[h][2 * i + 1] += x * v.y;
          }
        }
      }
    }
    for (int h = 0; h < kHeads; ++h) {
      for (int distance = kLanes; distance < 32; distance *= 2) {
        weight[h] += ptx::shfl_xor(weight[h], distance);
        for (int i = 0; i < 8; ++i) out[h][i] += ptx::shfl_xor(out[h][i], distance);
      }
      if (ptx::lane_id() >= kPieces) continue;
      if (piece == 0) choice.weight[warp][h] = weight[h];
      for (int i = 0; i < 8; ++i) sums[(warp * kHeads + h) * kHeadDim + piece * 8 + i] = out[h][i];
    }
    ptx::sync_block();
#pragma unroll 1
    for (int i = threadIdx.x; i < kHeads * kHeadDim; i += kThreads) {
      const int h = i / kHeadDim, d = i % kHeadDim, g = head + h;
      if (g >= G) break;
      float anchor_out = 0.f, anchor_sum = 0.f;
      for (int j = 0; j < kWarps; ++j) {
        anchor_out += sums[(j * kHeads + h) * kHeadDim + d];
        anchor_sum += choice.weight[j][h];
      }
      const float old_max = finite_or_zero(choice.max[kOld][g]), old_sum = choice.sum[kOld][g];
      const float fresh_max = choice.max[kFresh][g], max = fmaxf(fresh_max, old_max);
      const float anchor_scale = ptx::ex2(old_max - max);
      const float rest = old_sum - anchor_sum;
      const bool empty = count == old_tokens || rest <= old_sum * kRoundingOfSums;
      const float fresh_sum = choice.sum[kFresh][g] * ptx::ex2(fresh_max - max);
      const float new_sum = fresh_sum + anchor_sum * anchor_scale;
      const int64_t row = static_cast<int64_t>(group) * G + g;
      float* old_out = p.out + row * kHeadDim + d;
      float* fresh_out = p.out + (spans + row) * kHeadDim + d;
      *old_out = empty ? 0.f : (*old_out * old_sum - anchor_out) / rest;
      *fresh_out = new_sum == 0.f ? 0.f : (*fresh_out * fresh_sum + anchor_out * anchor_scale) / new_sum;
      if (d == 0) {
        p.lse[row] = log2_total(old_max, empty ? 0.f : rest) * kLn2;
        p.lse[spans + row] = log2_total(max, new_sum) * kLn2;
      }
    }
  }
}

}  // namespace mac_attn::cuda
