// The end of amend for one KV head: the last CTA that leaves it merges the partial states of all its segments
// and, on a miss, chooses the anchors of the new entry (anchors.cuh).
//
// A thread merges four elements of a head at a time, over twelve partial states in flight. Traffic: the partial
// states once, from the L2 cache that they have just been written to.
#pragma once

#include "anchors.cuh"

namespace mac_attn::cuda {

// The tiles of a KV head on the line: one run of them for each pass.
struct Segments {
  int first_tile;  // of the first pass
  int pass_tiles;
  int old_tiles;
  int first_pass;
  Line line;
};

// Which CTAs have a partial state of which span, of the pass over one head tile: the span's tiles follow one
// another, so they do too. Four threads, `end` of 0 to 3, look for the four ends.
MAC_DEVICE void find_ctas(const Segments& segments, int head_tile, int end, CtaRange (&ctas)[kNumSpans]) {
  const bool fresh = end / 2 == kFresh, upper = end % 2;
  const int first = fresh ? segments.old_tiles : 0, last = fresh ? segments.pass_tiles : segments.old_tiles;
  const int tile = segments.first_tile + head_tile * segments.pass_tiles + (upper ? last - 1 : first);
  const int cta = first == last ? 0 : segments.line.cta_of(tile) + upper;
  (upper ? ctas[fresh].end : ctas[fresh].begin) = cta;
}

// Four elements of a head's merged state: sums of weight and of weight * value relative to 2^max.
struct Merged {
  float max, sum;
  float4 out;
};

// Adds a partial state to `merged` whose maximum is at least as great.
MAC_DEVICE void add_partial(Merged& merged, float base, float max, float sum, const float4& out) {
  const float weight = ptx::ex2(max - base);
  merged.sum += sum * weight;
  merged.out.x += out.x * weight, merged.out.y += out.y * weight;
  merged.out.z += out.z * weight, merged.out.w += out.w * weight;
}

// Both spans at once: their partial states are one list, the old span's first, and many of it are in flight.
template <int kHeadDim>
MAC_DEVICE void merge_partials(const AmendWorkspace& w, int pass, int head, int column,
                               const CtaRange (&ctas)[kNumSpans], Merged (&merged)[kNumSpans]) {
  constexpr int kAtOnce = 12;
  const int num_old = ctas[kOld].end - ctas[kOld].begin;
  const int all = num_old + ctas[kFresh].end - ctas[kFresh].begin;
  for (Merged& m : merged) m = {-INFINITY, 0.f, {0.f, 0.f, 0.f, 0.f}};
#pragma unroll 1
  for (int first = 0; first < all; first += kAtOnce) {
    float max[kAtOnce], sum[kAtOnce];
    float4 out[kAtOnce];
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) {
      max[u] = -INFINITY, sum[u] = 0.f, out[u] = {0.f, 0.f, 0.f, 0.f};
      if (first + u >= all) continue;
      const int fresh = first + u >= num_old;
      const int cta = first + u + (fresh ? ctas[kFresh].begin - num_old : ctas[kOld].begin);
      const int i = ((cta + pass) * kNumSpans + fresh) * w.tile_heads + head;
      max[u] = w.partial_max[i];
      sum[u] = w.partial_sum[i];
      out[u] = ptx::load_float4(w.partial_out + static_cast<int64_t>(i) * kHeadDim + column);
    }
#pragma unroll
    for (int span = 0; span < kNumSpans; ++span) {
      Merged& m = merged[span];
      float high = m.max;
#pragma unroll
      for (int u = 0; u < kAtOnce; ++u) {
        if ((first + u >= num_old) == (span == kFresh)) high = fmaxf(high, max[u]);
      }
      const float base = finite_or_zero(high), rescale = ptx::ex2(m.max - base);
      m.max = high;
      m.sum *= rescale;
      m.out = {m.out.x * rescale, m.out.y * rescale, m.out.z * rescale, m.out.w * rescale};
#pragma unroll
      for (int u = 0; u < kAtOnce; ++u) {
        if ((first + u >= num_old) == (span == kFresh)) add_partial(m, base, max[u], sum[u], out[u]);
      }
    }
  }
}

// Merges the partial states of a KV head and chooses its anchors. The states of a request that cannot be served
// are NaN.
template <typename T, int kHeadDim>
MAC_DEVICE void finish_kv_head(const AmendParams& p, const AmendWorkspace& w, const Segments& segments,
                               const Cursor& cursor, const Scratch& scratch, AnchorChoice& choice) {
  const int G = p.shape.group_size, n = p.requests.seq_lens[cursor.request], group = cursor.kv_group(p);
  // The first thread may be marking the request below already, as may the CTAs of other KV heads.
  const int given = ptx::load_volatile(w.status + cursor.request),
            status = given | (n < 0 || n > w.max_tokens ? kBadLength : 0);
  const int64_t spans = static_cast<int64_t>(p.shape.batch) * p.shape.num_qo_heads();
  const KvHeadWork& work = cursor.work;
  const bool chooses = p.num_anchors > 0 && !work.hit() && work.old_end > 0;
#pragma unroll 1
  for (int tile = 0; tile < w.head_tiles; ++tile) {
    if (tile > 0) {
      ptx::sync_block();  // all have read the last pass's
      if (threadIdx.x < 2 * kNumSpans) find_ctas(segments, tile, threadIdx.x, choice.ctas);
      ptx::sync_block();
    }
    const int first = tile * kMaxTileHeads, heads = G - first < w.tile_heads ? G - first : w.tile_heads;
#pragma unroll 1
    for (int i = threadIdx.x; i < heads * (kHeadDim / 4); i += kThreads) {
      const int column = i % (kHeadDim / 4) * 4, head = i / (kHeadDim / 4), g = first + head;
      Merged merged[kNumSpans];
      merge_partials<kHeadDim>(w, segments.first_pass + tile, head, column, choice.ctas, merged);
#pragma unroll
      for (int span = 0; span < kNumSpans; ++span) {
        const Merged& m = merged[span];
        const float scale = status ? NAN : m.sum == 0.f ? 0.f : ptx::divide(1.f, m.sum);
        const int64_t row = span * spans + static_cast<int64_t>(group) * G + g;
        ptx::store_float4(p.out + row * kHeadDim + column,
                          {m.out.x * scale, m.out.y * scale, m.out.z * scale, m.out.w * scale});
        if (column != 0) continue;
        p.lse[row] = status ? NAN : log2_total(m.max, m.sum) * kLn2;
        if (chooses) choice.max[span][g] = m.max, choice.sum[span][g] = m.sum;
      }
    }
  }
  if (status) {
    // Only match's errors and a bad page are in the request's status already.
    if (threadIdx.x == 0 && !given) {
      ptx::atomic_or(w.status + cursor.request, status);
      if (w.error_flag) ptx::atomic_or(w.error_flag, status);
    }
  }
  if (p.num_anchors == 0 || (work.hit() && !status)) return;
  int count = 0;
  if (chooses && !status) {
    ptx::sync_block();
    count = choose_anchors(p, w, group, (work.old_end + kWarpTokens - 1) / kWarpTokens, choice);
    take_out_anchors<T, kHeadDim>(p, w, cursor.request, cursor.kv_head, count, work.old_end, scratch, choice);
  }
  int32_t* anchors = p.anchors + static_cast<int64_t>(group) * p.num_anchors;
#pragma unroll 1
  for (int i = threadIdx.x; i < p.num_anchors; i += kThreads) anchors[i] = i < count ? choice.token[i] : kNoAnchor;
}

// A CTA has written its last partial state of a KV head; if it is the last one of all, it finishes the head.
template <typename T, int kHeadDim>
MAC_DEVICE void leave_kv_head(const AmendParams& p, const AmendWorkspace& w, const Line& line, const Cursor& cursor,
                              const Scratch& scratch) {
  __shared__ AnchorChoice choice;
  __shared__ int is_last;
  const int group = cursor.kv_group(p), tiles = cursor.work.tiles;
  const Segments segments{cursor.tile - cursor.local - cursor.head_tile * tiles, tiles, cursor.work.old_tiles,
                          group * w.head_tiles, line};
  // write_partial ended with a barrier: everybody's part is done, and the release below covers it.
  if (threadIdx.x == 0) {
    const int first = line.first_tile(blockIdx.x), all = w.head_tiles * tiles;
    const int mine = cursor.tile + 1 - (first > segments.first_tile ? first : segments.first_tile);
    is_last = ptx::atomic_add_acq_rel(w.done + group, mine) == all - mine;
    if (is_last) w.done[group] = 0;  // as the next call wants to find it
  }
  // Another warp, meanwhile.
  if (threadIdx.x / 32 == 1 && ptx::lane_id() < 2 * kNumSpans) find_ctas(segments, 0, ptx::lane_id(), choice.ctas);
  ptx::sync_block();
  if (!is_last) return;
  finish_kv_head<T, kHeadDim>(p, w, segments, cursor, scratch, choice);
  ptx::sync_block();  // `is_last`, `choice` and the scratch memory are free again
}

}  // namespace mac_attn::cuda
