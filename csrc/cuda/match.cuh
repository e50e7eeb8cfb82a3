// Match on the GPU: for every decision, the stored query with the smallest score.
//
//   d2_h(c) = |q_h - ring_query_h(c)|^2,   score(c) = mean over the group of d2_h / theta_h
//   (granularity "head": every head alone);  a hit is a score below 1, a tie goes to the newest.
//
// Grid: `splits` CTAs of eight warps for each (request, KV head), which share the candidates out; the last one to
// finish writes the answer. A few lanes read a ring row, so that a warp looks at eight candidates at a time.
// Partial sums only grow, so most candidates are ruled out by their first head; only the others' heads are read on,
// a few at a time: each read is a wait for memory, and at batch 1 there is nothing else to do meanwhile.
// Traffic: between 1/G and all of the ring's queries of the KV head.
#pragma once

#include "kernels.h"
#include "ptx/barrier.h"
#include "ptx/math.h"
#include "ptx/memory.h"
#include "ptx/warp.h"
#include "simt.h"

namespace mac_attn::cuda {

constexpr int kMatchThreads = 256;
constexpr int kMatchWarps = kMatchThreads / 32;

template <int kHeadDim>
struct MatchLayout {
  static constexpr int kLanes = kHeadDim <= 128 ? 4 : 8;  // of a warp, for one row
  static constexpr int kPieces = kHeadDim / 8;            // of 16 bytes in a row
  static constexpr int kLoads = (kPieces + kLanes - 1) / kLanes;
  static constexpr int kPerWarp = 32 / kLanes;
  static constexpr int kPerBlock = kMatchWarps * kPerWarp;
  static constexpr int kHeadsAtOnce = 3;
};

// A candidate as one number, the greater the better and never 0: the bits of its total (they are ordered like a
// number that is not negative) and its age, so that the newest wins a tie.
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
  int errors = n < 0 ? kBadLength : 0;
  if (slot < 0 || slot >= p.ring.num_slots) errors |= kBadSlot;
  for (int b = threadIdx.x; b < p.shape.batch; b += kMatchThreads) {
    if (b != request && p.requests.slots[b] == slot && p.requests.seq_lens[b] != 0) errors |= kBadSlot;
  }
  return errors;
}

// One lane's pieces of a ring row: piece lane % kLanes and every kLanes-th after it.
template <typename T, int kHeadDim>
struct RowPieces {
  using Layout = MatchLayout<kHeadDim>;
  uint4 data[Layout::kLoads];

  MAC_DEVICE void load(const T* row, bool wanted) {
    const int first = ptx::lane_id() % Layout::kLanes;
#pragma unroll
    for (int i = 0; i < Layout::kLoads; ++i) {
      const int piece = first + i * Layout::kLanes;
      data[i] = uint4{0, 0, 0, 0};
      if (wanted && piece < Layout::kPieces) data[i] = ptx::load_stream_16(row + piece * 8);
    }
  }
  // |q - row|^2, the same in all lanes of the row.
  MAC_DEVICE float distance(const float* query) const {
    const int first = ptx::lane_id() % Layout::kLanes;
    float sum = 0.f;
#pragma unroll
    for (int i = 0; i < Layout::kLoads; ++i) {
      const int piece = first + i * Layout::kLanes;
      if (piece >= Layout::kPieces) continue;
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

template <typename T, int kHeadDim>
__global__ void __launch_bounds__(kMatchThreads, 2)
    match_kernel(const __grid_constant__ MatchParams p, const __grid_constant__ MatchWorkspace w) {
  using Layout = MatchLayout<kHeadDim>;
  constexpr int kLanes = Layout::kLanes;
  const int G = p.shape.group_size, H = p.shape.num_kv_heads, M = p.ring.window;
  const int lane = ptx::lane_id(), warp = threadIdx.x / 32;
  const int group = blockIdx.x / w.splits, split = blockIdx.x % w.splits, request = group / H, kv_head = group % H;

  float* query = static_cast<float*>(dynamic_shared());  // [G, D]
  __shared__ float scale[kMaxGroup];                     // 1 / theta
  __shared__ unsigned long long best[kMaxGroup];
  __shared__ int errors, is_last;

  ptx::grid_dependency_wait();  // the last step's ring
  ptx::grid_dependency_launch();
  const int n = p.requests.seq_lens[request], position = n - 1;
  const int given_slot = p.requests.slots[request];
  // Candidates have p - M <= c < p, so their ages are 1..M. E(c) > 0 needs c >= band. Whether the slot's history
  // is unbroken is asked for together with the first rows: neither waits for the other.
  const bool readable = n > 0 && given_slot >= 0 && given_slot < p.ring.num_slots;
  const int slot = readable ? given_slot : 0;  // padding may name any
  const int64_t id = p.requests.request_ids ? p.requests.request_ids[request] : -1;
  const bool unbroken = readable && p.ring.end[slot] == position && p.ring.request[slot] == id;
  const int begin = p.ring.begin[slot], oldest = begin > p.band ? begin : p.band;
  const int last_age = !readable ? 0 : position - p.band < M ? position - p.band : M;
  const int64_t ring_row = (static_cast<int64_t>(slot) * H + kv_head) * M;
  const T* ring = static_cast<const T*>(p.ring.query);

  // Tag, depth and first head of a candidate that may turn out to be none.
  struct Candidate {
    int64_t row;
    int age, tag, depth;
    RowPieces<T, kHeadDim> first_head;
  };
  const auto fetch = [&](int age) {
    Candidate c;
    const int index = age <= last_age ? (position - age) % M : 0;
    c.age = age;
    c.row = (ring_row + index) * G;
    c.tag = p.ring.position[static_cast<int64_t>(slot) * M + index];
    c.depth = p.ring.depth[c.row];
    c.first_head.load(ring + c.row * kHeadDim, age <= last_age);
    return c;
  };
  const int warp_age = 1 + split * Layout::kPerBlock + warp * Layout::kPerWarp,
            stride = w.splits * Layout::kPerBlock;
  Candidate next = fetch(warp_age + lane / kLanes);

  const T* rows = static_cast<const T*>(p.query.data) + request * p.query.batch_stride +
                  static_cast<int64_t>(kv_head) * G * p.query.head_stride;
#pragma unroll 2
  for (int i = threadIdx.x; i < G * kHeadDim; i += kMatchThreads) {
    query[i] = ptx::to_float(rows[i / kHeadDim * p.query.head_stride + i % kHeadDim]);
  }
  if (threadIdx.x == 0) errors = 0;
  const int found = request_errors(p, request, n, given_slot);

  ptx::sync_block();
  if (found) ptx::atomic_or(&errors, found);
  // NaN for a head that can never hit; in a group it decides for all.
#pragma unroll 1
  for (int g = warp; g < G; g += kMatchWarps) {
    float norm = 0.f;
    for (int d = lane; d < kHeadDim; d += 32) norm += query[g * kHeadDim + d] * query[g * kHeadDim + d];
#pragma unroll
    for (int distance = 1; distance < 32; distance *= 2) norm += ptx::shfl_xor(norm, distance);
    if (lane != 0) continue;
    const float given = p.threshold[kv_head * G + g], theta = p.relative ? given * norm : given;
    const bool can_hit = norm < INFINITY && theta > 0.f && theta < INFINITY;
    scale[g] = can_hit ? 1.f / theta : NAN;
    best[g] = match_key(p.per_head ? 1.f : static_cast<float>(G), 0);
  }
  ptx::sync_block();

  if (threadIdx.x == 0 && split == 0) {
    if (kv_head == 0) w.status[request] = errors;
    if (errors && w.error_flag) ptx::atomic_or(w.error_flag, errors);
  }
  const bool searches = !errors && unbroken && n >= p.min_context;
#pragma unroll 1
  for (int first = warp_age; searches && first <= last_age; first += stride) {
    const Candidate c = next;
    if (first + stride <= last_age) next = fetch(c.age + stride);
    const int candidate = position - c.age;
    // With decisions per head every head has a depth of its own, looked at below.
    bool alive = c.age <= last_age && candidate >= oldest && c.tag == candidate &&
                 (p.per_head || c.depth < p.max_reuse_depth);
    RowPieces<T, kHeadDim> head[Layout::kHeadsAtOnce];
    head[0] = c.first_head;
    float total = 0.f;
#pragma unroll 1
    for (int g = 0, end = 1; g < G && ptx::ballot(alive); g = end, end += Layout::kHeadsAtOnce) {
#pragma unroll
      for (int i = 0; i < Layout::kHeadsAtOnce; ++i) {
        if (g > 0) head[i].load(ring + (c.row + g + i) * kHeadDim, alive && g + i < G);
      }
#pragma unroll
      for (int i = 0; i < Layout::kHeadsAtOnce; ++i) {
        if (g + i >= end || g + i >= G) break;
        const float score = head[i].distance(query + (g + i) * kHeadDim) * scale[g + i];
        if (p.per_head) {
          // NaN is no candidate.
          if (alive && lane % kLanes == 0 && score < 1.f && p.ring.depth[c.row + g + i] < p.max_reuse_depth) {
            ptx::atomic_max(&best[g + i], match_key(score, c.age));
          }
        } else {
          // Nor is a total beyond the best so far, which cannot win. The best may be changing, and the lanes of a
          // candidate have to agree.
          total += score;
          alive = alive && total <= match_total(ptx::load_volatile(&best[0]));
          alive = ptx::shfl(static_cast<int>(alive), lane / kLanes * kLanes);
        }
      }
    }
    if (alive && !p.per_head && lane % kLanes == 0) ptx::atomic_max(&best[0], match_key(total, c.age));
  }
  ptx::sync_block();

  const int decisions = p.per_head ? G : 1;
  if (w.splits > 1) {
    unsigned long long* shared_best = w.best + static_cast<int64_t>(group) * G;
    bool hit = false;
#pragma unroll 1
    for (int g = threadIdx.x; g < decisions; g += kMatchThreads) {
      if (match_age(best[g]) == 0) continue;
      ptx::atomic_max(&shared_best[g], best[g]);
      hit = true;
    }
    if (hit) ptx::fence();  // most CTAs have none, and a fence takes its time
    ptx::sync_block();
    if (threadIdx.x == 0) is_last = ptx::atomic_add_acquire(w.done + group, 1) == w.splits - 1;
    ptx::sync_block();
    if (!is_last) return;
    // Both as the next call wants to find them; no other CTA comes here any more.
    if (threadIdx.x == 0) w.done[group] = 0;
#pragma unroll 1
    for (int g = threadIdx.x; g < decisions; g += kMatchThreads) {
      const unsigned long long key = ptx::atomic_exchange(&shared_best[g], 0);
      best[g] = key ? key : match_key(0.f, 0);
    }
    ptx::sync_block();
  }
#pragma unroll 1
  for (int g = threadIdx.x; g < G; g += kMatchThreads) {
    const int age = match_age(best[p.per_head ? g : 0]);
    p.source[static_cast<int64_t>(group) * G + g] = age == 0 ? kMiss : position - age;
  }
}

}  // namespace mac_attn::cuda
