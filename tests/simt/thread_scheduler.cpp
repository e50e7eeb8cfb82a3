// Engine 2: every CUDA thread is an OS thread.
//
// They meet through a lock and futexes of this file's own, compiled without instrumentation. A mutex and a
// condition variable would do, but ThreadSanitizer would take each of their uses for an order between the two
// threads, and a shuffle would hide a missing barrier. What does order memory is told to it by machine.cpp.
#include <linux/futex.h>
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <thread>

#include "machine.h"

namespace mac_attn::simt {

namespace {

struct Abandoned {};  // thrown through the kernel

class ThreadScheduler final : public Scheduler {
 public:
  void run(Block& block) override {
    block_ = &block;
    std::vector<std::thread> threads;
    for (auto& thread : block.threads) {
      threads.emplace_back([&block, me = thread.get()] {
        place = me;
        try {
          run_thread(block, *me);
        } catch (const Abandoned&) {
        }
      });
    }
    for (std::thread& thread : threads) thread.join();
  }

  void enter() override {
    while (__atomic_exchange_n(&lock_, 1, __ATOMIC_ACQUIRE) != 0) sched_yield();
  }
  void leave() override {
    fail_if_stuck();
    __atomic_store_n(&lock_, 0, __ATOMIC_RELEASE);
  }
  void wake(Thread& thread) override {
    __atomic_store_n(&thread.awake, 1, __ATOMIC_RELEASE);
    syscall(SYS_futex, &thread.awake, FUTEX_WAKE_PRIVATE, 1, nullptr, nullptr, 0);
  }
  void wait(Thread& self) override {
    leave();
    while (__atomic_exchange_n(&self.awake, 0, __ATOMIC_ACQUIRE) == 0) {
      syscall(SYS_futex, &self.awake, FUTEX_WAIT_PRIVATE, 0, nullptr, nullptr, 0);
    }
    if (__atomic_load_n(&failed_, __ATOMIC_RELAXED)) throw Abandoned();
  }
  void give_way(Thread&) override { leave(); }
  void maybe_give_way(Thread& self) override {
    if (self.random.next() % 8 == 0) sched_yield();
  }
  void abandon(Thread&) override {
    wake_all_to_fail();
    __atomic_store_n(&lock_, 0, __ATOMIC_RELEASE);
    throw Abandoned();
  }

 private:
  // Whoever is the last to wait or to exit sees that nobody is left to wake the others.
  void fail_if_stuck() {
    const int active = block_->num_threads - block_->waiting - block_->exited;
    if (active > 0 || block_->waiting == 0 || !block_->failure.empty()) return;
    note_failure(*block_, nullptr, "deadlock");
    wake_all_to_fail();
  }

  void wake_all_to_fail() {
    __atomic_store_n(&failed_, 1, __ATOMIC_RELAXED);
    for (auto& thread : block_->threads) wake(*thread);
  }

  Block* block_ = nullptr;
  uint32_t lock_ = 0;
  uint32_t failed_ = 0;
};

}  // namespace

std::unique_ptr<Scheduler> make_thread_scheduler() {
  return std::make_unique<ThreadScheduler>();
}

}  // namespace mac_attn::simt
