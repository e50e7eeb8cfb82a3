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

  void run(Block& block) override {
    block_ = &block;
    runnable_warps_ = 0;
    current_warp_ = 0;
    for (int i = 0; i < kMaxWarps; ++i) rank_[i] = random_.next();
    for (auto& thread : block.threads) {
      thread->fiber.start(
          [](void* self) {
            auto* scheduler = static_cast<FiberScheduler*>(self);
            Thread& me = *static_cast<Thread*>(const_cast<Place*>(place));
            run_thread(*scheduler->block_, me);
            scheduler->run_next(me, true);
          },
          this);
      wake(*thread);
    }
    Thread* first = choose();
    place = first;
    first->fiber.switch_from(caller_);
  }

  void wake(Thread& thread) override {
    runnable_lanes_[thread.index / kLanes] |= 1u << thread.lane;
    runnable_warps_ |= 1u << thread.index / kLanes;
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
    kUniform,  // any warp at any time
    kSticky,   // a warp, and of it a lane, runs until it has to wait
    kRanked,   // the warps have ranks, and the first that can run does
  };

  // Some set bit of a mask that is not 0.
  uint32_t any_bit(uint32_t mask) {
    const uint32_t first = random_.next() % 32;
    const uint32_t turned = mask >> first | (first ? mask << (32 - first) : 0u);
    return (static_cast<uint32_t>(__builtin_ctz(turned)) + first) % 32;
  }

  uint32_t choose_warp() {
    switch (manner_) {
      case kInOrder: return static_cast<uint32_t>(__builtin_ctz(runnable_warps_));
      case kUniform: return any_bit(runnable_warps_);
      case kSticky: return runnable_warps_ >> current_warp_ & 1u ? current_warp_ : any_bit(runnable_warps_);
      case kRanked: break;
    }
    uint32_t best = 0, best_rank = 0;
    for (uint32_t warps = runnable_warps_; warps; warps &= warps - 1) {
      const uint32_t warp = static_cast<uint32_t>(__builtin_ctz(warps));
      if (rank_[warp] >= best_rank) best = warp, best_rank = rank_[warp];
    }
    if (random_.next() % 512 == 0) rank_[best] = random_.next();
    return best;
  }

  // Takes a thread from those that can run; null if there is none.
  Thread* choose() {
    if (runnable_warps_ == 0) return nullptr;
    const uint32_t warp = current_warp_ = choose_warp();
    uint32_t& lanes = runnable_lanes_[warp];
    const uint32_t lane = manner_ == kInOrder ? static_cast<uint32_t>(__builtin_ctz(lanes)) : any_bit(lanes);
    lanes &= ~(1u << lane);
    if (lanes == 0) runnable_warps_ &= ~(1u << warp);
    return block_->threads[warp * kLanes + lane].get();
  }

  void run_next(Thread& self, bool for_good) {
    Thread* next = choose();
    if (!next && block_->exited < block_->num_threads) {
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
  Block* block_ = nullptr;
  uint32_t current_warp_ = 0;
  uint32_t runnable_warps_ = 0;
  uint32_t runnable_lanes_[kMaxWarps] = {};
  uint32_t rank_[kMaxWarps];
};

}  // namespace

std::unique_ptr<Scheduler> make_fiber_scheduler(uint64_t seed) {
  return std::make_unique<FiberScheduler>(seed);
}

}  // namespace mac_attn::simt
