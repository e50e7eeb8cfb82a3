// One block in execution: its threads, warps and barriers, and the rules by which they wait for one another.
// A Scheduler lets the threads run; the rules are the same for both.
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
constexpr int kNumBarriers = 16;      // PTX ISA 9.7.13.1: barriers of a CTA
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

// A CUDA thread.
struct Thread : Place {
  int index = 0;
  Warp* warp = nullptr;
  const char* waits_for = nullptr;  // null when it can run
  int barrier = -1;
  bool exited = false;
  Random random;
  Counters counters = {};
  std::unique_ptr<AsyncCopies> copies;
  Fiber fiber;         // kFibers
  uint32_t awake = 0;  // kThreads: a futex
};

struct Block {
  void (*body)(const void*);
  const void* context;
  int num_threads = 0;
  std::vector<std::unique_ptr<Thread>> threads;
  std::vector<std::unique_ptr<Warp>> warps;
  Barrier barriers[kNumBarriers];
  int waiting = 0;
  int exited = 0;
  std::string failure;  // empty: none
  bool failed = false;  // the threads are on their way out
  char start_order, end_order;

  void reset(const LaunchConfig& config, uint3 index, Random& random);
  std::string describe() const;  // who waits for what
};

// Lets the threads of a block run, all to their end.
class Scheduler {
 public:
  virtual ~Scheduler() = default;
  virtual void run(Block& block) = 0;

  // Between these two the caller alone looks at the block.
  virtual void enter() {}
  virtual void leave() {}
  virtual void wake(Thread& thread) = 0;
  virtual void wait(Thread& self) = 0;       // leaves; returns when somebody has woken `self`
  virtual void give_way(Thread& self) = 0;   // leaves; others may run
  virtual void maybe_give_way(Thread&) = 0;  // not within enter()
};

std::unique_ptr<Scheduler> make_fiber_scheduler(uint64_t seed);
std::unique_ptr<Scheduler> make_thread_scheduler();

// What a scheduler calls as a thread of the block: the kernel, from its first line to the exit.
void run_thread(Block& block, Thread& thread);

// For a scheduler, within enter(): nobody is left that could run, and not all have exited.
void note_deadlock();

// Shared memory of the running block.
class SharedMemory {
 public:
  explicit SharedMemory(size_t dynamic_bytes);
  SharedMemory(const SharedMemory&) = delete;
  SharedMemory& operator=(const SharedMemory&) = delete;
  ~SharedMemory();
  void fill_with_nan();
  bool contains(const void* p, size_t bytes) const;
  void* dynamic() const { return dynamic_; }

 private:
  void* dynamic_ = nullptr;  // exactly as large as asked for, so that ASan sees the end
  size_t dynamic_bytes_;
};

}  // namespace mac_attn::simt
