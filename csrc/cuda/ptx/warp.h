// Exchange among the 32 lanes of a warp (PTX ISA 9.7.9: shfl.sync; 9.7.13: vote.sync, bar.warp.sync).
#pragma once

#include "../simt.h"

namespace mac_attn::ptx {

MAC_DEVICE int lane_id() {
  return static_cast<int>(threadIdx.x % 32);
}

template <typename T>
MAC_DEVICE T shfl_xor(T value, int mask) {
  return __shfl_xor_sync(0xffffffffu, value, mask);
}
MAC_DEVICE int64_t shfl(int64_t value, int lane) {
  return static_cast<int64_t>(__shfl_sync(0xffffffffu, static_cast<long long>(value), lane));
}
MAC_DEVICE uint32_t ballot(bool predicate) {
  return __ballot_sync(0xffffffffu, predicate);
}
MAC_DEVICE void sync_warp() {
  __syncwarp();
}

}  // namespace mac_attn::ptx
