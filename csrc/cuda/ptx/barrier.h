// Barriers of a block and the dependency between launches (PTX ISA 9.7.13: barrier, griddepcontrol).
#pragma once

#include "../simt.h"

namespace mac_attn::ptx {

#if defined(__CUDACC__)

// bar.sync 0
MAC_DEVICE void sync_block() {
  __syncthreads();
}

// For `num_threads` threads, whole warps. Barrier 0 is sync_block's.
MAC_DEVICE void named_barrier_sync(int id, int num_threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(num_threads) : "memory");
}

// Waits until the launch before this one has ended and its writes are visible. Nothing below sm_90, where
// launches follow one another anyway.
MAC_DEVICE void grid_dependency_wait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Lets the next launch start its blocks.
MAC_DEVICE void grid_dependency_launch() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

#else

inline void sync_block() {
  simt::sync_block();
}
inline void named_barrier_sync(int id, int num_threads) {
  simt::named_barrier_sync(id, num_threads);
}

// Launches follow one another on the host.
inline void grid_dependency_wait() {}
inline void grid_dependency_launch() {}

#endif

}  // namespace mac_attn::ptx
