#include "machine.h"

#include <cstdio>
#include <cstring>

#include "sanitizers.h"

namespace mac_attn::simt {

__thread const Place* place;

namespace {

Block* block;  // in execution
Scheduler* scheduler;
SharedMemory* shared_memory;
Counters totals;

typedef uint32_t __attribute__((may_alias, aligned(1))) Word;

Thread& self() {
  return *static_cast<Thread*>(const_cast<Place*>(place));
}

void wake(Thread& thread) {
  thread.waits_for = nullptr;
  thread.barrier = -1;
  --block->waiting;
  scheduler->wake(thread);
}

struct Abandoned {};  // thrown through the kernel by every thread after a failure

void leave_if_failed() {
  if (__atomic_load_n(&block->failed, __ATOMIC_RELAXED)) throw Abandoned();
}

void enter_unless_failed() {
  scheduler->enter();
  if (!block->failed) return;
  scheduler->leave();
  throw Abandoned();
}

// The first failure counts. Everybody wakes up to leave.
void note_failure(const Thread* thread, const std::string& what) {
  if (block->failed) return;
  const uint3 where = block->threads[0]->block;
  block->failure =
      "block (" + std::to_string(where.x) + ", " + std::to_string(where.y) + ", " + std::to_string(where.z) + ")";
  if (thread) {
    block->failure += " thread " + std::to_string(thread->index) + " (warp " +
                      std::to_string(thread->index / kLanes) + ", lane " + std::to_string(thread->lane) + ")";
  }
  block->failure += ": " + what + "; " + block->describe();
  __atomic_store_n(&block->failed, true, __ATOMIC_RELAXED);
  for (auto& other : block->threads) {
    if (other->waits_for) wake(*other);
  }
}

[[noreturn]] void fail_entered(Thread& thread, const std::string& what) {
  note_failure(&thread, what);
  scheduler->leave();
  throw Abandoned();
}

void add(Counters& sum, const Counters& c) {
  sum.async_copy_bytes += c.async_copy_bytes;
  sum.async_zero_bytes += c.async_zero_bytes;
  sum.load_stream_bytes += c.load_stream_bytes;
  sum.load_bytes += c.load_bytes;
  sum.store_bytes += c.store_bytes;
  sum.atomics += c.atomics;
  sum.matrix_products += c.matrix_products;
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
  ++block->waiting;
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
    const int first = thread.index - thread.lane;
    for (int i = first; i < first + kLanes; ++i) {
      if (i != thread.index) wake(*block->threads[i]);
    }
    scheduler->give_way(thread);
  }
  if (orders) order_acquire(&warp.order[phase]);
  copy(out, warp.out[phase] + thread.lane * out_bytes, out_bytes);
}

void barrier_sync(const char* name, int id, int num_threads) {
  Thread& thread = self();
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
  barrier_sync("sync_block", 0, block->num_threads);
}
void named_barrier_sync(int id, int num_threads) {
  barrier_sync("named_barrier_sync", id, num_threads);
}
void switch_point() {
  leave_if_failed();
  scheduler->maybe_give_way(self());
}
void* dynamic_shared() {
  return shared_memory->dynamic();
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
  if (!shared_memory->contains(p, bytes)) fail((std::string(name) + ": address is not in shared memory").c_str());
}

// ---- blocks and launches

void run_thread(Block& running, Thread& thread) {
  order_acquire(&running.start_order);
  try {
    leave_if_failed();
    running.body(running.context);
    scheduler->enter();
    if (thread.copies->count > 0) fail_entered(thread, "exits with asynchronous copies in flight");
    if (thread.warp->arrived > 0) {
      fail_entered(thread, std::string("exits while other lanes of the warp are at ") + thread.warp->name);
    }
    if (running.barriers[0].arrived > 0) fail_entered(thread, "exits while other threads are at sync_block");
  } catch (const Abandoned&) {
    for (int i = 0; i < thread.copies->count; ++i) in_flight(thread.copies->copy[i].shared, 16, false);
    scheduler->enter();
  }
  thread.exited = true;
  ++thread.warp->exited;
  ++running.exited;
  order_release(&running.end_order);
  scheduler->leave();
}

void note_deadlock() {
  note_failure(nullptr, "deadlock");
}

std::string Block::describe() const {
  auto state = [&](int i) {
    const Thread& t = *threads[i];
    return t.exited ? std::string("exited") : t.waits_for ? std::string("at ") + t.waits_for : "running";
  };
  std::string text;
  for (int i = 0; i < num_threads;) {
    int end = i + 1;
    while (end < num_threads && state(end) == state(i)) ++end;
    text += (i ? ", " : "") + std::string("threads ") + std::to_string(i) + "-" + std::to_string(end - 1) + " " +
            state(i);
    i = end;
  }
  return text;
}

void Block::reset(const LaunchConfig& config, uint3 index, Random& random) {
  for (int i = 0; i < num_threads; ++i) {
    Thread& t = *threads[i];
    const unsigned x = config.block.x, y = config.block.y, linear = static_cast<unsigned>(i);
    t.thread = {linear % x, linear / x % y, linear / x / y};
    t.Place::block = index;
    t.block_dim = config.block;
    t.grid_dim = config.grid;
    t.lane = i % kLanes;
    t.index = i;
    t.warp = warps[i / kLanes].get();
    t.waits_for = nullptr;
    t.barrier = -1;
    t.exited = false;
    t.random = Random(random.next());
    t.copies->count = t.copies->groups = 0;
    t.awake = 0;
  }
  for (auto& warp : warps) warp->arrived = warp->exited = 0;
  for (Barrier& barrier : barriers) barrier = Barrier{};
  waiting = exited = 0;
}

void launch(const LaunchConfig& config, void (*body)(const void*), const void* context) {
  const int64_t threads = static_cast<int64_t>(config.block.x) * config.block.y * config.block.z;
  if (threads <= 0 || threads % kLanes != 0 || threads > kLanes * kMaxWarps) {
    throw Failure("a block has 1 to 32 whole warps, this one " + std::to_string(threads) + " threads");
  }
  // Threads are kept from launch to launch: a stack, and for TSan a fiber, is not made in no time.
  static std::vector<std::unique_ptr<Thread>> pool;
  Random random(config.seed);
  Block running;
  running.body = body;
  running.context = context;
  running.num_threads = static_cast<int>(threads);
  while (pool.size() < static_cast<size_t>(threads)) {
    pool.push_back(std::make_unique<Thread>());
    pool.back()->copies.reset(new AsyncCopies);  // not cleared: most of it is never touched
  }
  for (int i = 0; i < threads; ++i) running.threads.push_back(std::move(pool[i]));
  for (int i = 0; i < threads / kLanes; ++i) running.warps.push_back(std::make_unique<Warp>());
  SharedMemory shared(config.dynamic_shared_bytes);
  const std::unique_ptr<Scheduler> chosen =
      config.engine == Engine::kFibers ? make_fiber_scheduler(config.seed) : make_thread_scheduler();
  block = &running;
  scheduler = chosen.get();
  shared_memory = &shared;

  std::vector<uint32_t> order(static_cast<size_t>(config.grid.x) * config.grid.y * config.grid.z);
  for (uint32_t i = 0; i < order.size(); ++i) order[i] = i;
  for (uint32_t i = static_cast<uint32_t>(order.size()); config.seed != 0 && i > 1; --i) {
    const uint32_t j = random.below(i), other = order[j];
    order[j] = order[i - 1];
    order[i - 1] = other;
  }
  for (uint32_t linear : order) {
    const unsigned x = config.grid.x, y = config.grid.y;
    running.reset(config, {linear % x, linear / x % y, linear / x / y}, random);
    shared.fill_with_nan();
    order_release(&running.start_order);
    chosen->run(running);
    order_acquire(&running.end_order);
    if (running.failed) break;
  }
  for (int i = 0; i < threads; ++i) {
    add(totals, running.threads[i]->counters);
    running.threads[i]->counters = {};
    pool[i] = std::move(running.threads[i]);
  }
  block = nullptr;
  scheduler = nullptr;
  shared_memory = nullptr;
  if (running.failed) throw Failure(running.failure);
}

Counters counters() {
  return totals;
}
void reset_counters() {
  totals = {};
}

}  // namespace mac_attn::simt
