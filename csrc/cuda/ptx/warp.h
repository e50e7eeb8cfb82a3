// Exchange among the 32 lanes of a warp (PTX ISA 9.7.9: shfl.sync; 9.7.13: vote.sync, bar.warp.sync). All lanes
// take part. Only sync_warp orders the lanes' memory accesses.
#pragma once

#include "../simt.h"

namespace mac_attn::ptx {

#if defined(__CUDACC__)

MAC_DEVICE int lane_id() {
  return static_cast<int>(threadIdx.x % 32);
}

// 4-byte types and int64_t.
template <typename T>
MAC_DEVICE T shfl(T value, int lane) {
  if constexpr (sizeof(T) == 8) {
    return static_cast<T>(__shfl_sync(0xffffffffu, static_cast<long long>(value), lane));
  } else {
    return __shfl_sync(0xffffffffu, value, lane);
  }
}
template <typename T>
MAC_DEVICE T shfl_xor(T value, int mask) {
  if constexpr (sizeof(T) == 8) {
    return static_cast<T>(__shfl_xor_sync(0xffffffffu, static_cast<long long>(value), mask));
  } else {
    return __shfl_xor_sync(0xffffffffu, value, mask);
  }
}
MAC_DEVICE uint32_t ballot(bool predicate) {
  return __ballot_sync(0xffffffffu, predicate);
}
// redux.sync (sm_80)
MAC_DEVICE uint32_t reduce_max(uint32_t value) {
  return __reduce_max_sync(0xffffffffu, value);
}
MAC_DEVICE uint32_t reduce_add(uint32_t value) {
  return __reduce_add_sync(0xffffffffu, value);
}
MAC_DEVICE int count_bits(uint32_t bits) {
  return __popc(bits);
}
MAC_DEVICE void sync_warp() {
  __syncwarp();
}

#else

inline int lane_id() {
  return simt::place->lane;
}

template <typename T>
struct ShuffleOperands {
  T value;
  int source;
};

template <typename T>
MAC_SIMT_UNCHECKED inline void shfl_of_warp(const ShuffleOperands<T>* in, T* out) {
  for (int lane = 0; lane < 32; ++lane) out[lane] = in[in[lane].source % 32].value;
}

MAC_SIMT_UNCHECKED inline void ballot_of_warp(const bool* in, uint32_t* out) {
  uint32_t votes = 0;
  for (int lane = 0; lane < 32; ++lane) votes |= static_cast<uint32_t>(in[lane]) << lane;
  for (int lane = 0; lane < 32; ++lane) out[lane] = votes;
}

MAC_SIMT_UNCHECKED inline void reduce_max_of_warp(const uint32_t* in, uint32_t* out) {
  uint32_t max = 0;
  for (int lane = 0; lane < 32; ++lane) max = in[lane] > max ? in[lane] : max;
  for (int lane = 0; lane < 32; ++lane) out[lane] = max;
}

MAC_SIMT_UNCHECKED inline void reduce_add_of_warp(const uint32_t* in, uint32_t* out) {
  uint32_t sum = 0;
  for (int lane = 0; lane < 32; ++lane) sum += in[lane];
  for (int lane = 0; lane < 32; ++lane) out[lane] = sum;
}

template <typename T>
inline T shfl(T value, int lane) {
  return simt::collective<shfl_of_warp<T> >("shfl", ShuffleOperands<T>{value, lane & 31});
}
template <typename T>
inline T shfl_xor(T value, int mask) {
  return simt::collective<shfl_of_warp<T> >("shfl_xor", ShuffleOperands<T>{value, (lane_id() ^ mask) & 31});
}
inline uint32_t ballot(bool predicate) {
  return simt::collective<ballot_of_warp>("ballot", predicate);
}
inline uint32_t reduce_max(uint32_t value) {
  return simt::collective<reduce_max_of_warp>("reduce_max", value);
}
inline uint32_t reduce_add(uint32_t value) {
  return simt::collective<reduce_add_of_warp>("reduce_add", value);
}
inline int count_bits(uint32_t bits) {
  return __builtin_popcount(bits);
}
inline void sync_warp() {
  simt::sync_warp();
}

#endif

}  // namespace mac_attn::ptx
