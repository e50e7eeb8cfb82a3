// A launch: its clusters one after another.
#include "machine.h"

namespace mac_attn::simt {

namespace {

Counters totals;

void add(Counters& sum, const Counters& c) {
  sum.async_copy_bytes += c.async_copy_bytes;
  sum.async_zero_bytes += c.async_zero_bytes;
  sum.load_stream_bytes += c.load_stream_bytes;
  sum.load_bytes += c.load_bytes;
  sum.store_bytes += c.store_bytes;
  sum.atomics += c.atomics;
  sum.matrix_products += c.matrix_products;
}

// Threads are kept from launch to launch: a stack, and for TSan a fiber, is not made in no time.
std::unique_ptr<Thread> take_thread(std::vector<std::unique_ptr<Thread>>& pool) {
  if (pool.empty()) {
    auto thread = std::make_unique<Thread>();
    thread->copies.reset(new AsyncCopies);  // not cleared: most of it is never touched
    return thread;
  }
  std::unique_ptr<Thread> thread = std::move(pool.back());
  pool.pop_back();
  return thread;
}

void check(const LaunchConfig& config) {
  const int64_t threads = static_cast<int64_t>(config.block.x) * config.block.y * config.block.z;
  if (threads <= 0 || threads % kLanes != 0 || threads > kLanes * kMaxWarps) {
    throw Failure("a block has 1 to 32 whole warps, this one " + std::to_string(threads) + " threads");
  }
  if (config.cluster < 1 || config.cluster > kMaxBlocks || config.grid.x % config.cluster != 0) {
    throw Failure("a cluster has 1 to 16 blocks and divides grid.x, this one " + std::to_string(config.cluster) +
                  " of " + std::to_string(config.grid.x));
  }
}

// What nobody could see while it happened: writes where no block of the cluster may write.
void check_memory(Cluster& cluster) {
  for (auto& block : cluster.blocks) {
    if (block->shared.open() || cluster.failed) continue;
    cluster.failed = true;
    cluster.failure = block->name() + ": its shared memory was written after it had exited";
  }
  if (!cluster.failed && !static_shared_is_unused()) {
    cluster.failed = true;
    cluster.failure =
        "a kernel of clusters has written to a static __shared__ variable, which all blocks share here";
  }
}

}  // namespace

void Block::reset(const LaunchConfig& config, uint3 index, Random& random) {
  for (int i = 0; i < num_threads; ++i) {
    Thread& t = *threads[i];
    const unsigned x = config.block.x, y = config.block.y, linear = static_cast<unsigned>(i);
    t.thread = {linear % x, linear / x % y, linear / x / y};
    t.Place::block = index;
    t.block_dim = config.block;
    t.grid_dim = config.grid;
    t.lane = i % kLanes;
    t.cluster_rank = rank;
    t.cluster_size = static_cast<int>(config.cluster);
    t.index = i;
    t.home = this;
    t.warp = warps[i / kLanes].get();
    t.waits_for = nullptr;
    t.barrier = -1;
    t.exited = false;
    t.in_cluster_barrier = false;
    t.random = Random(random.next());
    t.copies->count = t.copies->groups = 0;
    t.awake = 0;
  }
  for (auto& warp : warps) warp->arrived = warp->exited = 0;
  for (Barrier& barrier : barriers) barrier = Barrier{};
  started = exited = 0;
  config.cluster == 1 ? shared.fill_with_nan() : shared.close();
}

void Cluster::reset(const LaunchConfig& config, uint3 first_block, Random& random) {
  for (auto& block : blocks) {
    const unsigned x = first_block.x + static_cast<unsigned>(block->rank);
    block->reset(config, {x, first_block.y, first_block.z}, random);
  }
  fill_static_shared_with_nan();
  barrier = ClusterBarrier{};
  waiting = exited = 0;
}

void launch(const LaunchConfig& config, void (*body)(const void*), const void* context) {
  check(config);
  static std::vector<std::unique_ptr<Thread>> pool;
  const int threads = static_cast<int>(config.block.x * config.block.y * config.block.z);
  Random random(config.seed);
  Cluster cluster;
  cluster.body = body;
  cluster.context = context;
  cluster.num_threads = threads * static_cast<int>(config.cluster);
  for (unsigned rank = 0; rank < config.cluster; ++rank) {
    auto block = std::make_unique<Block>(config);
    block->rank = static_cast<int>(rank);
    block->num_threads = threads;
    for (int i = 0; i < threads; ++i) block->threads.push_back(take_thread(pool));
    for (int i = 0; i < threads / kLanes; ++i) block->warps.push_back(std::make_unique<Warp>());
    cluster.blocks.push_back(std::move(block));
  }
  const std::unique_ptr<Scheduler> scheduler =
      config.engine == Engine::kFibers ? make_fiber_scheduler(config.seed) : make_thread_scheduler();

  const unsigned x = config.grid.x / config.cluster, y = config.grid.y;
  std::vector<uint32_t> order(static_cast<size_t>(x) * y * config.grid.z);
  for (uint32_t i = 0; i < order.size(); ++i) order[i] = i;
  for (uint32_t i = static_cast<uint32_t>(order.size()); config.seed != 0 && i > 1; --i) {
    const uint32_t j = random.below(i), other = order[j];
    order[j] = order[i - 1];
    order[i - 1] = other;
  }
  for (uint32_t linear : order) {
    cluster.reset(config, {linear % x * config.cluster, linear / x % y, linear / x / y}, random);
    run_cluster(cluster, *scheduler);
    if (config.cluster > 1) check_memory(cluster);
    if (cluster.failed) break;
  }
  // The first to be taken lies last.
  for (size_t b = cluster.blocks.size(); b-- > 0;) {
    auto& used = cluster.blocks[b]->threads;
    for (size_t i = used.size(); i-- > 0;) {
      add(totals, used[i]->counters);
      used[i]->counters = {};
      pool.push_back(std::move(used[i]));
    }
  }
  if (cluster.failed) throw Failure(cluster.failure);
}

Counters counters() {
  return totals;
}
void reset_counters() {
  totals = {};
}

}  // namespace mac_attn::simt
