#include "machine.h"

#include <cstdio>
#include <cstring>

#include "sanitizers.h"

namespace mac_attn::simt {

__thread const Place* place;

namespace {

Cluster* cluster;  // in execution
Scheduler* scheduler;

typedef uint32_t __attribute__((may_alias, aligned(1))) Word;

Thread& self() {
  return *static_cast<Thread*>(const_cast<Place*>(place));
}

void wake(Thread& thread) {
  thread.waits_for = nullptr;
  thread.barrier = -1;
  --cluster->waiting;
  scheduler->wake(thread);
}

struct Abandoned {};  // thrown through the kernel by every thread after a failure

void leave_if_failed() {
  if (__atomic_load_n(&cluster->failed, __ATOMIC_RELAXED)) throw Abandoned();
}

void enter_unless_failed() {
  scheduler->enter();
  if (!cluster->failed) return;
  scheduler->leave();
  throw Abandoned();
}

// The first failure counts. Everybody wakes up to leave.
void note_failure(const Thread* thread, const std::string& what) {
  if (cluster->failed) return;
  cluster->failure = (thread ? *thread->home : *cluster->blocks[0]).name();
  if (thread) {
    cluster->failure += " thread " + std::to_string(thread->index) + " (warp " +
                        std::to_string(thread->index / kLanes) + ", lane " + std::to_string(thread->lane) + ")";
  } else if (cluster->blocks.size() > 1) {
    cluster->failure += " and the others of its cluster";
  }
  cluster->failure += ": " + what + "; " + cluster->describe();
  __atomic_store_n(&cluster->failed, true, __ATOMIC_RELAXED);
  for (auto& block : cluster->blocks) {
    for (auto& other : block->threads) {
      if (other->waits_for) wake(*other);
    }
  }
}

[[noreturn]] void fail_entered(Thread& thread, const std::string& what) {
  note_failure(&thread, what);
  scheduler->leave();
  throw Abandoned();
}

// Not memcpy, which the sanitizers would take for an access by the running thread.
void copy(void* to, const void* from, size_t bytes) {
  auto* out = static_cast<volatile unsigned char*>(to);
  const auto* in = static_cast<const unsigned char*>(from);
  for (; bytes >= 4; bytes -= 4, in += 4, out += 4) {
    uint32_t word;
    __builtin_memcpy(&word, in, 4);
    *reinterpret_cast<volatile Word*>(out) = word;
  }
  for (; bytes > 0; --bytes) *out++ = *in++;
}

void wait_for(Thread& thread, const char* name) {
  thread.waits_for = name;
  ++cluster->waiting;
  scheduler->wait(thread);
  leave_if_failed();
}

// Waits for all lanes of the warp; the last one to come does the work.
void meet(Thread& thread, const char* name, const void* in, size_t in_bytes, void* out, size_t out_bytes,
          void (*meaning)(const void*, void*), bool orders) {
  if (in_bytes > kMaxOperandBytes || out_bytes > kMaxOperandBytes) fail("operands are too large");
  Warp& warp = *thread.warp;
  enter_unless_failed();
  if (warp.exited > 0) fail_entered(thread, std::string(name) + ": lanes of the warp have exited");
  if (warp.arrived == 0) warp.name = name;
  if (std::strcmp(warp.name, name) != 0) {
    fail_entered(thread, std::string(name) + ": other lanes of the warp are at " + warp.name);
  }
  const unsigned phase = warp.phase % 2;
  copy(warp.in[phase] + thread.lane * in_bytes, in, in_bytes);
  if (orders) order_release(&warp.order[phase]);
  if (++warp.arrived < kLanes) {
    wait_for(thread, name);
  } else {
    if (meaning) meaning(warp.in[phase], warp.out[phase]);
    warp.arrived = 0;
    ++warp.phase;
    const std::unique_ptr<Thread>* lanes = thread.home->threads.data() + (thread.index - thread.lane);
    for (int i = 0; i < kLanes; ++i) {
      if (i != thread.lane) wake(*lanes[i]);
    }
    scheduler->give_way(thread);
  }
  if (orders) order_acquire(&warp.order[phase]);
  copy(out, warp.out[phase] + thread.lane * out_bytes, out_bytes);
}

void barrier_sync(const char* name, int id, int num_threads) {
  Thread& thread = self();
  Block* block = thread.home;
  enter_unless_failed();
  if (id < 0 || id >= kNumBarriers) fail_entered(thread, "no such barrier");
  if (num_threads <= 0 || num_threads % kLanes != 0 || num_threads > block->num_threads) {
    fail_entered(thread, "a barrier is for whole warps of the block");
  }
  if (num_threads > block->num_threads - block->exited) {
    fail_entered(thread, std::string(name) + ": threads have exited that it waits for");
  }
  Barrier& barrier = block->barriers[id];
  if (barrier.arrived == 0) barrier.expected = num_threads;
  if (barrier.expected != num_threads) fail_entered(thread, std::string(name) + ": numbers of threads differ");
  const int warp = thread.index / kLanes;
  barrier.lanes[warp] |= 1u << thread.lane;
  const unsigned phase = barrier.phase % 2;
  order_release(&barrier.order[phase]);
  thread.barrier = id;
  if (++barrier.arrived < num_threads) {
    wait_for(thread, name);
  } else {
    for (uint32_t& lanes : barrier.lanes) {
      if (lanes != 0 && lanes != 0xffffffffu) {
        fail_entered(thread, std::string(name) + ": part of a warp takes part");
      }
      lanes = 0;
    }
    barrier.arrived = 0;
    ++barrier.phase;
    thread.barrier = -1;
    for (auto& other : block->threads) {
      if (other->barrier == id) wake(*other);
    }
    scheduler->give_way(thread);
  }
  order_acquire(&barrier.order[phase]);
}

// In a cluster, what others do in a block's shared memory must come after the start of its first thread and before
// the exit of its last one: both count as writes.
void note_start(Block& block, const Thread& thread) {
  scheduler->enter();
  if (block.started++ == 0) {
    if (!block.shared.open()) note_failure(&thread, "shared memory was written before the block had started");
    order_release(&block.start_order);
  }
  order_acquire(&block.start_order);
  scheduler->leave();
}
void note_exit(Block& block) {  // within enter()
  order_release(&block.exit_order);
  if (block.exited < block.num_threads) return;
  order_acquire(&block.exit_order);
  block.shared.close();
}

}  // namespace

// ---- what csrc/cuda/simt_host.h asks for

void collective(const char* name, const void* in, size_t in_bytes, void* out, size_t out_bytes,
                void (*meaning)(const void* in, void* out)) {
  meet(self(), name, in, in_bytes, out, out_bytes, meaning, false);
}
void sync_warp() {
  meet(self(), "sync_warp", nullptr, 0, nullptr, 0, nullptr, true);
}
void sync_block() {
  barrier_sync("sync_block", 0, self().home->num_threads);
}
void named_barrier_sync(int id, int num_threads) {
  barrier_sync("named_barrier_sync", id, num_threads);
}

// The warp comes as one (.aligned); then each lane counts for itself.
void cluster_arrive() {
  Thread& thread = self();
  if (thread.in_cluster_barrier) fail("cluster_arrive: arrives twice without a cluster_wait");
  meet(thread, "cluster_arrive", nullptr, 0, nullptr, 0, nullptr, false);
  enter_unless_failed();
  if (cluster->exited > 0) {
    fail_entered(thread, "cluster_arrive: threads of the cluster have exited that it waits for");
  }
  ClusterBarrier& barrier = cluster->barrier;
  thread.in_cluster_barrier = true;
  thread.cluster_phase = barrier.phase;
  order_release(&barrier.order[barrier.phase % 2]);
  if (++barrier.arrived == cluster->num_threads) {
    barrier.arrived = 0;
    ++barrier.phase;
    for (auto& block : cluster->blocks) {
      for (auto& other : block->threads) {
        if (other->barrier == kClusterBarrier) wake(*other);
      }
    }
  }
  scheduler->leave();
  switch_point();
}
void cluster_wait() {
  Thread& thread = self();
  if (!thread.in_cluster_barrier) fail("cluster_wait: waits without a cluster_arrive");
  meet(thread, "cluster_wait", nullptr, 0, nullptr, 0, nullptr, false);
  enter_unless_failed();
  ClusterBarrier& barrier = cluster->barrier;
  if (barrier.phase == thread.cluster_phase) {
    thread.barrier = kClusterBarrier;
    wait_for(thread, "cluster_wait");
  } else {
    scheduler->leave();
  }
  thread.in_cluster_barrier = false;
  order_acquire(&barrier.order[thread.cluster_phase % 2]);
}
void check_not_anothers(const char* name, const void* p) {
  const Thread& thread = self();
  for (int rank = 0; rank < thread.cluster_size; ++rank) {
    if (rank != thread.cluster_rank && cluster->blocks[rank]->shared.contains(p, 1)) fail(name);
  }
}
uintptr_t shared_of(uintptr_t mine, int rank) {
  const Thread& thread = self();
  const SharedMemory& own = thread.home->shared;
  if (rank < 0 || rank >= thread.cluster_size) fail("shared_of: no such block in the cluster");
  if (!own.contains(reinterpret_cast<const void*>(mine), 1)) {
    fail("shared_of: address is not in the block's shared memory");
  }
  if (rank == thread.cluster_rank) return mine;
  const auto start_of = [](const SharedMemory& shared) { return reinterpret_cast<uintptr_t>(shared.dynamic()); };
  return mine - start_of(own) + start_of(cluster->blocks[rank]->shared);
}

void switch_point() {
  leave_if_failed();
  scheduler->maybe_give_way(self());
}
void* dynamic_shared() {
  return self().home->shared.dynamic();
}
AsyncCopies& async_copies() {
  return *self().copies;
}
bool random_bit() {
  return self().random.next() & 1;
}
Counters& thread_counters() {
  return self().counters;
}
void fail(const char* what) {
  scheduler->enter();
  fail_entered(self(), what);
}

void in_flight(void* shared, size_t bytes, bool on) {
  on ? poison(shared, bytes) : unpoison(shared, bytes);
}

void check_shared(const char* name, const void* p, size_t bytes) {
  if (reinterpret_cast<uintptr_t>(p) % bytes != 0) {
    fail((std::string(name) + ": shared address is not aligned").c_str());
  }
  if (self().home->shared.contains(p, bytes)) return;
  fail((std::string(name) + ": address is not in the block's shared memory").c_str());
}

// ---- for schedulers and launches

void run_cluster(Cluster& running, Scheduler& chosen) {
  cluster = &running;
  scheduler = &chosen;
  order_release(&running.start_order);
  chosen.run(running);
  order_acquire(&running.end_order);
  cluster = nullptr;
  scheduler = nullptr;
}

void run_thread(Cluster& running, Thread& thread) {
  order_acquire(&running.start_order);
  Block& block = *thread.home;
  const bool alone = running.blocks.size() == 1;
  if (!alone) note_start(block, thread);
  try {
    leave_if_failed();
    running.body(running.context);
    scheduler->enter();
    if (thread.copies->count > 0) fail_entered(thread, "exits with asynchronous copies in flight");
    if (thread.warp->arrived > 0) {
      fail_entered(thread, std::string("exits while other lanes of the warp are at ") + thread.warp->name);
    }
    if (block.barriers[0].arrived > 0) fail_entered(thread, "exits while other threads are at sync_block");
    if (thread.in_cluster_barrier) fail_entered(thread, "exits after cluster_arrive without a cluster_wait");
    if (running.barrier.arrived > 0) {
      fail_entered(thread, "exits while other threads of the cluster have come to cluster_arrive");
    }
  } catch (const Abandoned&) {
    for (int i = 0; i < thread.copies->count; ++i) in_flight(thread.copies->copy[i].shared, 16, false);
    scheduler->enter();
  }
  thread.exited = true;
  ++thread.warp->exited;
  ++running.exited;
  ++block.exited;
  if (!alone && !running.failed) note_exit(block);
  order_release(&running.end_order);
  scheduler->leave();
}

void note_deadlock() {
  note_failure(nullptr, "deadlock");
}

namespace {

// "threads 0-31 at x, threads 32-63 exited": what `state` says of 0 to `count` - 1, neighbours of one state
// together.
template <typename State>
std::string describe_runs(int count, const char* what, const char* between, const State& state) {
  std::string text;
  for (int i = 0; i < count;) {
    int end = i + 1;
    while (end < count && state(end) == state(i)) ++end;
    text += (i ? between : "") + std::string(what) + std::to_string(i) + "-" + std::to_string(end - 1) + state(i);
    i = end;
  }
  return text;
}

}  // namespace

std::string Block::name() const {
  const uint3 index = threads[0]->block;
  return "block (" + std::to_string(index.x) + ", " + std::to_string(index.y) + ", " + std::to_string(index.z) +
         ")";
}

std::string Block::describe() const {
  return describe_runs(num_threads, "threads ", ", ", [&](int i) {
    const Thread& t = *threads[i];
    return t.exited ? std::string(" exited") : t.waits_for ? std::string(" at ") + t.waits_for : " running";
  });
}

std::string Cluster::describe() const {
  if (blocks.size() == 1) return blocks[0]->describe();
  std::vector<std::string> texts;
  for (const auto& block : blocks) texts.push_back(block->describe());
  return describe_runs(static_cast<int>(blocks.size()), "ranks ", "; ", [&](int i) { return ": " + texts[i]; });
}

}  // namespace mac_attn::simt
