// In place of the CUDA toolkit's header: the types in the declarations of csrc/cuda/kernels.h.
#pragma once

using cudaError_t = int;
using cudaStream_t = void*;
