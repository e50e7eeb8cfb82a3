// The host execution itself: threads, warps, barriers, atomics, asynchronous copies, shared memory, and that it
// reports what a GPU would hang or fault on.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <set>

#include "check.h"
#include "ptx/async_copy.h"
#include "ptx/barrier.h"
#include "ptx/memory.h"
#include "ptx/warp.h"

namespace mac_attn::cuda {

struct WarpResults {
  float xor_float, from_float;
  int xor_int, from_int;
  int64_t from_int64;
  uint32_t from_uint32, votes;
};

__global__ void exchange(const float* f, const int* i, const int64_t* l, WarpResults* out) {
  const unsigned t = threadIdx.x;
  const int lane = ptx::lane_id();
  out[t].xor_float = ptx::shfl_xor(f[t], 5);
  out[t].xor_int = ptx::shfl_xor(i[t], 16);
  out[t].from_float = ptx::shfl(f[t], (lane * 7) % 32);
  out[t].from_int = ptx::shfl(i[t], 31);
  out[t].from_int64 = ptx::shfl(l[t], lane >= 3 ? lane - 3 : lane);
  out[t].from_uint32 = ptx::shfl(static_cast<uint32_t>(i[t]), 0);
  out[t].votes = ptx::ballot(i[t] % 3 == 0);
}

__global__ void note_places(int* out) {  // [grid, block]
  const unsigned block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
  const unsigned thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
  ++out[block * blockDim.x * blockDim.y * blockDim.z + thread];
}

// Whether shared memory is fresh in every block, and then not any more.
template <typename T>
__global__ void find_nan(int* fresh, int dynamic_floats) {
  __shared__ T kept[64];
  float* dynamic = static_cast<float*>(dynamic_shared());
  bool all = true;
  for (int i = static_cast<int>(threadIdx.x); i < 64; i += 32) all = all && std::isnan(kept[i]);
  for (int i = static_cast<int>(threadIdx.x); i < dynamic_floats; i += 32) all = all && std::isnan(dynamic[i]);
  if (ptx::ballot(all) == 0xffffffffu && threadIdx.x == 0) ++fresh[blockIdx.x];
  for (int i = static_cast<int>(threadIdx.x); i < 64; i += 32) kept[i] = 1;
  for (int i = static_cast<int>(threadIdx.x); i < dynamic_floats; i += 32) dynamic[i] = 1.f;
}

// Warps 0 and 1 sum into one half, 2 and 3 into the other, twice, at barriers of their own.
__global__ void pairs_of_warps(int* out) {
  __shared__ int sum[2][2];
  __shared__ int value[128];
  const int t = static_cast<int>(threadIdx.x), pair = t / 64;
  for (int round = 0; round < 2; ++round) {
    value[t] = t + round;
    ptx::named_barrier_sync(1 + pair, 64);
    if (t % 64 == 0) {
      sum[pair][round] = 0;
      for (int i = 0; i < 64; ++i) sum[pair][round] += value[pair * 64 + i];
    }
    ptx::named_barrier_sync(1 + pair, 64);
  }
  ptx::sync_block();
  if (t < 4) out[t] = sum[t / 2][t % 2];
}

struct Atomics {
  int count, bits, shared_sum, last_block, seen_by_last;
  unsigned long long greatest;
};
__global__ void use_atomics(const unsigned long long* values, int* written, Atomics* out) {
  __shared__ int sum, is_last;
  const int t = static_cast<int>(threadIdx.x), all = static_cast<int>(blockIdx.x * blockDim.x) + t;
  if (t == 0) sum = 0;
  ptx::sync_block();
  ptx::atomic_add(&sum, t);
  ptx::atomic_or(&out->bits, 1 << t % 20);
  ptx::atomic_max(&out->greatest, values[all]);
  written[all] = 1;
  ptx::sync_block();
  if (t == 0) {
    is_last = ptx::atomic_add_acq_rel(&out->count, 1) == static_cast<int>(gridDim.x) - 1;
    out->shared_sum = sum;
  }
  ptx::sync_block();
  if (is_last && t == 0) {
    ++out->last_block;
    for (unsigned i = 0; i < gridDim.x * blockDim.x; ++i) out->seen_by_last += written[i];
  }
}

// A pipeline of three stages over `tiles` rows of 16 bytes a thread; rows from `valid` on are zeros.
__global__ void pipeline(const float* in, float* out, int tiles, int valid) {
  float* stages = static_cast<float*>(dynamic_shared());
  const int t = static_cast<int>(threadIdx.x), other = static_cast<int>(t ^ 1);
  auto load = [&](int tile) {
    if (tile < tiles) {
      const bool is_valid = tile < valid;
      ptx::cp_async_16(stages + (tile % 3 * 64 + t) * 4, is_valid ? in + (tile * 64 + t) * 4 : nullptr, is_valid);
    }
    ptx::cp_async_commit();
  };
  load(0);
  load(1);
  for (int tile = 0; tile < tiles; ++tile) {
    load(tile + 2);
    ptx::cp_async_wait<2>();
    ptx::sync_warp();
    for (int i = 0; i < 4; ++i) out[(tile * 64 + other) * 4 + i] = stages[(tile % 3 * 64 + other) * 4 + i];
    ptx::sync_warp();
  }
  ptx::cp_async_wait<0>();
}

// What this thread sees of two groups and of a copy in none, before and after the waits for them.
__global__ void watch_copies(const float* in, float* seen) {
  float* shared = static_cast<float*>(dynamic_shared()) + threadIdx.x * 12;
  for (int i = 0; i < 12; ++i) shared[i] = 1.f;
  ptx::cp_async_16(shared, in, true);
  ptx::cp_async_commit();
  ptx::cp_async_16(shared + 4, in + 4, true);
  ptx::cp_async_commit();
  ptx::cp_async_16(shared + 8, in + 8, true);
  auto look = [&](int first) {
    for (int i = 0; i < 3; ++i) seen[threadIdx.x * 12 + first + i] = shared[i * 4];
  };
  look(0);
  ptx::cp_async_wait<1>();
  look(3);
  ptx::cp_async_wait<0>();
  look(6);
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
  look(9);
}

__global__ void order_of_arrival(int* next, int* order) {
  order[ptx::atomic_add_acq_rel(next, 1)] = static_cast<int>(threadIdx.x);
}

__global__ void request_memory(uint32_t* data, int* dummy) {
  const uint4 a = ptx::load_16(data + threadIdx.x * 4), b = ptx::load_stream_16(data);
  ptx::store_16(data + 128 + threadIdx.x * 4, {a.x, b.y, ptx::load_4(data + 1), 0});
  ptx::cp_async_16(static_cast<char*>(dynamic_shared()) + threadIdx.x * 16, data, threadIdx.x % 2 == 0);
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
  ptx::atomic_or(dummy, 1);
}

// What a GPU hangs or faults on, or leaves undefined.
enum class Mistake {
  kExitBeforeBarrier,
  kExitBeforeShuffle,
  kShuffleWithoutLane,
  kTwoInstructions,
  kWarpApart,
  kTooFewAtBarrier,
  kCountsDiffer,
  kPartOfWarp,
  kExitInFlight,
  kMisalignedCopy,
  kMisalignedLoad,
  kCopyBeyondShared,
  kCopyToGlobal,
};
__global__ void make_mistake(Mistake mistake, char* global) {
  char* shared = static_cast<char*>(dynamic_shared());  // 64 bytes
  const unsigned t = threadIdx.x;
  switch (mistake) {
    case Mistake::kExitBeforeBarrier:
      if (t != 70) ptx::sync_block();
      break;
    case Mistake::kExitBeforeShuffle:
      if (t != 70) ptx::shfl_xor(1.f, 1);
      break;
    case Mistake::kShuffleWithoutLane:
      if (t != 70) ptx::shfl_xor(1.f, 1);
      ptx::sync_block();
      break;
    case Mistake::kTwoInstructions:
      if (t % 32 < 16) {
        ptx::ballot(true);
      } else {
        ptx::shfl_xor(1.f, 1);
      }
      break;
    case Mistake::kWarpApart: ptx::named_barrier_sync(t < 64 ? 1 : 2, 128); break;
    case Mistake::kTooFewAtBarrier:
      if (t < 64) ptx::named_barrier_sync(1, 96);
      if (t >= 64) ptx::named_barrier_sync(2, 96);
      break;
    case Mistake::kCountsDiffer: ptx::named_barrier_sync(1, t < 64 ? 96 : 64); break;
    case Mistake::kPartOfWarp:
      if (t % 2 == 0) ptx::named_barrier_sync(1, 64);
      ptx::sync_warp();
      break;
    case Mistake::kExitInFlight:
      if (t < 4) ptx::cp_async_16(shared + t * 16, global, true);
      break;
    case Mistake::kMisalignedCopy: ptx::cp_async_16(shared + 8, global, true); break;
    case Mistake::kMisalignedLoad: ptx::load_stream_16(global + 4); break;
    case Mistake::kCopyBeyondShared: ptx::cp_async_16(shared + 64, global, true); break;
    case Mistake::kCopyToGlobal: ptx::cp_async_16(global, global, true); break;
  }
}

}  // namespace mac_attn::cuda

namespace mac_attn::simt {
namespace {

std::mt19937 generator(5);

void test_exchange(const Run& run) {
  std::normal_distribution<float> normal;
  std::vector<float> f(96);
  std::vector<int> i(96);
  std::vector<int64_t> l(96);
  for (int t = 0; t < 96; ++t) {
    f[t] = normal(generator), i[t] = static_cast<int>(generator() >> 1);
    l[t] = static_cast<int64_t>(generator()) << 31 | i[t];
  }
  std::vector<cuda::WarpResults> out(96);
  launch({1, 96, 0, run.engine, run.seed}, cuda::exchange, f.data(), i.data(), l.data(), out.data());
  for (int t = 0; t < 96; ++t) {
    const int base = t / 32 * 32, lane = t % 32;
    uint32_t votes = 0;
    for (int other = 0; other < 32; ++other) votes |= (i[base + other] % 3 == 0 ? 1u : 0u) << other;
    CHECK(out[t].xor_float == f[base + (lane ^ 5)]);
    CHECK(out[t].xor_int == i[base + (lane ^ 16)]);
    CHECK(out[t].from_float == f[base + lane * 7 % 32]);
    CHECK(out[t].from_int == i[base + 31]);
    CHECK(out[t].from_int64 == l[base + (lane >= 3 ? lane - 3 : lane)]);
    CHECK(out[t].from_uint32 == static_cast<uint32_t>(i[base]));
    CHECK(out[t].votes == votes);
  }
}

void test_places(const Run& run) {
  std::vector<int> out(2 * 3 * 2 * 64);
  launch({dim3(2, 3, 2), dim3(4, 8, 2), 0, run.engine, run.seed}, cuda::note_places, out.data());
  CHECK(std::all_of(out.begin(), out.end(), [](int count) { return count == 1; }));
}

void test_fresh_shared(const Run& run) {
  std::vector<int> fresh(5);
  launch({5, 32, 37 * 4, run.engine, run.seed}, cuda::find_nan<float>, fresh.data(), 37);
  launch({5, 32, 0, run.engine, run.seed}, cuda::find_nan<float>, fresh.data(), 0);
  CHECK(std::all_of(fresh.begin(), fresh.end(), [](int count) { return count == 2; }));
}

void test_named_barriers(const Run& run) {
  std::vector<int> out(4);
  launch({2, 128, 0, run.engine, run.seed}, cuda::pairs_of_warps, out.data());
  for (int pair = 0; pair < 2; ++pair) {
    for (int round = 0; round < 2; ++round) {
      CHECK(out[pair * 2 + round] == 64 * (64 * pair + round) + 63 * 32);
    }
  }
}

void test_atomics(const Run& run) {
  std::vector<unsigned long long> values(6 * 64);
  for (auto& value : values) value = static_cast<unsigned long long>(generator()) << 32 | generator();
  std::vector<int> written(values.size());
  std::vector<cuda::Atomics> out = {{0, 0, 0, 0, 0, 0}};
  launch({6, 64, 0, run.engine, run.seed}, cuda::use_atomics, values.data(), written.data(), out.data());
  CHECK(out[0].count == 6 && out[0].bits == (1 << 20) - 1 && out[0].shared_sum == 63 * 32);
  CHECK(out[0].greatest == *std::max_element(values.begin(), values.end()));
  CHECK(out[0].last_block == 1 && out[0].seen_by_last == 6 * 64);
}

void test_pipeline(const Run& run) {
  std::normal_distribution<float> normal;
  constexpr int kTiles = 7, kValid = 5;
  std::vector<float> in(kValid * 256), out(kTiles * 256, NAN);
  for (float& x : in) x = normal(generator);
  launch({1, 64, 3 * 64 * 16, run.engine, run.seed}, cuda::pipeline, in.data(), out.data(), kTiles, kValid);
  for (int i = 0; i < kTiles * 256; ++i) CHECK(out[i] == (i < kValid * 256 ? in[i] : 0.f));
}

// Not under ASan, which ends the program at the first of these looks (test_planted.cpp).
void test_visibility([[maybe_unused]] const Run& run) {
#ifndef MAC_SIMT_ASAN
  const std::vector<float> in = {2, 0, 0, 0, 3, 0, 0, 0, 4, 0, 0, 0};
  std::vector<float> seen(64 * 12);
  launch({1, 64, 64 * 48, run.engine, run.seed}, cuda::watch_copies, in.data(), seen.data());
  const float expected[12] = {NAN, NAN, NAN, 2, NAN, NAN, 2, 3, NAN, 2, 3, 4};
  for (int i = 0; i < 64 * 12; ++i) {
    CHECK(seen[i] == expected[i % 12] || (std::isnan(seen[i]) && std::isnan(expected[i % 12])));
  }
#endif
}

std::vector<int> arrivals(uint64_t seed) {
  std::vector<int> next(1), order(128);
  launch({1, 128, 0, Engine::kFibers, seed}, cuda::order_of_arrival, next.data(), order.data());
  return order;
}

void test_schedules() {
  std::set<std::vector<int>> different;
  for (uint64_t seed = 0; seed < 20; ++seed) {
    const std::vector<int> order = arrivals(seed);
    CHECK(order == arrivals(seed));
    different.insert(order);
  }
  CHECK(different.size() == 20);
}

void test_counters(const Run& run) {
  reset_counters();
  std::vector<uint32_t> data(256);
  int dummy = 0;
  launch({2, 32, 512, run.engine, run.seed}, cuda::request_memory, data.data(), &dummy);
  const Counters c = counters();
  CHECK(c.load_bytes == 64 * 16 && c.load_stream_bytes == 64 * 16 && c.store_bytes == 64 * 16);
  CHECK(c.async_copy_bytes == 32 * 16 && c.async_zero_bytes == 32 * 16 && c.atomics == 64);
}

void test_failures(const Run& run) {
  using cuda::Mistake;
  const struct {
    Mistake mistake;
    const char* report[2];  // one or the other, as the schedule has it
  } cases[] = {
      {Mistake::kExitBeforeBarrier, {"threads have exited that it waits for", "exits while other threads are at"}},
      {Mistake::kExitBeforeShuffle,
       {"lanes of the warp have exited", "exits while other lanes of the warp are at"}},
      {Mistake::kShuffleWithoutLane, {"deadlock", "threads 64-69 at shfl_xor, threads 70-70 at sync_block"}},
      {Mistake::kTwoInstructions, {"shfl_xor: other lanes of the warp are at ballot", "ballot: other lanes"}},
      {Mistake::kWarpApart, {"deadlock", "deadlock"}},
      {Mistake::kTooFewAtBarrier, {"deadlock", "deadlock"}},
      {Mistake::kCountsDiffer, {"numbers of threads differ", "numbers of threads differ"}},
      {Mistake::kPartOfWarp, {"part of a warp takes part", "part of a warp takes part"}},
      {Mistake::kExitInFlight, {"exits with asynchronous copies in flight", "threads 0-"}},
      {Mistake::kMisalignedCopy, {"cp_async_16: shared address is not aligned", "block (0, 0, 0) thread"}},
      {Mistake::kMisalignedLoad, {"load_stream_16: address is not 16-byte aligned", "block (0, 0, 0) thread"}},
      {Mistake::kCopyBeyondShared,
       {"cp_async_16: address is not in the block's shared memory", "block (0, 0, 0) thread"}},
      {Mistake::kCopyToGlobal,
       {"cp_async_16: address is not in the block's shared memory", "block (0, 0, 0) thread"}},
  };
  alignas(16) static char global[32];
  for (const auto& c : cases) {
    const std::string failure =
        failure_of([&] { launch({1, 128, 64, run.engine, run.seed}, cuda::make_mistake, c.mistake, global); });
    const bool reported = contains(failure, c.report[0]) || contains(failure, c.report[1]);
    if (!reported) std::printf("mistake %d: \"%s\"\n", static_cast<int>(c.mistake), failure.c_str());
    CHECK(reported);
  }
  CHECK(
      contains(failure_of([&] { launch({1, 48}, cuda::note_places, static_cast<int*>(nullptr)); }), "whole warps"));
}

}  // namespace
}  // namespace mac_attn::simt

int main() {
  using namespace mac_attn;
  for (const simt::Run& run : simt::all_runs()) {
    simt::test_exchange(run);
    simt::test_places(run);
    simt::test_fresh_shared(run);
    simt::test_named_barriers(run);
    simt::test_atomics(run);
    simt::test_pipeline(run);
    simt::test_visibility(run);
    simt::test_counters(run);
    simt::test_failures(run);
  }
  simt::test_schedules();
  return simt::test_result("engine");
}
