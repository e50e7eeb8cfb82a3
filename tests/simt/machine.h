// A cluster of blocks in execution: their threads, warps and barriers, and the rules by which they wait for one
// another. A launch without clusters has clusters of one block. A Scheduler lets the threads run; the rules are the
// same for both.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "engine.h"
#include "fiber.h"

namespace mac_attn::simt {

constexpr int kLanes = 32;
constexpr int kMaxWarps = 32;
constexpr int kMaxBlocks = 16;    // of a cluster: 8 are portable, sm_90 can have 16
constexpr int kNumBarriers = 16;  // PTX ISA 9.7.13.1: barriers of a CTA
constexpr int kClusterBarrier = kNumBarriers;
constexpr int kMaxOperandBytes = 48;  // of one lane

class Random {
 public:
  explicit Random(uint64_t seed = 0) : state_(seed * 0x9e3779b97f4a7c15u + 0x2545f4914f6cdd1du) {}
  uint32_t next() {  // xorshift64*
    state_ ^= state_ >> 12, state_ ^= state_ << 25, state_ ^= state_ >> 27;
    return static_cast<uint32_t>((state_ * 0x2545f4914f6cdd1du) >> 32);
  }
  uint32_t below(uint32_t limit) { return static_cast<uint32_t>(static_cast<uint64_t>(next()) * limit >> 32); }

 private:
  uint64_t state_;
};

// The operands lie here twice, as a lane may come to the next instruction before another has fetched the result
// of this one. It cannot come to the one after that.
struct Warp {
  const char* name = nullptr;  // of the instruction that lanes have come to
  int arrived = 0;
  int exited = 0;
  unsigned phase = 0;
  char order[2];  // addresses for the sanitizer
  alignas(16) unsigned char in[2][kLanes * kMaxOperandBytes];
  alignas(16) unsigned char out[2][kLanes * kMaxOperandBytes];
};

struct Barrier {
  int arrived = 0;
  int expected = 0;
  unsigned phase = 0;
  uint32_t lanes[kMaxWarps] = {};
  char order[2];
};

// Two phases' orders are enough: nobody arrives at the next but one before all have waited for this one.
struct ClusterBarrier {
  int arrived = 0;
  unsigned phase = 0;
  char order[2];
};

// Dynamic shared memory of a block, and for `contains` the static variables, which blocks of a cluster have none
// of.
class SharedMemory {
 public:
  explicit SharedMemory(size_t dynamic_bytes, bool with_statics);
  SharedMemory(const SharedMemory&) = delete;
  SharedMemory& operator=(const SharedMemory&) = delete;
  ~SharedMemory();
  void fill_with_nan();
  bool contains(const void* p, size_t bytes) const;
  void* dynamic() const { return dynamic_; }

  // In a cluster, while others run: nobody may touch the memory of a block before it starts or after it has exited.
  void close();
  bool open();  // whether nobody has written meanwhile

 private:
  void* dynamic_ = nullptr;  // exactly as large as asked for, so that ASan sees the end
  size_t dynamic_bytes_;
  bool with_statics_;
};

void fill_static_shared_with_nan();
bool static_shared_is_unused();  // since it was filled

struct Block;

// A CUDA thread.
struct Thread : Place {
  int index = 0;  // in its block
  Block* home = nullptr;
  Warp* warp = nullptr;
  const char* waits_for = nullptr;  // null when it can run
  int barrier = -1;                 // at which it waits
  bool exited = false;
  bool in_cluster_barrier = false;  // has arrived and not waited
  unsigned cluster_phase = 0;       // at which it arrived
  Random random;
  Counters counters = {};
  std::unique_ptr<AsyncCopies> copies;
  Fiber fiber;         // kFibers
  uint32_t awake = 0;  // kThreads: a futex
};

struct Block {
  explicit Block(const LaunchConfig& config) : shared(config.dynamic_shared_bytes, config.cluster == 1) {}
  int rank = 0;  // in the cluster
  int num_threads = 0;
  std::vector<std::unique_ptr<Thread>> threads;
  std::vector<std::unique_ptr<Warp>> warps;
  Barrier barriers[kNumBarriers];
  SharedMemory shared;
  int started = 0;
  int exited = 0;
  char start_order, exit_order;

  void reset(const LaunchConfig& config, uint3 index, Random& random);
  std::string name() const;
  std::string describe() const;  // who waits for what
};

struct Cluster {
  void (*body)(const void*);
  const void* context;
  int num_threads = 0;  // of all blocks
  std::vector<std::unique_ptr<Block>> blocks;
  ClusterBarrier barrier;
  int waiting = 0;
  int exited = 0;
  std::string failure;  // empty: none
  bool failed = false;  // the threads are on their way out
  char start_order, end_order;

  void reset(const LaunchConfig& config, uint3 first_block, Random& random);
  std::string describe() const;
};

// Lets the threads of a cluster run, all to their end.
class Scheduler {
 public:
  virtual ~Scheduler() = default;
  virtual void run(Cluster& cluster) = 0;

  // Between these two the caller alone looks at the cluster.
  virtual void enter() {}
  virtual void leave() {}
  virtual void wake(Thread& thread) = 0;
  virtual void wait(Thread& self) = 0;       // leaves; returns when somebody has woken `self`
  virtual void give_way(Thread& self) = 0;   // leaves; others may run
  virtual void maybe_give_way(Thread&) = 0;  // not within enter()
};

std::unique_ptr<Scheduler> make_fiber_scheduler(uint64_t seed);
std::unique_ptr<Scheduler> make_thread_scheduler();

// Runs a cluster that was reset, with this scheduler, from the first thread's start to the last one's exit.
void run_cluster(Cluster& cluster, Scheduler& scheduler);

// What a scheduler calls as a thread of the cluster: the kernel, from its first line to the exit.
void run_thread(Cluster& cluster, Thread& thread);

// For a scheduler, within enter(): nobody is left that could run, and not all have exited.
void note_deadlock();

}  // namespace mac_attn::simt
