// Barriers of a block and the dependency between launches (PTX ISA 9.7.13: barrier, griddepcontrol).
#pragma once

#include "../simt.h"

namespace mac_attn::ptx {

MAC_DEVICE void sync_block() {
  __syncthreads();
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

}  // namespace mac_attn::ptx
