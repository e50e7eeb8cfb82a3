#include "amend_launch.cuh"

namespace mac_attn::cuda {

cudaError_t launch_amend_fp16_fp8(const AmendParams& p, const AmendWorkspace& w, int32_t ctas,
                                  cudaStream_t stream) {
  return launch_amend_type<fp16, fp8>(p, w, ctas, stream);
}

}  // namespace mac_attn::cuda
