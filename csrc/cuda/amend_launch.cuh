// One translation unit per dtype, of the queries and of the cache, includes this, so that they compile side by
// side.
#pragma once

#include <algorithm>

#include "amend.cuh"
#include "head_dim.cuh"
#include "kernels.h"
#include "launch.cuh"

namespace mac_attn::cuda {

// Calls `use` with the kernel for these sizes and its shared memory: so much that no more CTAs fit a processor than
// the grid has for each. While match leaves the processors, one that is free before the others would else take a
// third CTA, and another be left with one, for the whole step.
template <typename Q, typename T, typename Use>
cudaError_t with_amend_kernel(const Shape& shape, int queries, const Use& use) {
  int device = 0, all = 0;
  if (cudaError_t error = cudaGetDevice(&device)) return error;
  if (cudaError_t error = cudaDeviceGetAttribute(&all, cudaDevAttrMaxSharedMemoryPerMultiprocessor, device)) {
    return error;
  }
  const int least = all / (ctas_per_processor(shape.head_dim) + 1);  // beside it a CTA has static shared memory
  return with_head_dim(shape, [&](auto dim) {
    constexpr int kHeadDim = decltype(dim)::value;
    return with_head_blocks<kHeadDim>(queries, [&](auto blocks) {
      constexpr int kHeadBlocks = decltype(blocks)::value;
      return use(amend_kernel<Q, kHeadDim, kHeadBlocks, T, decltype(dim)::kExact>,
                 std::max(least, amend_shared_bytes<kHeadDim, kHeadBlocks, T>()));
    });
  });
}

template <typename Q, typename T>
cudaError_t launch_amend_type(const AmendParams& p, const AmendWorkspace& w, int32_t ctas, cudaStream_t stream) {
  return each_amend_launch(p, [&](int queries, Serves serves) {
    AmendWorkspace served = w;
    served.serves = serves;
    return with_amend_kernel<Q, T>(p.shape, queries, [&](auto* kernel, int shared) {
      return launch(kernel, dim3(ctas), kThreads, shared, stream, p, served);
    });
  });
}

// As many CTAs as the device is to hold at a time.
template <typename Q, typename T>
cudaError_t amend_ctas_type(const AmendParams& p, int32_t* ctas) {
  int device = 0, processors = 0;
  if (cudaError_t error = cudaGetDevice(&device)) return error;
  if (cudaError_t error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device)) return error;
  return with_amend_kernel<Q, T>(p.shape, p.shape.group_queries(), [&](auto* kernel, int shared) {
    int each = 0;
    cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
    if (!error) error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&each, kernel, kThreads, shared);
    if (!error && each == 0) error = cudaErrorInvalidConfiguration;
    *ctas = processors * std::min(each, ctas_per_processor(p.shape.head_dim));
    return error;
  });
}

cudaError_t launch_amend_bf16(const AmendParams&, const AmendWorkspace&, int32_t ctas, cudaStream_t);
cudaError_t launch_amend_fp16(const AmendParams&, const AmendWorkspace&, int32_t ctas, cudaStream_t);
cudaError_t launch_amend_bf16_fp8(const AmendParams&, const AmendWorkspace&, int32_t ctas, cudaStream_t);
cudaError_t launch_amend_fp16_fp8(const AmendParams&, const AmendWorkspace&, int32_t ctas, cudaStream_t);
// Queries of both dtypes have the same shared memory and launch bounds.
cudaError_t amend_ctas_fp8(const AmendParams&, int32_t* ctas);

}  // namespace mac_attn::cuda
