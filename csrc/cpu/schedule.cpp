#include "schedule.h"

#include <algorithm>

namespace mac_attn::cpu {

namespace {

constexpr int32_t kMinTask = 64;   // tokens; below, the work around a task costs more than the task
constexpr int32_t kMaxTask = 512;  // K and V of all heads for this many tokens still fit the caches
constexpr int kTasksPerThread = 8;

// The first token of every query head of a request.
void starts_of(const AmendParams& p, int request, std::vector<int32_t>& starts) {
  for (int head = 0; head < p.shape.num_qo_heads(); ++head) starts[head] = amend_start(p, request, head);
}

int32_t task_length(const AmendParams& p, int num_threads) {
  int64_t tokens = 0;
  std::vector<int32_t> starts(p.shape.num_qo_heads());
  for (int b = 0; b < p.shape.batch; ++b) {
    starts_of(p, b, starts);
    for (int h = 0; h < p.shape.num_kv_heads; ++h) {
      const auto first = starts.begin() + h * p.shape.group_size;
      tokens += p.requests.seq_lens[b] - *std::min_element(first, first + p.shape.group_size);
    }
  }
  const int64_t even = tokens / (static_cast<int64_t>(num_threads) * kTasksPerThread);
  return static_cast<int32_t>(std::clamp<int64_t>(even / kMinTask * kMinTask, kMinTask, kMaxTask));
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
  const int H = p.shape.num_kv_heads, G = p.shape.group_size, D = p.shape.head_dim;
  const int32_t length = task_length(p, num_threads);
  groups.resize(static_cast<size_t>(p.shape.batch) * H);
  std::vector<int32_t> starts(p.shape.num_qo_heads()), low(H);
  int64_t num_logits = 0;

  for (int b = 0; b < p.shape.batch; ++b) {
    const int32_t n = p.requests.seq_lens[b];
    const int32_t old_end = p.source && n > 0 ? band_start(n - 1, p.band) : 0;
    starts_of(p, b, starts);
    for (int h = 0; h < H; ++h) {
      const auto first = starts.begin() + h * G;
      low[h] = *std::min_element(first, first + G);
      AmendGroup& group = groups[b * H + h];
      const int32_t source = p.source ? p.source[(static_cast<int64_t>(b) * H + h) * G] : kMiss;
      if (n == 0) {
        // A task without tokens, so that somebody writes the empty state.
        tasks.push_back({b * H + h, kFresh, 0, 0, false, 0});
      } else if (p.num_anchors > 0 && source == kMiss && old_end > 0) {
        group.logits = num_logits;
        num_logits += static_cast<int64_t>(G) * old_end;
      } else if (p.num_anchors > 0 && source != kMiss) {
        const int64_t slot = p.requests.slots[b];
        group.inherited = p.ring_anchors + ((slot * H + h) * p.window + source % p.window) * p.num_anchors;
        group.num_inherited = static_cast<int32_t>(
            std::find(group.inherited, group.inherited + p.num_anchors, kNoAnchor) - group.inherited);
        for (int32_t i = 0; i < group.num_inherited; i += length) {
          tasks.push_back({b * H + h, kFresh, i, std::min(i + length, group.num_inherited), true, 0});
        }
      }
    }
    // The KV heads of the same tokens follow one another: their rows are neighbours in memory.
    const int32_t lowest = *std::min_element(low.begin(), low.end());
    for (int32_t chunk = lowest / length * length; chunk < n; chunk += length) {
      for (int h = 0; h < H; ++h) {
        const int32_t end = std::min(n, chunk + length);
        for (int32_t begin = std::max(low[h], chunk); begin < end;) {
          // Cut where the band begins and where a query head comes in, so that a task has one span
          // and whole heads.
          int32_t cut = begin < old_end ? std::min(end, old_end) : end;
          for (int g = 0; g < G; ++g) {
            if (starts[h * G + g] > begin) cut = std::min(cut, starts[h * G + g]);
          }
          tasks.push_back({b * H + h, begin < old_end ? kOld : kFresh, begin, cut, false, 0});
          begin = cut;
        }
      }
    }
  }

  for (const AmendTask& task : tasks) ++groups[task.group].num_partials;
  pending.reset(new std::atomic<int32_t>[groups.size()]);
  int64_t num_partials = 0;
  for (size_t i = 0; i < groups.size(); ++i) {
    groups[i].first_partial = num_partials;
    num_partials += groups[i].num_partials;
    pending[i].store(groups[i].num_partials, std::memory_order_relaxed);
  }
  std::vector<int64_t> place(groups.size());
  partial_span.resize(num_partials);
  for (AmendTask& task : tasks) {
    task.partial = groups[task.group].first_partial + place[task.group]++;
    partial_span[task.partial] = task.span;
  }
  partial_out.reset(new float[num_partials * G * D]);
  partial_max.reset(new float[num_partials * G]);
  partial_sum.reset(new float[num_partials * G]);
  if (num_logits > 0) logits.reset(new float[num_logits]);
}

CompleteWork::CompleteWork(const CompleteParams& p)
    : num_tasks(static_cast<int64_t>(p.shape.batch) * p.shape.num_qo_heads()) {}

}  // namespace mac_attn::cpu
