#include "complete.cuh"
#include "kernels.h"
#include "launch.cuh"

namespace mac_attn::cuda {

namespace {

template <typename T, int kHeadDim>
cudaError_t launch_dim(const CompleteParams& p, const CompleteWorkspace& w, cudaStream_t stream) {
  const int warps = p.shape.batch * (p.shape.num_qo_heads() + (p.source ? p.shape.num_kv_heads : 0));
  const dim3 grid((warps + kWarps - 1) / kWarps);
  return launch(complete_kernel<T, kHeadDim>, grid, kThreads, 0, stream, p, w);
}

template <typename T>
cudaError_t launch_type(const CompleteParams& p, const CompleteWorkspace& w, cudaStream_t stream) {
  switch (p.shape.head_dim) {
    case 64: return launch_dim<T, 64>(p, w, stream);
    case 80: return launch_dim<T, 80>(p, w, stream);
    case 96: return launch_dim<T, 96>(p, w, stream);
    case 128: return launch_dim<T, 128>(p, w, stream);
    case 256: return launch_dim<T, 256>(p, w, stream);
    default: return cudaErrorInvalidValue;
  }
}

}  // namespace

cudaError_t launch_complete(const CompleteParams& p, const CompleteWorkspace& w, cudaStream_t stream) {
  return p.dtype == DType::kBFloat16 ? launch_type<bf16>(p, w, stream) : launch_type<fp16>(p, w, stream);
}

}  // namespace mac_attn::cuda
