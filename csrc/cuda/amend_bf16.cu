#include "amend_launch.cuh"

namespace mac_attn::cuda {

cudaError_t launch_amend_bf16(const AmendParams& p, const AmendWorkspace& w, int32_t ctas, cudaStream_t stream) {
  return launch_amend_type<bf16, bf16>(p, w, ctas, stream);
}

cudaError_t launch_amend(const AmendParams& p, const AmendWorkspace& w, int32_t ctas, cudaStream_t stream) {
  const bool is_bf16 = p.dtype == DType::kBFloat16;
  if (p.kv.float8) return (is_bf16 ? launch_amend_bf16_fp8 : launch_amend_fp16_fp8)(p, w, ctas, stream);
  return (is_bf16 ? launch_amend_bf16 : launch_amend_fp16)(p, w, ctas, stream);
}

cudaError_t amend_ctas(const AmendParams& p, int32_t* ctas) {
  return p.kv.float8 ? amend_ctas_fp8(p, ctas) : amend_ctas_type<bf16, bf16>(p, ctas);
}

}  // namespace mac_attn::cuda
