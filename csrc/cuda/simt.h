// What makes one source compile both ways: by nvcc for the GPU and, with MAC_SIMT, as plain C++ for the
// host execution in tests/simt. The kernels name every instruction through ptx/; here are the words of
// CUDA C++ around them.
#pragma once

#include <cmath>
#include <cstdint>

#include "types.h"

#if defined(__CUDACC__)

#include <cuda_runtime.h>

#define MAC_DEVICE __device__ __forceinline__

namespace mac_attn {

// The launch's dynamic shared memory.
MAC_DEVICE void* dynamic_shared() {
  extern __shared__ __align__(128) unsigned char mac_attn_dynamic_shared[];
  return mac_attn_dynamic_shared;
}

MAC_DEVICE uint32_t float_bits(float x) {
  return __float_as_uint(x);
}
MAC_DEVICE float bits_float(uint32_t x) {
  return __uint_as_float(x);
}

}  // namespace mac_attn

#elif defined(MAC_SIMT)

#include "simt_host.h"

#else
#error "Kernels compile with nvcc, or with MAC_SIMT for the host execution in tests/simt"
#endif
