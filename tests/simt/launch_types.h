// Grids, blocks and shared memory of the kernels. One source for each dtype includes this, so that they compile
// side by side.
#pragma once

#include "amend.cuh"
#include "complete.cuh"
#include "launch_kernels.h"

namespace mac_attn::simt {

template <typename T, int kHeadDim>
void launch_amend_dim(const AmendParams& p, const cuda::AmendWorkspace& w, int ctas, const Run& run) {
  const LaunchConfig config{static_cast<unsigned>(ctas), cuda::kThreads, cuda::amend_shared_bytes<kHeadDim>(),
                            run.engine, run.seed};
  if (p.shape.group_size <= 8) {
    launch(config, cuda::amend_kernel<T, kHeadDim, 1>, p, w);
  } else {
    launch(config, cuda::amend_kernel<T, kHeadDim, 2>, p, w);
  }
}

template <typename T>
void launch_amend_type(const AmendParams& p, const cuda::AmendWorkspace& w, int ctas, const Run& run) {
  switch (p.shape.head_dim) {
    case 64: return launch_amend_dim<T, 64>(p, w, ctas, run);
    case 80: return launch_amend_dim<T, 80>(p, w, ctas, run);
    case 96: return launch_amend_dim<T, 96>(p, w, ctas, run);
    case 128: return launch_amend_dim<T, 128>(p, w, ctas, run);
    case 256: return launch_amend_dim<T, 256>(p, w, ctas, run);
    default: throw Failure("no such head_dim");
  }
}

template <typename T>
void launch_complete_type(const CompleteParams& p, const cuda::CompleteWorkspace& w, const Run& run) {
  const int rows = p.shape.batch * p.shape.num_qo_heads();
  launch({static_cast<unsigned>((rows + cuda::kWarps - 1) / cuda::kWarps), cuda::kThreads, 0, run.engine, run.seed},
         cuda::complete_kernel<T>, p, w);
}

}  // namespace mac_attn::simt
