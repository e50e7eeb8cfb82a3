// Asynchronous copies from global to shared memory (PTX ISA 9.7.9.25: cp.async, sm_80).
#pragma once

#include "../simt.h"

namespace mac_attn::ptx {

#if defined(__CUDACC__)

// 16 bytes past the L1 cache; zeros, and nothing read, when not valid. Not visible before a wait.
MAC_DEVICE void cp_async_16(void* shared, const void* global, bool valid) {
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(global), "r"(valid ? 16 : 0)
               : "memory");
}

// Ends a group of copies.
MAC_DEVICE void cp_async_commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

// Waits until all groups but the newest kPending are there, for the executing thread.
template <int kPending>
MAC_DEVICE void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

#else

// The hardware may write at any time up to the wait. Here it does so at both ends: garbage now, the data at
// the wait; the source, too, is read at either end, as the schedule likes.
inline void cp_async_16(void* shared, const void* global, bool valid) {
  simt::check_shared("cp_async_16", shared, 16);
  if (valid) simt::check_aligned("cp_async_16: global address is not 16-byte aligned", global, 16);
  simt::AsyncCopies& copies = simt::async_copies();
  if (copies.count == simt::AsyncCopies::kMax) simt::fail("cp_async_16: too many copies in flight");
  simt::AsyncCopy& copy = copies.copy[copies.count++];
  copy = {shared, valid ? global : nullptr, {}, valid && simt::random_bit()};
  if (copy.early) std::memcpy(&copy.data, global, 16);
  const uint4 garbage{simt::kNaN, simt::kNaN, simt::kNaN, simt::kNaN};
  std::memcpy(shared, &garbage, 16);
  simt::in_flight(shared, 16, true);
  (valid ? simt::thread_counters().async_copy_bytes : simt::thread_counters().async_zero_bytes) += 16;
  simt::switch_point();
}

inline void cp_async_commit() {
  simt::AsyncCopies& copies = simt::async_copies();
  if (copies.groups == simt::AsyncCopies::kMax) simt::fail("cp_async_commit: too many groups in flight");
  copies.group_end[copies.groups++] = copies.count;
}

template <int kPending>
inline void cp_async_wait() {
  simt::switch_point();
  simt::AsyncCopies& copies = simt::async_copies();
  const int finished = copies.groups - kPending;
  if (finished <= 0) return;
  const int end = copies.group_end[finished - 1];
  for (int i = 0; i < end; ++i) {
    simt::AsyncCopy& copy = copies.copy[i];
    if (copy.global && !copy.early) std::memcpy(&copy.data, copy.global, 16);
    simt::in_flight(copy.shared, 16, false);
    std::memcpy(copy.shared, &copy.data, 16);
  }
  for (int i = end; i < copies.count; ++i) copies.copy[i - end] = copies.copy[i];
  copies.count -= end;
  for (int i = finished; i < copies.groups; ++i) copies.group_end[i - finished] = copies.group_end[i] - end;
  copies.groups -= finished;
}

#endif

}  // namespace mac_attn::ptx
