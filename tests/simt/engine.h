// Runs CUDA kernels on the host. The kernels' own sources, compiled as C++ with MAC_SIMT (csrc/cuda/simt.h), so
// that AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer look at the code that a GPU runs.
//
//   simt::launch({.grid = 4, .block = 128, .dynamic_shared_bytes = 1024, .seed = 7}, kernel<bf16>, params);
//
// The model. Blocks run one after another, so no block ever waits for a later one. Within a block nothing is
// ordered but by the barriers and __syncwarp: shuffles, votes, ldmatrix and mma gather their 32 lanes, but as
// in the CUDA programming guide they order no memory accesses. Static and dynamic shared memory hold NaN when
// a block starts, the destination of a cp.async from its issue to its wait.
//
// The blocks of a cluster run at once, each with dynamic shared memory of its own, and the clusters one after
// another. Nothing orders two blocks of a cluster but its barriers. Shared memory of a block that has not started
// or has exited is not there: it holds NaN, a write is reported, by ASan every access, and by TSan every access
// that no barrier puts after the start and before the exit. A static __shared__ variable is one object here, so a
// kernel that is launched with cluster > 1 must have none: it keeps everything in dynamic shared memory. A write to
// a static one is reported. A cluster barrier of PTX waits only for threads that have not exited; here an exit that
// leaves a barrier incomplete, or comes between arrive and wait, is reported.
//
// Two engines with one meaning (machine.h):
//   kFibers   every CUDA thread is a fiber; a seeded schedule chooses who runs at each barrier, warp instruction,
//             atomic and asynchronous copy. Fast: run many seeds. Under TSan each fiber counts as a thread, so
//             that a missing barrier is seen whatever the schedule.
//   kThreads  every CUDA thread is an OS thread: preemption anywhere, real atomics. Slow.
//
// What neither sees: races between blocks of different clusters (they are ordered), the limits of registers and of
// shared memory, bank conflicts. Under TSan a cluster can have about 5,000 threads: each takes a dozen of the
// mappings that Linux allows a process (vm.max_map_count).
#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>

#include "simt.h"

namespace mac_attn::simt {

enum class Engine { kFibers, kThreads };

struct LaunchConfig {
  dim3 grid;
  dim3 block;  // whole warps
  size_t dynamic_shared_bytes = 0;
  Engine engine = Engine::kFibers;
  uint64_t seed = 0;     // of the schedule; 0 runs threads and blocks in their order
  unsigned cluster = 1;  // blocks of a cluster, along x: 1 to 16, divides grid.x
};

// A deadlock, a barrier or warp instruction without all of its threads, a misaligned address, ...
struct Failure : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Calls `body(context)` once for every thread of the launch.
void launch(const LaunchConfig& config, void (*body)(const void* context), const void* context);

template <typename... Params, typename... Args>
void launch(const LaunchConfig& config, void (*kernel)(Params...), Args... args) {
  const auto call = [&] { kernel(args...); };
  launch(config, [](const void* context) { (*static_cast<const decltype(call)*>(context))(); }, &call);
}

// Sums over all launches since the last reset.
Counters counters();
void reset_counters();

}  // namespace mac_attn::simt
