// Complete on the GPU: merge the parts, write the output and the new ring entry.
//
//   carried = reused (+) old        out = carried (+) fresh
//   entry p = (q_match, carried, anchors, depth)
//
// Grid: one warp for each (request, query head), four a CTA. Traffic: two states, one ring row read and one
// written, all small.
#pragma once

#include "../state.h"
#include "finish.cuh"

namespace mac_attn::cuda {

// What all heads of a request share: the tag, the anchors, the slot's history and the counters.
MAC_DEVICE void complete_request(const CompleteParams& p, int request, int lane) {
  const int n = p.requests.seq_lens[request], position = n - 1;
  const int H = p.shape.num_kv_heads, G = p.shape.group_size, M = p.ring.window, S = p.ring.num_anchors;
  const int64_t slot = p.requests.slots[request];
  int64_t counts[3] = {};  // KV-head hits, query-head hits, tokens read
  for (int h = lane; h < H; h += 32) {
    const int64_t group = static_cast<int64_t>(request) * H + h;
    int hits = 0, start = n;
    for (int g = 0; g < G; ++g) {
      const int source = p.source[group * G + g];
      const int s = source == kMiss ? 0 : band_start(source, p.band);
      hits += source != kMiss;
      start = s < start ? s : start;
    }
    counts[0] += hits == G;
    counts[1] += hits;
    counts[2] += n - start;
  }
  for (int i = lane; i < H * S; i += 32) {
    const int64_t group = static_cast<int64_t>(request) * H + i / S;
    const int anchor = p.anchors[group * S + i % S];
    p.ring.anchors[((slot * H + i / S) * M + position % M) * S + i % S] = anchor;
    // With anchors a group decides as one, so its first head tells of a hit, which has read them.
    counts[2] += anchor != kNoAnchor && p.source[group * G] != kMiss;
  }
  for (int i = 0; i < 3; ++i) {
    for (int distance = 1; distance < 32; distance *= 2) {
      counts[i] += ptx::shfl(counts[i], lane ^ distance);
    }
  }
  if (lane != 0) return;
  const int64_t id = p.requests.request_ids ? p.requests.request_ids[request] : -1;
  if (p.ring.end[slot] != position || p.ring.request[slot] != id) p.ring.begin[slot] = position;
  p.ring.end[slot] = n;
  p.ring.request[slot] = id;
  p.ring.position[slot * M + position % M] = position;
  int64_t* counters = p.ring.counters + slot * kNumCounters;
  counters[kSteps] += 1;
  counters[kKvHeadSteps] += H;
  counters[kKvHeadHits] += counts[0];
  counters[kQueryHeadHits] += counts[1];
  counters[kKvTokensRead] += counts[2];
  counters[kKvTokensFull] += static_cast<int64_t>(n) * H;
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    complete_kernel(const __grid_constant__ CompleteParams p, const __grid_constant__ CompleteWorkspace w) {
  const int lane = ptx::lane_id();
  const int G = p.shape.group_size, D = p.shape.head_dim, H = p.shape.num_kv_heads, Hq = H * G;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  ptx::grid_dependency_wait();
  if (row >= static_cast<int64_t>(p.shape.batch) * Hq) return;
  const int request = static_cast<int>(row / Hq), head = static_cast<int>(row % Hq);
  const int64_t fresh_row = static_cast<int64_t>(p.shape.batch) * Hq + row;
  const int n = p.requests.seq_lens[request];
  const bool bad = w.status && w.status[request] != 0;
  const bool reuse = p.source && n > 0 && !bad;

  T* out = static_cast<T*>(p.out) + request * p.out_batch_stride + head * p.out_head_stride;
  int64_t from = 0, to = 0;
  float carried_lse = p.state_lse[row];
  MergeWeights carry{0.f, 1.f, carried_lse};
  if (reuse) {
    const int M = p.ring.window, position = n - 1, source = p.source[row];
    const int64_t ring_row = (static_cast<int64_t>(p.requests.slots[request]) * H + head / G) * M;
    to = (ring_row + position % M) * G + head % G;
    int depth = 0;
    if (source != kMiss) {
      from = (ring_row + source % M) * G + head % G;  // may be `to`
      carry = merge_weights(p.ring.lse[from], carried_lse);
      depth = p.ring.depth[from] + 1;
    } else {
      from = -1;
    }
    carried_lse = carry.lse;
    ptx::sync_warp();  // all lanes have read the entry
    if (lane == 0) {
      p.ring.lse[to] = carried_lse;
      p.ring.depth[to] = depth;
    }
  }
  const MergeWeights merge = merge_weights(carried_lse, p.state_lse[fresh_row]);
  const T* query =
      static_cast<const T*>(p.query.data) + request * p.query.batch_stride + head * p.query.head_stride;
  for (int d = lane; d < D; d += 32) {
    float carried = p.states[row * D + d] * carry.second;
    if (reuse && from >= 0) carried += p.ring.out[from * D + d] * carry.first;
    if (reuse) {
      p.ring.out[to * D + d] = carried;
      static_cast<T*>(p.ring.query)[to * D + d] = query[d];
    }
    const float value = carried * merge.first + p.states[fresh_row * D + d] * merge.second;
    out[d] = ptx::from_float<T>(bad ? NAN : value);
  }
  if (lane == 0 && p.lse) p.lse[row] = bad ? NAN : merge.lse;
  if (reuse && head == 0) complete_request(p, request, lane);
}

}  // namespace mac_attn::cuda
