// Complete on the GPU: merge the parts, write the output and, if it may be reused, the new ring entry.
//
//   carried = old on a miss; reused (+) old on a hit without anchors
//   out = carried (+) fresh; by hit_weights on a hit with anchors, which nobody reuses
//   entry p = (q_match, q, carried, anchors, depth)
//   a sink joins `out` and its log-sum-exp, and nothing else
//
// In a step it is the last that amend does for a KV head (finish.cuh), on the states as they leave the registers.
// Where the states come from another kernel it is one of its own, with a CTA for each (request, KV head). A thread
// looks after four elements of a head at a time. Traffic: two states, one record of the ring read and perhaps one
// entry written, all small.
#pragma once

#include "../state.h"
#include "ptx/barrier.h"
#include "ptx/math.h"
#include "ptx/memory.h"
#include "ptx/warp.h"
#include "schedule.cuh"

namespace mac_attn::cuda {

// What a KV head does, from all of its heads, and what is known of these. It is in shared memory: the new entry may
// take the place of a matched one, so nothing of that is read once anything is written but a thread's own elements.
struct KvHeadStep {
  int request, kv_head, seq_len, slot;
  int stored;            // Matched::stored
  int hits, start;       // heads that hit; the first token read
  bool reuses;           // the request has a ring and tokens, and no error
  bool shallow;          // a head's depth allows that its state is reused
  int place[kMaxGroup];  // of the matched entries, or kMiss
  int depth[kMaxGroup];  // of the states that the heads carry on
  float lse[kMaxGroup];  // of the matched entries

  MAC_DEVICE int64_t row(const CompleteParams& p, int g) const {
    return (static_cast<int64_t>(request) * p.shape.num_kv_heads + kv_head) * p.shape.group_size + g;
  }
  // Whether the new entry may be reused, in a step that counts. `sampled`: amend's answer.
  MAC_DEVICE bool stores(const CompleteParams& p, int sampled) const {
    const int S = p.ring.layout.shape.anchors, old_end = band_start(seq_len - 1, p.band);
    const bool drawn = S == 0 || (hits == 0 && sampled >= 0 && sampled <= kCandidateRoom * sample_size(S, old_end));
    return shallow && old_end > 0 && drawn;
  }
  MAC_DEVICE int new_place(const CompleteParams& p) const {
    const int M = p.ring.layout.shape.entries, next = stored < 0 ? 0 : stored;
    return next < M ? next : next - M;
  }
};

// One warp. `bad`: the request has an error, and its slot may be none. The block's barrier has to follow.
MAC_DEVICE void look_at_kv_head(const CompleteParams& p, int request, int kv_head, bool bad, KvHeadStep& step) {
  const int G = p.shape.group_size, n = p.requests.seq_lens[request], lane = ptx::lane_id();
  const int64_t group = static_cast<int64_t>(request) * p.shape.num_kv_heads + kv_head;
  const bool reuses = p.matched.source && has_ring(p.requests, request) && n > 0 && !bad;
  const int slot = reuses ? p.requests.slots[request] : 0;
  int hits = 0, start = n;
  bool shallow = false;
#pragma unroll 1
  for (int g = lane; g < G; g += 32) {
    const int place = reuses ? p.matched.place[group * G + g] : kMiss;
    const int source = reuses ? p.matched.source[group * G + g] : kMiss;
    int depth = 0, first = 0;
    if (place != kMiss) {
      step.lse[g] = p.ring.lse(slot, kv_head, place)[g];
      depth = next_depth(p.ring.depth(slot, kv_head, place)[g]);
      first = band_start(source, p.band);
    }
    step.place[g] = place, step.depth[g] = depth;
    hits += place != kMiss;
    start = first < start ? first : start;
    shallow = shallow || depth < p.max_reuse_depth;
  }
  hits = static_cast<int>(ptx::reduce_add(hits));
  start = static_cast<int>(~ptx::reduce_max(~static_cast<uint32_t>(start)));
  shallow = ptx::ballot(shallow);
  if (lane != 0) return;
  step.request = request, step.kv_head = kv_head, step.seq_len = n, step.slot = slot;
  step.stored = reuses ? p.matched.stored[group] : kNoHistory;
  step.hits = hits, step.start = start, step.reuses = reuses, step.shallow = shallow;
}

// Four elements of a head: of the states that amend has found, and what is known of the head.
struct HeadPart {
  float4 old, fresh;
  float old_lse, fresh_lse, log_ratio;
};

MAC_DEVICE float4 weighted(float4 a, float first, float4 b, float second) {
  return {a.x * first + b.x * second, a.y * first + b.y * second, a.z * first + b.z * second,
          a.w * first + b.w * second};
}

// Four elements of a head of the matched entry.
MAC_DEVICE float4 load_reused(const CompleteParams& p, const KvHeadStep& step, int g, int column) {
  const int place = step.place[g];
  if (place == kMiss) return {0.f, 0.f, 0.f, 0.f};
  return ptx::load_float4(p.ring.out(step.slot, step.kv_head, place) + g * p.shape.head_dim + column);
}

// Writes four elements of a head's output and, if it is stored, of the new entry. `counts`: the step reuses, and
// nothing is wrong with it.
template <typename T>
MAC_DEVICE void complete_part(const CompleteParams& p, const KvHeadStep& step, bool counts, bool stores, int g,
                              int column, float4 reused, const HeadPart& part) {
  const int head = step.kv_head * p.shape.group_size + g, place = step.new_place(p);
  const bool hit = step.place[g] != kMiss, anchors = p.ring.layout.shape.anchors > 0;
  float4 carried = part.old, all;
  float carried_lse = part.old_lse, lse;
  if (hit && anchors) {
    const HitWeights weights = hit_weights(step.lse[g], part.old_lse, part.log_ratio, part.fresh_lse);
    all = weighted(weighted(reused, weights.entry, part.old, weights.replaced), 1.f, part.fresh, weights.fresh);
    lse = weights.lse;
  } else {
    if (hit) {
      const MergeWeights weights = merge_weights(step.lse[g], part.old_lse);
      carried = weighted(reused, weights.first, part.old, weights.second), carried_lse = weights.lse;
    }
    const MergeWeights weights = merge_weights(carried_lse, part.fresh_lse);
    all = weighted(carried, weights.first, part.fresh, weights.second), lse = weights.lse;
  }
  const bool has_sink = p.sinks && step.seq_len != 0;
  const MergeWeights tokens = has_sink ? merge_weights(lse, p.sinks[head]) : MergeWeights{1.f, 0.f, lse};
  const float elements[] = {all.x * tokens.first, all.y * tokens.first, all.z * tokens.first, all.w * tokens.first};
  T* out = static_cast<T*>(p.out) + step.request * p.out_batch_stride + head * p.out_head_stride + column;
#pragma unroll
  for (int i = 0; i < 4; ++i) out[i] = ptx::from_float<T>(elements[i]);
  if (column == 0) {
    p.lse[step.row(p, g)] = tokens.lse;
    if (counts) p.ring.last_lse(step.slot, step.kv_head)[g] = lse;
  }
  if (!stores) return;
  const int element = g * p.shape.head_dim + column;
  const auto copy = [&](const HeadsView& heads, T* to) {
    const T* from =
        static_cast<const T*>(heads.data) + step.request * heads.batch_stride + head * heads.head_stride + column;
#pragma unroll
    for (int i = 0; i < 4; ++i) to[element + i] = from[i];
  };
  copy(p.query, p.ring.query<T>(step.slot, step.kv_head, place));
  if (p.ring.layout.shape.anchors > 0) copy(p.rotated, p.ring.rotated<T>(step.slot, step.kv_head, place));
  ptx::store_float4(p.ring.out(step.slot, step.kv_head, place) + element, carried);
  if (column > 0) return;
  p.ring.lse(step.slot, step.kv_head, place)[g] = carried_lse;
  p.ring.depth(step.slot, step.kv_head, place)[g] = step.depth[g];
}

// Moves the slot's history on and counts what the KV head did, in a step that counts; one thread.
MAC_DEVICE void complete_history(const CompleteParams& p, const KvHeadStep& step, bool stores, int sampled) {
  const int n = step.seq_len, G = p.shape.group_size, S = p.ring.layout.shape.anchors;
  const int64_t slot = step.slot;
  const int stored = step.stored < 0 ? 0 : step.stored;
  *p.ring.stored(slot, step.kv_head) = stores ? next_stored(stored, p.ring.layout.shape.entries) : stored;
  if (stores) *p.ring.position(slot, step.kv_head, step.new_place(p)) = n - 1;
  if (step.stored == kNoHistory) *p.ring.spread(slot, step.kv_head) = 0.f;  // another request's
  if (S > 0) {
    const int size = sample_size(S, band_start(n - 1, p.band));
    float* tau = p.ring.tau(slot, step.kv_head);
    const float base = step.stored != kNoHistory && usable_tau(*tau) ? *tau : first_tau(size);
    *tau = step.hits == 0 && sampled >= 0 ? next_tau(base, sampled, size) : base;
  }
  int64_t* counters = p.ring.counters(slot);
  const int anchors = S > 0 && step.hits > 0 ? sampled : 0;
  ptx::atomic_add(counters + kKvHeadSteps, 1);
  ptx::atomic_add(counters + kKvHeadHits, step.hits == G);
  ptx::atomic_add(counters + kQueryHeadHits, step.hits);
  ptx::atomic_add(counters + kKvTokensRead, n - step.start + anchors);
  ptx::atomic_add(counters + kKvTokensFull, n);
  ptx::atomic_add(counters + kAnchorsRead, anchors);
  ptx::atomic_add(counters + kEntriesStored, stores);
  if (step.kv_head > 0) return;
  *p.ring.end(slot) = n;
  *p.ring.request(slot) = p.requests.request_ids ? p.requests.request_ids[step.request] : -1;
  ptx::atomic_add(counters + kSteps, 1);
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    complete_kernel(const __grid_constant__ CompleteParams p, const __grid_constant__ CompleteWorkspace w) {
  __shared__ KvHeadStep step;
  const int G = p.shape.group_size, H = p.shape.num_kv_heads, D = p.shape.head_dim, S = p.ring.layout.shape.anchors;
  const int request = blockIdx.x / H, kv_head = blockIdx.x % H;
  const int64_t group = blockIdx.x, rows = static_cast<int64_t>(p.shape.batch) * p.shape.num_qo_heads();
  ptx::grid_dependency_wait();
  ptx::grid_dependency_launch();
  const bool bad = w.status && w.status[request] != 0;
  if (threadIdx.x < 32) look_at_kv_head(p, request, kv_head, bad, step);
  ptx::sync_block();
  const int sampled = p.matched.source ? p.sampled[group] : kNotSampled;
  const bool stores = step.reuses && step.stores(p, sampled);
#pragma unroll 1
  for (int i = threadIdx.x; i < G * (D / 4); i += kThreads) {
    const int g = i / (D / 4), column = i % (D / 4) * 4;
    const int64_t row = step.row(p, g);
    HeadPart part{ptx::load_float4(p.states + row * D + column),
                  ptx::load_float4(p.states + (rows + row) * D + column), bad ? NAN : p.state_lse[row],
                  bad ? NAN : p.state_lse[rows + row], step.place[g] != kMiss ? p.log_ratio[row] : 0.f};
    complete_part<T>(p, step, step.reuses, stores, g, column, load_reused(p, step, g, column), part);
  }
  if (threadIdx.x == 0 && step.reuses) complete_history(p, step, stores, sampled);
  if (!stores) return;
  const int place = step.new_place(p);
#pragma unroll 4
  for (int i = threadIdx.x; i < S; i += kThreads) {
    p.ring.anchors(step.slot, kv_head, place)[i] = p.anchors[group * S + i];
    p.ring.anchor_weights(step.slot, kv_head, place)[i] = p.anchor_weights[group * S + i];
  }
}

}  // namespace mac_attn::cuda
