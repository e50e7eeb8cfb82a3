// One translation unit per dtype includes this, so that they compile side by side.
#pragma once

#include "amend.cuh"
#include "kernels.h"
#include "launch.cuh"

namespace mac_attn::cuda {

// Calls `use` with the kernel for these sizes and its shared memory.
template <typename T, int kHeadBlocks, typename Use>
cudaError_t with_head_dim(int head_dim, const Use& use) {
  switch (head_dim) {
    case 64: return use(amend_kernel<T, 64, kHeadBlocks>, amend_shared_bytes<64, kHeadBlocks>());
    case 80: return use(amend_kernel<T, 80, kHeadBlocks>, amend_shared_bytes<80, kHeadBlocks>());
    case 96: return use(amend_kernel<T, 96, kHeadBlocks>, amend_shared_bytes<96, kHeadBlocks>());
    case 128: return use(amend_kernel<T, 128, kHeadBlocks>, amend_shared_bytes<128, kHeadBlocks>());
    case 256: return use(amend_kernel<T, 256, kHeadBlocks>, amend_shared_bytes<256, kHeadBlocks>());
    default: return cudaErrorInvalidValue;
  }
}

template <typename T, typename Use>
cudaError_t with_amend_kernel(int head_dim, int group_size, const Use& use) {
  return group_size <= 8 ? with_head_dim<T, 1>(head_dim, use) : with_head_dim<T, 2>(head_dim, use);
}

template <typename T>
cudaError_t launch_amend_type(const AmendParams& p, const AmendWorkspace& w, int32_t ctas, cudaStream_t stream) {
  return with_amend_kernel<T>(p.shape.head_dim, p.shape.group_size, [&](auto* kernel, int shared) {
    return launch(kernel, dim3(ctas), kThreads, shared, stream, p, w);
  });
}

cudaError_t launch_amend_bf16(const AmendParams&, const AmendWorkspace&, int32_t ctas, cudaStream_t);
cudaError_t launch_amend_fp16(const AmendParams&, const AmendWorkspace&, int32_t ctas, cudaStream_t);

}  // namespace mac_attn::cuda
