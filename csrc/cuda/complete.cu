#include "complete.cuh"
#include "kernels.h"
#include "launch.cuh"

namespace mac_attn::cuda {

cudaError_t launch_complete(const CompleteParams& p, const CompleteWorkspace& w, cudaStream_t stream) {
  const auto run = [&](auto* kernel) {
    return launch(kernel, dim3(p.shape.batch * p.shape.num_kv_heads), kThreads, 0, stream, p, w);
  };
  return p.dtype == DType::kBFloat16 ? run(complete_kernel<bf16>) : run(complete_kernel<fp16>);
}

}  // namespace mac_attn::cuda
