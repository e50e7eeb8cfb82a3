#include <algorithm>

#include "kernels.h"
#include "launch.cuh"
#include "match.cuh"

namespace mac_attn::cuda {

namespace {

template <typename T, int kHeadDim>
cudaError_t launch_dim(const MatchParams& p, const MatchWorkspace& w, cudaStream_t stream) {
  const size_t shared = sizeof(float) * p.shape.group_size * kHeadDim;
  return launch(match_kernel<T, kHeadDim>, dim3(p.shape.batch * p.shape.num_kv_heads * w.splits), kMatchThreads,
                shared, stream, p, w);
}

template <typename T>
cudaError_t launch_type(const MatchParams& p, const MatchWorkspace& w, cudaStream_t stream) {
  switch (p.shape.head_dim) {
    case 64: return launch_dim<T, 64>(p, w, stream);
    case 80: return launch_dim<T, 80>(p, w, stream);
    case 96: return launch_dim<T, 96>(p, w, stream);
    case 128: return launch_dim<T, 128>(p, w, stream);
    case 256: return launch_dim<T, 256>(p, w, stream);
    default: return cudaErrorInvalidValue;
  }
}

int candidates_per_block(int head_dim) {
  return head_dim <= 64    ? MatchLayout<64>::kPerBlock
         : head_dim <= 128 ? MatchLayout<128>::kPerBlock
                           : MatchLayout<256>::kPerBlock;
}

}  // namespace

cudaError_t match_splits(const MatchParams& p, int32_t* splits) {
  int device = 0, processors = 0;
  if (cudaError_t error = cudaGetDevice(&device)) return error;
  if (cudaError_t error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device)) return error;
  constexpr int kBlocksAtATime = 4;  // on a processor
  constexpr int kMaxSplits = 32;     // they meet at one counter
  const int each = candidates_per_block(p.shape.head_dim), most = (p.ring.window + each - 1) / each;
  const int wanted = processors * kBlocksAtATime / (p.shape.batch * p.shape.num_kv_heads);
  *splits = std::max(1, std::min({wanted, most, kMaxSplits}));
  return cudaSuccess;
}

cudaError_t launch_match(const MatchParams& p, const MatchWorkspace& w, cudaStream_t stream) {
  return p.dtype == DType::kBFloat16 ? launch_type<bf16>(p, w, stream) : launch_type<fp16>(p, w, stream);
}

}  // namespace mac_attn::cuda
