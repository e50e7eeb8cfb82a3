// Loads and atomics with the cache and ordering behaviour in their names (PTX ISA 9.7.9: ld, 9.7.13: atom).
#pragma once

#include "../simt.h"

namespace mac_attn::ptx {

MAC_DEVICE uint32_t load_4(const void* global) {
  return *static_cast<const uint32_t*>(global);
}

// 16 bytes that are read once: past the L1 cache.
MAC_DEVICE uint4 load_stream_16(const void* global) {
  uint4 value;
  asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
               : "l"(global)
               : "memory");
  return value;
}

// Returns the old value; orders the block's writes before it, and other blocks' after it (with a barrier
// of the block on either side).
MAC_DEVICE int atomic_add_acq_rel(int* p, int value) {
  int old;
  asm volatile("atom.acq_rel.gpu.global.add.s32 %0, [%1], %2;" : "=r"(old) : "l"(p), "r"(value) : "memory");
  return old;
}

// Reads what other threads of the block may be changing by atomics.
MAC_DEVICE unsigned long long load_volatile(const unsigned long long* p) {
  return *static_cast<const volatile unsigned long long*>(p);
}

MAC_DEVICE void atomic_or(int* p, int bits) {
  atomicOr(p, bits);
}
MAC_DEVICE void atomic_add_shared(int* p, int value) {
  atomicAdd(p, value);
}
MAC_DEVICE void atomic_min(unsigned long long* p, unsigned long long value) {
  atomicMin(p, value);
}

}  // namespace mac_attn::ptx
