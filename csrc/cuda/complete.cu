#include "complete.cuh"
#include "head_dim.cuh"
#include "kernels.h"
#include "launch.cuh"

namespace mac_attn::cuda {

namespace {

template <typename T>
cudaError_t launch_type(const CompleteParams& p, const CompleteWorkspace& w, cudaStream_t stream) {
  const dim3 grid(p.shape.batch * p.shape.num_kv_heads);
  return with_head_dim(p.shape, [&](auto dim) {
    return launch(complete_kernel<T, decltype(dim)::value, decltype(dim)::kExact>, grid, complete_threads(p),
                  complete_shared_bytes(p), stream, p, w);
  });
}

}  // namespace

cudaError_t launch_complete(const CompleteParams& p, const CompleteWorkspace& w, cudaStream_t stream) {
  return p.dtype == DType::kBFloat16 ? launch_type<bf16>(p, w, stream) : launch_type<fp16>(p, w, stream);
}

}  // namespace mac_attn::cuda
