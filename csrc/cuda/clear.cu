#include "clear.cuh"

#include "kernels.h"

namespace mac_attn::cuda {

// Not as a dependent launch: whatever comes before has ended when it starts, so the launch after it, which starts
// with it, may read all of that.
cudaError_t launch_clear(int32_t* memory, int32_t count, cudaStream_t stream) {
  clear_kernel<<<(count + kClearThreads - 1) / kClearThreads, kClearThreads, 0, stream>>>(memory, count);
  return cudaGetLastError();
}

}  // namespace mac_attn::cuda
