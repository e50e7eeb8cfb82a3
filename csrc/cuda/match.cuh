// Match on the GPU: for every decision, the stored query with the smallest score.
//
//   d2_h(c) = |q_h - ring_query_h(c)|^2,   score(c) = mean over the group of d2_h / theta_h
//   (granularity "head": every head alone);  a hit is a score below 1, a tie goes to the newest.
//
// Grid: one CTA of 32 warps for each (request, KV head). A ring row is read by as many lanes as it has 16-byte
// pieces, so a warp looks at several candidates at a time, head after head: partial sums only grow, so candidates
// that cannot win any more drop out, most of them after their first head.
// Traffic: between 1/G and all of the ring's queries of the KV head.
#pragma once

#include "finish.cuh"

namespace mac_attn::cuda {

constexpr int kMatchThreads = 1024;
constexpr int kMatchWarps = kMatchThreads / 32;
constexpr int kMatchUnroll = 4;  // candidates of a lane in flight

// A candidate as one number, the smaller the better: the bits of its total (they are ordered like a
// number that is not negative), then its age, so that the newest wins a tie.
MAC_DEVICE uint64_t match_key(float total, int age) {
  return static_cast<uint64_t>(float_bits(total)) << 32 | static_cast<uint32_t>(age);
}

// This thread's share of looking whether the request can be served: Error bits.
MAC_DEVICE int request_errors(const MatchParams& p, int request) {
  const int n = p.requests.seq_lens[request];
  if (n == 0) return 0;
  const int slot = p.requests.slots[request];
  int errors = n < 0 ? kBadLength : 0;
  if (slot < 0 || slot >= p.ring.num_slots) errors |= kBadSlot;
  for (int b = threadIdx.x; b < p.shape.batch; b += kMatchThreads) {
    if (b != request && p.requests.seq_lens[b] != 0 && p.requests.slots[b] == slot) errors |= kBadSlot;
  }
  return errors;
}

template <typename T, int kHeadDim>
__global__ void __launch_bounds__(kMatchThreads)
    match_kernel(const __grid_constant__ MatchParams p, const __grid_constant__ MatchWorkspace w) {
  constexpr int kPieces = kHeadDim / 8;
  constexpr int kLanes = kPieces <= 8 ? 8 : kPieces <= 16 ? 16 : 32;  // of a warp, for one candidate
  constexpr int kPerWarp = 32 / kLanes * kMatchUnroll;
  const int G = p.shape.group_size, H = p.shape.num_kv_heads, M = p.ring.window;
  const int lane = ptx::lane_id(), warp = threadIdx.x / 32;
  const int request = blockIdx.x / H, kv_head = blockIdx.x % H;
  const int piece = lane % kLanes;

  float* query = static_cast<float*>(dynamic_shared());  // [G, D]
  __shared__ float theta[kMaxGroup];
  __shared__ unsigned long long best[kMaxGroup];
  __shared__ int usable, errors;

  ptx::grid_dependency_launch();
  ptx::grid_dependency_wait();  // the last step's ring
  if (threadIdx.x == 0) {
    errors = 0;
    usable = 1;
  }
  const T* rows = static_cast<const T*>(p.query.data) + request * p.query.batch_stride +
                  static_cast<int64_t>(kv_head) * G * p.query.head_stride;
  for (int i = threadIdx.x; i < G * kHeadDim; i += kMatchThreads) {
    query[i] = ptx::to_float(rows[i / kHeadDim * p.query.head_stride + i % kHeadDim]);
  }
  ptx::sync_block();
  if (const int found = request_errors(p, request)) ptx::atomic_or(&errors, found);
  // theta, or NaN for a head that can never hit; in a group it decides for all.
  for (int g = warp; g < G; g += kMatchWarps) {
    float norm = 0.f;
    for (int d = lane; d < kHeadDim; d += 32) norm += query[g * kHeadDim + d] * query[g * kHeadDim + d];
    for (int distance = 1; distance < 32; distance *= 2) norm += ptx::shfl_xor(norm, distance);
    if (lane == 0) {
      const float given = p.threshold[kv_head * G + g];
      const float value = p.relative ? given * norm : given;
      const bool can_hit = norm < INFINITY && value > 0.f && value < INFINITY;
      theta[g] = can_hit ? value : NAN;
      best[g] = match_key(p.per_head ? 1.f : static_cast<float>(G), 0);
      if (!can_hit && !p.per_head) usable = 0;
    }
  }
  ptx::sync_block();

  if (threadIdx.x == 0) {
    if (kv_head == 0) w.status[request] = errors;
    if (errors && w.error_flag) ptx::atomic_or(w.error_flag, errors);
  }
  const int n = p.requests.seq_lens[request], position = n - 1;
  const int slot = errors || n == 0 ? 0 : p.requests.slots[request];  // padding may name any
  const int64_t id = p.requests.request_ids ? p.requests.request_ids[request] : -1;
  const bool searches = !errors && usable && n > 0 && n >= p.min_context && p.ring.end[slot] == position &&
                        p.ring.request[slot] == id;
  // Candidates have p - M <= c < p, so their ages are 1..M. E(c) > 0 needs c >= band.
  const int begin = n > 0 ? p.ring.begin[slot] : 0;
  const int oldest = begin > p.band ? begin : p.band;
  const int last_age = !searches ? 0 : position - oldest < M ? position - oldest : M;
  const int64_t ring_row = (static_cast<int64_t>(slot) * H + kv_head) * M;
  const T* ring = static_cast<const T*>(p.ring.query);

  for (int first = 1 + warp * kPerWarp; first <= last_age; first += kMatchWarps * kPerWarp) {
    const T* entry[kMatchUnroll];
    float total[kMatchUnroll];
    int age[kMatchUnroll];
    bool alive[kMatchUnroll];
#pragma unroll
    for (int u = 0; u < kMatchUnroll; ++u) {
      age[u] = first + u * (32 / kLanes) + lane / kLanes;
      const int candidate = position - age[u];
      // Tag, depth and first row are asked for together: none waits for another.
      const int index = age[u] <= last_age ? candidate % M : 0;
      const int64_t row = (ring_row + index) * G;
      const int tag = p.ring.position[static_cast<int64_t>(slot) * M + index];
      const int depth = p.ring.depth[row];
      // With decisions per head every head has a depth of its own, looked at below.
      alive[u] = age[u] <= last_age && tag == candidate && (p.per_head || depth < p.max_reuse_depth);
      entry[u] = ring + row * kHeadDim + piece * 8;
      total[u] = 0.f;
    }
    for (int g = 0; g < G; ++g) {
      uint4 data[kMatchUnroll];
#pragma unroll
      for (int u = 0; u < kMatchUnroll; ++u) {
        data[u] = (g == 0 || alive[u]) && piece < kPieces
                      ? ptx::load_stream_16(entry[u] + static_cast<int64_t>(g) * kHeadDim)
                      : uint4{0, 0, 0, 0};
      }
      bool any = false;
#pragma unroll
      for (int u = 0; u < kMatchUnroll; ++u) {
        const uint32_t words[4] = {data[u].x, data[u].y, data[u].z, data[u].w};
        float distance = 0.f;
        if (piece < kPieces) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const float2 stored = ptx::unpack2<T>(words[i]);
            const float x = query[g * kHeadDim + piece * 8 + 2 * i] - stored.x;
            const float y = query[g * kHeadDim + piece * 8 + 2 * i + 1] - stored.y;
            distance += x * x + y * y;
          }
        }
        for (int i = 1; i < kLanes; i *= 2) distance += ptx::shfl_xor(distance, i);
        if (p.per_head) {
          const int64_t place = (ring_row + (position - age[u]) % M) * G + g;
          const float score = distance / theta[g];
          if (alive[u] && piece == 0 && score < 1.f && p.ring.depth[place] < p.max_reuse_depth) {
            ptx::atomic_min(&best[g], match_key(score, age[u]));
          }
          continue;
        }
        total[u] += distance / theta[g];
        // NaN is no candidate, and a total beyond the best so far cannot win.
        alive[u] = alive[u] && total[u] <= bits_float(static_cast<uint32_t>(ptx::load_volatile(&best[0]) >> 32));
        if (alive[u] && g == G - 1 && piece == 0) ptx::atomic_min(&best[0], match_key(total[u], age[u]));
        any = any || alive[u];
      }
      if (!p.per_head && !ptx::ballot(any)) break;
    }
  }
  ptx::sync_block();
  for (int g = threadIdx.x; g < G; g += kMatchThreads) {
    const int age = static_cast<int>(best[p.per_head ? g : 0] & 0xffffffffu);
    p.source[(static_cast<int64_t>(request) * H + kv_head) * G + g] = age == 0 ? kMiss : position - age;
  }
}

}  // namespace mac_attn::cuda
