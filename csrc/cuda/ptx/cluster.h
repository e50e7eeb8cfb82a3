// Clusters of sm_90: blocks that run together, meet at barriers of the cluster and reach into one another's
// shared memory (PTX ISA 10: %cluster_ctarank, %cluster_nctarank; 9.7.13: barrier.cluster; 9.7.9: mapa).
//
// Every thread of every block of the cluster arrives and then waits, in turn; a warp does so as one. A block's
// shared memory is there for the others from its start to its exit, so there is a barrier before the first and
// after the last access (CUDA Programming Guide, distributed shared memory). A launch without clusters has clusters
// of one block.
//
// Below sm_90 there are no clusters and the host launches none, but the code is compiled for those architectures
// as well: there it says what is true of a block on its own, and the barriers do nothing, not even for the block.
#pragma once

#include "../simt.h"

namespace mac_attn::ptx {

#if defined(__CUDACC__)

// Of this block in its cluster.
MAC_DEVICE int cluster_rank() {
#if __CUDA_ARCH__ >= 900
  int rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
#else
  return 0;
#endif
}

// Blocks of the cluster.
MAC_DEVICE int cluster_size() {
#if __CUDA_ARCH__ >= 900
  int size;
  asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
  return size;
#else
  return 1;
#endif
}

// What this thread has written so far is seen by every thread of the cluster after its cluster_wait.
MAC_DEVICE void cluster_arrive() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
#endif
}

// The same of a thread that has nothing to show: a release waits for all that the thread has asked of memory.
MAC_DEVICE void cluster_arrive_relaxed() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
#endif
}

// Waits until all threads of the cluster have arrived.
MAC_DEVICE void cluster_wait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}

// The place in the shared memory of block `rank` of the cluster that `mine` is in this block's, as a generic
// address: for ordinary loads, stores and atomics.
template <typename T>
MAC_DEVICE T* shared_of(T* mine, int rank) {
#if __CUDA_ARCH__ >= 900
  uint64_t theirs;
  asm("mapa.u64 %0, %1, %2;" : "=l"(theirs) : "l"(mine), "r"(rank));
  return reinterpret_cast<T*>(theirs);
#else
  return mine;
#endif
}

#else

inline int cluster_rank() {
  return simt::place->cluster_rank;
}
inline int cluster_size() {
  return simt::place->cluster_size;
}
inline void cluster_arrive() {
  simt::cluster_arrive();
}
inline void cluster_arrive_relaxed() {
  simt::cluster_arrive();
}
inline void cluster_wait() {
  simt::cluster_wait();
}
template <typename T>
inline T* shared_of(T* mine, int rank) {
  return reinterpret_cast<T*>(simt::shared_of(reinterpret_cast<uintptr_t>(mine), rank));
}

#endif

}  // namespace mac_attn::ptx
