// Match on the GPU: for every decision, the ring entry whose query has the smallest score.
//
//   d2_h(c) = |q_h - ring_query_h(c)|^2,   score(c) = mean over the group of d2_h / theta_h
//   (granularity "head": every head alone);  a hit is a score below 1, a tie goes to the youngest.
//
// Grid: `splits` CTAs of eight warps for each query token of each (request, KV head), which share the candidates
// out. Where they are a cluster (sm_90) they leave what they have found in the first one's shared memory,
// elsewhere, as those of several tokens, in global memory: the first or last one to finish writes the answer. A few
// lanes read a ring row, so that a warp looks at up to eight candidates at a time. Partial sums only grow, so most
// candidates are ruled out by their first head; only the others' heads are read on, a few at a time: each read is a
// wait for memory, and at batch 1 there is nothing else to do meanwhile. Traffic: between 1/G and all of the ring's
// queries of the KV head.
#pragma once

#include "head_dim.cuh"
#include "kernels.h"
#include "ptx/barrier.h"
#include "ptx/cluster.h"
#include "ptx/math.h"
#include "ptx/memory.h"
#include "ptx/warp.h"
#include "simt.h"

namespace mac_attn::cuda {

constexpr int kMatchThreads = 256;
constexpr int kMatchWarps = kMatchThreads / 32;

template <int kHeadDim>
struct MatchLayout {
  static constexpr int kLanes = kHeadDim <= 128 ? 4 : kHeadDim <= 256 ? 8 : 16;  // of a warp, for one row
  static constexpr int kPieces = kHeadDim / 8;                                   // of 16 bytes in a row
  static constexpr int kLoads = (kPieces + kLanes - 1) / kLanes;
  static constexpr int kPerWarp = 32 / kLanes;
  static constexpr int kPerBlock = kMatchWarps * kPerWarp;
  static constexpr int kHeadsAtOnce = 3;
};

// A candidate as one number, the greater the better and never 0: the bits of its total (they are ordered like a
// number that is not negative) and its age, so that the youngest wins a tie. The youngest entry has age 1, 0 is
// none.
MAC_DEVICE unsigned long long match_key(float total, int age) {
  return ~(static_cast<unsigned long long>(float_bits(total)) << 32 | static_cast<uint32_t>(age));
}
MAC_DEVICE float match_total(unsigned long long key) {
  return bits_float(static_cast<uint32_t>(~key >> 32));
}
MAC_DEVICE int match_age(unsigned long long key) {
  return static_cast<int>(~key & 0xffffffffu);
}

// This thread's share of looking whether the request can be served: Error bits.
MAC_DEVICE int request_errors(const MatchParams& p, int request, int n, int slot) {
  if (n == 0) return 0;
  int errors = fits_query(p.shape, p.requests, request) ? 0 : kBadLength;
  if (slot == kNoSlot) return errors;
  if (slot < 0 || slot >= p.ring.num_slots) errors |= kBadSlot;
  for (int b = threadIdx.x; b < p.shape.batch; b += kMatchThreads) {
    if (b != request && p.requests.slots[b] == slot && p.requests.seq_lens[b] != 0) errors |= kBadSlot;
  }
  return errors;
}

// One lane's pieces of a ring row of `elements`: piece lane % kLanes and every kLanes-th after it.
template <typename T, int kHeadDim>
struct RowPieces {
  using Layout = MatchLayout<kHeadDim>;
  uint4 data[Layout::kLoads];

  MAC_DEVICE void load(const T* row, int elements, bool wanted) {
    const int first = ptx::lane_id() % Layout::kLanes;
#pragma unroll
    for (int i = 0; i < Layout::kLoads; ++i) {
      const int piece = first + i * Layout::kLanes;
      data[i] = uint4{0, 0, 0, 0};
      if (wanted && piece * 8 < elements) data[i] = ptx::load_stream_16(row + piece * 8);
    }
  }
  // |q - row|^2, the same in all lanes of the row.
  MAC_DEVICE float distance(const float* query, int elements) const {
    const int first = ptx::lane_id() % Layout::kLanes;
    float sum = 0.f;
#pragma unroll
    for (int i = 0; i < Layout::kLoads; ++i) {
      const int piece = first + i * Layout::kLanes;
      if (piece * 8 >= elements) continue;
      const float4 q0 = ptx::load_float4(query + piece * 8), q1 = ptx::load_float4(query + piece * 8 + 4);
      const float2 s0 = ptx::unpack2<T>(data[i].x), s1 = ptx::unpack2<T>(data[i].y);
      const float2 s2 = ptx::unpack2<T>(data[i].z), s3 = ptx::unpack2<T>(data[i].w);
      sum += (q0.x - s0.x) * (q0.x - s0.x) + (q0.y - s0.y) * (q0.y - s0.y) + (q0.z - s1.x) * (q0.z - s1.x) +
             (q0.w - s1.y) * (q0.w - s1.y) + (q1.x - s2.x) * (q1.x - s2.x) + (q1.y - s2.y) * (q1.y - s2.y) +
             (q1.z - s3.x) * (q1.z - s3.x) + (q1.w - s3.y) * (q1.w - s3.y);
    }
#pragma unroll
    for (int i = 1; i < Layout::kLanes; i *= 2) sum += ptx::shfl_xor(sum, i);
    return sum;
  }
};

// What the threads of a CTA share while they search; behind it lie the query as floats, [G, kHeadDim], and of a
// cluster what the other CTAs have found, a key for each of their decisions, 0 for none. Dynamic: they write to it.
struct alignas(16) MatchShared {
  unsigned long long best[kMaxGroup];
  float scale[kMaxGroup];  // 1 / theta
  int errors, is_last;

  // Before any thread that searches. `found`: the keys of other CTAs, so many.
  MAC_DEVICE void clear(const MatchParams& p, unsigned long long* found, int keys) {
    const int G = p.shape.group_size;
#pragma unroll 1
    for (int g = threadIdx.x; g < G; g += kMatchThreads) {
      best[g] = match_key(p.per_head ? 1.f : static_cast<float>(G), 0);
    }
#pragma unroll 1
    for (int i = threadIdx.x; i < keys; i += kMatchThreads) found[i] = 0;
    if (threadIdx.x == 0) errors = 0;
  }
};

// The request of a CTA, as far as match needs it.
struct MatchRequest {
  int request, kv_head, token, seq_len, given_slot;
  bool readable;  // it has tokens and its slot is there
  int slot;       // that, or 0: padding may name any
  int tokens;     // of the query

  MAC_DEVICE int first_position() const { return seq_len - tokens; }
};

MAC_DEVICE MatchRequest match_request(const MatchParams& p, int group, int token) {
  const int request = group / p.shape.num_kv_heads, kv_head = group - request * p.shape.num_kv_heads;
  const int n = p.requests.seq_lens[request], slot = p.requests.slots[request];
  const bool readable = n > 0 && slot >= 0 && slot < p.ring.num_slots;
  return {request, kv_head, token, n, slot, readable, readable ? slot : 0, query_len(p.shape, p.requests, request)};
}

// Place of the entry of an age, and the other way.
MAC_DEVICE int place_of_age(int age, int stored, int entries) {
  const int place = stored - age;
  return place < entries ? place : place - entries;
}
MAC_DEVICE int age_of_place(int place, int stored, int entries) {
  const int age = stored - place;
  return age <= entries ? age : age - entries;
}

// Brings a query head and its scale to shared memory; one warp.
template <typename T, int kHeadDim, bool kExact>
MAC_DEVICE void prepare_head(const MatchParams& p, const MatchRequest& r, int g, float* query,
                             MatchShared& shared) {
  constexpr int kLaneElements = (kHeadDim + 31) / 32;
  const int head = r.kv_head * p.shape.group_size + g, lane = ptx::lane_id();
  const T* row = static_cast<const T*>(p.query.data) + r.request * p.query.batch_stride +
                 r.token * p.query.token_stride + head * p.query.head_stride;
  const float threshold = p.threshold[head], spread = *p.ring.spread(r.slot, r.kv_head);
  float norm = 0.f;
#pragma unroll
  for (int i = 0; i < kLaneElements; ++i) {
    if (lane + 32 * i >= row_elements<kHeadDim, kExact>(p.shape)) continue;
    const float x = ptx::to_float(row[lane + 32 * i]);
    query[g * kHeadDim + lane + 32 * i] = x, norm += x * x;
  }
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) norm += ptx::shfl_xor(norm, distance);
  if (lane != 0) return;
  float theta = p.relative ? threshold * norm : threshold;
  if (p.max_drift > 0.f) theta = fminf(theta, drift_bound(p.max_drift, spread, norm));
  // NaN for a head that can never hit; in a group it decides for all.
  const bool can_hit = norm < INFINITY && theta > 0.f && theta < INFINITY;
  shared.scale[g] = can_hit ? 1.f / theta : NAN;
}

// One CTA's search of the ring.
template <typename T, int kHeadDim, bool kExact>
struct RingSearch {
  using Layout = MatchLayout<kHeadDim>;
  static constexpr int kLanes = Layout::kLanes;

  // Tag, depth and first head of a candidate that may turn out to be none.
  struct Candidate {
    int place, tag, depth;
    RowPieces<T, kHeadDim> first_head;
  };
  const MatchParams& p;
  const MatchRequest& r;
  int first_place, stride, places;  // the warp's; places that may hold a candidate
  int stored;                       // Matched::stored
  Candidate next;

  MAC_DEVICE int elements() const { return row_elements<kHeadDim, kExact>(p.shape); }
  // Asks for the first rows and for the slot's history: neither waits for the other.
  MAC_DEVICE RingSearch(const MatchParams& p, const MatchRequest& r, int split, int splits) : p(p), r(r) {
    const int M = p.ring.layout.shape.entries;
    first_place = split * Layout::kPerBlock + static_cast<int>(threadIdx.x / 32) * Layout::kPerWarp;
    stride = splits * Layout::kPerBlock;
    places = r.readable ? M : 0;
    next = fetch(first_place + ptx::lane_id() / kLanes);
    const int64_t id = p.requests.request_ids ? p.requests.request_ids[r.request] : -1;
    stored = *p.ring.stored(r.slot, r.kv_head);
    const bool unbroken =
        r.readable && goes_on(p.ring, r.slot, r.first_position()) && *p.ring.request(r.slot) == id;
    if (!unbroken || stored < 0 || stored >= 2 * M) stored = kNoHistory;
    places = stored < places ? stored : places;
  }
  MAC_DEVICE Candidate fetch(int place) const {
    const bool there = place < places;
    Candidate c;
    c.place = there ? place : 0;
    c.first_head.load(p.ring.query<T>(r.slot, r.kv_head, c.place), elements(), there);
    c.tag = *p.ring.position(r.slot, r.kv_head, c.place);
    c.depth = *p.ring.depth(r.slot, r.kv_head, c.place);
    if (!there) c.tag = -1;
    return c;
  }
  // Leaves the best key of every decision in `shared.best`.
  MAC_DEVICE void look(const float* query, MatchShared& shared) {
    const int G = p.shape.group_size, M = p.ring.layout.shape.entries;
    const int lane = ptx::lane_id(), first = r.first_position(), position = first + r.token;
    if (shared.errors) stored = kNoHistory, places = 0;
    const bool searches = stored > 0 && position + 1 >= p.min_context && r.token < r.tokens;
    const int oldest = oldest_candidate(position, p.window, p.band, p.ring.layout.shape.anchors, r.tokens);
#pragma unroll 1
    for (int at = first_place; searches && at < places; at += stride) {
      const Candidate c = next;
      if (at + stride < places) next = fetch(at + stride + lane / kLanes);
      // With decisions per head every head has a depth of its own, looked at below.
      bool alive =
          c.place < places && c.tag >= oldest && c.tag < first && (p.per_head || c.depth < p.max_reuse_depth);
      RowPieces<T, kHeadDim> head[Layout::kHeadsAtOnce];
      head[0] = c.first_head;
      float total = 0.f;
#pragma unroll 1
      for (int g = 0, end = 1; g < G && ptx::ballot(alive); g = end, end += Layout::kHeadsAtOnce) {
        const T* rows = p.ring.query<T>(r.slot, r.kv_head, c.place);
#pragma unroll
        for (int i = 0; i < Layout::kHeadsAtOnce; ++i) {
          if (g > 0) head[i].load(rows + (g + i) * elements(), elements(), alive && g + i < G);
        }
#pragma unroll
        for (int i = 0; i < Layout::kHeadsAtOnce; ++i) {
          if (g + i >= end || g + i >= G) break;
          const float score = head[i].distance(query + (g + i) * kHeadDim, elements()) * shared.scale[g + i];
          if (p.per_head) {
            // NaN is no candidate.
            const int32_t* depth = p.ring.depth(r.slot, r.kv_head, c.place) + g + i;
            if (alive && lane % kLanes == 0 && score < 1.f && *depth < p.max_reuse_depth) {
              ptx::atomic_max(&shared.best[g + i], match_key(score, age_of_place(c.place, stored, M)));
            }
          } else {
            // Nor is a total beyond the best so far, which cannot win. The best may be changing, and the lanes of a
            // candidate have to agree.
            total += score;
            alive = alive && total <= match_total(ptx::load_volatile(&shared.best[0]));
            alive = ptx::shfl(static_cast<int>(alive), lane / kLanes * kLanes);
          }
        }
      }
      if (alive && !p.per_head && lane % kLanes == 0) {
        ptx::atomic_max(&shared.best[0], match_key(total, age_of_place(c.place, stored, M)));
      }
    }
  }
};

// What the CTAs of a KV head have found, brought together in the first one, whose `found` the others write to: they
// are a cluster. Returns whether this is the first. Each has a place of its own there: with atomics on the first
// one's best keys, which its threads may still be raising, some were lost (64-bit atomics on the shared memory of
// another CTA).
MAC_DEVICE bool meet_in_cluster(int decisions, MatchShared& shared, unsigned long long* found) {
  const int rank = ptx::cluster_rank();
  bool tells = false;
  if (rank != 0) {
    unsigned long long* mine = ptx::shared_of(found, 0) + (rank - 1) * decisions;
#pragma unroll 1
    for (int g = threadIdx.x; g < decisions; g += kMatchThreads) {
      if (match_age(shared.best[g]) == 0) continue;
      mine[g] = shared.best[g];
      tells = true;
    }
  }
  if (ptx::ballot(tells)) {
    ptx::cluster_arrive();
  } else {
    ptx::cluster_arrive_relaxed();
  }
  ptx::cluster_wait();
  if (rank != 0) return false;
  const int others = ptx::cluster_size() - 1;
#pragma unroll 1
  for (int g = threadIdx.x; g < decisions; g += kMatchThreads) {
    unsigned long long best = shared.best[g];
    for (int i = 0; i < others; ++i) best = found[i * decisions + g] > best ? found[i * decisions + g] : best;
    shared.best[g] = best;
  }
  ptx::sync_block();
  return true;
}

// The same in global memory, where the last to come finds it all and brings it to `keys`, of all query tokens.
// Returns whether this is the last.
MAC_DEVICE bool meet_in_memory(const MatchParams& p, const MatchWorkspace& w, int group, int token, int decisions,
                               MatchShared& shared, unsigned long long* keys) {
  unsigned long long* first_best = w.best + static_cast<int64_t>(group) * p.shape.group_queries();
  unsigned long long* all_best = first_best + token * decisions;
  bool hit = false;
#pragma unroll 1
  for (int g = threadIdx.x; g < decisions; g += kMatchThreads) {
    if (match_age(shared.best[g]) == 0) continue;
    ptx::atomic_max(&all_best[g], shared.best[g]);
    hit = true;
  }
  if (hit) ptx::fence();  // most CTAs have none, and a fence takes its time
  ptx::sync_block();
  const int others = w.splits * p.shape.tokens - 1;
  if (threadIdx.x == 0) shared.is_last = ptx::atomic_add_acquire(w.done + group, 1) == others;
  ptx::sync_block();
  if (!shared.is_last) return false;
  // Both as the next call wants to find them; no other CTA comes here any more.
  if (threadIdx.x == 0) w.done[group] = 0;
#pragma unroll 1
  for (int i = threadIdx.x; i < decisions * p.shape.tokens; i += kMatchThreads) {
    const unsigned long long key = ptx::atomic_exchange(&first_best[i], 0);
    keys[i] = key ? key : match_key(0.f, 0);
  }
  ptx::sync_block();
  return true;
}

template <int kHeadDim>
constexpr size_t match_shared_bytes(int group_size, int cluster) {
  return sizeof(MatchShared) + (sizeof(float) * kHeadDim + sizeof(unsigned long long) * (cluster - 1)) * group_size;
}

// CTAs of a processor. With half of its registers the instance of 96 keeps two of them in local memory.
constexpr int match_ctas(int head_dim) {
  return head_dim == 96 ? 1 : 2;
}

template <typename T, int kHeadDim, bool kExact = true>
__global__ void __launch_bounds__(kMatchThreads, match_ctas(kHeadDim))
    match_kernel(const __grid_constant__ MatchParams p, const __grid_constant__ MatchWorkspace w) {
  const int G = p.shape.group_size, T_ = p.shape.tokens, warp = threadIdx.x / 32;
  const int row = blockIdx.x / w.splits, split = blockIdx.x % w.splits;
  const int group = T_ == 1 ? row : row / T_;
  const int others = ptx::cluster_size() - 1, decisions = p.per_head ? G : 1;
  MatchShared& shared = *static_cast<MatchShared*>(dynamic_shared());
  float* query = reinterpret_cast<float*>(&shared + 1);                       // [G, kHeadDim]
  auto* found = reinterpret_cast<unsigned long long*>(query + G * kHeadDim);  // [others, decisions]

  shared.clear(p, found, others * decisions);
  ptx::sync_block();
  if (others > 0) ptx::cluster_arrive();  // `clear` comes before what others may write
  ptx::grid_dependency_wait();            // the last step's ring
  ptx::grid_dependency_launch();
  const MatchRequest r = match_request(p, group, row - group * T_);
  RingSearch<T, kHeadDim, kExact> search(p, r, split, w.splits);
#pragma unroll 1
  for (int g = warp; g < G; g += kMatchWarps) prepare_head<T, kHeadDim, kExact>(p, r, g, query, shared);
  const int errors = request_errors(p, r.request, r.seq_len, r.given_slot);
  if (errors) ptx::atomic_or(&shared.errors, errors);
  ptx::sync_block();
  if (threadIdx.x == 0 && split == 0 && r.token == 0) {
    if (r.kv_head == 0) w.status[r.request] = shared.errors;
    if (shared.errors && w.error_flag) ptx::atomic_or(w.error_flag, shared.errors);
  }
  search.look(query, shared);
  ptx::sync_block();

  const int M = p.ring.layout.shape.entries;
  const unsigned long long* keys = shared.best;  // [T, decisions]
  if (others > 0) {
    ptx::cluster_wait();
    if (!meet_in_cluster(decisions, shared, found)) return;
  } else if (w.splits * T_ > 1) {
    // Nobody needs the query any more, and a decision's keys take less than its floats.
    auto* all_keys = reinterpret_cast<unsigned long long*>(query);
    if (!meet_in_memory(p, w, group, r.token, decisions, shared, all_keys)) return;
    keys = all_keys;
  }
#pragma unroll 1
  for (int g = threadIdx.x; g < G; g += kMatchThreads) {
    const int decision = p.per_head ? g : 0;
    bool hit = true;  // with all tokens that are there
#pragma unroll 1
    for (int t = 0; t < T_ && t < r.tokens; ++t) hit = hit && match_age(keys[t * decisions + decision]) != 0;
#pragma unroll 1
    for (int t = 0; t < T_; ++t) {
      const int age = hit && t < r.tokens ? match_age(keys[t * decisions + decision]) : 0;
      const int place = age == 0 ? kMiss : place_of_age(age, search.stored, M);
      const int64_t to = (static_cast<int64_t>(group) * T_ + t) * G + g;
      p.matched.place[to] = place;
      p.matched.source[to] = age == 0 ? kMiss : *p.ring.position(r.slot, r.kv_head, place);
    }
  }
  if (threadIdx.x == 0) p.matched.stored[group] = search.stored;
}

}  // namespace mac_attn::cuda
