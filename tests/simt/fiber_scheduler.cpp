// Engine 1: one OS thread, every CUDA thread a fiber, and a schedule drawn from the seed.
//
// A uniform choice among the threads that can run seldom lets one warp get far ahead of the others, which is what
// shows a missing barrier; so the seed also chooses among three manners of choosing.
#include "machine.h"

namespace mac_attn::simt {

namespace {

class FiberScheduler final : public Scheduler {
 public:
  explicit FiberScheduler(uint64_t seed) : random_(seed), manner_(seed == 0 ? kInOrder : 1 + seed % 3) {}

  void run(Cluster& cluster) override {
    cluster_ = &cluster;
    num_blocks_ = cluster.blocks.size();
    runnable_blocks_ = 0;
    current_block_ = 0;
    for (auto& block : cluster.blocks) {
      Warps& warps = warps_[block->rank];
      warps.runnable = 0;
      warps.current = 0;
      warps.threads = block->threads.data();
      for (uint32_t& rank : warps.ranks) rank = random_.next();
      for (auto& thread : block->threads) {
        thread->fiber.start(
            [](void* self) {
              auto* scheduler = static_cast<FiberScheduler*>(self);
              Thread& me = *static_cast<Thread*>(const_cast<Place*>(place));
              run_thread(*scheduler->cluster_, me);
              scheduler->run_next(me, true);
            },
            this);
        wake(*thread);
      }
    }
    if (num_blocks_ > 1) {
      for (uint32_t& rank : block_ranks_) rank = random_.next();
    }
    Thread* first = choose();
    place = first;
    first->fiber.switch_from(caller_);
  }

  void wake(Thread& thread) override {
    Warps& warps = warps_[thread.cluster_rank];
    warps.lanes[thread.index / kLanes] |= 1u << thread.lane;
    warps.runnable |= 1u << thread.index / kLanes;
    runnable_blocks_ |= 1u << thread.cluster_rank;
  }
  void wait(Thread& self) override { run_next(self, false); }
  void give_way(Thread& self) override {
    wake(self);
    run_next(self, false);
  }
  void maybe_give_way(Thread& self) override {
    if (manner_ != kInOrder && random_.next() % 8 == 0) give_way(self);
  }

 private:
  enum Manner : uint64_t {
    kInOrder,
    kUniform,  // any block of the cluster and any warp at any time
    kSticky,   // a block, of it a warp, and of that a lane, runs until it has to wait
    kRanked,   // the blocks and their warps have ranks, and the first that can run does
  };

  // Some set bit of a mask that is not 0.
  uint32_t any_bit(uint32_t mask) {
    const uint32_t first = random_.next() % 32;
    const uint32_t turned = mask >> first | (first ? mask << (32 - first) : 0u);
    return (static_cast<uint32_t>(__builtin_ctz(turned)) + first) % 32;
  }

  // One of `runnable`, blocks or warps of a block, of which `current` was the last choice.
  uint32_t choose_of(uint32_t runnable, uint32_t current, uint32_t* ranks) {
    switch (manner_) {
      case kInOrder: return static_cast<uint32_t>(__builtin_ctz(runnable));
      case kUniform: return any_bit(runnable);
      case kSticky: return runnable >> current & 1u ? current : any_bit(runnable);
      case kRanked: break;
    }
    uint32_t best = 0, best_rank = 0;
    for (uint32_t left = runnable; left; left &= left - 1) {
      const uint32_t i = static_cast<uint32_t>(__builtin_ctz(left));
      if (ranks[i] >= best_rank) best = i, best_rank = ranks[i];
    }
    if (random_.next() % 512 == 0) ranks[best] = random_.next();
    return best;
  }

  // Takes a thread from those that can run; null if there is none.
  Thread* choose() {
    if (runnable_blocks_ == 0) return nullptr;
    if (num_blocks_ > 1) current_block_ = choose_of(runnable_blocks_, current_block_, block_ranks_);
    Warps& warps = warps_[current_block_];
    const uint32_t warp = warps.current = choose_of(warps.runnable, warps.current, warps.ranks);
    uint32_t& lanes = warps.lanes[warp];
    const uint32_t lane = manner_ == kInOrder ? static_cast<uint32_t>(__builtin_ctz(lanes)) : any_bit(lanes);
    lanes &= ~(1u << lane);
    if (lanes == 0) warps.runnable &= ~(1u << warp);
    if (warps.runnable == 0) runnable_blocks_ &= ~(1u << current_block_);
    return warps.threads[warp * kLanes + lane].get();
  }

  void run_next(Thread& self, bool for_good) {
    Thread* next = choose();
    if (!next && cluster_->exited < cluster_->num_threads) {
      note_deadlock();  // which wakes everybody
      next = choose();
    }
    if (next == &self) return;
    Fiber& to = next ? next->fiber : caller_;
    place = next;
    to.switch_from(self.fiber, for_good);
  }

  Random random_;
  uint64_t manner_;
  Fiber caller_;
  Cluster* cluster_ = nullptr;
  size_t num_blocks_ = 0;
  struct Warps {  // of a block
    const std::unique_ptr<Thread>* threads = nullptr;
    uint32_t runnable = 0;
    uint32_t current = 0;
    uint32_t lanes[kMaxWarps] = {};  // that can run
    uint32_t ranks[kMaxWarps];
  };
  uint32_t runnable_blocks_ = 0;
  uint32_t current_block_ = 0;
  uint32_t block_ranks_[kMaxBlocks];
  Warps warps_[kMaxBlocks];
};

}  // namespace

std::unique_ptr<Scheduler> make_fiber_scheduler(uint64_t seed) {
  return std::make_unique<FiberScheduler>(seed);
}

}  // namespace mac_attn::simt
