#include "complete.cuh"
#include "kernels.h"
#include "launch.cuh"

namespace mac_attn::cuda {

cudaError_t launch_complete(const CompleteParams& p, const CompleteWorkspace& w, cudaStream_t stream) {
  const int64_t rows = static_cast<int64_t>(p.shape.batch) * p.shape.num_kv_heads * p.shape.group_size;
  const dim3 grid(static_cast<unsigned>((rows + kWarps - 1) / kWarps));
  return launch(p.dtype == DType::kBFloat16 ? complete_kernel<bf16> : complete_kernel<fp16>, grid, kThreads, 0,
                stream, p, w);
}

}  // namespace mac_attn::cuda
