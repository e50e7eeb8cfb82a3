#include "schedule.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "scratch.h"

namespace mac_attn::cpu {

namespace {

// Work is counted in tokens times KV heads.
constexpr int64_t kMinTask = 512;           // below, the work around a task costs more than the task
constexpr int kTasksPerThread = 24;         // the last one that is drawn ends soon after the others
constexpr int kTasksAlone = 48;             // of a request that is cut up the same way in any company
constexpr int kWidestVector = 16;           // floats
constexpr int32_t kStep = 2 * kAmendBlock;  // tokens; tasks begin at multiples of it

// Orders items by their first tokens, equal ones as they are, and writes those down. `sorts`: they may differ.
template <typename Start>
void sort_by_start(int32_t* items, int32_t* starts, int count, bool sorts, const Start& start) {
  if (sorts) std::stable_sort(items, items + count, [&](int32_t a, int32_t b) { return start(a) < start(b); });
  for (int i = 0; i < count; ++i) starts[i] = start(items[i]);
}

}  // namespace

int32_t stored_entries(const MatchParams& p, int32_t request, int32_t kv_head) {
  if (p.requests.seq_lens[request] == 0 || p.requests.slots[request] == kNoSlot) return kNoHistory;
  const int32_t position = first_position(p.shape, p.requests, request);
  const int64_t slot = p.requests.slots[request];
  const int64_t id = p.requests.request_ids ? p.requests.request_ids[request] : -1;
  if (!goes_on(p.ring, slot, position) || *p.ring.request(slot) != id) return kNoHistory;
  const int32_t stored = *p.ring.stored(slot, kv_head);
  return stored >= 0 && stored < 2 * int64_t{p.ring.layout.shape.entries} ? stored : kNoHistory;
}

MatchWork::MatchWork(const MatchParams& p, int num_threads) {
  const int64_t groups = static_cast<int64_t>(p.shape.batch) * p.shape.num_kv_heads * p.shape.tokens;
  const int32_t entries = p.ring.layout.shape.entries;
  // A few tasks per thread are enough to balance; more would prune less.
  const int64_t wanted = groups > 0 ? (4 * num_threads + groups - 1) / groups : 1;
  chunk = static_cast<int32_t>(std::max<int64_t>(32, (entries + wanted - 1) / wanted));
  chunks_per_token = (entries + chunk - 1) / chunk;
  num_tasks = groups * chunks_per_token;
  decisions_per_group = p.per_head ? p.shape.group_size : 1;
  const int64_t decisions = groups * decisions_per_group;
  best.reset(new std::atomic<uint64_t>[decisions]);
  const uint64_t none = match_key(p.per_head ? 1.f : static_cast<float>(p.shape.group_size), 0);
  for (int64_t i = 0; i < decisions; ++i) best[i].store(none, std::memory_order_relaxed);
}

void MatchWork::write_matched(const MatchParams& p) const {
  const int32_t H = p.shape.num_kv_heads, G = p.shape.group_size, T = p.shape.tokens;
  for (int32_t group = 0; group < p.shape.batch * H; ++group) {
    const int32_t request = group / H, kv_head = group % H, stored = stored_entries(p, request, kv_head);
    const int32_t tokens = p.requests.seq_lens[request] == 0 ? 0 : query_len(p.shape, p.requests, request);
    p.matched.stored[group] = stored;
    const auto age_of = [&](int32_t token, int32_t g) {
      const int64_t first = (int64_t{group} * T + token) * decisions_per_group;
      return static_cast<int32_t>(best[first + (p.per_head ? g : 0)].load(std::memory_order_relaxed) & 0xffffffffu);
    };
    for (int32_t g = 0; g < G; ++g) {
      // With all tokens or with none.
      bool hits = true;
      for (int32_t token = 0; token < tokens; ++token) hits &= age_of(token, g) != 0;
      for (int32_t token = 0; token < T; ++token) {
        const int64_t row = (int64_t{group} * T + token) * G + g;
        const bool reuses = hits && token < tokens;
        const int32_t place = reuses ? place_of(stored, age_of(token, g), p.ring.layout.shape.entries) : kMiss;
        p.matched.place[row] = place;
        p.matched.source[row] = reuses ? *p.ring.position(p.requests.slots[request], kv_head, place) : kMiss;
      }
    }
  }
}

AmendWork::AmendWork(const AmendParams& p, int num_threads) {
  const int B = p.shape.batch, H = p.shape.num_kv_heads, G = p.shape.group_size, V = p.shape.head_dim_v;
  const int T = p.shape.tokens, Q = p.shape.num_queries();
  const int64_t room = static_cast<int64_t>(kCandidateRoom) * p.num_anchors;
  groups.resize(static_cast<size_t>(B) * H);
  hits.resize(groups.size() * T);
  kv_heads.resize(groups.size());
  kv_starts.resize(groups.size());
  queries.resize(static_cast<size_t>(B) * Q);
  starts.resize(queries.size());
  num_candidates.reset(new std::atomic<int32_t>[groups.size()]);
  int64_t num_drawing = 0;
  std::vector<int64_t> work(B);

  for (int b = 0; b < B; ++b) {
    const int32_t n = p.requests.seq_lens[b];
    for (int h = 0; h < H; ++h) num_candidates[b * H + h].store(0, std::memory_order_relaxed);
    if (n == 0) continue;
    const int32_t tokens = query_len(p.shape, p.requests, b), position = first_position(p.shape, p.requests, b);
    sort_request(p, b);
    for (int h = 0; h < H; ++h) {
      AmendGroup& group = groups[b * H + h];
      work[b] += n - kv_starts[b * H + h];
      if (p.num_anchors == 0 || !reuses(p, b)) continue;
      const int64_t slot = p.requests.slots[b], first = (static_cast<int64_t>(b) * H + h) * T;
      if (p.matched.source[first * G] != kMiss) {
        for (int64_t i = first; i < first + tokens; ++i) {
          const int32_t place = p.matched.place[i * G], source = p.matched.source[i * G];
          AmendHit& hit = hits[i];
          hit.anchors = p.ring.anchors(slot, h, place);
          hit.anchor_weights = p.ring.anchor_weights(slot, h, place);
          hit.num_anchors = num_anchors(hit.anchors, p.num_anchors);
          hit.density = sample_density(p.num_anchors, band_start(source, p.band));
          work[b] += 2 * hit.num_anchors;
        }
        continue;
      }
      const float* last_lse = p.ring.last_lse(slot, h);
      const float tau = *p.ring.tau(slot, h);
      const bool known = std::all_of(last_lse, last_lse + G, [](float lse) { return std::isfinite(lse); });
      if (p.matched.stored[b * H + h] == kNoHistory || band_start(position, p.band) == 0 || !known ||
          !usable_tau(tau) || !draws_sample(*p.ring.missed(slot, h))) {
        continue;
      }
      group.candidates = num_drawing++ * room;
      group.last_lse = last_lse;
      group.tau = tau;
      group.seed = sample_seed(position, h, p.layer);
    }
  }

  const int64_t all_work = std::accumulate(work.begin(), work.end(), int64_t{0});
  const int64_t most_tasks = int64_t{num_threads} * kTasksPerThread;
  pending.reset(new std::atomic<int32_t>[B]);
  for (int b = 0; b < B; ++b) {
    first_partial.push_back(static_cast<int64_t>(partial_tokens.size()));
    const size_t first_task = tasks.size();
    const int64_t target = p.batch_invariant ? work[b] / kTasksAlone : all_work / most_tasks;
    cut_request(p, b, std::max(kMinTask, target));
    pending[b].store(static_cast<int32_t>(tasks.size() - first_task), std::memory_order_relaxed);
  }
  num_drawn_early = static_cast<int64_t>(tasks.size()) - 3 * num_threads;
  const int64_t num_partials = static_cast<int64_t>(partial_tokens.size());
  first_partial.push_back(num_partials);

  static thread_local Scratch kept;
  const int64_t states = num_partials * p.shape.num_queries();
  partial_out = kept.array<float>(0, states * V);
  partial_max = kept.array<float>(1, states);
  partial_sum = kept.array<float>(2, states);
  partial_light = kept.array<float>(3, states);
  // Read in whole vectors.
  candidate_tokens = kept.array<int32_t>(4, num_drawing * room + kWidestVector);
  candidate_weights = kept.array<float>(5, num_drawing * room + kWidestVector);
}

// Fills the order of a request's heads.
void AmendWork::sort_request(const AmendParams& p, int request) {
  const int H = p.shape.num_kv_heads, G = p.shape.group_size, Q = p.shape.num_queries();
  const int T = p.shape.tokens, tokens = query_len(p.shape, p.requests, request);
  const bool sorts = reuses(p, request);
  int32_t* all = &queries[static_cast<size_t>(request) * Q];
  int32_t* first = &starts[static_cast<size_t>(request) * Q];
  std::iota(all, all + Q, 0);
  const auto start_of_query = [&](int32_t query) { return amend_start(p, request, query); };
  for (int i = 0; i < Q; i += G) sort_by_start(all + i, first + i, G, sorts, start_of_query);
  int32_t* heads = &kv_heads[static_cast<size_t>(request) * H];
  std::iota(heads, heads + H, 0);
  const auto start_of_head = [&](int32_t head) {
    int32_t start = INT32_MAX;
    for (int t = 0; t < tokens; ++t) start = std::min(start, first[(head * T + t) * G]);
    return start;
  };
  sort_by_start(heads, &kv_starts[static_cast<size_t>(request) * H], H, sorts, start_of_head);
}

// Tasks of some `target` work each. One has either old or recent tokens, or anchors.
void AmendWork::cut_request(const AmendParams& p, int request, int64_t target) {
  const int H = p.shape.num_kv_heads, T = p.shape.tokens;
  const int64_t S = p.num_anchors;
  const int32_t n = p.requests.seq_lens[request];
  if (n == 0) return;
  const int32_t old_end = reuses(p, request) ? band_start(first_position(p.shape, p.requests, request), p.band) : 0;
  const int32_t* first = &kv_starts[static_cast<size_t>(request) * H];
  const auto add = [&](Tokens kind, int64_t begin, int64_t end) {
    tasks.push_back({request, kind, begin, end, static_cast<int64_t>(partial_tokens.size())});
    partial_tokens.push_back(kind);
    if (kind == Tokens::kAnchors) partial_tokens.push_back(Tokens::kReplaced);
  };

  int64_t work = 0;
  int64_t anchors_begin = 0;
  for (int32_t list = 0; list < H * T; ++list) {
    const int32_t count = hits[static_cast<size_t>(request) * H * T + list].num_anchors;
    for (int32_t i = 0; i < count;) {
      const int32_t taken = static_cast<int32_t>(std::min<int64_t>(count - i, (target - work + 1) / 2));
      i += taken;
      work += 2 * taken;
      if (work < target) continue;
      add(Tokens::kAnchors, anchors_begin, list * S + i);
      anchors_begin = list * S + i;
      work = 0;
    }
  }
  if (work > 0) add(Tokens::kAnchors, anchors_begin, H * T * S);
  work = 0;
  int active = 0;
  int32_t begin = first[0];
  for (int32_t at = begin; at < n;) {
    int32_t end = std::min(n, at / kStep * kStep + kStep);
    if (at < old_end) end = std::min(end, old_end);
    while (active < H && first[active] < end) ++active;
    work += static_cast<int64_t>(end - at) * active;
    at = end;
    if (work < target && end != old_end && end != n) continue;
    add(begin < old_end ? Tokens::kOld : Tokens::kRecent, begin, end);
    begin = end;
    work = 0;
  }
}

CompleteWork::CompleteWork(const CompleteParams& p)
    : num_tasks(static_cast<int64_t>(p.shape.batch) * p.shape.num_kv_heads) {}

}  // namespace mac_attn::cpu
