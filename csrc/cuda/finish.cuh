// The end of amend for one KV head: the last CTA that leaves it merges the partial states of all its pieces, brings
// the sample of a miss into its form (sample.cuh) and, in a step, completes (complete.cuh).
//
// A thread merges four elements of a head at a time, all of whose partial states are on their way to shared memory
// at once. Traffic: the partial states once, from the L2 cache that they have just been written to.
#pragma once

#include "complete.cuh"
#include "ptx/async_copy.h"
#include "sample.cuh"
#include "stage.cuh"

namespace mac_attn::cuda {

// The partial states of a pass over one head tile, those of both spans in one list. Some piece may have both.
struct PartialList {
  int old_begin, old_end, fresh_begin, fresh_end;  // pieces

  MAC_DEVICE int num_old() const { return old_end - old_begin; }
  MAC_DEVICE int count() const { return num_old() + fresh_end - fresh_begin; }
  // Where a head's part of a partial state lies.
  MAC_DEVICE int place(const AmendWorkspace& w, int i, int head) const {
    const bool fresh = i >= num_old();
    const int piece = i + (fresh ? fresh_begin - num_old() : old_begin);
    return (piece * kNumSpans + fresh) * w.tile_heads + head;
  }
};

MAC_DEVICE PartialList partial_list(const Piece& piece, int head_tile) {
  const int first = piece.first + head_tile * piece.splits;
  return {first, first + divide_up(piece.work.tiles_of_old(), piece.most),
          first + piece.work.old_tiles / piece.most, first + piece.splits};
}

// What a CTA that leaves a KV head has to know; in shared memory.
struct Leaving {
  PartialList list;  // of the first head tile
  int given, found;  // Error bits: the request's by match, the KV head's own
  bool is_last, draws;
  KvHeadStep step;
};

// Shared memory that the partial states are merged in: sums of all of them, and of each thread's four elements as
// many as there is room for.
template <typename T, int kHeadDim>
struct MergeScratch {
  static constexpr int kBytes = kWarps * Stage<kHeadDim, T>::kCount * Stage<kHeadDim, T>::kBytes;
  // A hit with anchors has two of each of the pieces with those.
  static constexpr int kMostStates = kMaxSplits + kMaxAnchors / kTileTokens + 1;
  static_assert(kMostStates * kMaxTileHeads * 16 + kThreads * 16 <= kBytes, "all sums and one state fit");
  float* sums;  // [states, tile_heads, 4]
  float* out;   // [room, threads, 4], this thread's
  int room;

  MAC_DEVICE MergeScratch(void* scratch, int states, int heads) : sums(static_cast<float*>(scratch)) {
    out = sums + (states * heads + static_cast<int>(threadIdx.x)) * 4;
    room = (kBytes / 16 - states * heads) / kThreads;
  }
  // Asks for a thread's part of the states [first, first + room).
  MAC_DEVICE void ask(const AmendWorkspace& w, const PartialList& list, int first, int head, int column) const {
    const int end = first + room < list.count() ? first + room : list.count();
#pragma unroll 4
    for (int i = first; i < end; ++i) {
      const int64_t place = list.place(w, i, head);
      ptx::cp_async_16(out + (i - first) * (kThreads * 4), w.partial_out + place * kHeadDim + column, true);
    }
    ptx::cp_async_commit();
  }
};

// Merges a thread's part of the states of a head, which it has asked for. `entry_lse`: of the entry that a hit with
// anchors reuses, else NaN.
template <typename T, int kHeadDim>
MAC_DEVICE HeadPart merge_partials(const AmendWorkspace& w, const PartialList& list,
                                   const MergeScratch<T, kHeadDim>& scratch, int head, int column, bool bad,
                                   float entry_lse, float& anchors) {
  const int count = list.count(), num_old = list.num_old(), heads = w.tile_heads;
  float max[kNumSpans] = {-INFINITY, -INFINITY}, sum[kNumSpans] = {}, light[kNumSpans] = {};
  float4 out[kNumSpans] = {};
  anchors = 0.f;
#pragma unroll 4
  for (int i = 0; i < count; ++i) {
    const float state = scratch.sums[(i * heads + head) * 4];
    max[kOld] = fmaxf(max[kOld], i < num_old ? state : -INFINITY);
    max[kFresh] = fmaxf(max[kFresh], i < num_old ? -INFINITY : state);
  }
#pragma unroll 1
  for (int first = 0; first < count; first += scratch.room) {
    if (first > 0) scratch.ask(w, list, first, head, column);
    ptx::cp_async_wait<0>();
    const int end = first + scratch.room < count ? first + scratch.room : count;
#pragma unroll
    for (int span = 0; span < kNumSpans; ++span) {
      const int from = span == kOld || first > num_old ? first : num_old,
                to = span == kOld && num_old < end ? num_old : end;
      const float base = finite_or_zero(max[span]);
      float4& all = out[span];
#pragma unroll 4
      for (int i = from; i < to; ++i) {
        const float4 sums = ptx::load_float4(scratch.sums + (i * heads + head) * 4);
        const float4 part = ptx::load_float4(scratch.out + (i - first) * (kThreads * 4));
        const float weight = ptx::ex2(sums.x - base);
        sum[span] += sums.y * weight, light[span] += sums.z * weight, anchors += sums.w;
        all.x += part.x * weight, all.y += part.y * weight, all.z += part.z * weight, all.w += part.w * weight;
      }
    }
  }
  HeadPart part;
  float lse[kNumSpans];
#pragma unroll
  for (int span = 0; span < kNumSpans; ++span) {
    const float scale = bad ? NAN : sum[span] == 0.f ? 0.f : ptx::divide(1.f, sum[span]);
    out[span] = {out[span].x * scale, out[span].y * scale, out[span].z * scale, out[span].w * scale};
    lse[span] = bad ? NAN : log2_total(max[span], sum[span]) * kLn2;
  }
  part.old = out[kOld], part.fresh = out[kFresh], part.old_lse = lse[kOld], part.fresh_lse = lse[kFresh];
  // Without a token that stands for others nothing is known of those.
  const float now = log2_total(max[kFresh], light[kFresh]), then = log2_total(max[kOld], light[kOld]);
  part.log_ratio = !bad && light[kOld] != 0.f ? (now - then) * kLn2 : 0.f;
  if (nothing_left(entry_lse, lse[kOld], then * kLn2)) part.log_ratio = -INFINITY;
  return part;
}

// Four elements of a head, as amend alone answers them.
MAC_DEVICE void write_part(const AmendParams& p, int64_t row, int column, const HeadPart& part) {
  const int64_t rows = static_cast<int64_t>(p.shape.batch) * p.shape.num_qo_heads(), D = p.shape.head_dim;
  ptx::store_float4(p.out + row * D + column, part.old);
  ptx::store_float4(p.out + (rows + row) * D + column, part.fresh);
  if (column > 0) return;
  p.lse[row] = part.old_lse, p.lse[rows + row] = part.fresh_lse;
  if (p.matched.source) p.log_ratio[row] = part.log_ratio;
}

// Merges the partial states of a KV head and completes, or writes what amend answers. The states of a KV head that
// cannot be served are NaN.
template <typename Q, typename T, int kHeadDim>
MAC_DEVICE void finish_kv_head(const AmendParams& p, const AmendWorkspace& w, const CompleteParams& c,
                               const Piece& piece, void* scratch, const Leaving& leaving) {
  constexpr int kParts = kHeadDim / 4;
  const int G = p.shape.group_size, group = piece.kv_group(p), S = p.num_anchors, thread = threadIdx.x;
  const bool bad = (leaving.given | leaving.found) != 0, completes = c.out != nullptr;
  const int candidates = leaving.draws ? ptx::load_volatile(w.sampled + group) : 0;
  int sampled = leaving.draws && !bad ? candidates : kNotSampled;
  // Of a hit, which reads anchors instead, only one that draws none depends on this.
  const bool counts = completes && !bad && leaving.step.reuses, stores = counts && leaving.step.stores(c, sampled);
  const bool replaces = piece.work.anchor_tiles > 0 && !bad;
  const auto entry_lse = [&](int g) {
    return replaces ? p.ring.lse(p.requests.slots[piece.request], piece.kv_head, piece.work.place)[g] : NAN;
  };
#pragma unroll 1
  for (int tile = 0; tile < w.head_tiles; ++tile) {
    const PartialList list = tile == 0 ? leaving.list : partial_list(piece, tile);
    const MergeScratch<T, kHeadDim> merging(scratch, list.count(), w.tile_heads);
    const int first = tile * kMaxTileHeads, heads = G - first < w.tile_heads ? G - first : w.tile_heads;
    const auto ask = [&](int i) {
      if (i < heads * kParts) merging.ask(w, list, 0, i / kParts, i % kParts * 4);
      float4 reused{0.f, 0.f, 0.f, 0.f};
      if (completes && i < heads * kParts)
        reused = load_reused(c, leaving.step, first + i / kParts, i % kParts * 4);
      return reused;
    };
    if (tile > 0) ptx::sync_block();  // all have read the last one's
#pragma unroll 1
    for (int i = thread; i < list.count() * w.tile_heads; i += kThreads) {
      const int state = i / w.tile_heads;
      ptx::cp_async_16(merging.sums + i * 4,
                       w.partial_sums + int64_t{4} * list.place(w, state, i - state * w.tile_heads), true);
    }
    float4 reused = ask(thread);
    ptx::cp_async_wait<0>();
    ptx::sync_block();
#pragma unroll 1
    for (int i = thread; i < heads * kParts; i += kThreads) {
      const int column = i % kParts * 4, head = i / kParts, g = first + head;
      if (i != thread) reused = ask(i);
      float anchors;
      const HeadPart part = merge_partials(w, list, merging, head, column, bad, entry_lse(g), anchors);
      if (replaces) sampled = static_cast<int>(anchors);
      if (completes) {
        complete_part<Q>(c, leaving.step, counts, stores, g, column, reused, part);
      } else {
        write_part(p, static_cast<int64_t>(group) * G + g, column, part);
      }
    }
  }
  if (thread == 0) {                          // who has merged a part
    if (leaving.draws) w.sampled[group] = 0;  // as the next call wants to find it
    if (counts) complete_history(c, leaving.step, stores, sampled);
    if (!completes && p.matched.source) p.sampled[group] = sampled;
  }
  if (S == 0 || (completes && !stores)) return;
  ptx::sync_block();  // the shared memory is free
  const int place = completes ? leaving.step.new_place(c) : 0;
  const int64_t at = static_cast<int64_t>(group) * S;
  write_sample(p, w, piece, leaving.draws ? sampled : kNotSampled, *static_cast<SampleScratch*>(scratch),
               completes ? p.ring.anchors(leaving.step.slot, piece.kv_head, place) : p.anchors + at,
               completes ? p.ring.anchor_weights(leaving.step.slot, piece.kv_head, place) : p.anchor_weights + at);
}

// A CTA has written the partial states of its piece; if it is the last one of all, it finishes the KV head.
// `scratch`: all of the stages. `bad_page`: one of its warps has met a page that is not there.
template <typename Q, typename T, int kHeadDim>
MAC_DEVICE void leave_kv_head(const AmendParams& p, const AmendWorkspace& w, const CompleteParams& c,
                              const Piece& piece, void* scratch, bool bad_page) {
  static_assert(sizeof(SampleScratch) <= MergeScratch<T, kHeadDim>::kBytes, "it fits");
  constexpr int kBadPiece = 1 << 16;  // more than there are pieces
  __shared__ Leaving leaving;
  const int warp = threadIdx.x / 32, n = p.requests.seq_lens[piece.request];
  int32_t* status = w.status + piece.request;
  ptx::grid_dependency_wait();  // without reuse the counters may not have been cleared yet
  if (threadIdx.x == 0) {
    // A bad page is the KV head's own affair: others, which may have ended already, need not have read it.
    const int too_long = n < 0 || n > w.max_tokens ? kBadLength : 0, found = too_long | (bad_page ? kBadPage : 0);
    if (found) {
      ptx::atomic_or(status, found);
      if (w.error_flag) ptx::atomic_or(w.error_flag, found);
    }
    const int pieces = piece.splits * w.head_tiles, mine = 1 + (bad_page ? kBadPiece : 0);
    // write_partial ended with a barrier: everybody's part is done, and the release below covers it.
    int32_t* done = w.done + piece.kv_group(p);
    const int all = mine + (pieces == 1 ? 0 : ptx::atomic_add_acq_rel(done, mine));
    leaving.is_last = all % kBadPiece == pieces;
    leaving.found = too_long | (all >= kBadPiece ? kBadPage : 0);
    if (leaving.is_last && pieces > 1) *done = 0;  // as the next call wants to find it
  }
  // Other warps, meanwhile.
  if (threadIdx.x == 32) leaving.list = partial_list(piece, 0), leaving.draws = sample_tau(p, piece) > 0.f;
  if (warp == 2 && c.out) {
    const bool bad = (ptx::load_volatile(status) & ~kBadPage) != 0 || n > w.max_tokens;
    look_at_kv_head(c, piece.request, piece.kv_head, bad, leaving.step);
  }
  if (threadIdx.x == 96) leaving.given = ptx::load_volatile(status) & ~kBadPage;
  ptx::sync_block();
  if (!leaving.is_last) return;
  finish_kv_head<Q, T, kHeadDim>(p, w, c, piece, scratch, leaving);
  ptx::sync_block();  // the shared memory is free again
}

}  // namespace mac_attn::cuda
