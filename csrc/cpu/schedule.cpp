#include "schedule.h"

#include <algorithm>
#include <numeric>

#include "scratch.h"

namespace mac_attn::cpu {

namespace {

// Work is counted in tokens times KV heads.
constexpr int64_t kMinTask = 512;           // below, the work around a task costs more than the task
constexpr int kTasksPerThread = 24;         // the last one that is drawn ends soon after the others
constexpr int32_t kStep = 2 * kAmendBlock;  // tokens; tasks begin at multiples of it
// Logits kept for choosing anchors that are left in the caches: more are written past them in less time
// (bench/README.md).
constexpr int64_t kCachedLogits = 128 << 10;

// Fills the order of heads of one request: by first token, equal ones by number.
void sort_heads(const AmendParams& p, int request, int32_t* kv_heads, int32_t* qo_heads, int32_t* starts) {
  const int H = p.shape.num_kv_heads, G = p.shape.group_size;
  for (int h = 0; h < H; ++h) {
    int32_t* heads = qo_heads + h * G;
    std::iota(heads, heads + G, h * G);
    if (p.source) {
      std::stable_sort(heads, heads + G, [&](int32_t a, int32_t b) {
        return amend_start(p, request, a) < amend_start(p, request, b);
      });
    }
    for (int g = 0; g < G; ++g) starts[h * G + g] = amend_start(p, request, heads[g]);
  }
  std::iota(kv_heads, kv_heads + H, 0);
  if (p.source) {
    std::stable_sort(kv_heads, kv_heads + H, [&](int32_t a, int32_t b) { return starts[a * G] < starts[b * G]; });
  }
}

}  // namespace

MatchWork::MatchWork(const MatchParams& p, int num_threads) {
  const int64_t groups = static_cast<int64_t>(p.shape.batch) * p.shape.num_kv_heads;
  // A few tasks per thread are enough to balance; more would prune less.
  const int64_t wanted = groups > 0 ? (4 * num_threads + groups - 1) / groups : 1;
  chunk = static_cast<int32_t>(std::max<int64_t>(32, (p.ring.window + wanted - 1) / wanted));
  chunks_per_group = (p.ring.window + chunk - 1) / chunk;
  num_tasks = groups * chunks_per_group;
  decisions_per_group = p.per_head ? p.shape.group_size : 1;
  const int64_t decisions = groups * decisions_per_group;
  best.reset(new std::atomic<uint64_t>[decisions]);
  const uint64_t none = match_key(p.per_head ? 1.f : static_cast<float>(p.shape.group_size), 0);
  for (int64_t i = 0; i < decisions; ++i) best[i].store(none, std::memory_order_relaxed);
}

void MatchWork::write_source(const MatchParams& p) const {
  for (int64_t row = 0; row < static_cast<int64_t>(p.shape.batch) * p.shape.num_qo_heads(); ++row) {
    const int64_t request = row / p.shape.num_qo_heads();
    const int64_t decision = p.per_head ? row : row / p.shape.group_size;
    const int32_t age = static_cast<int32_t>(best[decision].load(std::memory_order_relaxed) & 0xffffffffu);
    p.source[row] = age == 0 ? kMiss : p.requests.seq_lens[request] - 1 - age;
  }
}

AmendWork::AmendWork(const AmendParams& p, int num_threads) {
  const int B = p.shape.batch, H = p.shape.num_kv_heads, G = p.shape.group_size, D = p.shape.head_dim;
  const int Hq = p.shape.num_qo_heads();
  groups.resize(static_cast<size_t>(B) * H);
  kv_heads.resize(groups.size());
  qo_heads.resize(groups.size() * G);
  starts.resize(groups.size() * G);
  int64_t num_logits = 0, num_totals = 0, work = 0;

  for (int b = 0; b < B; ++b) {
    const int32_t n = p.requests.seq_lens[b];
    sort_heads(p, b, &kv_heads[b * H], &qo_heads[b * Hq], &starts[b * Hq]);
    const int32_t old_end = reuses(p, b) && n > 0 ? band_start(n - 1, p.band) : 0;
    for (int h = 0; n > 0 && h < H; ++h) {
      work += n - starts[b * Hq + h * G];
      if (p.num_anchors == 0) continue;
      AmendGroup& group = groups[b * H + h];
      const int32_t source = p.source[(static_cast<int64_t>(b) * H + h) * G];
      if (source == kMiss && old_end > 0) {
        group.logits = num_logits;
        group.totals = num_totals;
        const OldLogits old(nullptr, nullptr, G, old_end);
        num_logits += old.num_logits();
        num_totals += old.num_totals();
      } else if (source != kMiss) {
        const int64_t slot = p.requests.slots[b];
        group.inherited = p.ring_anchors + ((slot * H + h) * p.window + source % p.window) * p.num_anchors;
        group.num_inherited = static_cast<int32_t>(
            std::find(group.inherited, group.inherited + p.num_anchors, kNoAnchor) - group.inherited);
        work += group.num_inherited;
      }
    }
  }

  const int64_t target = std::max(kMinTask, work / (static_cast<int64_t>(num_threads) * kTasksPerThread));
  pending.reset(new std::atomic<int32_t>[B]);
  for (int b = 0; b < B; ++b) {
    first_partial.push_back(static_cast<int64_t>(tasks.size()));
    cut_request(p, b, target);
    pending[b].store(static_cast<int32_t>(tasks.size() - first_partial[b]), std::memory_order_relaxed);
  }
  const int64_t num_partials = static_cast<int64_t>(tasks.size());
  num_drawn_early = num_partials - 3 * num_threads;
  first_partial.push_back(num_partials);
  for (int64_t i = 0; i < num_partials; ++i) {
    tasks[i].partial = i;
    partial_span.push_back(tasks[i].span);
  }

  static thread_local Scratch kept;
  partial_out = kept.array<float>(0, num_partials * Hq * D);
  partial_max = kept.array<float>(1, num_partials * Hq);
  partial_sum = kept.array<float>(2, num_partials * Hq);
  logits = kept.array<float>(3, num_logits);
  logits_cached = num_logits <= kCachedLogits;
  block_totals = kept.array<float>(4, num_totals);
}

// Tasks of some `target` work each. One has either old or fresh tokens.
void AmendWork::cut_request(const AmendParams& p, int request, int64_t target) {
  const int H = p.shape.num_kv_heads, G = p.shape.group_size;
  const int32_t n = p.requests.seq_lens[request];
  if (n == 0) return;
  const int32_t old_end = reuses(p, request) ? band_start(n - 1, p.band) : 0;
  const int32_t* order = &kv_heads[request * H];
  const int32_t* first = &starts[static_cast<size_t>(request) * H * G];

  int64_t work = 0;
  for (int32_t h = 0, begin = 0; h < H; ++h) {
    work += groups[request * H + h].num_inherited;
    if (work >= target || (work > 0 && h == H - 1)) {
      tasks.push_back({request, kFresh, begin, h + 1, true, 0});
      begin = h + 1;
      work = 0;
    }
  }
  work = 0;
  int active = 0;
  int32_t begin = first[order[0] * G];
  for (int32_t at = begin; at < n;) {
    int32_t end = std::min(n, at / kStep * kStep + kStep);
    if (at < old_end) end = std::min(end, old_end);
    while (active < H && first[order[active] * G] < end) ++active;
    work += static_cast<int64_t>(end - at) * active;
    at = end;
    if (work < target && end != old_end && end != n) continue;
    tasks.push_back({request, begin < old_end ? kOld : kFresh, begin, end, false, 0});
    begin = end;
    work = 0;
  }
}

CompleteWork::CompleteWork(const CompleteParams& p)
    : num_tasks(static_cast<int64_t>(p.shape.batch) * p.shape.num_qo_heads()) {}

}  // namespace mac_attn::cpu
