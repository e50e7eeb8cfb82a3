// Complete on the GPU: merge the parts, write the output and the new ring entry.
//
//   carried = reused (+) old        out = carried (+) fresh
//   entry p = (q_match, carried, anchors, depth)
//
// Grid: one warp for each (request, query head), four a CTA, and with reuse one for each (request, KV head), for
// what its heads share. Traffic: two states, one ring row read and one written, all small.
#pragma once

#include "../state.h"
#include "ptx/barrier.h"
#include "ptx/math.h"
#include "ptx/memory.h"
#include "ptx/warp.h"
#include "schedule.cuh"

namespace mac_attn::cuda {

// What the query heads of a KV head share: the anchors of its entry, and its part of the slot's counters.
MAC_DEVICE void complete_kv_head(const CompleteParams& p, int request, int kv_head, int lane) {
  const int H = p.shape.num_kv_heads, G = p.shape.group_size, M = p.ring.window, S = p.ring.num_anchors;
  const int n = p.requests.seq_lens[request], position = n - 1;
  const int64_t slot = p.requests.slots[request], group = static_cast<int64_t>(request) * H + kv_head;
  int hits = 0, start = n, anchors = 0;
#pragma unroll 1
  for (int g = lane; g < G; g += 32) {
    const int source = p.source[group * G + g];
    const int s = source == kMiss ? 0 : band_start(source, p.band);
    hits += source != kMiss;
    start = s < start ? s : start;
  }
  int32_t* entry = p.ring.anchors + ((slot * H + kv_head) * M + position % M) * S;
  constexpr int kAtOnce = 4;
#pragma unroll 1
  for (int first = lane; first < S; first += 32 * kAtOnce) {
    int anchor[kAtOnce];
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) {
      anchor[u] = first + 32 * u < S ? p.anchors[group * S + first + 32 * u] : kNoAnchor;
    }
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) {
      if (first + 32 * u < S) entry[first + 32 * u] = anchor[u];
      anchors += anchor[u] != kNoAnchor;
    }
  }
  for (int distance = 1; distance < 32; distance *= 2) {
    const int other = ptx::shfl_xor(start, distance);
    start = other < start ? other : start;
    hits += ptx::shfl_xor(hits, distance);
    anchors += ptx::shfl_xor(anchors, distance);
  }
  if (lane != 0) return;
  int64_t* counters = p.ring.counters + slot * kNumCounters;
  ptx::atomic_add(counters + kKvHeadSteps, 1);
  ptx::atomic_add(counters + kKvHeadHits, hits == G);
  ptx::atomic_add(counters + kQueryHeadHits, hits);
  // With anchors a group decides as one, and a hit has read them besides [s, n).
  ptx::atomic_add(counters + kKvTokensRead, n - start + (hits > 0 ? anchors : 0));
  ptx::atomic_add(counters + kKvTokensFull, n);
}

// The slot's history and the entry's tag; one thread.
MAC_DEVICE void complete_request(const CompleteParams& p, int request) {
  const int n = p.requests.seq_lens[request], position = n - 1;
  const int64_t slot = p.requests.slots[request];
  const int64_t id = p.requests.request_ids ? p.requests.request_ids[request] : -1;
  if (p.ring.end[slot] != position || p.ring.request[slot] != id) p.ring.begin[slot] = position;
  p.ring.end[slot] = n;
  p.ring.request[slot] = id;
  p.ring.position[slot * p.ring.window + position % p.ring.window] = position;
  ptx::atomic_add(p.ring.counters + slot * kNumCounters + kSteps, 1);
}

// Asks for what a head will read besides amend's states, while amend is still running. What this reads itself may
// still be written by the launches before it: a wrong address is a prefetch in vain, within the ring all the same.
template <typename T, int kHeadDim>
MAC_DEVICE void prefetch_head(const CompleteParams& p, int request, int head, int lane) {
  constexpr int kLine = 128, kOutLines = (kHeadDim * 4 + kLine - 1) / kLine;
  const T* query =
      static_cast<const T*>(p.query.data) + request * p.query.batch_stride + head * p.query.head_stride;
  if (lane * kLine < kHeadDim * 2) ptx::prefetch_l2(query + lane * kLine / 2);
  const int source = p.source[request * p.shape.num_qo_heads() + head], slot = p.requests.slots[request];
  if (source < 0 || slot < 0 || slot >= p.ring.num_slots) return;
  const int H = p.shape.num_kv_heads, G = p.shape.group_size, M = p.ring.window;
  const int64_t row = ((static_cast<int64_t>(slot) * H + head / G) * M + source % M) * G + head % G;
  if (lane < kOutLines) ptx::prefetch_l2(p.ring.out + row * kHeadDim + lane * kLine / 4);
  if (lane == 30) ptx::prefetch_l2(p.ring.lse + row);
  if (lane == 31) ptx::prefetch_l2(p.ring.depth + row);
}

template <typename T, int kHeadDim>
__global__ void __launch_bounds__(kThreads)
    complete_kernel(const __grid_constant__ CompleteParams p, const __grid_constant__ CompleteWorkspace w) {
  constexpr int D = kHeadDim, kLaneElements = (D + 31) / 32;
  const int lane = ptx::lane_id();
  const int G = p.shape.group_size, H = p.shape.num_kv_heads, Hq = H * G;
  const int row = blockIdx.x * kWarps + threadIdx.x / 32;
  ptx::grid_dependency_launch();
  if (p.source && row < p.shape.batch * Hq) prefetch_head<T, kHeadDim>(p, row / Hq, row % Hq, lane);
  ptx::grid_dependency_wait();
  if (row >= p.shape.batch * Hq) {
    const int group = row - p.shape.batch * Hq, request = group / H;
    if (!p.source || request >= p.shape.batch) return;
    if (p.requests.seq_lens[request] <= 0 || (w.status && w.status[request] != 0)) return;
    if (!has_ring(p.requests, request)) return;
    if (group % H == 0 && lane == 31) complete_request(p, request);
    complete_kv_head(p, request, group % H, lane);
    return;
  }
  const int request = row / Hq, head = row % Hq;
  const int64_t old_row = row, fresh_row = static_cast<int64_t>(p.shape.batch) * Hq + row;

  // Everything is asked for before anything is used or written.
  float carried[kLaneElements], fresh[kLaneElements];
  T query[kLaneElements];
  const T* query_row =
      static_cast<const T*>(p.query.data) + request * p.query.batch_stride + head * p.query.head_stride;
#pragma unroll
  for (int i = 0; i < kLaneElements; ++i) {
    const int d = lane + 32 * i;
    if (d >= D) continue;
    carried[i] = p.states[old_row * D + d];
    fresh[i] = p.states[fresh_row * D + d];
    if (p.source) query[i] = query_row[d];
  }
  float carried_lse = p.state_lse[row];
  const float fresh_lse = p.state_lse[fresh_row];
  const int n = p.requests.seq_lens[request];
  const bool bad = w.status && w.status[request] != 0;
  const bool reuse = p.source && has_ring(p.requests, request) && n > 0 && !bad;

  if (reuse) {
    const int M = p.ring.window, position = n - 1, source = p.source[row];
    const int64_t ring_row = (static_cast<int64_t>(p.requests.slots[request]) * H + head / G) * M;
    const int64_t to = (ring_row + position % M) * G + head % G;
    int depth = 0;
    if (source != kMiss) {
      const int64_t from = (ring_row + source % M) * G + head % G;  // may be `to`
      float reused[kLaneElements];
#pragma unroll
      for (int i = 0; i < kLaneElements; ++i) {
        if (lane + 32 * i < D) reused[i] = p.ring.out[from * D + lane + 32 * i];
      }
      depth = next_depth(p.ring.depth[from]);
      const MergeWeights carry = merge_weights(p.ring.lse[from], carried_lse);
      carried_lse = carry.lse;
#pragma unroll
      for (int i = 0; i < kLaneElements; ++i) {
        if (lane + 32 * i < D) carried[i] = reused[i] * carry.first + carried[i] * carry.second;
      }
    }
    ptx::sync_warp();  // all lanes have read the entry
#pragma unroll
    for (int i = 0; i < kLaneElements; ++i) {
      const int d = lane + 32 * i;
      if (d >= D) continue;
      p.ring.out[to * D + d] = carried[i];
      static_cast<T*>(p.ring.query)[to * D + d] = query[i];
    }
    if (lane == 0) {
      p.ring.lse[to] = carried_lse;
      p.ring.depth[to] = depth;
    }
  }
  const MergeWeights merge = merge_weights(carried_lse, fresh_lse);
  T* out = static_cast<T*>(p.out) + request * p.out_batch_stride + head * p.out_head_stride;
#pragma unroll
  for (int i = 0; i < kLaneElements; ++i) {
    const float value = carried[i] * merge.first + fresh[i] * merge.second;
    if (lane + 32 * i < D) out[lane + 32 * i] = ptx::from_float<T>(bad ? NAN : value);
  }
  if (lane == 0 && p.lse) p.lse[row] = bad ? NAN : merge.lse;
}

}  // namespace mac_attn::cuda
