#include "kernels.h"
#include "launch.cuh"
#include "unrotate.cuh"

namespace mac_attn::cuda {

cudaError_t launch_unrotate(const UnrotateParams& p, cudaStream_t stream) {
  const dim3 grid(p.shape.batch, unrotate_ctas(p), p.shape.tokens);
  return p.dtype == DType::kBFloat16 ? launch(unrotate_kernel<bf16>, grid, kUnrotateThreads, 0, stream, p)
                                     : launch(unrotate_kernel<fp16>, grid, kUnrotateThreads, 0, stream, p);
}

}  // namespace mac_attn::cuda
