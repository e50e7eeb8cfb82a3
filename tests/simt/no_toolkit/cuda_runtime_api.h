// In place of the CUDA toolkit's header: what csrc/cuda/kernels.h and csrc/backend_cuda.cpp take from it. The GPU
// has compute capability 7.5.
#pragma once

using cudaError_t = int;
using cudaStream_t = void*;

constexpr cudaError_t cudaErrorInvalidDeviceFunction = 98, cudaErrorNoKernelImageForDevice = 209;
enum cudaDeviceAttr {
  cudaDevAttrComputeCapabilityMajor = 75,
  cudaDevAttrComputeCapabilityMinor = 76,
  cudaDevAttrMaxSharedMemoryPerBlockOptin = 97
};

inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return 0;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrMaxSharedMemoryPerBlockOptin ? 227 * 1024
           : attribute == cudaDevAttrComputeCapabilityMajor     ? 7
                                                                : 5;
  return 0;
}
inline cudaError_t cudaGetLastError() {
  return 0;
}
