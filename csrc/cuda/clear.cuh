// Zeros for the counters of a call that has no memory of its own for them.
#pragma once

#include "ptx/barrier.h"
#include "simt.h"

namespace mac_attn::cuda {

constexpr int kClearThreads = 256;

__global__ void clear_kernel(int32_t* memory, int32_t count) {
  ptx::grid_dependency_launch();
  const int i = blockIdx.x * kClearThreads + threadIdx.x;
  if (i < count) memory[i] = 0;
}

}  // namespace mac_attn::cuda
