#include <algorithm>

#include "amend_launch.cuh"

namespace mac_attn::cuda {

cudaError_t launch_amend_bf16(const AmendParams& p, const AmendWorkspace& w, const CompleteParams& c, int32_t ctas,
                              cudaStream_t stream) {
  return launch_amend_type<bf16>(p, w, c, ctas, stream);
}

cudaError_t launch_amend(const AmendParams& p, const AmendWorkspace& w, const CompleteParams& c, int32_t ctas,
                         cudaStream_t stream) {
  return p.dtype == DType::kBFloat16 ? launch_amend_bf16(p, w, c, ctas, stream)
                                     : launch_amend_fp16(p, w, c, ctas, stream);
}

// As many CTAs as the device is to hold at a time. Both dtypes have the same shared memory and launch bounds.
cudaError_t amend_ctas(int32_t head_dim, int32_t group_size, int32_t* ctas) {
  int device = 0, processors = 0;
  if (cudaError_t error = cudaGetDevice(&device)) return error;
  if (cudaError_t error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device)) return error;
  return with_amend_kernel<bf16>(head_dim, group_size, [&](auto* kernel, int shared) {
    int each = 0;
    cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
    if (!error) error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&each, kernel, kThreads, shared);
    if (!error && each == 0) error = cudaErrorInvalidConfiguration;
    *ctas = processors * std::min(each, ctas_per_processor(head_dim));
    return error;
  });
}

}  // namespace mac_attn::cuda
