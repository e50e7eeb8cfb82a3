// The end of amend for one KV head: the last CTA that leaves it merges the partial states of all its
// segments and, on a miss, chooses the anchors of the new entry.
//
// Anchors are taken from the candidates (the heaviest of every 16 tokens), the S heaviest by softmax weight,
// maximum over the heads of the group, up to the width of a histogram bin (1/8 log2). They leave the old
// state by subtraction of just what was added for them, the weight as the MMA had it, rounded.
#pragma once

#include "ptx/barrier.h"
#include "ptx/math.h"
#include "ptx/memory.h"
#include "ptx/warp.h"
#include "schedule.cuh"

namespace mac_attn::cuda {

constexpr float kLog2E = 1.44269504f;
constexpr float kLn2 = 0.693147181f;
constexpr int kBins = 256;
constexpr float kBinsPerLog2 = 8.f;
// Below this share of the old sum, what the subtraction leaves is its own rounding error.
constexpr float kRoundingOfSums = 4.8e-7f;

// What a maximum is subtracted as: -inf (no token yet) would make NaN of the -inf it is subtracted from.
MAC_DEVICE float finite_or_zero(float max) {
  return max == -INFINITY ? 0.f : max;
}

// One KV head's merged sums, per query head; in shared memory.
struct Totals {
  float max[kNumSpans][kMaxGroup];
  float sum[kNumSpans][kMaxGroup];
  int anchor[kMaxAnchors];  // places of the chosen candidates
  int bin[kBins];
  int num_anchors;
  int cutoff;
  int room;
};

// The segments of a KV head: consecutive CTAs for each of its passes.
struct Segments {
  int64_t first_tile;  // of the first pass
  int pass_tiles;
  int old_tiles;
  int first_pass;
  Line line;

  MAC_DEVICE int64_t pass_begin(int head_tile) const {
    return first_tile + static_cast<int64_t>(head_tile) * pass_tiles;
  }
  MAC_DEVICE int first_cta(int head_tile) const { return line.cta_of(pass_begin(head_tile)); }
  MAC_DEVICE int last_cta(int head_tile) const { return line.cta_of(pass_begin(head_tile) + pass_tiles - 1); }
  // Whether the CTA's piece has tiles of the span, that is whether it left a partial state.
  MAC_DEVICE bool has(int head_tile, int cta, Span span) const {
    const int64_t begin = pass_begin(head_tile) + (span == kOld ? 0 : old_tiles);
    const int64_t end = pass_begin(head_tile) + (span == kOld ? old_tiles : pass_tiles);
    return begin < end && line.first_tile(cta) < end && line.first_tile(cta + 1) > begin;
  }
  MAC_DEVICE int64_t partial(int head_tile, int cta, Span span) const {
    return (static_cast<int64_t>(cta) + first_pass + head_tile) * kNumSpans + span;
  }
};

// For query head g of the group: max and sum over all segments.
MAC_DEVICE void merge_sums(const AmendWorkspace& w, const Segments& segments, int g, Totals& totals) {
  const int head_tile = g / kMaxTileHeads, head = g % kMaxTileHeads;
  for (int span = 0; span < kNumSpans; ++span) {
    float max = -INFINITY, sum = 0.f;
    for (int cta = segments.first_cta(head_tile); cta <= segments.last_cta(head_tile); ++cta) {
      if (!segments.has(head_tile, cta, static_cast<Span>(span))) continue;
      const int64_t i = segments.partial(head_tile, cta, static_cast<Span>(span)) * w.tile_heads + head;
      const float partial_max = w.partial_max[i], higher = fmaxf(max, partial_max);
      sum = sum * ptx::ex2(max - finite_or_zero(higher)) +
            w.partial_sum[i] * ptx::ex2(partial_max - finite_or_zero(higher));
      max = higher;
    }
    totals.max[span][g] = max;
    totals.sum[span][g] = sum;
  }
}

// Element d of the sum of weight * value of a span, relative to the span's maximum.
MAC_DEVICE float merge_out(const AmendWorkspace& w, const Segments& segments, const Totals& totals, int g, int d,
                           int head_dim, Span span) {
  const int head_tile = g / kMaxTileHeads, head = g % kMaxTileHeads;
  const float max = finite_or_zero(totals.max[span][g]);
  float out = 0.f;
  for (int cta = segments.first_cta(head_tile); cta <= segments.last_cta(head_tile); ++cta) {
    if (!segments.has(head_tile, cta, span)) continue;
    const int64_t i = segments.partial(head_tile, cta, span) * w.tile_heads + head;
    out += w.partial_out[i * head_dim + d] * ptx::ex2(w.partial_max[i] - max);
  }
  return out;
}

MAC_DEVICE float log2_total(float max, float sum) {
  return sum == 0.f ? -INFINITY : max + ptx::lg2(sum);
}

// Marks the heaviest candidates: `totals.anchor`, ascending. The whole block takes part.
MAC_DEVICE void choose_anchors(const AmendParams& p, const AmendWorkspace& w, int group, int num_candidates,
                               Totals& totals) {
  const int G = p.shape.group_size, lane = ptx::lane_id(), warp = threadIdx.x / 32;
  const int64_t base = static_cast<int64_t>(group) * w.max_candidates;
  // The heaviest head's log2 weight below 1 as a bin, or -1 for no candidate.
  auto bin_of = [&](int i) {
    if (i >= num_candidates || w.candidate[base + i] == kNoAnchor) return -1;
    float weight = -INFINITY;
    for (int g = 0; g < G; ++g) {
      const float old = log2_total(totals.max[kOld][g], totals.sum[kOld][g]);
      const float fresh = log2_total(totals.max[kFresh][g], totals.sum[kFresh][g]);
      const float high = fmaxf(old, fresh);
      const float total = high + ptx::lg2(ptx::ex2(old - high) + ptx::ex2(fresh - high));
      weight = fmaxf(weight, w.candidate_logit[(base + i) * G + g] - total);
    }
    const float bin = -weight * kBinsPerLog2;
    return bin < 0.f ? 0 : bin < kBins - 1 ? static_cast<int>(bin) : kBins - 1;
  };
  for (int i = threadIdx.x; i < kBins; i += kThreads) totals.bin[i] = 0;
  ptx::sync_block();
  for (int i = threadIdx.x; i < num_candidates; i += kThreads) {
    const int bin = bin_of(i);
    if (bin >= 0) ptx::atomic_add_shared(&totals.bin[bin], 1);
  }
  ptx::sync_block();
  if (threadIdx.x == 0) {
    int count = 0, bin = 0;
    while (bin < kBins && count + totals.bin[bin] <= p.num_anchors) count += totals.bin[bin++];
    totals.cutoff = bin;                  // lighter bins do not fit any more,
    totals.room = p.num_anchors - count;  // and of this one only so many do
    totals.num_anchors = 0;
  }
  ptx::sync_block();
  // One warp collects in order, so that the choice does not depend on timing.
  if (warp == 0) {
    int count = 0, room = totals.room;
    for (int first = 0; first < num_candidates; first += 32) {
      const int bin = bin_of(first + lane);
      const bool at_cutoff = bin == totals.cutoff;
      const uint32_t below = (1u << lane) - 1u;
      const uint32_t edge = ptx::ballot(at_cutoff);
      const bool taken = (bin >= 0 && bin < totals.cutoff) || (at_cutoff && popcount(edge & below) < room);
      const uint32_t all = ptx::ballot(taken);
      if (taken) totals.anchor[count + popcount(all & below)] = first + lane;
      count += popcount(all);
      room -= popcount(edge) < room ? popcount(edge) : room;
    }
    if (lane == 0) totals.num_anchors = count;
  }
  ptx::sync_block();
}

// The weight that a candidate had in the sums, relative to the old span's maximum.
template <typename T>
MAC_DEVICE float candidate_weight(const AmendWorkspace& w, int64_t place, int g, int group_size, float old_max) {
  const float max = w.candidate_max[place * group_size + g];
  const float weight = ptx::ex2(w.candidate_logit[place * group_size + g] - finite_or_zero(max));
  return ptx::unpack2<T>(ptx::pack2<T>(weight, 0.f)).x * ptx::ex2(max - finite_or_zero(old_max));
}

template <typename T>
MAC_DEVICE_NOINLINE void finish_kv_head(const AmendParams& p, const AmendWorkspace& w, const Segments& segments,
                                        int request, int kv_head, const KvHeadWork& work, Totals& totals) {
  const int G = p.shape.group_size, D = p.shape.head_dim, H = p.shape.num_kv_heads;
  const int group = request * H + kv_head;
  const int64_t spans = static_cast<int64_t>(p.shape.batch) * H * G;
  int32_t* anchors = p.anchors + static_cast<int64_t>(group) * p.num_anchors;
  const int n = p.requests.seq_lens[request];
  const bool bad_length = n < 0 || n > w.max_tokens;
  if (bad_length && threadIdx.x == 0) {
    ptx::atomic_or(w.status + request, kBadLength);
    if (w.error_flag) ptx::atomic_or(w.error_flag, kBadLength);
  }
  if (bad_length || w.status[request] != 0) {
    for (int i = threadIdx.x; i < G * D; i += kThreads) {
      p.out[static_cast<int64_t>(group) * G * D + i] = NAN;
      p.out[(spans + static_cast<int64_t>(group) * G) * D + i] = NAN;
    }
    for (int g = threadIdx.x; g < G; g += kThreads) {
      p.lse[static_cast<int64_t>(group) * G + g] = NAN;
      p.lse[spans + static_cast<int64_t>(group) * G + g] = NAN;
    }
    for (int i = threadIdx.x; i < p.num_anchors; i += kThreads) anchors[i] = kNoAnchor;
    return;
  }
  for (int g = threadIdx.x; g < G; g += kThreads) merge_sums(w, segments, g, totals);
  ptx::sync_block();

  const int64_t base = static_cast<int64_t>(group) * w.max_candidates;
  int count = 0;
  if (p.num_anchors > 0 && !work.hit && work.old_end > 0) {
    choose_anchors(p, w, group, (work.old_end + kWarpTokens - 1) / kWarpTokens, totals);
    count = totals.num_anchors;
    // From here on the logit's place holds the weight.
    for (int i = threadIdx.x; i < count * G; i += kThreads) {
      const int64_t place = base + totals.anchor[i / G];
      w.candidate_logit[place * G + i % G] = candidate_weight<T>(w, place, i % G, G, totals.max[kOld][i % G]);
    }
  }
  for (int i = threadIdx.x; i < p.num_anchors; i += kThreads) {
    anchors[i] = work.hit    ? inherited_anchors(p, request, kv_head)[i]
                 : i < count ? w.candidate[base + totals.anchor[i]]
                             : kNoAnchor;
  }
  ptx::sync_block();

  const int32_t* pages = p.kv.block_table + request * p.kv.block_table_stride;
  const T* values = static_cast<const T*>(p.kv.v) + kv_head * p.kv.v_head_stride;
  for (int i = threadIdx.x; i < G * D; i += kThreads) {
    const int g = i / D, d = i % D;
    float old_out = merge_out(w, segments, totals, g, d, D, kOld), old_sum = totals.sum[kOld][g];
    float fresh_out = merge_out(w, segments, totals, g, d, D, kFresh), fresh_sum = totals.sum[kFresh][g];
    float fresh_max = totals.max[kFresh][g];
    if (count > 0) {
      float out = 0.f, sum = 0.f;
      for (int a = 0; a < count; ++a) {
        const int64_t place = base + totals.anchor[a];
        const int token = w.candidate[place], page_index = token / p.kv.page_size;
        const int64_t page = pages[page_index];
        if (page < 0 || page >= w.num_pages) continue;
        const float weight = w.candidate_logit[place * G + g];
        sum += weight;
        out += weight * ptx::to_float(values[page * p.kv.v_page_stride +
                                             (token - page_index * p.kv.page_size) * p.kv.v_token_stride + d]);
      }
      const float rest = old_sum - sum;
      const bool empty = count == work.old_end || rest <= old_sum * kRoundingOfSums;
      old_out = empty ? 0.f : old_out - out;
      old_sum = empty ? 0.f : rest;
      const float anchor_max = finite_or_zero(totals.max[kOld][g]), max = fmaxf(fresh_max, anchor_max);
      const float fresh_weight = ptx::ex2(fresh_max - max), anchor_weight = ptx::ex2(anchor_max - max);
      fresh_out = fresh_out * fresh_weight + out * anchor_weight;
      fresh_sum = fresh_sum * fresh_weight + sum * anchor_weight;
      fresh_max = max;
    }
    const int64_t row = static_cast<int64_t>(group) * G + g;
    p.out[row * D + d] = old_sum == 0.f ? 0.f : old_out / old_sum;
    p.out[(spans + row) * D + d] = fresh_sum == 0.f ? 0.f : fresh_out / fresh_sum;
    if (d == 0) {
      p.lse[row] = log2_total(totals.max[kOld][g], old_sum) * kLn2;
      p.lse[spans + row] = log2_total(fresh_max, fresh_sum) * kLn2;
    }
  }
}

// A CTA has written its last partial state of a KV head; if it is the last one of all, it finishes the head.
template <typename T>
MAC_DEVICE void leave_kv_head(const AmendParams& p, const AmendWorkspace& w, const Line& line,
                              const Cursor& cursor) {
  __shared__ Totals totals;
  __shared__ int is_last;
  const int group = cursor.kv_group(w);
  const int head_tile = cursor.pass % w.head_tiles;
  Segments segments;
  segments.pass_tiles = cursor.work.tiles();
  segments.first_tile = cursor.pass_first_tile - static_cast<int64_t>(head_tile) * segments.pass_tiles;
  segments.old_tiles = cursor.work.old_tiles;
  segments.first_pass = cursor.pass - head_tile;
  segments.line = line;
  // write_partial ended with a barrier: everybody's part is done, and the release below covers it.
  if (threadIdx.x == 0) {
    const int ctas = segments.last_cta(w.head_tiles - 1) - segments.first_cta(0) + 1;
    is_last = ptx::atomic_add_acq_rel(w.done + group, 1) == ctas - 1;
    if (is_last) w.done[group] = 0;  // as the next call wants to find it
  }
  ptx::sync_block();
  if (!is_last) return;
  finish_kv_head<T>(p, w, segments, cursor.request(p, w), cursor.kv_head(p, w), cursor.work, totals);
  ptx::sync_block();  // `is_last` and `totals` are free again
}

}  // namespace mac_attn::cuda
