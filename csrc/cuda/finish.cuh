// The end of amend for one KV head: the last CTA that leaves it merges the partial states of all its segments
// and, on a miss, chooses the anchors of the new entry (anchors.cuh).
//
// A thread merges four elements of a head at a time, with several partial states in flight. Traffic: the partial
// states once, from the L2 cache that they have just been written to.
#pragma once

#include "anchors.cuh"

namespace mac_attn::cuda {

// The tiles of a KV head on the line: one run of them for each pass.
struct Segments {
  int first_place;  // on the line, of the first pass's first tile
  int pass_tiles;
  int old_tiles;
  int first_pass;
  Line line;
};

// Which pieces have a partial state of which span, of the pass over one head tile: the span's tiles follow one
// another, so they do too. Four threads, `end` of 0 to 3, look for the four ends.
MAC_DEVICE void find_pieces(const Segments& segments, int head_tile, int end, PieceRange (&pieces)[kNumSpans]) {
  const bool fresh = end / 2 == kFresh, upper = end % 2;
  const int first = fresh ? segments.old_tiles : 0, last = fresh ? segments.pass_tiles : segments.old_tiles;
  const int place =
      segments.first_place + head_tile * (segments.pass_tiles + kPassCost) + (upper ? last - 1 : first);
  const int piece = first == last ? 0 : segments.line.piece_of(place) + upper;
  (upper ? pieces[fresh].end : pieces[fresh].begin) = piece;
}

// Where a head's part of a partial state lies.
MAC_DEVICE int partial_of(const AmendWorkspace& w, int piece, int pass, int span, int head) {
  return ((piece + pass) * kNumSpans + span) * w.tile_heads + head;
}

// Max and sum of every head over the partial states of a span: four lanes side by side for each head and span.
MAC_DEVICE void merge_sums(const AmendWorkspace& w, int pass, int heads, AnchorChoice& choice) {
  constexpr int kSharers = 4;
  static_assert(kThreads == kSharers * kNumSpans * kMaxTileHeads, "one round");
  const int sharer = threadIdx.x % kSharers, span = threadIdx.x / kSharers % kNumSpans;
  const int head = threadIdx.x / (kSharers * kNumSpans);
  float max = -INFINITY, sum = 0.f;
  if (head < heads) {
#pragma unroll 4
    for (int piece = choice.pieces[span].begin + sharer; piece < choice.pieces[span].end; piece += kSharers) {
      const int i = partial_of(w, piece, pass, span, head);
      const float partial_max = w.partial_max[i], partial_sum = w.partial_sum[i], high = fmaxf(max, partial_max);
      sum = sum * ptx::ex2(max - finite_or_zero(high)) + partial_sum * ptx::ex2(partial_max - finite_or_zero(high));
      max = high;
    }
  }
  for (int distance = 1; distance < kSharers; distance *= 2) {
    const float other_max = ptx::shfl_xor(max, distance), other_sum = ptx::shfl_xor(sum, distance);
    const float high = fmaxf(max, other_max);
    sum = sum * ptx::ex2(max - finite_or_zero(high)) + other_sum * ptx::ex2(other_max - finite_or_zero(high));
    max = high;
  }
  if (head < heads && sharer == 0) choice.max[span][head] = max, choice.sum[span][head] = sum;
}

// Four elements of a head's sums of weight * value, of both spans: their partial states are one list.
template <int kHeadDim>
MAC_DEVICE void merge_outs(const AmendWorkspace& w, int pass, int head, int column, const AnchorChoice& choice,
                           float4 (&out)[kNumSpans]) {
  const int num_old = choice.pieces[kOld].end - choice.pieces[kOld].begin;
  const int all = num_old + choice.pieces[kFresh].end - choice.pieces[kFresh].begin;
  const float base[kNumSpans] = {finite_or_zero(choice.max[kOld][head]), finite_or_zero(choice.max[kFresh][head])};
  out[kOld] = out[kFresh] = {0.f, 0.f, 0.f, 0.f};
  [[maybe_unused]] constexpr int kAtOnce = kHeadDim <= 128 ? 8 : 4;  // registers are short with the greatest
#pragma unroll kAtOnce
  for (int j = 0; j < all; ++j) {
    const int fresh = j >= num_old;
    const int piece = j + (fresh ? choice.pieces[kFresh].begin - num_old : choice.pieces[kOld].begin);
    const int i = partial_of(w, piece, pass, fresh, head);
    const float4 part = ptx::load_float4(w.partial_out + static_cast<int64_t>(i) * kHeadDim + column);
    const float weight = ptx::ex2(w.partial_max[i] - (fresh ? base[kFresh] : base[kOld]));
#pragma unroll
    for (int span = 0; span < kNumSpans; ++span) {
      const float x = span == fresh ? weight : 0.f;
      out[span].x += part.x * x, out[span].y += part.y * x, out[span].z += part.z * x, out[span].w += part.w * x;
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
      if (threadIdx.x < 2 * kNumSpans) find_pieces(segments, tile, threadIdx.x, choice.pieces);
      ptx::sync_block();
    }
    const int first = tile * kMaxTileHeads, heads = G - first < w.tile_heads ? G - first : w.tile_heads;
    merge_sums(w, segments.first_pass + tile, heads, choice);
    ptx::sync_block();
#pragma unroll 1
    for (int i = threadIdx.x; i < heads * (kHeadDim / 4); i += kThreads) {
      const int column = i % (kHeadDim / 4) * 4, head = i / (kHeadDim / 4), g = first + head;
      float4 out[kNumSpans];
      merge_outs<kHeadDim>(w, segments.first_pass + tile, head, column, choice, out);
#pragma unroll
      for (int span = 0; span < kNumSpans; ++span) {
        const float sum = choice.sum[span][head];
        const float scale = status ? NAN : sum == 0.f ? 0.f : ptx::divide(1.f, sum);
        const int64_t row = span * spans + static_cast<int64_t>(group) * G + g;
        ptx::store_float4(p.out + row * kHeadDim + column,
                          {out[span].x * scale, out[span].y * scale, out[span].z * scale, out[span].w * scale});
        if (column == 0) p.lse[row] = status ? NAN : log2_total(choice.max[span][head], sum) * kLn2;
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

MAC_DEVICE int min_of(int a, int b) {
  return a < b ? a : b;
}

// A CTA has written its last partial state of a KV head; if it is the last one of all, it finishes the head.
template <typename T, int kHeadDim>
MAC_DEVICE void leave_kv_head(const AmendParams& p, const AmendWorkspace& w, const Line& line, int piece,
                              const Cursor& cursor, const Scratch& scratch) {
  __shared__ AnchorChoice choice;
  __shared__ int is_last;
  const int group = cursor.kv_group(p), tiles = cursor.work.tiles;
  const Segments segments{cursor.place - cursor.local - cursor.head_tile * (tiles + kPassCost), tiles,
                          cursor.work.old_tiles, group * w.head_tiles, line};
  // write_partial ended with a barrier: everybody's part is done, and the release below covers it.
  if (threadIdx.x == 0) {
    // The piece's tiles of this KV head: of the passes before, and of this one from where it begins.
    const int begin = line.begin(piece) - segments.first_place, all = w.head_tiles * tiles;
    const int before =
        begin > 0 ? begin / (tiles + kPassCost) * tiles + min_of(begin % (tiles + kPassCost), tiles) : 0;
    const int mine = cursor.head_tile * tiles + cursor.local + 1 - before;
    is_last = ptx::atomic_add_acq_rel(w.done + group, mine) == all - mine;
    if (is_last) w.done[group] = 0;  // as the next call wants to find it
  }
  // Another warp, meanwhile.
  if (threadIdx.x / 32 == 1 && ptx::lane_id() < 2 * kNumSpans)
    find_pieces(segments, 0, ptx::lane_id(), choice.pieces);
  ptx::sync_block();
  if (!is_last) return;
  finish_kv_head<T, kHeadDim>(p, w, segments, cursor, scratch, choice);
  ptx::sync_block();  // `is_last`, `choice` and the scratch memory are free again
}

}  // namespace mac_attn::cuda
