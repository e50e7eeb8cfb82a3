// The end of amend for one unit (KvHeadWork): the last CTA that leaves it merges the partial states of all its
// pieces and counts a miss's candidates; it cuts them to a sample only where no complete does (cut_sample.cuh).
//
// A thread merges four elements of a head at a time, with several partial states in flight. Traffic: the partial
// states once, from the L2 cache that they have just been written to.
#pragma once

#include "cut_sample.cuh"
#include "sample.cuh"
#include "stage.cuh"

namespace mac_attn::cuda {

struct PieceRange {
  int begin, count, step;  // every step-th from `begin` on
};

// Which pieces have a partial state of which span, of the pass over one head tile. Some piece may have both.
template <bool kTwice>
MAC_DEVICE void find_pieces(const Piece& piece, int head_tile, PieceRange (&pieces)[kNumSpans]) {
  const int first = piece.first + head_tile, only_old = piece.work.old_tiles / piece.most;
  const int passes = piece.work.passes;
  pieces[kOld] = {first, divide_up(piece.work.tiles_of_old<kTwice>(), piece.most), passes};
  pieces[kFresh] = {first + only_old * passes, piece.splits - only_old, passes};
}

// Where a head's part of a partial state lies.
MAC_DEVICE int partial_of(const AmendWorkspace& w, int piece, int span, int head) {
  return (piece * kNumSpans + span) * w.tile_heads + head;
}

// What a thread merges: four elements of a head's sums of weight * value, of both spans.
struct Merged {
  float max[kNumSpans], sum[kNumSpans], light[kNumSpans];  // light: of a * weight
  float anchors;
  float4 out[kNumSpans];
};

// The partial states of both spans are one list, several of which are in flight at a time.
template <int kHeadDim>
MAC_DEVICE Merged merge_partials(const AmendWorkspace& w, int head, int column,
                                 const PieceRange (&pieces)[kNumSpans]) {
  constexpr int kAtOnce = kHeadDim <= 128 ? 8 : 4;  // registers are short with the greatest
  const int num_old = pieces[kOld].count, all = num_old + pieces[kFresh].count;
  Merged merged{{-INFINITY, -INFINITY}, {}, {}, 0.f, {}};
#pragma unroll 1
  for (int first = 0; first < all; first += kAtOnce) {
    float4 sums[kAtOnce], out[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int j = first + i, fresh = j >= num_old;
      sums[i] = {-INFINITY, 0.f, 0.f, 0.f}, out[i] = {0.f, 0.f, 0.f, 0.f};
      if (j >= all) continue;
      const PieceRange& of = pieces[fresh ? kFresh : kOld];
      const int piece = of.begin + (fresh ? j - num_old : j) * of.step;
      const int place = partial_of(w, piece, fresh, head);
      sums[i] = ptx::load_float4(w.partial_sums + int64_t{4} * place);
      out[i] = ptx::load_float4(w.partial_out + static_cast<int64_t>(place) * kHeadDim + column);
    }
    float high[kNumSpans] = {merged.max[kOld], merged.max[kFresh]};
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int fresh = first + i >= num_old;
      high[kOld] = fmaxf(high[kOld], fresh ? -INFINITY : sums[i].x);
      high[kFresh] = fmaxf(high[kFresh], fresh ? sums[i].x : -INFINITY);
      merged.anchors += sums[i].w;
    }
#pragma unroll
    for (int span = 0; span < kNumSpans; ++span) {
      const float base = finite_or_zero(high[span]), keep = ptx::ex2(merged.max[span] - base);
      float4& to = merged.out[span];
      merged.sum[span] *= keep, merged.light[span] *= keep;
      to.x *= keep, to.y *= keep, to.z *= keep, to.w *= keep;
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const float weight = (first + i >= num_old) == (span == kFresh) ? ptx::ex2(sums[i].x - base) : 0.f;
        merged.sum[span] += sums[i].y * weight, merged.light[span] += sums[i].z * weight;
        to.x += out[i].x * weight, to.y += out[i].y * weight, to.z += out[i].z * weight, to.w += out[i].w * weight;
      }
      merged.max[span] = high[span];
    }
  }
  return merged;
}

// Merges the partial states of a unit; of the first token's, writes the KV head's sample or leaves its candidates.
// The states of a request that cannot be served are NaN.
template <int kHeadDim, bool kExact>
MAC_DEVICE void finish_unit(const AmendParams& p, const AmendWorkspace& w, const Piece& piece, void* scratch,
                            PieceRange (&pieces)[kNumSpans]) {
  const int queries = piece.work.queries, group = piece.kv_group(p);
  const int elements = value_elements<kHeadDim, kExact>(p.shape);
  // The first thread may be marking the request below already, as may the CTAs of other KV heads.
  const int given = ptx::load_volatile(w.status + piece.request),
            bad = p.requests.seq_lens[piece.request] != 0 && position_of(p, w, piece.request) < 0,
            status = given | (bad ? kBadLength : 0);
  const int64_t spans = static_cast<int64_t>(p.shape.batch) * p.shape.num_queries();
#pragma unroll 1
  for (int tile = 0; tile < piece.work.passes; ++tile) {
    if (tile > 0) {
      ptx::sync_block();  // all have read the last pass's
      if (threadIdx.x == 0) find_pieces<anchors_twice(kHeadDim)>(piece, tile, pieces);
      ptx::sync_block();
    }
    const int first = tile * w.tile_heads, heads = queries - first < w.tile_heads ? queries - first : w.tile_heads;
#pragma unroll 1
    for (int i = threadIdx.x; i < heads * (kHeadDim / 4); i += kThreads) {
      const int column = i % (kHeadDim / 4) * 4, head = i / (kHeadDim / 4), g = first + head;
      if (!kExact && column >= elements) continue;
      // Asked for before what it is needed with.
      const bool replaces = column == 0 && piece.work.anchor_tiles > 0 && !status;
      const float entry =
          replaces ? p.ring.lse(p.requests.slots[piece.request], piece.kv_head, piece.work.place)[g] : 0.f;
      const Merged merged = merge_partials<kHeadDim>(w, head, column, pieces);
      const int64_t qo_row =
          int64_t{group} * p.shape.group_queries() + int64_t{piece.work.token} * p.shape.group_size + g;
#pragma unroll
      for (int span = 0; span < kNumSpans; ++span) {
        const float sum = merged.sum[span];
        const float4 out = merged.out[span];
        const float scale = status ? NAN : sum == 0.f ? 0.f : ptx::divide(1.f, sum);
        const int64_t row = span * spans + qo_row;
        ptx::store_float4(p.out + row * elements + column,
                          {out.x * scale, out.y * scale, out.z * scale, out.w * scale});
        if (column > 0) continue;
        p.lse[row] = status ? NAN : log2_total(merged.max[span], sum) * kLn2;
      }
      if (column > 0 || !p.matched.source) continue;
      // Without a token that stands for others nothing is known of those.
      const bool known = !status && merged.light[kOld] != 0.f;
      const float now = log2_total(merged.max[kFresh], merged.light[kFresh]);
      const float then = log2_total(merged.max[kOld], merged.light[kOld]);
      p.log_ratio[qo_row] = known ? (now - then) * kLn2 : 0.f;
      if (replaces) {
        const float replaced = log2_total(merged.max[kOld], merged.sum[kOld]) * kLn2;
        if (nothing_left(entry, replaced, then * kLn2)) p.log_ratio[qo_row] = -INFINITY;
      }
      const int token = w.group_size.divide(g);  // of the unit's
      if (g == token * p.shape.group_size) {
        p.sampled[piece.token_row(p) + token] = replaces ? static_cast<int>(merged.anchors) : kNotSampled;
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
  if (p.num_anchors == 0 || piece.work.token > 0) return;
  const int candidates = ptx::load_volatile(w.sampled + group);
  const int sampled = !status && sample_tau(p, piece) > 0.f ? candidates : kNotSampled;
  ptx::sync_block();
  if (threadIdx.x == 0) {
    w.sampled[group] = 0;  // as the next call wants to find it; all have read it
    if (sampled >= 0) p.sampled[piece.token_row(p)] = sampled;
  }
  if (p.candidates) return;
  const int64_t first = static_cast<int64_t>(group) * p.num_anchors;
  const Drawn drawn{w.candidate + first * kCandidateRoom, sampled, piece.work.old_end,
                    sample_seed(piece.work.position, piece.kv_head, p.layer)};
  write_sample<kThreads>(drawn, p.num_anchors, *static_cast<SampleScratch*>(scratch), p.anchors + first,
                         p.anchor_weights + first);
}

// A CTA has written the partial states of its piece; if it is the last one of all, it finishes the unit. `scratch`:
// all of the stages.
template <int kHeadDim, bool kExact>
MAC_DEVICE void leave_unit(const AmendParams& p, const AmendWorkspace& w, const Piece& piece, void* scratch) {
  static_assert(sizeof(SampleScratch) <= kWarps * Stage<kHeadDim>::kCount * Stage<kHeadDim>::kBytes, "it fits");
  __shared__ PieceRange pieces[kNumSpans];
  __shared__ int is_last;
  // write_partial ended with a barrier: everybody's part is done, and the release below covers it.
  if (threadIdx.x == 0) {
    const int others = piece.splits * piece.work.passes - 1;
    int32_t* done = w.done + (p.matched.source ? piece.token_row(p) : piece.kv_group(p));
    is_last = others == 0 || ptx::atomic_add_acq_rel(done, 1) == others;
    if (is_last) *done = 0;  // as the next call wants to find it
  }
  // Another warp, meanwhile.
  if (threadIdx.x == 32) find_pieces<anchors_twice(kHeadDim)>(piece, 0, pieces);
  ptx::sync_block();
  if (!is_last) return;
  finish_unit<kHeadDim, kExact>(p, w, piece, scratch, pieces);
  ptx::sync_block();  // the shared memory is free again
}

}  // namespace mac_attn::cuda
