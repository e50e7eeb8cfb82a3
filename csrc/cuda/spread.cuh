// How far the keys of a KV head spread, see `drift_bound`: the variance of kSpreadKeys of them, mean over their
// dimensions. By all threads of a block of complete, once as a request starts and whenever its length has doubled.
// Traffic: a row of K each, an element a thread.
#pragma once

#include "ptx/barrier.h"
#include "ptx/math.h"
#include "ptx/warp.h"
#include "schedule.cuh"

namespace mac_attn::cuda {

template <typename T>
MAC_DEVICE float key_element(const KVPages& kv, int64_t at) {
  if (!kv.float8) return ptx::to_float(static_cast<const T*>(kv.k)[at]);
  return ptx::unpack2<fp16>(ptx::fp8_to_fp16(static_cast<const uint8_t*>(kv.k)[at]).x).x;
}

// Every dimension has `shares` threads, if there are as many; each looks at every so many-th key.
template <typename T, int kMostThreads>
MAC_DEVICE void measure_spread(const CompleteParams& p, int request, int kv_head, int n, float* spread) {
  __shared__ float2 parts[kMostThreads];
  const int D = p.shape.head_dim, threads = blockDim.x, thread = threadIdx.x;
  if (!p.kv.k || n < kSpreadKeys) {
    if (thread == 0) *spread = 0.f;  // another request's
    return;
  }
  const int columns = D < threads ? D : threads, shares = threads / columns;
  const int share = thread / columns, column = thread - share * columns;
  const auto element = [&](int i, int d) {
    const int token = spread_key(i, n), index = token / p.kv.page_size;
    int page = p.kv.block_table[request * p.kv.block_table_stride + index];
    page = page < 0 ? 0 : page < p.kv.num_pages ? page : p.kv.num_pages - 1;  // a hit has not looked at every page
    return key_element<T>(p.kv, page * p.kv.k_page_stride + (token - index * p.kv.page_size) * p.kv.k_token_stride +
                                    kv_head * p.kv.k_head_stride + d);
  };
  float variance = 0.f;
#pragma unroll 1
  for (int first = 0; first < D; first += columns) {
    const int d = first + column;
    const bool takes_part = share < shares && d < D;
    const float origin = takes_part ? element(0, d) : 0.f;  // means may be far from 0
    float2 part{0.f, 0.f};
#pragma unroll 4
    for (int i = share; takes_part && i < kSpreadKeys; i += shares) {
      const float x = element(i, d) - origin;
      part.x += x, part.y += x * x;
    }
    parts[thread] = part;
    ptx::sync_block();
    if (takes_part && share == 0) {
#pragma unroll 1
      for (int i = 1; i < shares; ++i)
        part.x += parts[i * columns + thread].x, part.y += parts[i * columns + thread].y;
      const float mean = part.x / kSpreadKeys;
      variance += part.y / kSpreadKeys - mean * mean;
    }
    ptx::sync_block();
  }
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) variance += ptx::shfl_xor(variance, distance);
  if (thread % 32 == 0) parts[thread / 32].x = variance;
  ptx::sync_block();
  if (thread != 0) return;
#pragma unroll 1
  for (int i = 1; i < threads / 32; ++i) variance += parts[i].x;
  const float unit = p.sm_scale * p.kv.k_scale.of(kv_head);
  *spread = variance / static_cast<float>(D) * unit * unit;
}

}  // namespace mac_attn::cuda
