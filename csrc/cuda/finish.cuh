// The end of amend for one KV head: the last CTA that leaves it merges the partial states of all its segments
// and, on a miss, chooses the anchors of the new entry (anchors.cuh).
//
// A thread merges four elements of a head at a time, with several partial states in flight. Traffic: the partial
// states once, from the L2 cache that they have just been written to.
#pragma once

#include "anchors.cuh"

namespace mac_attn::cuda {

// Which pieces have a partial state of which span, of the pass over one head tile. Some piece may have both.
MAC_DEVICE void find_pieces(const Piece& piece, int head_tile, PieceRange (&pieces)[kNumSpans]) {
  const int first = piece.first + head_tile * piece.splits, old_tiles = piece.work.old_tiles;
  pieces[kOld] = {first, first + divide_up(old_tiles, piece.most)};
  pieces[kFresh] = {first + old_tiles / piece.most, first + piece.splits};
}

// Where a head's part of a partial state lies.
MAC_DEVICE int partial_of(const AmendWorkspace& w, int piece, int span, int head) {
  return (piece * kNumSpans + span) * w.tile_heads + head;
}

// Max and sum of every head over the partial states of a span: four lanes side by side for each head and span.
MAC_DEVICE void merge_sums(const AmendWorkspace& w, int heads, AnchorChoice& choice) {
  constexpr int kSharers = 4;
  static_assert(kThreads == kSharers * kNumSpans * kMaxTileHeads, "one round");
  const int sharer = threadIdx.x % kSharers, span = threadIdx.x / kSharers % kNumSpans;
  const int head = threadIdx.x / (kSharers * kNumSpans);
  float max = -INFINITY, sum = 0.f;
  if (head < heads) {
#pragma unroll 4
    for (int piece = choice.pieces[span].begin + sharer; piece < choice.pieces[span].end; piece += kSharers) {
      const int i = partial_of(w, piece, span, head);
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
MAC_DEVICE void merge_outs(const AmendWorkspace& w, int head, int column, const AnchorChoice& choice,
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
    const int i = partial_of(w, piece, fresh, head);
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
MAC_DEVICE void finish_kv_head(const AmendParams& p, const AmendWorkspace& w, const Piece& piece,
                               const Scratch& scratch, AnchorChoice& choice) {
  const int G = p.shape.group_size, n = p.requests.seq_lens[piece.request], group = piece.kv_group(p);
  // The first thread may be marking the request below already, as may the CTAs of other KV heads.
  const int given = ptx::load_volatile(w.status + piece.request),
            status = given | (n < 0 || n > w.max_tokens ? kBadLength : 0);
  const int64_t spans = static_cast<int64_t>(p.shape.batch) * p.shape.num_qo_heads();
  const KvHeadWork& work = piece.work;
  const bool chooses = p.num_anchors > 0 && !work.hit() && work.old_end > 0;
#pragma unroll 1
  for (int tile = 0; tile < w.head_tiles; ++tile) {
    if (tile > 0) {
      ptx::sync_block();  // all have read the last pass's
      if (threadIdx.x == 0) find_pieces(piece, tile, choice.pieces);
      ptx::sync_block();
    }
    const int first = tile * kMaxTileHeads, heads = G - first < w.tile_heads ? G - first : w.tile_heads;
    merge_sums(w, heads, choice);
    ptx::sync_block();
#pragma unroll 1
    for (int i = threadIdx.x; i < heads * (kHeadDim / 4); i += kThreads) {
      const int column = i % (kHeadDim / 4) * 4, head = i / (kHeadDim / 4), g = first + head;
      float4 out[kNumSpans];
      merge_outs<kHeadDim>(w, head, column, choice, out);
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
      ptx::atomic_or(w.status + piece.request, status);
      if (w.error_flag) ptx::atomic_or(w.error_flag, status);
    }
  }
  if (p.num_anchors == 0 || (work.hit() && !status)) return;
  int count = 0;
  if (chooses && !status) {
    ptx::sync_block();
    count = choose_anchors(p, w, group, (work.old_end + kWarpTokens - 1) / kWarpTokens, choice);
    take_out_anchors<T, kHeadDim>(p, w, piece.request, piece.kv_head, count, work.old_end, scratch, choice);
  }
  int32_t* anchors = p.anchors + static_cast<int64_t>(group) * p.num_anchors;
#pragma unroll 1
  for (int i = threadIdx.x; i < p.num_anchors; i += kThreads) anchors[i] = i < count ? choice.token[i] : kNoAnchor;
}

// A CTA has written the partial states of its piece; if it is the last one of all, it finishes the KV head.
template <typename T, int kHeadDim>
MAC_DEVICE void leave_kv_head(const AmendParams& p, const AmendWorkspace& w, const Piece& piece,
                              const Scratch& scratch) {
  __shared__ AnchorChoice choice;
  __shared__ int is_last;
  // write_partial ended with a barrier: everybody's part is done, and the release below covers it.
  if (threadIdx.x == 0) {
    const int others = piece.splits * w.head_tiles - 1;
    int32_t* done = w.done + piece.kv_group(p);
    is_last = others == 0 || ptx::atomic_add_acq_rel(done, 1) == others;
    if (is_last) *done = 0;  // as the next call wants to find it
  }
  // Another warp, meanwhile.
  if (threadIdx.x == 32) find_pieces(piece, 0, choice.pieces);
  ptx::sync_block();
  if (!is_last) return;
  finish_kv_head<T, kHeadDim>(p, w, piece, scratch, choice);
  ptx::sync_block();  // `is_last`, `choice` and the scratch memory are free again
}

}  // namespace mac_attn::cuda
