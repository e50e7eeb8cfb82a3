#include "amend_launch.cuh"

namespace mac_attn::cuda {

cudaError_t launch_amend_bf16_fp8(const AmendParams& p, const AmendWorkspace& w, int32_t ctas,
                                  cudaStream_t stream) {
  return launch_amend_type<bf16, fp8>(p, w, ctas, stream);
}

cudaError_t amend_ctas_fp8(const AmendParams& p, int32_t* ctas) {
  return amend_ctas_type<bf16, fp8>(p, ctas);
}

}  // namespace mac_attn::cuda
