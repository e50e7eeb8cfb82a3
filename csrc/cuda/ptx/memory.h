// Loads and atomics with the cache and ordering behaviour in their names (PTX ISA 9.7.9: ld, st; 9.7.13: atom).
#pragma once

#include "../simt.h"

namespace mac_attn::ptx {

#if defined(__CUDACC__)

// Shared or global.
MAC_DEVICE uint32_t load_4(const void* p) {
  return *static_cast<const uint32_t*>(p);
}
MAC_DEVICE uint2 load_8(const void* p) {
  return *static_cast<const uint2*>(p);
}
MAC_DEVICE uint4 load_16(const void* p) {
  return *static_cast<const uint4*>(p);
}
MAC_DEVICE void store_4(void* p, uint32_t value) {
  *static_cast<uint32_t*>(p) = value;
}
MAC_DEVICE void store_8(void* p, uint2 value) {
  *static_cast<uint2*>(p) = value;
}
MAC_DEVICE void store_16(void* p, uint4 value) {
  *static_cast<uint4*>(p) = value;
}

// Shared or global.
MAC_DEVICE float4 load_float4(const float* p) {
  return *reinterpret_cast<const float4*>(p);
}
MAC_DEVICE void store_float4(float* p, float4 value) {
  *reinterpret_cast<float4*>(p) = value;
}

// 16 bytes that are read once: past the L1 cache. Not ld.global.nc, whose data must not change during the
// kernel: with programmatic dependent launch the kernel before this one may still be writing it.
MAC_DEVICE uint4 load_stream_16(const void* global) {
  uint4 value;
  asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
               : "l"(global)
               : "memory");
  return value;
}

// Asks for a line of the L2 cache; a hint, so it may be given before the data is there to be read.
MAC_DEVICE void prefetch_l2(const void* global) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(global));
}

// Returns the old value; orders the block's writes before it, and other blocks' after it (with a barrier
// of the block on either side).
MAC_DEVICE int atomic_add_acq_rel(int* p, int value) {
  int old;
  asm volatile("atom.acq_rel.gpu.global.add.s32 %0, [%1], %2;" : "=r"(old) : "l"(p), "r"(value) : "memory");
  return old;
}
// Orders what this thread has seen or written so far before its later writes.
MAC_DEVICE void fence() {
  asm volatile("fence.acq_rel.gpu;" ::: "memory");
}
// The same without the first half: orders only what this thread does after it.
MAC_DEVICE int atomic_add_acquire(int* p, int value) {
  int old;
  asm volatile("atom.acquire.gpu.global.add.s32 %0, [%1], %2;" : "=r"(old) : "l"(p), "r"(value) : "memory");
  return old;
}

// Reads what other threads may be changing by atomics.
MAC_DEVICE unsigned long long load_volatile(const unsigned long long* p) {
  return *static_cast<const volatile unsigned long long*>(p);
}
MAC_DEVICE int load_volatile(const int* p) {
  return *static_cast<const volatile int*>(p);
}

// These order nothing; the old value comes back. Those of 64 bits are not for the shared memory of another block of
// the cluster: shared memory has no such instruction, and what nvcc 13.0 makes of it there is a load and a store.
MAC_DEVICE int atomic_or(int* p, int bits) {
  return atomicOr(p, bits);
}
MAC_DEVICE void atomic_add(int64_t* p, int64_t value) {
  atomicAdd(reinterpret_cast<unsigned long long*>(p), static_cast<unsigned long long>(value));
}
MAC_DEVICE int atomic_add(int* p, int value) {
  return atomicAdd(p, value);
}
MAC_DEVICE unsigned long long atomic_max(unsigned long long* p, unsigned long long value) {
  return atomicMax(p, value);
}
MAC_DEVICE unsigned long long atomic_exchange(unsigned long long* p, unsigned long long value) {
  return atomicExch(p, value);
}

#else

inline uint32_t load_4(const void* p) {
  simt::check_aligned("load_4: address is not 4-byte aligned", p, 4);
  uint32_t value;
  std::memcpy(&value, p, sizeof value);
  return value;
}
inline uint2 load_8(const void* p) {
  simt::check_aligned("load_8: address is not 8-byte aligned", p, 8);
  return *static_cast<const uint2*>(p);
}
inline uint4 load_16(const void* p) {
  simt::check_aligned("load_16: address is not 16-byte aligned", p, 16);
  simt::thread_counters().load_bytes += 16;
  return *static_cast<const uint4*>(p);
}
inline void store_4(void* p, uint32_t value) {
  simt::check_aligned("store_4: address is not 4-byte aligned", p, 4);
  simt::thread_counters().store_bytes += 4;
  std::memcpy(p, &value, sizeof value);
}
inline void store_8(void* p, uint2 value) {
  simt::check_aligned("store_8: address is not 8-byte aligned", p, 8);
  simt::thread_counters().store_bytes += 8;
  *static_cast<uint2*>(p) = value;
}
inline void store_16(void* p, uint4 value) {
  simt::check_aligned("store_16: address is not 16-byte aligned", p, 16);
  simt::thread_counters().store_bytes += 16;
  *static_cast<uint4*>(p) = value;
}
inline float4 load_float4(const float* p) {
  simt::check_aligned("load_float4: address is not 16-byte aligned", p, 16);
  return {p[0], p[1], p[2], p[3]};
}
inline void store_float4(float* p, float4 value) {
  simt::check_aligned("store_float4: address is not 16-byte aligned", p, 16);
  p[0] = value.x, p[1] = value.y, p[2] = value.z, p[3] = value.w;
}
inline uint4 load_stream_16(const void* global) {
  simt::check_aligned("load_stream_16: address is not 16-byte aligned", global, 16);
  simt::thread_counters().load_stream_bytes += 16;
  return *static_cast<const uint4*>(global);
}

inline void prefetch_l2(const void*) {}

inline int atomic_add_acq_rel(int* p, int value) {
  simt::switch_point();
  ++simt::thread_counters().atomics;
  return __atomic_fetch_add(p, value, __ATOMIC_ACQ_REL);
}
inline void fence() {
  __atomic_thread_fence(__ATOMIC_ACQ_REL);
}
inline int atomic_add_acquire(int* p, int value) {
  simt::switch_point();
  ++simt::thread_counters().atomics;
  return __atomic_fetch_add(p, value, __ATOMIC_ACQUIRE);
}
inline unsigned long long load_volatile(const unsigned long long* p) {
  return __atomic_load_n(p, __ATOMIC_RELAXED);
}
inline int load_volatile(const int* p) {
  return __atomic_load_n(p, __ATOMIC_RELAXED);
}
inline int atomic_or(int* p, int bits) {
  simt::switch_point();
  ++simt::thread_counters().atomics;
  return __atomic_fetch_or(p, bits, __ATOMIC_RELAXED);
}
inline void atomic_add(int64_t* p, int64_t value) {
  simt::switch_point();
  ++simt::thread_counters().atomics;
  __atomic_fetch_add(p, value, __ATOMIC_RELAXED);
}
inline int atomic_add(int* p, int value) {
  simt::switch_point();
  return __atomic_fetch_add(p, value, __ATOMIC_RELAXED);
}
inline unsigned long long atomic_max(unsigned long long* p, unsigned long long value) {
  simt::check_not_anothers("atomic_max: 64 bits of another block's shared memory, which its threads may change", p);
  simt::switch_point();
  ++simt::thread_counters().atomics;
  unsigned long long old = __atomic_load_n(p, __ATOMIC_RELAXED);
  while (value > old && !__atomic_compare_exchange_n(p, &old, value, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
  }
  return old;
}
inline unsigned long long atomic_exchange(unsigned long long* p, unsigned long long value) {
  simt::switch_point();
  ++simt::thread_counters().atomics;
  return __atomic_exchange_n(p, value, __ATOMIC_RELAXED);
}

#endif

}  // namespace mac_attn::ptx
