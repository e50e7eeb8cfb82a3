// One translation unit per dtype includes this, so that they compile side by side.
#pragma once

#include <algorithm>

#include "amend.cuh"
#include "kernels.h"
#include "launch.cuh"

namespace mac_attn::cuda {

// Calls `use` with the kernel for these sizes and its shared memory: so much that no more CTAs fit a processor than
// the grid has for each. While match leaves the processors, one that is free before the others would else take a
// third CTA, and another be left with one, for the whole step.
template <typename T, typename Use>
cudaError_t with_amend_kernel(int head_dim, int group_size, const Use& use) {
  int device = 0, all = 0;
  if (cudaError_t error = cudaGetDevice(&device)) return error;
  if (cudaError_t error = cudaDeviceGetAttribute(&all, cudaDevAttrMaxSharedMemoryPerMultiprocessor, device)) {
    return error;
  }
  const int least = all / (ctas_per_processor(head_dim) + 1);  // beside it a CTA has static shared memory
  return with_head_dim(head_dim, [&](auto dim) {
    constexpr int kHeadDim = decltype(dim)::value;
    return group_size <= 8 ? use(amend_kernel<T, kHeadDim, 1>, std::max(least, amend_shared_bytes<kHeadDim, 1>()))
                           : use(amend_kernel<T, kHeadDim, 2>, std::max(least, amend_shared_bytes<kHeadDim, 2>()));
  });
}

template <typename T>
cudaError_t launch_amend_type(const AmendParams& p, const AmendWorkspace& w, const CompleteParams& c, int32_t ctas,
                              cudaStream_t stream) {
  return with_amend_kernel<T>(p.shape.head_dim, p.shape.group_size, [&](auto* kernel, int shared) {
    return launch(kernel, dim3(ctas), kThreads, shared, stream, p, w, c);
  });
}

cudaError_t launch_amend_bf16(const AmendParams&, const AmendWorkspace&, const CompleteParams&, int32_t ctas,
                              cudaStream_t);
cudaError_t launch_amend_fp16(const AmendParams&, const AmendWorkspace&, const CompleteParams&, int32_t ctas,
                              cudaStream_t);

}  // namespace mac_attn::cuda
