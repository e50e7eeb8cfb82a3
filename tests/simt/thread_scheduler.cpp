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

void futex_wake(uint32_t& word) {
  syscall(SYS_futex, &word, FUTEX_WAKE_PRIVATE, 1, nullptr, nullptr, 0);
}

// Sleeps until the word is not 0, and sets it to 0.
void take(uint32_t& word) {
  while (__atomic_exchange_n(&word, 0, __ATOMIC_ACQUIRE) == 0) {
    syscall(SYS_futex, &word, FUTEX_WAIT_PRIVATE, 0, nullptr, nullptr, 0);
  }
}

void give(uint32_t& word) {
  __atomic_store_n(&word, 1, __ATOMIC_RELEASE);
  futex_wake(word);
}

// OS threads are kept from block to block: under TSan one takes milliseconds to make.
class Workers {
 public:
  ~Workers() {
    for (auto& worker : workers_) {
      worker->block = nullptr;
      give(worker->start);
      worker->thread.join();
    }
  }

  void run(Block& block) {
    while (workers_.size() < block.threads.size()) {
      workers_.push_back(std::make_unique<Worker>());
      workers_.back()->thread = std::thread([this, worker = workers_.back().get()] { work(*worker); });
    }
    left_ = static_cast<uint32_t>(block.num_threads);
    for (int i = 0; i < block.num_threads; ++i) {
      workers_[i]->block = &block;
      workers_[i]->self = block.threads[i].get();
      give(workers_[i]->start);
    }
    take(done_);
  }

 private:
  struct Worker {
    Block* block = nullptr;
    Thread* self = nullptr;
    uint32_t start = 0;
    std::thread thread;
  };

  void work(Worker& worker) {
    for (;;) {
      take(worker.start);
      if (!worker.block) return;
      place = worker.self;
      run_thread(*worker.block, *worker.self);
      if (__atomic_sub_fetch(&left_, 1, __ATOMIC_ACQ_REL) == 0) give(done_);
    }
  }

  std::vector<std::unique_ptr<Worker>> workers_;
  uint32_t left_ = 0;
  uint32_t done_ = 0;
};

class ThreadScheduler final : public Scheduler {
 public:
  void run(Block& block) override {
    static Workers workers;
    block_ = &block;
    workers.run(block);
  }

  void enter() override {
    while (__atomic_exchange_n(&lock_, 1, __ATOMIC_ACQUIRE) != 0) sched_yield();
  }
  void leave() override {
    // Whoever is the last to wait or to exit sees that nobody is left to wake the others.
    const int active = block_->num_threads - block_->waiting - block_->exited;
    if (active == 0 && block_->waiting > 0) note_deadlock();
    __atomic_store_n(&lock_, 0, __ATOMIC_RELEASE);
  }
  void wake(Thread& thread) override { give(thread.awake); }
  void wait(Thread& self) override {
    leave();
    take(self.awake);
  }
  void give_way(Thread&) override { leave(); }
  void maybe_give_way(Thread& self) override {
    if (self.random.next() % 8 == 0) sched_yield();
  }

 private:
  Block* block_ = nullptr;
  uint32_t lock_ = 0;
};

}  // namespace

std::unique_ptr<Scheduler> make_thread_scheduler() {
  return std::make_unique<ThreadScheduler>();
}

}  // namespace mac_attn::simt
