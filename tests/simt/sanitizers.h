// The sanitizers' own interface, as weak symbols: the execution itself is compiled without instrumentation (its
// bookkeeping belongs to no CUDA thread), and works with whatever runtime it is linked to, or with none.
#pragma once

#include <cstddef>

extern "C" {
#define MAC_SIMT_WEAK __attribute__((weak))
// sanitizer/asan_interface.h, sanitizer/common_interface_defs.h
MAC_SIMT_WEAK void __asan_poison_memory_region(const volatile void* p, size_t size);
MAC_SIMT_WEAK void __asan_unpoison_memory_region(const volatile void* p, size_t size);
MAC_SIMT_WEAK void __sanitizer_start_switch_fiber(void** fake_stack, const void* bottom, size_t size);
MAC_SIMT_WEAK void __sanitizer_finish_switch_fiber(void* fake_stack, const void** bottom, size_t* size);
// sanitizer/tsan_interface.h
MAC_SIMT_WEAK void* __tsan_get_current_fiber(void);
MAC_SIMT_WEAK void* __tsan_create_fiber(unsigned flags);
MAC_SIMT_WEAK void __tsan_switch_to_fiber(void* fiber, unsigned flags);
MAC_SIMT_WEAK void __tsan_acquire(void* address);
MAC_SIMT_WEAK void __tsan_release(void* address);
// not declared in a header, but what compiled code calls for a memset
MAC_SIMT_WEAK void __tsan_write_range(void* address, unsigned long size);
#undef MAC_SIMT_WEAK
}

namespace mac_attn::simt {

// What ThreadSanitizer is told of the order of things: what was before a release is before a later acquire.
inline void order_release(void* address) {
  if (__tsan_release) __tsan_release(address);
}
inline void order_acquire(void* address) {
  if (__tsan_acquire) __tsan_acquire(address);
}
// Counts as a write by the running thread.
inline void note_write(void* p, size_t size) {
  if (__tsan_write_range) __tsan_write_range(p, size);
}
inline void poison(const void* p, size_t size) {
  if (__asan_poison_memory_region) __asan_poison_memory_region(p, size);
}
inline void unpoison(const void* p, size_t size) {
  if (__asan_unpoison_memory_region) __asan_unpoison_memory_region(p, size);
}

}  // namespace mac_attn::simt
