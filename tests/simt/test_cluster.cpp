// Clusters on the host execution: ranks, shared memory of the other blocks, barriers of the cluster, and that it
// reports what PTX leaves undefined.
#include <algorithm>
#include <cmath>
#include <set>

#include "check.h"
#include "ptx/async_copy.h"
#include "ptx/barrier.h"
#include "ptx/cluster.h"
#include "ptx/memory.h"
#include "ptx/warp.h"

namespace mac_attn::cuda {

MAC_DEVICE int linear_block() {
  return static_cast<int>((blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x);
}

// Every thread: the rank and size that it has, and the block that it finds at each rank, out [grid, block, 2 +
// size].
__global__ void note_cluster(int* out) {
  int* shared = static_cast<int*>(dynamic_shared());
  const int t = static_cast<int>(threadIdx.x), size = ptx::cluster_size();
  out += (linear_block() * static_cast<int>(blockDim.x) + t) * (2 + size);
  out[0] = ptx::cluster_rank();
  out[1] = size;
  shared[t] = linear_block() * 1000 + t;
  ptx::cluster_arrive();
  ptx::cluster_wait();
  for (int rank = 0; rank < size; ++rank) out[2 + rank] = *ptx::shared_of(shared + t, rank);
  ptx::cluster_arrive();
  ptx::cluster_wait();
}

// Sums of each cluster's part of `in`: by stores into rank 0's shared memory, and by atomics there.
__global__ void sum_of_cluster(const int* in, int* by_stores, int* by_atomics) {
  int* shared = static_cast<int*>(dynamic_shared());  // [warps of the block], [blocks], the atomic sum
  const int t = static_cast<int>(threadIdx.x), warps = static_cast<int>(blockDim.x) / 32;
  const int value = in[linear_block() * static_cast<int>(blockDim.x) + t];
  int* parts = shared + warps;
  int* sum = parts + ptx::cluster_size();
  if (t == 0) *sum = 0;
  ptx::cluster_arrive();
  const int of_warp = static_cast<int>(ptx::reduce_add(static_cast<uint32_t>(value)));
  if (t % 32 == 0) shared[t / 32] = of_warp;
  ptx::sync_block();
  ptx::cluster_wait();  // rank 0's sum is 0
  ptx::atomic_add(ptx::shared_of(sum, 0), value);
  if (t == 0) {
    int of_block = 0;
    for (int i = 0; i < warps; ++i) of_block += shared[i];
    *ptx::shared_of(parts + ptx::cluster_rank(), 0) = of_block;
  }
  ptx::cluster_arrive();
  ptx::cluster_wait();
  if (ptx::cluster_rank() == 0 && t == 0) {  // nobody reaches into the others' memory any more
    const int cluster = linear_block() / ptx::cluster_size();
    by_atomics[cluster] = *sum;
    by_stores[cluster] = 0;
    for (int rank = 0; rank < ptx::cluster_size(); ++rank) by_stores[cluster] += parts[rank];
  }
}

// Passes a value to the next block `rounds` times, with two places for it and work between arrive and wait; rank r
// also has r barriers of its own in every round, which are no other block's business.
__global__ void pass_around(int* out, int rounds) {
  int* shared = static_cast<int*>(dynamic_shared());
  const int t = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  const int next = (ptx::cluster_rank() + 1) % ptx::cluster_size();
  int value = linear_block() * threads + t;
  ptx::cluster_arrive();
  ptx::cluster_wait();
  for (int round = 0; round < rounds; ++round) {
    *ptx::shared_of(shared + round % 2 * threads + t, next) = value;
    ptx::cluster_arrive();
    for (int i = 0; i < ptx::cluster_rank(); ++i) ptx::named_barrier_sync(1 + t / 32 % 2, threads / 2);
    ptx::sync_block();
    ptx::cluster_wait();
    value = shared[round % 2 * threads + t];
  }
  out[linear_block() * threads + t] = value;
}

// Copies into the own shared memory, which others read.
__global__ void copy_for_others(const float* in, float* out) {  // [grid, block, 4]
  float* shared = static_cast<float*>(dynamic_shared());
  const int t = static_cast<int>(threadIdx.x), row = linear_block() * static_cast<int>(blockDim.x) + t;
  ptx::cp_async_16(shared + t * 4, in + row * 4, true);
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
  ptx::cluster_arrive();
  ptx::cluster_wait();
  const float* theirs = ptx::shared_of(shared, ptx::cluster_size() - 1 - ptx::cluster_rank());
  ptx::store_float4(out + row * 4, ptx::load_float4(theirs + t * 4));
  ptx::cluster_arrive();
  ptx::cluster_wait();
}

__global__ void order_of_blocks(int* next, int* order) {
  order[ptx::atomic_add_acq_rel(next, 1)] = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
}

// Two clusters of two blocks of two warps, 64 bytes of shared memory.
enum class ClusterMistake {
  kExitBeforeBarrier,
  kExitAfterArrive,
  kOneBarrierLess,
  kWaitWithoutArrive,
  kArriveTwice,
  kPartOfWarp,
  kPartOfWarpExits,
  kArriveAndWait,
  kWarpElsewhere,
  kBlockElsewhere,
  kNoSuchRank,
  kNegativeRank,
  kNotShared,
  kOfAnother,
  kLongAtomic,
  kCopyToAnother,
  kStaticShared,
  kCopyToStatic,
};
__global__ void make_cluster_mistake(ClusterMistake mistake, char* global) {
  __shared__ __align__(16) char fixed[16];
  char* shared = static_cast<char*>(dynamic_shared());
  const unsigned t = threadIdx.x;
  const int rank = ptx::cluster_rank();
  const auto meet = [] {
    ptx::cluster_arrive();
    ptx::cluster_wait();
  };
  switch (mistake) {
    case ClusterMistake::kExitBeforeBarrier:
      if (rank == 0) meet();
      break;
    case ClusterMistake::kExitAfterArrive:
      ptx::cluster_arrive();
      if (rank == 0) ptx::cluster_wait();
      break;
    case ClusterMistake::kOneBarrierLess:
      meet();
      if (rank == 1) meet();
      break;
    case ClusterMistake::kWaitWithoutArrive: ptx::cluster_wait(); break;
    case ClusterMistake::kArriveTwice:
      ptx::cluster_arrive();
      ptx::cluster_arrive();
      break;
    case ClusterMistake::kPartOfWarp:
      if (t % 32 < 16) meet();
      ptx::sync_warp();
      break;
    case ClusterMistake::kPartOfWarpExits:
      if (t % 32 != 5) meet();
      break;
    case ClusterMistake::kArriveAndWait:
      meet();
      ptx::cluster_arrive();
      if (t % 32 < 16) ptx::sync_warp();
      ptx::cluster_wait();
      break;
    case ClusterMistake::kWarpElsewhere:
      if (rank == 0 && t >= 32) ptx::named_barrier_sync(1, 64);
      meet();
      break;
    case ClusterMistake::kBlockElsewhere:
      if (rank == 0) {
        if (t < 32) ptx::sync_block();
        if (t >= 32) ptx::named_barrier_sync(1, 64);
      }
      meet();
      break;
    case ClusterMistake::kNoSuchRank: ptx::shared_of(shared, 2); break;
    case ClusterMistake::kNegativeRank: ptx::shared_of(shared, -1); break;
    case ClusterMistake::kNotShared: ptx::shared_of(global, 1); break;
    case ClusterMistake::kOfAnother: ptx::shared_of(ptx::shared_of(shared, 1), 1 - rank); break;
    case ClusterMistake::kLongAtomic:
      ptx::atomic_max(reinterpret_cast<unsigned long long*>(ptx::shared_of(shared, 1 - rank)), 1ull);
      break;
    case ClusterMistake::kCopyToAnother: ptx::cp_async_16(ptx::shared_of(shared, 1 - rank), global, true); break;
    case ClusterMistake::kStaticShared:
      if (rank == 0 && t == 0) fixed[0] = 1;
      meet();
      break;
    case ClusterMistake::kCopyToStatic: ptx::cp_async_16(fixed, global, true); break;
  }
}

}  // namespace mac_attn::cuda

namespace mac_attn::simt {
namespace {

std::mt19937 generator(23);

void test_ranks(const Run& run, unsigned cluster) {
  const int size = static_cast<int>(cluster), grid_x = 16, blocks = grid_x * 2;
  std::vector<int> out(static_cast<size_t>(blocks) * 64 * (2 + size), -1);
  launch({dim3(grid_x, 1, 2), 64, 64 * 4, run.engine, run.seed, cluster}, cuda::note_cluster, out.data());
  for (int block = 0; block < blocks; ++block) {
    for (int t = 0; t < 64; ++t) {
      const int* mine = out.data() + (block * 64 + t) * (2 + size);
      CHECK(mine[0] == block % size && mine[1] == size);
      for (int rank = 0; rank < size; ++rank) CHECK(mine[2 + rank] == (block / size * size + rank) * 1000 + t);
    }
  }
}

void test_sums(const Run& run, unsigned cluster) {
  constexpr int kBlocks = 16, kThreads = 96;
  std::vector<int> in(kBlocks * kThreads), by_stores(kBlocks / cluster), by_atomics(by_stores);
  for (int& x : in) x = static_cast<int>(generator() % 1000);
  launch({kBlocks, kThreads, (3 + cluster + 1) * 4, run.engine, run.seed, cluster}, cuda::sum_of_cluster, in.data(),
         by_stores.data(), by_atomics.data());
  for (size_t c = 0; c < by_stores.size(); ++c) {
    int sum = 0;
    for (size_t i = 0; i < cluster * kThreads; ++i) sum += in[c * cluster * kThreads + i];
    CHECK(by_stores[c] == sum && by_atomics[c] == sum);
  }
}

void test_passing(const Run& run, unsigned cluster) {
  constexpr int kThreads = 128, kRounds = 11;
  const int size = static_cast<int>(cluster), blocks = 2 * size;
  std::vector<int> out(static_cast<size_t>(blocks) * kThreads, -1);
  launch({2 * cluster, kThreads, 2 * kThreads * 4, run.engine, run.seed, cluster}, cuda::pass_around, out.data(),
         kRounds);
  for (int block = 0; block < blocks; ++block) {
    const int from = block / size * size + ((block - kRounds) % size + size) % size;
    for (int t = 0; t < kThreads; ++t) CHECK(out[block * kThreads + t] == from * kThreads + t);
  }
}

void test_copies(const Run& run) {
  constexpr int kBlocks = 8, kSize = 4, kThreads = 64;
  std::normal_distribution<float> normal;
  std::vector<float> in(kBlocks * kThreads * 4), out(in.size(), NAN);
  for (float& x : in) x = normal(generator);
  launch({kBlocks, kThreads, kThreads * 16, run.engine, run.seed, kSize}, cuda::copy_for_others, in.data(),
         out.data());
  for (int block = 0; block < kBlocks; ++block) {
    const int from = block / kSize * kSize + kSize - 1 - block % kSize;
    for (int i = 0; i < kThreads * 4; ++i) CHECK(out[block * kThreads * 4 + i] == in[from * kThreads * 4 + i]);
  }
}

// The blocks of a cluster run in one another's midst, as the seed has it, and the clusters one after another.
std::vector<int> arrivals(uint64_t seed) {
  std::vector<int> next(1), order(4 * 64);
  launch({4, 64, 0, Engine::kFibers, seed, 2}, cuda::order_of_blocks, next.data(), order.data());
  return order;
}

void test_schedules() {
  std::set<std::vector<int>> different;
  int mixed = 0;
  for (uint64_t seed = 0; seed < 20; ++seed) {
    const std::vector<int> order = arrivals(seed);
    CHECK(order == arrivals(seed));
    different.insert(order);
    int changes = 0;  // of the block within the first cluster to run
    for (int i = 0; i < 128; ++i) {
      CHECK(order[i] / 128 == order[0] / 128);
      changes += i > 0 && order[i] / 64 != order[i - 1] / 64;
    }
    mixed += changes > 1;
  }
  CHECK(different.size() == 20 && mixed >= 5);
}

void test_failures(const Run& run) {
  using Mistake = cuda::ClusterMistake;
  const struct {
    Mistake mistake;
    const char* report[2];  // one or the other, as the schedule has it
  } cases[] = {
      {Mistake::kExitBeforeBarrier,
       {"cluster_arrive: threads of the cluster have exited that it waits for",
        "exits while other threads of the cluster have come to cluster_arrive"}},
      {Mistake::kExitAfterArrive, {"exits after cluster_arrive without a cluster_wait", nullptr}},
      {Mistake::kOneBarrierLess,
       {"cluster_arrive: threads of the cluster have exited that it waits for",
        "exits while other threads of the cluster have come to cluster_arrive"}},
      {Mistake::kWaitWithoutArrive, {"cluster_wait: waits without a cluster_arrive", nullptr}},
      {Mistake::kArriveTwice, {"cluster_arrive: arrives twice without a cluster_wait", nullptr}},
      {Mistake::kPartOfWarp,
       {"sync_warp: other lanes of the warp are at cluster_arrive",
        "cluster_arrive: other lanes of the warp are at sync_warp"}},
      {Mistake::kPartOfWarpExits,
       {"cluster_arrive: lanes of the warp have exited",
        "exits while other lanes of the warp are at cluster_arrive"}},
      {Mistake::kArriveAndWait,
       {"sync_warp: other lanes of the warp are at cluster_wait",
        "cluster_wait: other lanes of the warp are at sync_warp"}},
      {Mistake::kWarpElsewhere,
       {"deadlock; ranks 0-0: threads 0-31 at cluster_wait, threads 32-63 at named_barrier_sync; "
        "ranks 1-1: threads 0-63 at cluster_wait",
        nullptr}},
      {Mistake::kBlockElsewhere,
       {"deadlock; ranks 0-0: threads 0-31 at sync_block, threads 32-63 at named_barrier_sync; "
        "ranks 1-1: threads 0-63 at cluster_wait",
        nullptr}},
      {Mistake::kNoSuchRank, {"shared_of: no such block in the cluster", nullptr}},
      {Mistake::kNegativeRank, {"shared_of: no such block in the cluster", nullptr}},
      {Mistake::kNotShared, {"shared_of: address is not in the block's shared memory", nullptr}},
      {Mistake::kOfAnother, {"shared_of: address is not in the block's shared memory", nullptr}},
      {Mistake::kLongAtomic, {"atomic_max: 64 bits of another block's shared memory", nullptr}},
      {Mistake::kCopyToAnother, {"cp_async_16: address is not in the block's shared memory", nullptr}},
      {Mistake::kStaticShared, {"written to a static __shared__ variable", nullptr}},
      {Mistake::kCopyToStatic, {"cp_async_16: address is not in the block's shared memory", nullptr}},
  };
  alignas(16) static char global[32];
  for (const auto& c : cases) {
    const std::string failure = failure_of(
        [&] { launch({4, 64, 64, run.engine, run.seed, 2}, cuda::make_cluster_mistake, c.mistake, global); });
    const bool reported = contains(failure, c.report[0]) || (c.report[1] && contains(failure, c.report[1]));
    if (!reported) std::printf("mistake %d: \"%s\"\n", static_cast<int>(c.mistake), failure.c_str());
    CHECK(reported);
  }
  // The next launch is as good as new.
  test_sums(run, 2);
  for (unsigned cluster : {0u, 3u, 17u, 32u}) {
    const std::string failure = failure_of([&] {
      launch({32, 64, 256, run.engine, run.seed, cluster}, cuda::note_cluster, static_cast<int*>(nullptr));
    });
    CHECK(
        contains(failure, "a cluster has 1 to 16 blocks and divides grid.x, this one " + std::to_string(cluster)));
  }
}

}  // namespace
}  // namespace mac_attn::simt

int main() {
  using namespace mac_attn;
  for (const simt::Run& run : simt::all_runs()) {
    for (unsigned cluster : {1u, 2u, 8u}) {
      simt::test_ranks(run, cluster);
      simt::test_sums(run, cluster);
      simt::test_passing(run, cluster);
    }
    simt::test_ranks(run, 16);
    simt::test_copies(run);
    simt::test_failures(run);
  }
  simt::test_schedules();
  return simt::test_result("cluster");
}
