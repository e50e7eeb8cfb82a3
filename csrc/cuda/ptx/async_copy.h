// Asynchronous copies from global to shared memory (PTX ISA 9.7.9.25: cp.async, sm_80).
#pragma once

#include "../simt.h"

namespace mac_attn::ptx {

// 16 bytes past the L1 cache; zeros, and nothing read, when not valid.
MAC_DEVICE void cp_async_16(void* shared, const void* global, bool valid) {
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(address), "l"(global),
               "r"(valid ? 16 : 0)
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

}  // namespace mac_attn::ptx
