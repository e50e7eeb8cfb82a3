// Queries without their rotary embedding, on the GPU: R(-p) q / scale, for a step that is given none.
//
// Grid: a row of CTAs for each token of each request; a thread for each pair of dimensions of each head, and for
// each dimension that does not turn. A launch of its own before match: its threads are as many as there are pairs,
// and match and complete both read the result.
#pragma once

#include "kernels.h"
#include "ptx/barrier.h"
#include "ptx/math.h"
#include "simt.h"

namespace mac_attn::cuda {

constexpr int kUnrotateThreads = 128;

// Threads for a head.
constexpr int32_t unrotate_units(const UnrotateParams& p) {
  return p.shape.head_dim - p.pairs;
}
// CTAs for a token.
constexpr int32_t unrotate_ctas(const UnrotateParams& p) {
  return (p.shape.num_qo_heads() * unrotate_units(p) + kUnrotateThreads - 1) / kUnrotateThreads;
}

template <typename T>
__global__ void __launch_bounds__(kUnrotateThreads) unrotate_kernel(const __grid_constant__ UnrotateParams p) {
  const int request = blockIdx.x, token = blockIdx.z, unit = blockIdx.y * kUnrotateThreads + threadIdx.x;
  const int head = unit / unrotate_units(p), i = unit % unrotate_units(p), heads = p.shape.num_qo_heads();
  ptx::grid_dependency_wait();  // whoever wrote q; and the last step may still read what lay at `out`
  ptx::grid_dependency_launch();
  if (head >= heads) return;
  const T* from = static_cast<const T*>(p.query.data) + request * p.query.batch_stride +
                  token * p.query.token_stride + head * p.query.head_stride;
  const int64_t row = (static_cast<int64_t>(request) * p.shape.tokens + token) * heads + head;
  T* to = static_cast<T*>(p.out) + row * p.shape.head_dim;
  if (i >= p.pairs) {
    to[i + p.pairs] = from[i + p.pairs];
    return;
  }
  const int first = p.interleaved ? 2 * i : i, second = p.interleaved ? first + 1 : i + p.pairs;
  const float x = ptx::to_float(from[first]), y = ptx::to_float(from[second]);
  // The angle is rounded to float32, as models round it; what it is in half turns, less the whole turns, to more.
  const int64_t back = p.each_back ? p.each_back[request] : p.back;
  const float angle = static_cast<float>(p.positions[request] - back + token) * p.inv_freq[i];
  const double half_turns = angle * 0.31830988618379067154;
  const float2 sin_cos = ptx::sin_cos_pi(static_cast<float>(half_turns - 2 * rint(half_turns / 2)));
  const float sin = sin_cos.x * p.inverse_scale, cos = sin_cos.y * p.inverse_scale;
  to[first] = ptx::from_float<T>(x * cos + y * sin);
  to[second] = ptx::from_float<T>(y * cos - x * sin);
}

}  // namespace mac_attn::cuda
