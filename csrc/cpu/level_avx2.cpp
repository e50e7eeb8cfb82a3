// The CPU kernels for x86-64 with avx2, fma, f16c.
#include "common.h"

#if MAC_X86
#include <immintrin.h>

// Everything below is compiled for these instructions; nothing calls it before a look at the CPU.
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
// GCC's headers make "any register" by `__Y = __Y` and then warn about it (GCC bug 105593).
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC target("avx2,fma,f16c")
#endif

#define MAC_LEVEL 1
#define MAC_LEVEL_NAME avx2
namespace mac_attn::cpu::avx2 {
#include "level.h"
}  // namespace mac_attn::cpu::avx2

#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif  // MAC_X86
