// Complete on the GPU: merge the parts, write the output and, if it may be reused, the new ring entry.
//
//   carried = old on a miss; reused (+) old on a hit without anchors
//   out = carried (+) fresh; by hit_weights on a hit with anchors, which nobody reuses
//   entry p = (q_match, q, carried, anchors, depth)
//   a sink joins `out` and its log-sum-exp, and nothing else
//
// Grid: one CTA for each (request, KV head), whose warps take the queries; then all of it cuts the sample of a miss
// (cut_sample.cuh). Traffic: two states, one record of the ring read and perhaps one entry written, the candidates
// of its sample, all small.
#pragma once

#include <algorithm>

#include "../state.h"
#include "cut_sample.cuh"
#include "head_dim.cuh"
#include "ptx/barrier.h"
#include "ptx/math.h"
#include "ptx/memory.h"
#include "ptx/warp.h"
#include "schedule.cuh"
#include "spread.cuh"

namespace mac_attn::cuda {

// With the largest heads, and those that are filled up, a thread of sixteen warps has too few registers.
constexpr int max_complete_warps(int head_dim, bool exact) {
  return head_dim <= 128 && exact ? 16 : 8;
}
// With candidates there are always as many, and shared memory to cut them in.
constexpr int complete_threads(const CompleteParams& p) {
  const int queries = p.shape.group_queries(), most = max_complete_warps(p.shape.head_dim, is_exact(p.shape));
  return 32 * (p.candidates ? most : std::min(std::max(queries, kWarps), most));
}
constexpr int complete_shared_bytes(const CompleteParams& p) {
  return p.candidates ? sizeof(SampleScratch) : 0;
}

// What a KV head does, the same for all of its threads.
struct CompleteWork {
  int request, kv_head, seq_len, slot;
  int tokens;           // of the query, 0 for padding
  bool bad, reuses;     // reuses: the request has a ring and tokens, and no error
  int stored, sampled;  // Matched::stored, amend's answer for the first token
  int hits;             // heads that hit, with all tokens
  bool stores;          // the new entry may be reused
  int place;            // of it; may be a matched one's

  MAC_DEVICE int position() const { return seq_len - tokens; }  // of the first query token
  // Of a query, in amend's states and match's answer.
  MAC_DEVICE int64_t row(const CompleteParams& p, int i) const { return group(p) * p.shape.group_queries() + i; }
  MAC_DEVICE int64_t group(const CompleteParams& p) const {
    return static_cast<int64_t>(request) * p.shape.num_kv_heads + kv_head;
  }
};

// What a query is made of.
template <int kHeadDim, bool kExact>
struct CompleteHead {
  static constexpr int kLaneElements = (kHeadDim + 31) / 32;
  float carried[kLaneElements], fresh[kLaneElements], reused[kLaneElements];
  float carried_lse, fresh_lse, reused_lse, log_ratio;
  int place, depth;  // of the matched entry

  // Of the states and the output.
  MAC_DEVICE static int elements(const CompleteParams& p) { return value_elements<kHeadDim, kExact>(p.shape); }
  MAC_DEVICE void load_states(const CompleteParams& p, const CompleteWork& work, int query) {
    const int V = elements(p);
    const int64_t row = work.row(p, query);
    const int64_t fresh_row = static_cast<int64_t>(p.shape.batch) * p.shape.num_queries() + row;
#pragma unroll
    for (int i = 0; i < kLaneElements; ++i) {
      const int d = ptx::lane_id() + 32 * i;
      if (d < V) carried[i] = p.states[row * V + d], fresh[i] = p.states[fresh_row * V + d];
    }
    carried_lse = p.state_lse[row], fresh_lse = p.state_lse[fresh_row];
    place = p.matched.source ? p.matched.place[row] : kMiss;
    log_ratio = p.matched.source ? p.log_ratio[row] : 0.f;
  }
  MAC_DEVICE void load_entry(const CompleteParams& p, const CompleteWork& work, int g) {
    if (!work.reuses || place == kMiss) return;
    const int V = elements(p);
#pragma unroll
    for (int i = 0; i < kLaneElements; ++i) {
      const int d = ptx::lane_id() + 32 * i;
      if (d < V) reused[i] = p.ring.out(work.slot, work.kv_head, place)[g * V + d];
    }
    reused_lse = p.ring.lse(work.slot, work.kv_head, place)[g];
    depth = p.ring.depth(work.slot, work.kv_head, place)[g];
  }
  // Makes of `carried` what the head carries on; with anchors nothing, and of `fresh` the output.
  MAC_DEVICE void carry(const CompleteParams& p, const CompleteWork& work) {
    const bool hit = work.reuses && place != kMiss;
    depth = hit ? next_depth(depth) : 0;
    if (!hit) return;
    const int V = elements(p);
    if (p.ring.layout.shape.anchors > 0) {
      const HitWeights weights = hit_weights(reused_lse, carried_lse, log_ratio, fresh_lse);
      fresh_lse = weights.lse, carried_lse = -INFINITY;
#pragma unroll
      for (int i = 0; i < kLaneElements; ++i) {
        if (ptx::lane_id() + 32 * i >= V) continue;
        fresh[i] = reused[i] * weights.entry + carried[i] * weights.replaced + fresh[i] * weights.fresh;
        carried[i] = 0.f;
      }
      return;
    }
    const MergeWeights weights = merge_weights(reused_lse, carried_lse);
    carried_lse = weights.lse;
#pragma unroll
    for (int i = 0; i < kLaneElements; ++i) {
      if (ptx::lane_id() + 32 * i < V) carried[i] = reused[i] * weights.first + carried[i] * weights.second;
    }
  }
};

// What a KV head does, from all of its heads' first queries; every warp for itself. `place`: of the lane's first
// head.
MAC_DEVICE void look_at_heads(const CompleteParams& p, CompleteWork& work, int place) {
  const int G = p.shape.group_size, M = p.ring.layout.shape.entries, S = p.ring.layout.shape.anchors;
  bool shallow = false;
#pragma unroll 1
  for (int g = ptx::lane_id(); g < G; g += 32) {
    if (g >= 32) place = p.matched.place[work.row(p, g)];
    const bool hit = place != kMiss;
    const int depth = hit ? next_depth(p.ring.depth(work.slot, work.kv_head, place)[g]) : 0;
    work.hits += hit;
    shallow = shallow || depth < p.max_reuse_depth;
  }
  work.hits = static_cast<int>(ptx::reduce_add(work.hits));
  const int old_end = band_start(work.position(), p.band);
  const bool drawn =
      S == 0 || (work.hits == 0 && work.sampled >= 0 && work.sampled <= kCandidateRoom * sample_size(S, old_end));
  work.stores = ptx::ballot(shallow) && old_end > 0 && drawn;
  const int stored = work.stored < 0 ? 0 : work.stored;
  work.place = stored < M ? stored : stored - M;
}

// What a lane's query token has matched, the oldest of its heads, and how many anchors it has read. Asked for
// before it is known whether it is there.
struct TokenMatch {
  int oldest, anchors;

  MAC_DEVICE static TokenMatch load(const CompleteParams& p, int64_t group) {
    static_assert(kMaxQueryTokens <= 32, "a lane for each");
    const int G = p.shape.group_size;
    TokenMatch match{0x7fffffff, 0};
    if (ptx::lane_id() >= p.shape.tokens) return match;
    const int64_t token = group * p.shape.tokens + ptx::lane_id();
    if (p.ring.layout.shape.anchors > 0) match.anchors = p.sampled[token];
#pragma unroll 4
    for (int g = 0; g < G; ++g) {
      const int source = p.matched.source[token * G + g];
      match.oldest = source < match.oldest ? source : match.oldest;
    }
    return match;
  }
};

// What the query heads share, but for the entry's rows; one warp. Nobody else reads what it writes.
MAC_DEVICE void complete_history(const CompleteParams& p, const CompleteWork& work, TokenMatch match) {
  const int n = work.seq_len, G = p.shape.group_size, S = p.ring.layout.shape.anchors, lane = ptx::lane_id();
  const int64_t slot = work.slot;
  // A miss reads once for all of its query tokens, on a hit each has its own.
  const bool hits = work.hits == G, counts = hits && lane < work.tokens;
  const int mine = work.position() + lane + 1 - band_start(match.oldest, p.band) + match.anchors;
  const int read = static_cast<int>(ptx::reduce_add(counts ? mine : 0));
  const int anchors = static_cast<int>(ptx::reduce_add(counts ? match.anchors : 0));
  if (lane != 0) return;
  const int stored = work.stored < 0 ? 0 : work.stored;
  *p.ring.stored(slot, work.kv_head) = work.stores ? next_stored(stored, p.ring.layout.shape.entries) : stored;
  if (work.stores) *p.ring.position(slot, work.kv_head, work.place) = work.position();
  if (S > 0) {
    const int size = sample_size(S, band_start(work.position(), p.band));
    float* tau = p.ring.tau(slot, work.kv_head);
    int32_t* missed = p.ring.missed(slot, work.kv_head);
    *missed = work.hits > 0 ? 0 : next_missed(work.stored == kNoHistory ? 0 : *missed);
    const float base = work.stored != kNoHistory && usable_tau(*tau) ? *tau : first_tau(size);
    *tau = work.hits == 0 && work.sampled >= 0 ? next_tau(base, work.sampled, size) : base;
  }
  int64_t* counters = p.ring.counters(slot);
  ptx::atomic_add(counters + kKvHeadSteps, work.tokens);
  ptx::atomic_add(counters + kKvHeadHits, hits ? work.tokens : 0);
  ptx::atomic_add(counters + kQueryHeadHits, work.hits * work.tokens);
  ptx::atomic_add(counters + kKvTokensRead, hits ? read : n);
  ptx::atomic_add(counters + kKvTokensFull, tokens_of_steps(n, work.tokens));
  ptx::atomic_add(counters + kAnchorsRead, anchors);
  ptx::atomic_add(counters + kEntriesStored, work.stores);
  if (work.kv_head > 0) return;
  *p.ring.end(slot) = work.position() + 1;
  *p.ring.reach(slot) = n;
  *p.ring.request(slot) = p.requests.request_ids ? p.requests.request_ids[work.request] : -1;
  ptx::atomic_add(counters + kSteps, work.tokens);
}

// Asks for what a query of head `g` will read besides amend's states, while amend is still running. What this reads
// itself may still be written by the launches before it: a wrong address is a prefetch in vain, within the ring all
// the same.
template <typename T, int kHeadDim, bool kExact>
MAC_DEVICE void prefetch_query(const CompleteParams& p, int request, int kv_head, int query, int g, int lane) {
  constexpr int kLine = 128;
  const int G = p.shape.group_size, D = row_elements<kHeadDim, kExact>(p.shape);
  const int V = value_elements<kHeadDim, kExact>(p.shape);
  const T* stored = static_cast<const T*>(p.query.data) + request * p.query.batch_stride +
                    (kv_head * G + g) * p.query.head_stride;
  if (query < G && lane * kLine < D * 2) ptx::prefetch_l2(stored + lane * kLine / 2);
  const int64_t group = static_cast<int64_t>(request) * p.shape.num_kv_heads + kv_head;
  const int place = p.matched.place[group * p.shape.group_queries() + query], slot = p.requests.slots[request];
  if (place < 0 || place >= p.ring.layout.shape.entries || slot < 0 || slot >= p.ring.num_slots) return;
  if (lane * kLine < V * 4) ptx::prefetch_l2(p.ring.out(slot, kv_head, place) + g * V + lane * kLine / 4);
  if (lane == 30) ptx::prefetch_l2(p.ring.lse(slot, kv_head, place) + g);
  if (lane == 31) ptx::prefetch_l2(p.ring.depth(slot, kv_head, place) + g);
}

// Writes a head of the new entry; one warp, all of whose lanes have read the matched one.
template <typename T, int kHeadDim, bool kExact>
MAC_DEVICE void store_head(const CompleteParams& p, const CompleteWork& work, int g,
                           const CompleteHead<kHeadDim, kExact>& head) {
  const int D = row_elements<kHeadDim, kExact>(p.shape), V = head.elements(p);
  const int lane = ptx::lane_id(), kv_head = work.kv_head, qo_head = kv_head * p.shape.group_size + g;
  const auto row_of = [&](const HeadsView& heads) {
    return static_cast<const T*>(heads.data) + work.request * heads.batch_stride + qo_head * heads.head_stride;
  };
  // All are on their way before the first is stored, which the compiler cannot know to be elsewhere.
  const bool anchors = p.ring.layout.shape.anchors > 0;
  const T* query = row_of(p.query);
  const T* rotated = anchors ? row_of(p.rotated) : query;
  T first[head.kLaneElements], second[head.kLaneElements];
#pragma unroll
  for (int i = 0; i < head.kLaneElements; ++i) {
    if (lane + 32 * i < D) first[i] = query[lane + 32 * i], second[i] = rotated[lane + 32 * i];
  }
#pragma unroll
  for (int i = 0; i < head.kLaneElements; ++i) {
    const int element = g * D + lane + 32 * i;
    if (lane + 32 * i >= D) continue;
    p.ring.query<T>(work.slot, kv_head, work.place)[element] = first[i];
    if (anchors) p.ring.rotated<T>(work.slot, kv_head, work.place)[element] = second[i];
  }
#pragma unroll
  for (int i = 0; i < head.kLaneElements; ++i) {
    if (lane + 32 * i < V) p.ring.out(work.slot, kv_head, work.place)[g * V + lane + 32 * i] = head.carried[i];
  }
  if (lane != 0) return;
  p.ring.lse(work.slot, kv_head, work.place)[g] = head.carried_lse;
  p.ring.depth(work.slot, kv_head, work.place)[g] = head.depth;
}

// Writes the anchors of the new entry, several of them at a time as above. The whole block takes part.
MAC_DEVICE void store_anchors(const CompleteParams& p, const CompleteWork& work, int64_t group) {
  constexpr int kAtOnce = 4;
  const int S = p.ring.layout.shape.anchors, threads = blockDim.x;
  int32_t* anchors = p.ring.anchors(work.slot, work.kv_head, work.place);
  float* weights = p.ring.anchor_weights(work.slot, work.kv_head, work.place);
#pragma unroll 1
  for (int begin = threadIdx.x; begin < S; begin += kAtOnce * threads) {
    int32_t token[kAtOnce];
    float a[kAtOnce];
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) {
      const int i = begin + j * threads;
      if (i < S) token[j] = p.anchors[group * S + i], a[j] = p.anchor_weights[group * S + i];
    }
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) {
      const int i = begin + j * threads;
      if (i < S) anchors[i] = token[j], weights[i] = a[j];
    }
  }
}

template <typename T, int kHeadDim, bool kExact>
MAC_DEVICE void write_out(const CompleteParams& p, const CompleteWorkspace& w, const CompleteWork& work, int query,
                          const CompleteHead<kHeadDim, kExact>& head) {
  const int lane = ptx::lane_id(), G = p.shape.group_size;
  const MergeWeights merge = merge_weights(head.carried_lse, head.fresh_lse);
  const int token = w.group_size.divide(query), g = query - token * G, qo_head = work.kv_head * G + g;
  T* out = static_cast<T*>(p.out) + work.request * p.out_batch_stride + token * p.out_token_stride +
           qo_head * p.out_head_stride;
  MergeWeights tokens{1.f, 0.f, merge.lse};
  if (p.sinks && token < work.tokens) tokens = merge_weights(merge.lse, p.sinks[qo_head]);
  const float carried_weight = merge.first * tokens.first, fresh_weight = merge.second * tokens.first;
  if (lane == 0) {
    const int64_t row = int64_t{work.request} * p.shape.tokens + token;
    p.lse[row * p.shape.num_qo_heads() + qo_head] = work.bad ? NAN : tokens.lse;
    if (work.reuses && token == 0) p.ring.last_lse(work.slot, work.kv_head)[g] = merge.lse;
  }
#pragma unroll
  for (int i = 0; i < head.kLaneElements; ++i) {
    const float value = head.carried[i] * carried_weight + head.fresh[i] * fresh_weight;
    if (lane + 32 * i < head.elements(p)) out[lane + 32 * i] = ptx::from_float<T>(work.bad ? NAN : value);
  }
}

// At batch 1 this is a chain of waits for memory, so everything is asked for as early as its address is known.
template <typename T, int kHeadDim, bool kExact = true>
__global__ void __launch_bounds__(32 * max_complete_warps(kHeadDim, kExact), 1)
    complete_kernel(const __grid_constant__ CompleteParams p, const __grid_constant__ CompleteWorkspace w) {
  const int G = p.shape.group_size, H = p.shape.num_kv_heads, lane = ptx::lane_id();
  const int queries = p.shape.group_queries(), warp = threadIdx.x / 32, warps = blockDim.x / 32;
  CompleteWork work{};
  work.request = blockIdx.x / H, work.kv_head = blockIdx.x % H;
  const auto head_of = [&](int query) { return query - w.group_size.divide(query) * G; };
  ptx::grid_dependency_launch();
#pragma unroll 1
  for (int i = warp; p.matched.source && i < queries; i += warps) {
    prefetch_query<T, kHeadDim, kExact>(p, work.request, work.kv_head, i, head_of(i), lane);
  }
  ptx::grid_dependency_wait();
  CompleteHead<kHeadDim, kExact> head;
  if (warp < queries) head.load_states(p, work, warp);
  const int64_t group = work.group(p);
  int place = kMiss;  // of the head that the lane looks at
  TokenMatch match{};
  if (p.matched.source) {
    if (lane < G) place = p.matched.place[work.row(p, lane)];
    work.stored = p.matched.stored[group], work.sampled = p.sampled[group * p.shape.tokens];
    if (warp == warps - 1) match = TokenMatch::load(p, group);
  }
  work.seq_len = p.requests.seq_lens[work.request],
  work.slot = p.requests.slots ? p.requests.slots[work.request] : 0;
  work.bad = w.status && w.status[work.request] != 0;
  work.tokens = work.seq_len == 0 ? 0 : query_len(p.shape, p.requests, work.request);
  work.reuses = p.matched.source && has_ring(p.requests, work.request) && work.seq_len > 0 && !work.bad;
  if (warp < queries) head.load_entry(p, work, head_of(warp));
  if (work.reuses) {
    look_at_heads(p, work, place);
    ptx::sync_block();  // all warps have read the depths, some of which may be the new entry's
  }
  const auto load = [&](int query) { head.load_states(p, work, query), head.load_entry(p, work, head_of(query)); };
  const auto answer = [&](int query) {
    head.carry(p, work);
    write_out<T>(p, w, work, query, head);
  };
  // The new entry may take the place of one that a later token reuses: those come before it then.
  const int last = work.stores && work.hits > 0 ? G : queries;
#pragma unroll 1
  for (int i = last + warp; i < queries; i += warps) load(i), answer(i);
  if (last < queries) ptx::sync_block();
#pragma unroll 1
  for (int i = warp; i < last; i += warps) {
    if (i != warp || last < queries) load(i);
    answer(i);
    ptx::sync_warp();
    if (work.stores && i < G) store_head<T>(p, work, i, head);
  }
  if (!work.reuses) return;
  if (warp == warps - 1) complete_history(p, work, match);
  constexpr int kMostThreads = 32 * max_complete_warps(kHeadDim, kExact);
  if (measures_spread(work.seq_len, work.tokens, work.stored == kNoHistory)) {
    measure_spread<T, kMostThreads>(p, work.request, work.kv_head, work.seq_len,
                                    p.ring.spread(work.slot, work.kv_head));
  }
  if (!work.stores) return;
  if (!p.candidates) return store_anchors(p, work, group);
  const int S = p.ring.layout.shape.anchors;
  const Drawn drawn{static_cast<const Candidate*>(p.candidates) + group * kCandidateRoom * S, work.sampled,
                    band_start(work.position(), p.band), sample_seed(work.position(), work.kv_head, p.layer)};
  write_sample<kMostThreads>(drawn, S, *static_cast<SampleScratch*>(dynamic_shared()),
                             p.ring.anchors(work.slot, work.kv_head, work.place),
                             p.ring.anchor_weights(work.slot, work.kv_head, work.place));
}

}  // namespace mac_attn::cuda
