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

// One KV head's merged sums, per query head, and the choice of its anchors; in shared memory.
struct Totals {
  int cta[kNumSpans][2];  // first and last CTA with a partial state of the span, for the current pass
  float max[kNumSpans][kMaxGroup];
  float sum[kNumSpans][kMaxGroup];
  float lse[kMaxTileHeads];  // log2, over all tokens
  int anchor[kMaxAnchors];   // places of the chosen candidates
  int64_t row[kMaxAnchors];  // where their values begin
  int bin[kBins];
  int taken[kWarps];
  int edge[kWarps];
  int cutoff;
  int room;
};

// The tiles of a KV head on the line: one run of them for each pass.
struct Segments {
  int64_t first_tile;  // of the first pass
  int pass_tiles;
  int old_tiles;
  int first_pass;
  Line line;

  MAC_DEVICE int64_t pass_begin(int head_tile) const {
    return first_tile + static_cast<int64_t>(head_tile) * pass_tiles;
  }
  MAC_DEVICE int first_cta() const { return line.cta_of(first_tile); }
  MAC_DEVICE int last_cta(int head_tiles) const { return line.cta_of(pass_begin(head_tiles) - 1); }
  // The span's tiles follow one another, so the CTAs that left a partial state of it do too.
  MAC_DEVICE int span_cta(int head_tile, Span span, int end) const {
    const int begin = span == kOld ? 0 : old_tiles, count = (span == kOld ? old_tiles : pass_tiles) - begin;
    if (count == 0) return -end;  // first 0, last -1
    return line.cta_of(pass_begin(head_tile) + begin + (end ? count - 1 : 0));
  }
};

// Max and sum of one head over the partial states of a span.
MAC_DEVICE void merge_sums(const AmendWorkspace& w, int pass, int head, Span span, const int (&ctas)[2], float& max,
                           float& sum) {
  max = -INFINITY, sum = 0.f;
  for (int cta = ctas[0]; cta <= ctas[1]; ++cta) {
    const int64_t i = (static_cast<int64_t>(cta + pass) * kNumSpans + span) * w.tile_heads + head;
    const float partial_max = w.partial_max[i], higher = fmaxf(max, partial_max);
    sum = sum * ptx::ex2(max - finite_or_zero(higher)) +
          w.partial_sum[i] * ptx::ex2(partial_max - finite_or_zero(higher));
    max = higher;
  }
}

// Element d of the sum of weight * value of a span, relative to the span's maximum.
MAC_DEVICE float merge_out(const AmendWorkspace& w, int pass, int head, int d, int head_dim, Span span,
                           const int (&ctas)[2], float max) {
  const float base = finite_or_zero(max);
  float out = 0.f;
#pragma unroll 4
  for (int cta = ctas[0]; cta <= ctas[1]; ++cta) {
    const int64_t i = (static_cast<int64_t>(cta + pass) * kNumSpans + span) * w.tile_heads + head;
    out += w.partial_out[i * head_dim + d] * ptx::ex2(w.partial_max[i] - base);
  }
  return out;
}

MAC_DEVICE float log2_total(float max, float sum) {
  return sum == 0.f ? -INFINITY : max + ptx::lg2(sum);
}

// Marks the heaviest candidates: `totals.anchor`, ascending; returns how many. The whole block takes part.
MAC_DEVICE int choose_anchors(const AmendParams& p, const AmendWorkspace& w, int group, int num_candidates,
                              Totals& totals) {
  const int G = p.shape.group_size, lane = ptx::lane_id(), warp = threadIdx.x / 32;
  const int64_t base = static_cast<int64_t>(group) * w.max_candidates;
  // The heaviest head's log2 weight below 1 as a bin, or kBins for no candidate.
  auto bin_of = [&](int i) {
    if (i >= num_candidates || w.candidate[base + i] == kNoAnchor) return kBins;
    float weight = -INFINITY;
    for (int g = 0; g < G; ++g) weight = fmaxf(weight, w.candidate_logit[(base + i) * G + g] - totals.lse[g]);
    const float bin = -weight * kBinsPerLog2;
    return bin < 0.f ? 0 : bin < kBins - 1 ? static_cast<int>(bin) : kBins - 1;
  };
  for (int g = threadIdx.x; g < G; g += kThreads) {
    const float old = log2_total(totals.max[kOld][g], totals.sum[kOld][g]);
    const float fresh = log2_total(totals.max[kFresh][g], totals.sum[kFresh][g]);
    const float high = finite_or_zero(fmaxf(old, fresh));
    totals.lse[g] = high + ptx::lg2(ptx::ex2(old - high) + ptx::ex2(fresh - high));
  }
  for (int i = threadIdx.x; i < kBins; i += kThreads) totals.bin[i] = 0;
  ptx::sync_block();
  for (int i = threadIdx.x; i < num_candidates; i += kThreads) {
    const int bin = bin_of(i);
    if (bin < kBins) ptx::atomic_add_shared(&totals.bin[bin], 1);
  }
  ptx::sync_block();
  if (threadIdx.x == 0) {
    int count = 0, bin = 0;
    while (bin < kBins && count + totals.bin[bin] <= p.num_anchors) count += totals.bin[bin++];
    totals.cutoff = bin;                  // lighter bins do not fit any more,
    totals.room = p.num_anchors - count;  // and of this one only so many do
  }
  ptx::sync_block();
  // In order of position, so that the choice does not depend on timing: each warp has a stretch of the
  // candidates, counts, and then knows where its own begin.
  const int stretch = (num_candidates + 32 * kWarps - 1) / (32 * kWarps) * 32;
  const int begin = warp * stretch, end = begin + stretch < num_candidates ? begin + stretch : num_candidates;
  int taken = 0, edge = 0;
  for (int first = begin; first < end; first += 32) {
    const int bin = bin_of(first + lane < end ? first + lane : num_candidates);
    taken += popcount(ptx::ballot(bin < totals.cutoff));
    edge += popcount(ptx::ballot(bin == totals.cutoff && bin < kBins));
  }
  if (lane == 0) totals.taken[warp] = taken, totals.edge[warp] = edge;
  ptx::sync_block();
  int count = 0, seen = 0, all = 0;  // before this warp; and of all warps
  int all_edges = 0;
  for (int i = 0; i < kWarps; ++i) {
    if (i == warp) {
      seen = all_edges;
      count = all + (all_edges < totals.room ? all_edges : totals.room);
    }
    all += totals.taken[i];
    all_edges += totals.edge[i];
  }
  for (int first = begin; first < end; first += 32) {
    const int bin = bin_of(first + lane < end ? first + lane : num_candidates);
    const uint32_t below = (1u << lane) - 1u;
    const uint32_t at_edge = ptx::ballot(bin == totals.cutoff && bin < kBins);
    const bool fits = seen + popcount(at_edge & below) < totals.room;
    const bool take = bin < totals.cutoff || (bin == totals.cutoff && bin < kBins && fits);
    const uint32_t takers = ptx::ballot(take);
    if (take) totals.anchor[count + popcount(takers & below)] = first + lane;
    count += popcount(takers);
    seen += popcount(at_edge);
  }
  ptx::sync_block();
  return all + (all_edges < totals.room ? all_edges : totals.room);
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
  const auto find_ctas = [&](int head_tile) {
    ptx::sync_block();
    if (threadIdx.x < 2 * kNumSpans) {
      const int span = threadIdx.x / 2, end = threadIdx.x % 2;
      totals.cta[span][end] = segments.span_cta(head_tile, static_cast<Span>(span), end);
    }
    ptx::sync_block();
  };
  for (int tile = 0; tile < w.head_tiles; ++tile) {
    find_ctas(tile);
    const int first = tile * kMaxTileHeads, heads = G - first < w.tile_heads ? G - first : w.tile_heads;
    for (int i = threadIdx.x; i < heads * kNumSpans; i += kThreads) {
      const int span = i % kNumSpans, head = i / kNumSpans;
      merge_sums(w, segments.first_pass + tile, head, static_cast<Span>(span), totals.cta[span],
                 totals.max[span][first + head], totals.sum[span][first + head]);
    }
  }
  ptx::sync_block();

  const int64_t base = static_cast<int64_t>(group) * w.max_candidates;
  int count = 0;
  if (p.num_anchors > 0 && !work.hit && work.old_end > 0) {
    count = choose_anchors(p, w, group, (work.old_end + kWarpTokens - 1) / kWarpTokens, totals);
    const int32_t* pages = p.kv.block_table + request * p.kv.block_table_stride;
    for (int i = threadIdx.x; i < count; i += kThreads) {
      const int token = w.candidate[base + totals.anchor[i]], page = token / p.kv.page_size;
      totals.row[i] = static_cast<int64_t>(pages[page]) * p.kv.v_page_stride +
                      (token - page * p.kv.page_size) * p.kv.v_token_stride;
    }
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

  const T* values = static_cast<const T*>(p.kv.v) + kv_head * p.kv.v_head_stride;
  for (int tile = 0; tile < w.head_tiles; ++tile) {
    if (w.head_tiles > 1) find_ctas(tile);
    const int first = tile * kMaxTileHeads, heads = G - first < w.tile_heads ? G - first : w.tile_heads;
    const int pass = segments.first_pass + tile;
    for (int i = threadIdx.x; i < heads * D; i += kThreads) {
      const int head = i / D, g = first + head, d = i % D;
      float old_out = merge_out(w, pass, head, d, D, kOld, totals.cta[kOld], totals.max[kOld][g]);
      float fresh_out = merge_out(w, pass, head, d, D, kFresh, totals.cta[kFresh], totals.max[kFresh][g]);
      float old_sum = totals.sum[kOld][g], fresh_sum = totals.sum[kFresh][g];
      float fresh_max = totals.max[kFresh][g];
      if (count > 0) {
        float out = 0.f, sum = 0.f;
#pragma unroll 8
        for (int a = 0; a < count; ++a) {
          const float weight = w.candidate_logit[(base + totals.anchor[a]) * G + g];
          sum += weight;
          out += weight * ptx::to_float(values[totals.row[a] + d]);
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
    const int ctas = segments.last_cta(w.head_tiles) - segments.first_cta() + 1;
    is_last = ptx::atomic_add_acq_rel(w.done + group, 1) == ctas - 1;
    if (is_last) w.done[group] = 0;  // as the next call wants to find it
  }
  ptx::sync_block();
  if (!is_last) return;
  finish_kv_head<T>(p, w, segments, cursor.request(p, w), cursor.kv_head(p, w), cursor.work, totals);
  ptx::sync_block();  // `is_last` and `totals` are free again
}

}  // namespace mac_attn::cuda
