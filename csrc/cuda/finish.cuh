// The end of amend for one KV head: the last CTA that leaves it merges the partial states of all its segments
// and, on a miss, chooses the anchors of the new entry (anchors.cuh).
//
// A thread merges four elements of a head at a time, over eight partial states in flight. Traffic: the partial
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
// another, so they do too. Four threads look for the four ends.
MAC_DEVICE void find_ctas(const Segments& segments, int head_tile, CtaRange (&ctas)[kNumSpans]) {
  if (threadIdx.x < 2 * kNumSpans) {
    const bool fresh = threadIdx.x / 2 == kFresh, at_end = threadIdx.x % 2;
    const int begin = fresh ? segments.old_tiles : 0, end = fresh ? segments.pass_tiles : segments.old_tiles;
    const int tile = segments.first_tile + head_tile * segments.pass_tiles + (at_end ? end - 1 : begin);
    const int cta = begin == end ? 0 : segments.line.cta_of(tile) + at_end;
    (at_end ? ctas[fresh].end : ctas[fresh].begin) = cta;
  }
  ptx::sync_block();
}

// Four elements of a head's merged state: sums of weight and of weight * value relative to 2^max.
struct Merged {
  float max, sum;
  float4 out;
};

template <int kHeadDim>
MAC_DEVICE Merged merge_partials(const AmendWorkspace& w, int pass, int head, int column, Span span,
                                 const CtaRange& ctas) {
  constexpr int kAtOnce = 8;
  Merged merged{-INFINITY, 0.f, {0.f, 0.f, 0.f, 0.f}};
#pragma unroll 1
  for (int first = ctas.begin; first < ctas.end; first += kAtOnce) {
    float max[kAtOnce], sum[kAtOnce];
    float4 out[kAtOnce];
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) {
      max[u] = -INFINITY, sum[u] = 0.f, out[u] = {0.f, 0.f, 0.f, 0.f};
      if (first + u >= ctas.end) continue;
      const int64_t i = (static_cast<int64_t>(first + u + pass) * kNumSpans + span) * w.tile_heads + head;
      max[u] = w.partial_max[i];
      sum[u] = w.partial_sum[i];
      out[u] = ptx::load_float4(w.partial_out + i * kHeadDim + column);
    }
    float high = merged.max;
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) high = fmaxf(high, max[u]);
    const float base = finite_or_zero(high), rescale = ptx::ex2(merged.max - base);
    merged.max = high;
    merged.sum *= rescale;
    merged.out = {merged.out.x * rescale, merged.out.y * rescale, merged.out.z * rescale, merged.out.w * rescale};
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) {
      const float weight = ptx::ex2(max[u] - base);
      merged.sum += sum[u] * weight;
      merged.out.x += out[u].x * weight, merged.out.y += out[u].y * weight;
      merged.out.z += out[u].z * weight, merged.out.w += out[u].w * weight;
    }
  }
  return merged;
}

// The states of a request that cannot be served are NaN. Returns whether this is one.
template <int kHeadDim>
MAC_DEVICE bool refuse(const AmendParams& p, const AmendWorkspace& w, int request, int group) {
  const int G = p.shape.group_size, n = p.requests.seq_lens[request];
  const bool bad_length = n < 0 || n > w.max_tokens;
  if (bad_length && threadIdx.x == 0) {
    ptx::atomic_or(w.status + request, kBadLength);
    if (w.error_flag) ptx::atomic_or(w.error_flag, kBadLength);
  }
  if (!bad_length && w.status[request] == 0) return false;
  const int64_t spans = static_cast<int64_t>(p.shape.batch) * p.shape.num_qo_heads();
  const int64_t first = static_cast<int64_t>(group) * G;
#pragma unroll 1
  for (int i = threadIdx.x; i < G * kHeadDim; i += kThreads) {
    p.out[first * kHeadDim + i] = NAN;
    p.out[(spans + first) * kHeadDim + i] = NAN;
  }
#pragma unroll 1
  for (int g = threadIdx.x; g < G; g += kThreads) p.lse[first + g] = p.lse[spans + first + g] = NAN;
#pragma unroll 1
  for (int i = threadIdx.x; i < p.num_anchors; i += kThreads) {
    p.anchors[static_cast<int64_t>(group) * p.num_anchors + i] = kNoAnchor;
  }
  return true;
}

template <typename T, int kHeadDim>
MAC_DEVICE void finish_kv_head(const AmendParams& p, const AmendWorkspace& w, const Segments& segments,
                               const Cursor& cursor, const Scratch& scratch, AnchorChoice& choice) {
  const int request = cursor.request, kv_head = cursor.kv_head;
  const KvHeadWork& work = cursor.work;
  const int G = p.shape.group_size, group = cursor.kv_group(p);
  if (refuse<kHeadDim>(p, w, request, group)) return;
  const int64_t spans = static_cast<int64_t>(p.shape.batch) * p.shape.num_qo_heads();
  const bool chooses = p.num_anchors > 0 && !work.hit() && work.old_end > 0;
#pragma unroll 1
  for (int tile = 0; tile < w.head_tiles; ++tile) {
    const int first = tile * kMaxTileHeads, heads = G - first < w.tile_heads ? G - first : w.tile_heads;
    if (tile > 0) ptx::sync_block();  // all have read the last pass's
    find_ctas(segments, tile, choice.ctas);
#pragma unroll 1
    for (int i = threadIdx.x; i < heads * (kHeadDim / 4); i += kThreads) {
      const int head = i / (kHeadDim / 4), column = i % (kHeadDim / 4) * 4, g = first + head;
      const int64_t row = static_cast<int64_t>(group) * G + g;
#pragma unroll 1
      for (int s = 0; s < kNumSpans; ++s) {
        const Span span = static_cast<Span>(s);
        const Merged merged = merge_partials<kHeadDim>(w, segments.first_pass + tile, head, column, span,
                                                       choice.ctas[s]);
        const float scale = merged.sum == 0.f ? 0.f : 1.f / merged.sum;
        ptx::store_float4(p.out + (s * spans + row) * kHeadDim + column,
                          {merged.out.x * scale, merged.out.y * scale, merged.out.z * scale, merged.out.w * scale});
        if (column == 0) p.lse[s * spans + row] = log2_total(merged.max, merged.sum) * kLn2;
        if (column == 0 && chooses) choice.max[s][g] = merged.max, choice.sum[s][g] = merged.sum;
      }
    }
  }
  if (p.num_anchors == 0) return;
  int32_t* anchors = p.anchors + static_cast<int64_t>(group) * p.num_anchors;
  int count = 0;
  if (chooses) {
    ptx::sync_block();
    count = choose_anchors(p, w, group, (work.old_end + kWarpTokens - 1) / kWarpTokens, choice);
    take_out_anchors<T, kHeadDim>(p, w, request, kv_head, count, work.old_end, scratch, choice);
  }
#pragma unroll 1
  for (int i = threadIdx.x; i < p.num_anchors; i += kThreads) {
    anchors[i] = work.hit() ? inherited_anchors(p, request, kv_head)[i] : i < count ? choice.token[i] : kNoAnchor;
  }
}

// A CTA has written its last partial state of a KV head; if it is the last one of all, it finishes the head.
template <typename T, int kHeadDim>
MAC_DEVICE void leave_kv_head(const AmendParams& p, const AmendWorkspace& w, const Line& line,
                              const Cursor& cursor, const Scratch& scratch) {
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
  ptx::sync_block();
  if (!is_last) return;
  finish_kv_head<T, kHeadDim>(p, w, segments, cursor, scratch, choice);
  ptx::sync_block();  // `is_last`, `choice` and the scratch memory are free again
}

}  // namespace mac_attn::cuda
