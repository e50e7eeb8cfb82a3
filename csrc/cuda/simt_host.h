// CUDA C++ for a C++ compiler: the keywords, built-in variables and types that the kernels use, and what the
// wrappers in ptx/ ask of the host execution, which tests/simt implements.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#define __global__
#define __device__
#define __host__
#define __grid_constant__
#define __launch_bounds__(...)
#define __shared__ static  // of the running block; tests/simt fills it with NaN first. Not in clusters
#define __align__(bytes) __attribute__((aligned(bytes)))
#define MAC_DEVICE inline

// Code that runs for a whole warp at once on the execution's own buffers: no thread's accesses.
#define MAC_SIMT_UNCHECKED __attribute__((no_sanitize("address"), no_sanitize("thread"), no_sanitize("undefined")))

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) uint2 {
  uint32_t x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};

namespace mac_attn::simt {

// Which thread is executing.
struct Place {
  uint3 thread, block;
  dim3 block_dim, grid_dim;
  int lane;
  int cluster_rank, cluster_size;
};
extern __thread const Place* place;  // __thread: no initialiser to check for at every use

constexpr uint32_t kNaN = 0x7fff7fff;  // as fp32 and twice as bf16 and fp16; as an integer, out of any bounds

// A copy that has been asked for and not been waited for.
struct AsyncCopy {
  void* shared;
  const void* global;  // null: zeros
  uint4 data;          // what `global` held when the copy was asked for, if it was read then
  bool early;          // it was
};
struct AsyncCopies {
  static constexpr int kMax = 512;
  AsyncCopy copy[kMax];
  int count;
  int group_end[kMax];  // of every committed group, the place after its last copy
  int groups;
};

// Global memory traffic that the wrappers asked for, and other numbers of the launches so far.
struct Counters {
  int64_t async_copy_bytes;   // cp_async_16 that copied
  int64_t async_zero_bytes;   // cp_async_16 that filled with zeros
  int64_t load_stream_bytes;  // load_stream_16
  int64_t load_bytes;         // load_16
  int64_t store_bytes;        // store_16
  int64_t atomics;
  int64_t matrix_products;  // mma_m16n8k16, one per warp
};

// Gives `in` of every lane to `meaning`, which is called once, when all 32 lanes have come to the instruction
// `name`, and returns this lane's `out`. Orders no memory accesses.
void collective(const char* name, const void* in, size_t in_bytes, void* out, size_t out_bytes,
                void (*meaning)(const void* in, void* out));
void sync_warp();
void sync_block();
void named_barrier_sync(int id, int num_threads);
void cluster_arrive();
void cluster_wait();
uintptr_t shared_of(uintptr_t mine, int rank);  // what is at `mine` in this block, in block `rank` of the cluster
void switch_point();                            // other threads may run here
void* dynamic_shared();
AsyncCopies& async_copies();                          // of this thread
bool random_bit();                                    // from the schedule's seed
void in_flight(void* shared, size_t bytes, bool on);  // nobody may touch it
Counters& thread_counters();
[[noreturn]] void fail(const char* what);  // ends the launch with a simt::Failure

// Faults that the hardware would report.
void check_shared(const char* name, const void* p, size_t bytes);  // 16-byte aligned, in shared memory
void check_not_anothers(const char* name, const void* p);          // not in another block's shared memory
inline void check_aligned(const char* name, const void* p, size_t bytes) {
  if (reinterpret_cast<uintptr_t>(p) % bytes != 0) fail(name);
}

// The same for types: kMeaning(const In* in, Out* out) has the 32 lanes' values in both.
template <typename In, typename Out>
Out out_of(void (*)(const In*, Out*));

template <auto kMeaning, typename In>
inline auto collective(const char* name, const In& in) {
  using Out = decltype(out_of(kMeaning));
  Out out;
  collective(name, &in, sizeof in, &out, sizeof out, [](const void* all_in, void* all_out) MAC_SIMT_UNCHECKED {
    kMeaning(static_cast<const In*>(all_in), static_cast<Out*>(all_out));
  });
  return out;
}

}  // namespace mac_attn::simt

#define threadIdx (::mac_attn::simt::place->thread)
#define blockIdx (::mac_attn::simt::place->block)
#define blockDim (::mac_attn::simt::place->block_dim)
#define gridDim (::mac_attn::simt::place->grid_dim)

namespace mac_attn {

inline void* dynamic_shared() {
  return simt::dynamic_shared();
}
inline uint32_t float_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}
inline float bits_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

}  // namespace mac_attn
