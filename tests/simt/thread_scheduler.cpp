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

// OS threads are kept from cluster to cluster: under TSan one takes milliseconds to make.
class Workers {
 public:
  ~Workers() {
    for (auto& worker : workers_) {
      worker->cluster = nullptr;
      give(worker->start);
      worker->thread.join();
    }
  }

  void run(Cluster& cluster) {
    const auto count = static_cast<size_t>(cluster.num_threads);
    while (workers_.size() < count) {
      workers_.push_back(std::make_unique<Worker>());
      workers_.back()->thread = std::thread([this, worker = workers_.back().get()] { work(*worker); });
    }
    left_ = static_cast<uint32_t>(count);
    size_t next = 0;
    for (auto& block : cluster.blocks) {
      for (auto& thread : block->threads) {
        Worker& worker = *workers_[next++];
        worker.cluster = &cluster;
        worker.self = thread.get();
        give(worker.start);
      }
    }
    take(done_);
  }

 private:
  struct Worker {
    Cluster* cluster = nullptr;
    Thread* self = nullptr;
    uint32_t start = 0;
    std::thread thread;
  };

  void work(Worker& worker) {
    for (;;) {
      take(worker.start);
      if (!worker.cluster) return;
      place = worker.self;
      run_thread(*worker.cluster, *worker.self);
      if (__atomic_sub_fetch(&left_, 1, __ATOMIC_ACQ_REL) == 0) give(done_);
    }
  }

  std::vector<std::unique_ptr<Worker>> workers_;
  uint32_t left_ = 0;
  uint32_t done_ = 0;
};

class ThreadScheduler final : public Scheduler {
 public:
  void run(Cluster& cluster) override {
    static Workers workers;
    cluster_ = &cluster;
    workers.run(cluster);
  }

  void enter() override {
    while (__atomic_exchange_n(&lock_, 1, __ATOMIC_ACQUIRE) != 0) sched_yield();
  }
  void leave() override {
    // Whoever is the last to wait or to exit sees that nobody is left to wake the others.
    const int active = cluster_->num_threads - cluster_->waiting - cluster_->exited;
    if (active == 0 && cluster_->waiting > 0) note_deadlock();
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
  Cluster* cluster_ = nullptr;
  uint32_t lock_ = 0;
};

}  // namespace

std::unique_ptr<Scheduler> make_thread_scheduler() {
  return std::make_unique<ThreadScheduler>();
}

}  // namespace mac_attn::simt
