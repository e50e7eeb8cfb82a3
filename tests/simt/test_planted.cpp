// Kernels with one mistake each, to show that the host execution finds it: test_simt_planted MISTAKE ENGINE.
//
// Some mistakes are reported by a sanitizer, others show as a wrong result in one of the schedules, in which case
// this program says so. CMakeLists.txt lists what is expected of which build.
#include <cmath>
#include <cstring>

#include "check.h"
#include "ptx/async_copy.h"
#include "ptx/barrier.h"
#include "ptx/cluster.h"
#include "ptx/memory.h"
#include "ptx/warp.h"

namespace mac_attn::cuda {

constexpr int kThreads = 128;

// out = in reversed, through shared memory.
template <bool kSync>
__global__ void reverse_block(const float* in, float* out) {
  __shared__ float shared[kThreads];
  shared[threadIdx.x] = in[threadIdx.x];
  if (kSync) ptx::sync_block();
  out[threadIdx.x] = shared[kThreads - 1 - threadIdx.x];
}

// The same within each warp. A shuffle gathers the lanes, but it orders no memory accesses.
template <bool kSync>
__global__ void reverse_warp(const float* in, float* out) {
  __shared__ float shared[kThreads];
  const int lane = ptx::lane_id(), base = static_cast<int>(threadIdx.x) - lane;
  const int mirror = ptx::shfl(31 - lane, lane);
  shared[base + lane] = in[base + lane];
  if (kSync) ptx::sync_warp();
  out[base + lane] = shared[base + mirror];
}

// Every thread copies 16 bytes with two groups in flight; then reads its own, or with kOthers its neighbour's.
template <int kPending, bool kOthers, bool kSync>
__global__ void copy_rows(const float* in, float* out) {
  float* shared = static_cast<float*>(dynamic_shared());
  const int t = static_cast<int>(threadIdx.x);
  ptx::cp_async_16(shared + 4 * t, in + 4 * t, true);
  ptx::cp_async_commit();
  ptx::cp_async_16(shared + 4 * (kThreads + t), in + 4 * (kThreads + t), true);
  ptx::cp_async_commit();
  ptx::cp_async_wait<kPending>();
  if (kSync) ptx::sync_block();
  const int from = kOthers ? (t + 1) % kThreads : t;
  for (int i = 0; i < 8; ++i) {
    const int place = 4 * (i / 4 * kThreads + from) + i % 4;
    out[place] = shared[place];
  }
  ptx::cp_async_wait<0>();
}

// Reads `beyond` elements past an array of kThreads: dynamic shared, static shared or global memory.
__global__ void overrun_shared(const float* in, float* out, int beyond) {
  float* shared = static_cast<float*>(dynamic_shared());
  shared[threadIdx.x] = in[threadIdx.x];
  ptx::sync_block();
  out[threadIdx.x] = shared[static_cast<int>(threadIdx.x) + beyond];
}
__global__ void overrun_static_shared(const float* in, float* out, int beyond) {
  __shared__ float shared[kThreads];
  shared[threadIdx.x] = in[threadIdx.x];
  ptx::sync_block();
  const float* row = shared;
  out[threadIdx.x] = row[static_cast<int>(threadIdx.x) + beyond];
}
__global__ void overrun_global(const float* in, float* out, int beyond) {
  const uint4 row = ptx::load_stream_16(in + (threadIdx.x / 4 * 4 + static_cast<unsigned>(beyond)));
  out[threadIdx.x] = bits_float(row.x);
}
__global__ void overrun_copy(const float* in, float* out, int beyond) {
  float* shared = static_cast<float*>(dynamic_shared());
  const unsigned row = threadIdx.x / 4 * 4;
  if (threadIdx.x % 4 == 0) ptx::cp_async_16(shared + row, in + row + beyond, true);
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
  ptx::sync_block();
  out[threadIdx.x] = shared[threadIdx.x];
}

// out = in reversed over a cluster of two blocks, each of which reads the other's shared memory, `beyond` elements
// further. Without kSync the other may not have written yet (a barrier of the block orders no other block),
// without kLast it may have exited.
template <bool kSync, bool kLast>
__global__ void reverse_cluster(const float* in, float* out, int beyond) {
  float* shared = static_cast<float*>(dynamic_shared());
  const int t = static_cast<int>(threadIdx.x), first = static_cast<int>(blockIdx.x) * kThreads;
  ptx::cluster_arrive();
  ptx::cluster_wait();
  shared[kThreads + t] = in[first + t];
  ptx::sync_block();
  if (kSync) ptx::cluster_arrive(), ptx::cluster_wait();
  out[first + t] = *(ptx::shared_of(shared + 2 * kThreads - 1 - t, 1 - ptx::cluster_rank()) + beyond);
  if (kLast) ptx::cluster_arrive(), ptx::cluster_wait();
}

// The same by writing into the other's shared memory. Without kFirst the other may not have started at the first
// write, without kLast it may have exited at the second, which does not matter to the result.
template <bool kFirst, bool kLast>
__global__ void scatter_cluster(const float* in, float* out) {
  float* shared = static_cast<float*>(dynamic_shared());
  const int t = static_cast<int>(threadIdx.x), first = static_cast<int>(blockIdx.x) * kThreads;
  float* theirs = ptx::shared_of(shared + kThreads - 1 - t, 1 - ptx::cluster_rank());
  if (kFirst) ptx::cluster_arrive(), ptx::cluster_wait();
  *theirs = in[first + t];
  ptx::cluster_arrive();
  ptx::cluster_wait();
  out[first + t] = shared[t];
  theirs[kThreads] = 1.f;
  if (kLast) ptx::cluster_arrive(), ptx::cluster_wait();
}

}  // namespace mac_attn::cuda

namespace mac_attn::simt {
namespace {

enum class Expect { kReversed, kReversedByWarp, kSame };

// Runs the kernel on 20 schedules (3 of the slow engine) and compares; `floats` in and out, as much dynamic shared
// memory.
template <unsigned kCluster = 1, typename... Args>
bool right_everywhere(Engine engine, int floats, Expect expect, void (*kernel)(const float*, float*, Args...),
                      Args... args) {
  std::mt19937 generator(3);
  std::normal_distribution<float> normal;
  bool right = true;
  for (uint64_t seed = 0; seed < (engine == Engine::kFibers ? 20 : 3); ++seed) {
    std::vector<float> in(floats), out(floats, NAN);
    for (float& x : in) x = normal(generator);
    launch({2, cuda::kThreads, floats * sizeof(float), engine, seed, kCluster}, kernel, in.data(), out.data(),
           args...);
    for (int i = 0; i < floats; ++i) {
      const int from = expect == Expect::kReversed         ? floats - 1 - i
                       : expect == Expect::kReversedByWarp ? i / 32 * 32 + 31 - i % 32
                                                           : i;
      right = right && out[i] == in[from];
    }
  }
  return right;
}

bool run(const std::string& mistake, Engine engine) {
  using namespace cuda;
  constexpr int kOne = kThreads, kTwo = 2 * kThreads, kRows = 8 * kThreads;
  if (mistake == "none") {
    return right_everywhere(engine, kOne, Expect::kReversed, reverse_block<true>) &&
           right_everywhere(engine, kOne, Expect::kReversedByWarp, reverse_warp<true>) &&
           right_everywhere(engine, kRows, Expect::kSame, copy_rows<0, false, false>) &&
           right_everywhere(engine, kRows, Expect::kSame, copy_rows<0, true, true>) &&
           right_everywhere(engine, kOne, Expect::kSame, overrun_shared, 0) &&
           right_everywhere(engine, kOne, Expect::kSame, overrun_static_shared, 0) &&
           right_everywhere(engine, kOne, Expect::kSame, overrun_copy, 0) &&
           right_everywhere<2>(engine, kTwo, Expect::kReversed, reverse_cluster<true, true>, 0) &&
           right_everywhere<2>(engine, kTwo, Expect::kReversed, scatter_cluster<true, true>);
  }
  if (mistake == "missing_sync_block")
    return right_everywhere(engine, kOne, Expect::kReversed, reverse_block<false>);
  if (mistake == "missing_sync_warp") {
    return right_everywhere(engine, kOne, Expect::kReversedByWarp, reverse_warp<false>);
  }
  if (mistake == "missing_barrier_after_copy") {
    return right_everywhere(engine, kRows, Expect::kSame, copy_rows<0, true, false>);
  }
  if (mistake == "early_read") return right_everywhere(engine, kRows, Expect::kSame, copy_rows<1, false, true>);
  if (mistake == "shared_overrun") return right_everywhere(engine, kOne, Expect::kSame, overrun_shared, 1);
  if (mistake == "static_shared_overrun") {
    return right_everywhere(engine, kOne, Expect::kSame, overrun_static_shared, 1);
  }
  if (mistake == "global_overrun") return right_everywhere(engine, kOne, Expect::kSame, overrun_global, 4);
  if (mistake == "copy_overrun") return right_everywhere(engine, kOne, Expect::kSame, overrun_copy, 4);
  if (mistake == "missing_cluster_barrier") {
    return right_everywhere<2>(engine, kTwo, Expect::kReversed, reverse_cluster<false, true>, 0);
  }
  if (mistake == "early_cluster_write") {
    return right_everywhere<2>(engine, kTwo, Expect::kReversed, scatter_cluster<false, true>);
  }
  if (mistake == "late_cluster_read") {
    return right_everywhere<2>(engine, kTwo, Expect::kReversed, reverse_cluster<true, false>, 0);
  }
  if (mistake == "late_cluster_write") {
    return right_everywhere<2>(engine, kTwo, Expect::kReversed, scatter_cluster<true, false>);
  }
  if (mistake == "cluster_overrun") {
    return right_everywhere<2>(engine, kTwo, Expect::kReversed, reverse_cluster<true, true>, 1);
  }
  std::printf("no such mistake: %s\n", mistake.c_str());
  return true;
}

}  // namespace
}  // namespace mac_attn::simt

int main(int argc, char** argv) {
  using mac_attn::simt::Engine;
  if (argc != 3) return 2;
  const Engine engine = std::string(argv[2]) == "threads" ? Engine::kThreads : Engine::kFibers;
  try {
    const bool right = mac_attn::simt::run(argv[1], engine);
    std::printf(right ? "nothing found\n" : "wrong result\n");
    return right ? 0 : 1;
  } catch (const mac_attn::simt::Failure& failure) {
    std::printf("%s\n", failure.what());
    return 1;
  }
}
