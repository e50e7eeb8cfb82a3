// The CPU kernels for aarch64 with dot products of bfloat16 (FEAT_BF16: Neoverse V1, N2 and later, Apple M2).
#include "common.h"

#if MAC_ARM
#include <arm_neon.h>

// Everything below is compiled for these instructions; nothing calls it before a look at the CPU.
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("bf16"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("arch=armv8.2-a+bf16")
#endif

#define MAC_LEVEL 0
#undef MAC_NEON
#define MAC_NEON 2
#define MAC_LEVEL_NAME neon_bf16
namespace mac_attn::cpu::neon_bf16 {
#include "level.h"
}  // namespace mac_attn::cpu::neon_bf16

#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif  // MAC_ARM
