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
#include "ptx/async_copy.h"
#include "ptx/barrier.h"
#include "ptx/memory.h"
#include "ptx/warp.h"
#include "schedule.cuh"
#include "stage.cuh"

namespace mac_attn::cuda {

constexpr int kBins = 255;
constexpr uint32_t kNoBin = 255;
constexpr float kBinsPerLog2 = 8.f;
// Below this share of the old sum, what the subtraction leaves is its own rounding error.
constexpr float kRoundingOfSums = 4.8e-7f;

struct PieceRange {
  int begin, end;
};

// Areas of shared memory, each of a stage's size.
struct Scratch {
  unsigned char* base;
  int stride;  // bytes from one to the next
  MAC_DEVICE void* area(int i) const { return base + i * stride; }
};

// What a finished KV head's anchors are chosen with: all stages are free then, and these areas of them.
constexpr int kBinArea = 0;    // two: bins of the strips, where they fit
constexpr int kQueueArea = 2;  // from here on: what is on its way to sort_strips
constexpr int kTokenBinArea = 0, kWeightArea = 0, kSumArea = 1;
constexpr int kValueArea = 2;     // two: V rows of a block of anchors
constexpr int kMaxArea = 4;       // up to four: what the weights of the chosen strips are relative to
constexpr int kQueue = 16;        // reads of a thread on their way
constexpr int kAnchorBlock = 64;  // whose V rows are there at a time
constexpr int kTakenHeads = 4;    // whose sums they are taken out of at a time

template <int kHeadDim>
constexpr bool anchors_fit() {
  constexpr int kArea = Stage<kHeadDim>::kBytes, kAreas = kWarps * Stage<kHeadDim>::kCount;
  return kQueueArea * kArea + kQueue * kThreads * 16 <= kAreas * kArea &&  // the queue
         kMaxAnchors * kWarpTokens <= kArea && kAnchorBlock * kTakenHeads * 4 <= kArea &&
         kWarps * kTakenHeads * kHeadDim * 4 <= kArea && kAnchorBlock * kHeadDim * 2 <= 2 * kArea &&
         kMaxArea + 4 <= kAreas && kMaxAnchors * kMaxTileHeads * 4 <= 4 * kArea;
}

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
  int place[kMaxAnchors], token[kMaxAnchors];
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

// The heaviest token and head's weight of every strip as a bin: counted, and kept for the choice. One CTA alone has
// to read them all, so every thread has kQueue reads on their way.
MAC_DEVICE void sort_strips(const AmendParams& p, const AmendWorkspace& w, int group, int num_strips, uint8_t* bins,
                            void* queue, AnchorChoice& choice) {
  const int row = strip_row(p.shape.group_size);
  const float* logits = w.strip_logit + static_cast<int64_t>(group) * w.max_strips * row;
  float* mine = static_cast<float*>(queue) + threadIdx.x * 4;
  const int reads = (num_strips + kThreads - 1) / kThreads * (row / 4);
  int asked = 0, asked_strip = threadIdx.x, asked_head = 0;
  const auto ask = [&] {
    const bool valid = asked_strip < num_strips;
    ptx::cp_async_16(mine + asked % kQueue * kThreads * 4,
                     logits + (valid ? static_cast<int64_t>(asked_strip) * row + asked_head : 0), valid);
    ptx::cp_async_commit();
    ++asked, asked_head += 4;
    if (asked_head == row) asked_head = 0, asked_strip += kThreads;
  };
#pragma unroll 1
  for (int i = 0; i < kQueue; ++i) ask();
  float weight = -INFINITY;
#pragma unroll 1
  for (int i = 0, strip = threadIdx.x, head = 0; i < reads; ++i) {
    ptx::cp_async_wait<kQueue - 1>();  // a thread reads what it has asked for itself
    const float4 x = ptx::load_float4(mine + i % kQueue * kThreads * 4);
    const float* lse = choice.lse + head;
    weight = fmaxf(fmaxf(weight, fmaxf(x.x - lse[0], x.y - lse[1])), fmaxf(x.z - lse[2], x.w - lse[3]));
    ask();
    head += 4;
    if (head < row) continue;
    if (strip < num_strips) {
      const uint32_t bin = bin_of_weight(weight);
      count_bin(bin, choice);
      bins[strip] = static_cast<uint8_t>(bin);
    }
    weight = -INFINITY, head = 0, strip += kThreads;
  }
  ptx::cp_async_wait<0>();
  // They are read 16 at a time: fill up the last 16.
  const int tail = num_strips + threadIdx.x;
  if (tail < (num_strips + 15) / 16 * 16) bins[tail] = kNoBin;
}

// Where heads `head` (even) and `head` + 1 have the weights of a token of a strip.
MAC_DEVICE const uint16_t* weights_of(const AmendParams& p, const AmendWorkspace& w, int group, int strip,
                                      int token, int head) {
  const int64_t row = static_cast<int64_t>(group) * w.max_strips + strip;
  const int G = p.shape.group_size;
  return w.token_weight + row * kWarpTokens * weight_row(G) + weight_place(G, token, head);
}

// The same of the tokens of the chosen strips, one after the other, by their weights in the sums. Leaves in `max`,
// [strips, kMaxTileHeads], what those are relative to.
template <typename T>
MAC_DEVICE void sort_tokens(const AmendParams& p, const AmendWorkspace& w, int group, int num_strips, uint8_t* bins,
                            float* max, AnchorChoice& choice) {
  const int G = p.shape.group_size, row = strip_row(G), head = threadIdx.x % kMaxTileHeads;
  const float* strip_max = w.strip_max + static_cast<int64_t>(group) * w.max_strips * row;
#pragma unroll 4
  for (int i = threadIdx.x / kMaxTileHeads; i < num_strips; i += kThreads / kMaxTileHeads) {
    if (head < G) max[i * kMaxTileHeads + head] = strip_max[int64_t{choice.strip[i]} * row + head];
  }
  ptx::sync_block();
  // Two tokens that are eight apart at a time: their weights lie side by side.
#pragma unroll 1
  for (int i = threadIdx.x; i < num_strips * 8; i += kThreads) {
    const int place = i / 8, token = i % 8;
    float weight[2] = {-INFINITY, -INFINITY};
#pragma unroll 4
    for (int g = 0; g < G; g += 2) {
      const uint2 pairs = ptx::load_8(weights_of(p, w, group, choice.strip[place], token, g));
      const float* high = max + place * kMaxTileHeads + g;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float2 pair = ptx::unpack2<T>(half ? pairs.y : pairs.x);
        weight[half] = fmaxf(weight[half], ptx::lg2(pair.x) + high[0] - choice.lse[g]);
        if (g + 1 < G) weight[half] = fmaxf(weight[half], ptx::lg2(pair.y) + high[1] - choice.lse[g + 1]);
      }
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint32_t bin = bin_of_weight(weight[half]);
      count_bin(bin, choice);
      bins[place * kWarpTokens + token + 8 * half] = static_cast<uint8_t>(bin);
    }
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

// Writes the anchors to `choice.token`, ascending, and where they are among the tokens of the chosen strips to
// `choice.place`; returns how many. The whole block takes part.
template <typename T>
MAC_DEVICE int choose_anchors(const AmendParams& p, const AmendWorkspace& w, int group, int num_strips,
                              const Scratch& scratch, AnchorChoice& choice) {
#pragma unroll 1
  for (int g = threadIdx.x; g < strip_row(p.shape.group_size); g += kThreads) {
    const float old = log2_total(choice.max[kOld][g], choice.sum[kOld][g]);
    const float fresh = log2_total(choice.max[kFresh][g], choice.sum[kFresh][g]);
    const float high = finite_or_zero(fmaxf(old, fresh));
    const float lse = high + ptx::lg2(ptx::ex2(old - high) + ptx::ex2(fresh - high));
    choice.lse[g] = g < p.shape.group_size ? lse : INFINITY;
  }
  clear_bins(choice);
  uint8_t* bins = w.strip_bin + static_cast<int64_t>(group) * w.max_strips;
  if (num_strips <= 2 * scratch.stride) bins = static_cast<uint8_t*>(scratch.area(kBinArea));
  sort_strips(p, w, group, num_strips, bins, scratch.area(kQueueArea), choice);
  const int strips = choose_lowest(bins, num_strips, p.num_anchors, choice.strip, choice);

  bins = static_cast<uint8_t*>(scratch.area(kTokenBinArea));  // [strips, 16]
  clear_bins(choice);
  sort_tokens<T>(p, w, group, strips, bins, static_cast<float*>(scratch.area(kMaxArea)), choice);
  const int count = choose_lowest(bins, strips * kWarpTokens, p.num_anchors, choice.place, choice);
#pragma unroll 1
  for (int i = threadIdx.x; i < count; i += kThreads) {
    const int place = choice.place[i];
    choice.token[i] = choice.strip[place / kWarpTokens] * kWarpTokens + place % kWarpTokens;
  }
  ptx::sync_block();
  return count;
}

// The weight that an anchor has in the sums of head `g`, relative to the old span's maximum.
template <typename T>
MAC_DEVICE float anchor_weight(const AmendParams& p, const AmendWorkspace& w, int group, int g, int anchor,
                               const float* max, const AnchorChoice& choice) {
  const int place = choice.place[anchor], strip = place / kWarpTokens;
  const uint16_t* pair = weights_of(p, w, group, choice.strip[strip], place % kWarpTokens, g / 2 * 2);
  const float2 weight = ptx::unpack2<T>(ptx::load_4(pair));
  const float lead = max[strip * kMaxTileHeads + g] - finite_or_zero(choice.max[kOld][g]);
  return (g % 2 == 0 ? weight.x : weight.y) * ptx::ex2(lead);
}

// Moves the chosen tokens from the old state to the fresh one, four heads at a time: as many lanes as a V row
// has 16-byte pieces sum up some of the anchors, then all of them are added.
template <typename T, int kHeadDim>
MAC_DEVICE void take_out_anchors(const AmendParams& p, const AmendWorkspace& w, int request, int kv_head, int count,
                                 int old_tokens, const Scratch& scratch, AnchorChoice& choice) {
  static_assert(anchors_fit<kHeadDim>(), "the areas");
  constexpr int kPieces = kHeadDim / 8, kLanes = kPieces <= 8 ? 8 : kPieces <= 16 ? 16 : 32;
  constexpr int kSharers = kThreads / kLanes, kBlock = kAnchorBlock, kHeads = kTakenHeads;
  constexpr int kEach = (kHeads * kHeadDim + kThreads - 1) / kThreads;  // results of a thread
  const int G = p.shape.group_size, group = request * p.shape.num_kv_heads + kv_head;
  const int64_t spans = static_cast<int64_t>(p.shape.batch) * p.shape.num_qo_heads();
  const int piece = threadIdx.x % kLanes, sharer = threadIdx.x / kLanes, warp = threadIdx.x / 32;
  const T* values = static_cast<const T*>(p.kv.v) + kv_head * p.kv.v_head_stride;
  float* weights = static_cast<float*>(scratch.area(kWeightArea));  // [kBlock, kHeads]
  float* sums = static_cast<float*>(scratch.area(kSumArea));        // [kWarps, kHeads, D]
  T* rows = static_cast<T*>(scratch.area(kValueArea));              // [kBlock, D]
  const float* max = static_cast<const float*>(scratch.area(kMaxArea));

  const int32_t* pages = p.kv.block_table + request * p.kv.block_table_stride;
#pragma unroll 1
  for (int i = threadIdx.x; i < count; i += kThreads) {
    const int token = choice.token[i], page = w.page_size.divide(token);
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
      for (int i = threadIdx.x; (head == 0 || count > kBlock) && i < kBlock * kPieces; i += kThreads) {
        const bool valid = first + i / kPieces < count;
        ptx::cp_async_16(rows + i * 8, values + (valid ? choice.row[first + i / kPieces] : 0) + i % kPieces * 8,
                         valid);
      }
      ptx::cp_async_commit();
#pragma unroll 2
      for (int i = threadIdx.x; i < kBlock * kHeads; i += kThreads) {
        const int a = first + i / kHeads, g = head + i % kHeads;
        weights[i] = a < count && g < G ? anchor_weight<T>(p, w, group, g, a, max, choice) : 0.f;
      }
      ptx::cp_async_wait<0>();
      ptx::sync_block();
#pragma unroll 1
      for (int a = sharer; a < kBlock && first + a < count && piece < kPieces; a += kSharers) {
        const uint4 data = ptx::load_16(rows + a * kHeadDim + piece * 8);
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
    // Asked for before they are needed: nobody else is on the way to memory.
    float old_out[kEach], fresh_out[kEach];
#pragma unroll
    for (int j = 0; j < kEach; ++j) {
      const int i = threadIdx.x + j * kThreads, g = head + i / kHeadDim;
      const float* state = p.out + (static_cast<int64_t>(group) * G + g) * kHeadDim + i % kHeadDim;
      const bool there = i < kHeads * kHeadDim && g < G;
      old_out[j] = there ? state[0] : 0.f, fresh_out[j] = there ? state[spans * kHeadDim] : 0.f;
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
#pragma unroll
    for (int j = 0; j < kEach; ++j) {
      const int i = threadIdx.x + j * kThreads, h = i / kHeadDim, d = i % kHeadDim, g = head + h;
      if (i >= kHeads * kHeadDim || g >= G) break;
      float anchor_out = 0.f, anchor_sum = 0.f;
      for (int k = 0; k < kWarps; ++k) {
        anchor_out += sums[(k * kHeads + h) * kHeadDim + d];
        anchor_sum += choice.weight[k][h];
      }
      const float old_max = finite_or_zero(choice.max[kOld][g]), old_sum = choice.sum[kOld][g];
      const float fresh_max = choice.max[kFresh][g], max = fmaxf(fresh_max, old_max);
      const float anchor_scale = ptx::ex2(old_max - max);
      const float rest = old_sum - anchor_sum;
      const bool empty = count == old_tokens || rest <= old_sum * kRoundingOfSums;
      const float fresh_sum = choice.sum[kFresh][g] * ptx::ex2(fresh_max - max);
      const float new_sum = fresh_sum + anchor_sum * anchor_scale;
      const int64_t row = static_cast<int64_t>(group) * G + g;
      p.out[row * kHeadDim + d] = empty ? 0.f : (old_out[j] * old_sum - anchor_out) / rest;
      p.out[(spans + row) * kHeadDim + d] =
          new_sum == 0.f ? 0.f : (fresh_out[j] * fresh_sum + anchor_out * anchor_scale) / new_sum;
      if (d == 0) {
        p.lse[row] = log2_total(old_max, empty ? 0.f : rest) * kLn2;
        p.lse[spans + row] = log2_total(max, new_sum) * kLn2;
      }
    }
  }
}

}  // namespace mac_attn::cuda
