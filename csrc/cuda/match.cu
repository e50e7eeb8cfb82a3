#include <algorithm>

#include "head_dim.cuh"
#include "kernels.h"
#include "launch.cuh"
#include "match.cuh"

namespace mac_attn::cuda {

namespace {

template <typename T>
cudaError_t launch_type(const MatchParams& p, const MatchWorkspace& w, cudaStream_t stream) {
  const dim3 grid(p.shape.batch * p.shape.num_kv_heads * p.shape.tokens * w.splits);
  return with_head_dim(p.shape.head_dim, [&](auto dim) {
    constexpr int kHeadDim = decltype(dim)::value;
    return launch_clusters(match_kernel<T, kHeadDim, decltype(dim)::kExact>, w.cluster, grid, kMatchThreads,
                           match_shared_bytes<kHeadDim>(p.shape.group_size, w.cluster), stream, p, w);
  });
}

}  // namespace

cudaError_t match_splits(const MatchParams& p, MatchWorkspace& w) {
  int device = 0, processors = 0, major = 0;
  if (cudaError_t error = cudaGetDevice(&device)) return error;
  if (cudaError_t error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device)) return error;
  if (cudaError_t error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device)) return error;
  constexpr int kBlocksAtATime = 2;  // on a processor, as the kernel's launch bounds say
  constexpr int kFewBlocks = 2;      // for each KV head: one alone has too few rows in flight
  constexpr int kMaxSplits = 32;     // they meet at one counter
  int each = 0;
  const auto candidates = [&](auto dim) {
    each = MatchLayout<decltype(dim)::value>::kPerBlock;
    return cudaSuccess;
  };
  if (cudaError_t error = with_head_dim(p.shape.head_dim, candidates)) return error;
  const int groups = p.shape.batch * p.shape.num_kv_heads * p.shape.tokens;
  const int most = (p.ring.layout.shape.entries + each - 1) / each;
  int wanted = processors * kBlocksAtATime / groups;
  if (wanted == 1) wanted = kFewBlocks;
  w.splits = std::max(1, std::min({wanted, most, kMaxSplits}));
  // Two CTAs of clusters on one processor are slower than without clusters.
  const bool meet_in_cluster =
      major >= 9 && p.shape.tokens == 1 && w.splits <= kMaxCluster && w.splits * groups <= processors;
  w.cluster = meet_in_cluster ? w.splits : 1;
  return cudaSuccess;
}

cudaError_t launch_match(const MatchParams& p, const MatchWorkspace& w, cudaStream_t stream) {
  return p.dtype == DType::kBFloat16 ? launch_type<bf16>(p, w, stream) : launch_type<fp16>(p, w, stream);
}

}  // namespace mac_attn::cuda
