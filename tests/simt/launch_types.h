// Grids, blocks and shared memory of the kernels. One source for each dtype includes this, so that they compile
// side by side.
#pragma once

#include "amend.cuh"
#include "complete.cuh"
#include "launch_kernels.h"
#include "match.cuh"
#include "unrotate.cuh"

namespace mac_attn::simt {

template <typename T>
void launch_unrotate_type(const UnrotateParams& p, const Run& run) {
  const dim3 grid(p.shape.batch, cuda::unrotate_ctas(p), p.shape.tokens);
  launch({grid, cuda::kUnrotateThreads, 0, run.engine, run.seed}, cuda::unrotate_kernel<T>, p);
}

template <typename T>
void launch_match_type(const MatchParams& p, const cuda::MatchWorkspace& w, const Run& run) {
  cuda::with_head_dim(p.shape.head_dim, [&](auto head_dim) {
    const int ctas = p.shape.batch * p.shape.num_kv_heads * p.shape.tokens * w.splits;
    launch({static_cast<unsigned>(ctas), cuda::kMatchThreads,
            cuda::match_shared_bytes<head_dim>(p.shape.group_size, w.cluster), run.engine, run.seed,
            static_cast<unsigned>(w.cluster)},
           cuda::match_kernel<T, head_dim, head_dim.kExact>, p, w);
  });
}

template <typename Q, typename T>
void launch_amend_type(const AmendParams& p, const cuda::AmendWorkspace& w, int ctas, const Run& run) {
  cuda::each_amend_launch(p, [&](int queries, cuda::Serves serves) {
    cuda::AmendWorkspace served = w;
    served.serves = serves;
    cuda::with_head_dim(p.shape, [&](auto head_dim) {
      cuda::with_head_blocks<head_dim>(queries, [&](auto blocks) {
        const size_t shared = cuda::amend_shared_bytes<head_dim, blocks, T>();
        launch({static_cast<unsigned>(ctas), cuda::kThreads, shared, run.engine, run.seed},
               cuda::amend_kernel<Q, head_dim, blocks, T, head_dim.kExact>, p, served);
      });
    });
    return 0;
  });
}

template <typename T>
void launch_complete_type(const CompleteParams& p, const cuda::CompleteWorkspace& w, const Run& run) {
  cuda::with_head_dim(p.shape, [&](auto head_dim) {
    const int ctas = p.shape.batch * p.shape.num_kv_heads, threads = cuda::complete_threads(p);
    launch({static_cast<unsigned>(ctas), static_cast<unsigned>(threads),
            static_cast<size_t>(cuda::complete_shared_bytes(p)), run.engine, run.seed},
           cuda::complete_kernel<T, head_dim, head_dim.kExact>, p, w);
  });
}

}  // namespace mac_attn::simt
