// Launching a kernel so that its start overlaps the end of the one before it, where the chip can
// (programmatic dependent launch, CUDA Programming Guide, sm_90).
#pragma once

#include <cuda_runtime.h>

namespace mac_attn::cuda {

template <typename Kernel, typename... Args>
cudaError_t launch_clusters(Kernel* kernel, int cluster, dim3 grid, int threads, size_t shared_bytes,
                            cudaStream_t stream, const Args&... args) {
  int device = 0, major = 0;
  if (cudaError_t error = cudaGetDevice(&device)) return error;
  if (cudaError_t error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device)) return error;
  constexpr size_t kStatic = 8 * 1024;  // there may be as much besides
  if (shared_bytes + kStatic > 48 * 1024) {
    const int size = static_cast<int>(shared_bytes);
    if (cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, size)) {
      return error;
    }
  }
  cudaLaunchAttribute attributes[2] = {};
  attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[0].val.programmaticStreamSerializationAllowed = 1;
  attributes[1].id = cudaLaunchAttributeClusterDimension;
  attributes[1].val.clusterDim = {static_cast<unsigned>(cluster), 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = major < 9 ? 0 : cluster > 1 ? 2 : 1;
  return cudaLaunchKernelEx(&config, kernel, args...);
}

template <typename Kernel, typename... Args>
cudaError_t launch(Kernel* kernel, dim3 grid, int threads, size_t shared_bytes, cudaStream_t stream,
                   const Args&... args) {
  return launch_clusters(kernel, 1, grid, threads, shared_bytes, stream, args...);
}

}  // namespace mac_attn::cuda
