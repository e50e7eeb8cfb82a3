// Complete: merge the parts, write the output and, if it may be reused, the new entry.
//
//   carried = old on a miss; reused (+) old on a hit without anchors
//   out = carried (+) fresh; by hit_weights on a hit with anchors, which nobody reuses
//   entry p = (q_match, q, carried, anchors, depth)
//   a sink joins `out` and its log-sum-exp, and nothing else
//
// Tasks: (request, KV head). Traffic: two states, one record of the ring read and perhaps one entry written.

template <typename T>
MAC_INLINE void write_row(T* to, const float* a, float wa, const float* b, float wb, int head_dim) {
  for (int d = 0; d < head_dim; d += kLanes) store(to + d, load(a + d) * wa + load(b + d) * wb);
}

// Writes the log-sum-exp that a head answers from that of its tokens; returns their share of it, which is all but
// for a sink.
MAC_INLINE float write_lse(const CompleteParams& p, int request, int head, float lse) {
  const bool has_sink = p.sinks && p.requests.seq_lens[request] != 0;
  const MergeWeights w = has_sink ? merge_weights(lse, p.sinks[head]) : MergeWeights{1.f, 0.f, lse};
  p.lse[static_cast<int64_t>(request) * p.shape.num_qo_heads() + head] = w.lse;
  return w.first;
}

// One query head's output from its carried state; returns the log-sum-exp of its tokens.
template <typename T>
float write_out(const CompleteParams& p, int request, int head, const float* carried, float carried_lse) {
  const int D = p.shape.head_dim, Hq = p.shape.num_qo_heads();
  const int64_t row = static_cast<int64_t>(request) * Hq + head;
  const int64_t fresh_row = static_cast<int64_t>(p.shape.batch) * Hq + row;
  const MergeWeights w = merge_weights(carried_lse, p.state_lse[fresh_row]);
  T* out = static_cast<T*>(p.out) + request * p.out_batch_stride + head * p.out_head_stride;
  const float share = write_lse(p, request, head, w.lse);
  write_row(out, carried, w.first * share, p.states + fresh_row * D, w.second * share, D);
  return w.lse;
}

// One query head's output on a hit with anchors; returns the log-sum-exp of its tokens.
template <typename T>
float write_hit(const CompleteParams& p, int request, int kv_head, int g) {
  const int D = p.shape.head_dim, Hq = p.shape.num_qo_heads(), head = kv_head * p.shape.group_size + g;
  const int64_t slot = p.requests.slots[request], row = static_cast<int64_t>(request) * Hq + head;
  const int64_t fresh_row = static_cast<int64_t>(p.shape.batch) * Hq + row;
  const int place = p.matched.place[row];
  HitWeights w =
      hit_weights(p.ring.lse(slot, kv_head, place)[g], p.state_lse[row], p.log_ratio[row], p.state_lse[fresh_row]);
  const float* entry = p.ring.out(slot, kv_head, place) + static_cast<int64_t>(g) * D;
  const float *replaced = p.states + row * D, *fresh = p.states + fresh_row * D;
  T* out = static_cast<T*>(p.out) + request * p.out_batch_stride + head * p.out_head_stride;
  const float share = write_lse(p, request, head, w.lse);
  w.entry *= share, w.replaced *= share, w.fresh *= share;
  for (int d = 0; d < D; d += kLanes) {
    store(out + d, load(entry + d) * w.entry + load(replaced + d) * w.replaced + load(fresh + d) * w.fresh);
  }
  return w.lse;
}

// What a group carries on: states [G, D] with their lse and depths.
struct Carried {
  float* out;
  float* lse;
  int32_t* depth;
};

MAC_INLINE void carry(const CompleteParams& p, int64_t slot, int kv_head, int64_t row, int g, const Carried& to) {
  const int D = p.shape.head_dim;
  const float *old = p.states + row * D, old_lse = p.state_lse[row];
  float* out = to.out + static_cast<int64_t>(g) * D;
  to.lse[g] = old_lse;
  to.depth[g] = 0;
  if (p.matched.source[row] == kMiss) {
    std::memcpy(out, old, D * sizeof(float));
    return;
  }
  const int place = p.matched.place[row];
  const float reused_lse = p.ring.lse(slot, kv_head, place)[g];
  const MergeWeights w = merge_weights(reused_lse, old_lse);
  write_row(out, p.ring.out(slot, kv_head, place) + static_cast<int64_t>(g) * D, w.first, old, w.second, D);
  to.lse[g] = w.lse;
  to.depth[g] = next_depth(p.ring.depth(slot, kv_head, place)[g]);
}

template <typename T>
void store_entry(const CompleteParams& p, int request, int kv_head, int place, const Carried& carried) {
  const int G = p.shape.group_size, D = p.shape.head_dim, S = p.ring.layout.shape.anchors;
  const int64_t slot = p.requests.slots[request];
  const int64_t group = static_cast<int64_t>(request) * p.shape.num_kv_heads + kv_head;
  const auto copy_rows = [&](const HeadsView& from, T* to) {
    const T* rows = static_cast<const T*>(from.data) + request * from.batch_stride;
    for (int g = 0; g < G; ++g) {
      std::memcpy(to + static_cast<int64_t>(g) * D, rows + (kv_head * G + g) * from.head_stride, D * sizeof(T));
    }
  };
  *p.ring.position(slot, kv_head, place) = p.requests.seq_lens[request] - 1;
  copy_rows(p.query, p.ring.query<T>(slot, kv_head, place));
  std::memcpy(p.ring.out(slot, kv_head, place), carried.out, static_cast<int64_t>(G) * D * sizeof(float));
  std::copy(carried.lse, carried.lse + G, p.ring.lse(slot, kv_head, place));
  std::copy(carried.depth, carried.depth + G, p.ring.depth(slot, kv_head, place));
  if (S == 0) return;
  copy_rows(p.rotated, p.ring.rotated<T>(slot, kv_head, place));
  std::copy(p.anchors + group * S, p.anchors + (group + 1) * S, p.ring.anchors(slot, kv_head, place));
  std::copy(p.anchor_weights + group * S, p.anchor_weights + (group + 1) * S,
            p.ring.anchor_weights(slot, kv_head, place));
}

template <typename T>
void complete_group(const CompleteParams& p, int request, int kv_head, const Carried& carried) {
  const int G = p.shape.group_size, D = p.shape.head_dim, H = p.shape.num_kv_heads;
  const int64_t group = static_cast<int64_t>(request) * H + kv_head;
  const int n = p.requests.seq_lens[request], first = kv_head * G;
  if (!p.matched.source || n == 0 || !has_ring(p.requests, request)) {
    for (int g = 0; g < G; ++g) {
      const int64_t row = group * G + g;
      write_out<T>(p, request, first + g, p.states + row * D, p.state_lse[row]);
    }
    return;
  }
  const int M = p.ring.layout.shape.entries, S = p.ring.layout.shape.anchors;
  const int64_t slot = p.requests.slots[request];
  const int stored = std::max(p.matched.stored[group], 0), sampled = p.sampled[group];
  int hits = 0, start = n, least_depth = INT32_MAX;
  for (int g = 0; g < G; ++g) {
    const int32_t source = p.matched.source[group * G + g];
    float& last_lse = p.ring.last_lse(slot, kv_head)[g];
    if (S > 0 && source != kMiss) {
      last_lse = write_hit<T>(p, request, kv_head, g);
      carried.depth[g] = next_depth(p.ring.depth(slot, kv_head, p.matched.place[group * G + g])[g]);
    } else {
      carry(p, slot, kv_head, group * G + g, g, carried);
      const float* state = carried.out + static_cast<int64_t>(g) * D;
      last_lse = write_out<T>(p, request, first + g, state, carried.lse[g]);
    }
    hits += source != kMiss;
    start = std::min(start, source == kMiss ? 0 : band_start(source, p.band));
    least_depth = std::min(least_depth, carried.depth[g]);
  }
  const int old_end = band_start(n - 1, p.band), size = sample_size(S, old_end);
  const bool drawn = S == 0 || (hits == 0 && sampled >= 0 && sampled <= kCandidateRoom * size);
  const bool stores = old_end > 0 && least_depth < p.max_reuse_depth && drawn;
  if (stores) store_entry<T>(p, request, kv_head, stored % M, carried);
  *p.ring.stored(slot, kv_head) = stores ? next_stored(stored, M) : stored;
  if (p.matched.stored[group] == kNoHistory) *p.ring.spread(slot, kv_head) = 0.f;  // another request's
  if (S > 0) {
    float& tau = *p.ring.tau(slot, kv_head);
    if (p.matched.stored[group] == kNoHistory || !usable_tau(tau)) tau = first_tau(size);
    if (hits == 0 && sampled >= 0) tau = next_tau(tau, sampled, size);
  }

  // Its own part of the slot's counters: tasks of the request's other KV heads count at the same time.
  const auto count = [&](Counter which, int64_t number) {
    __atomic_fetch_add(p.ring.counters(slot) + which, number, __ATOMIC_RELAXED);
  };
  const int anchors = hits > 0 && S > 0 ? sampled : 0;
  count(kKvHeadSteps, 1);
  count(kKvHeadHits, hits == G);
  count(kQueryHeadHits, hits);
  count(kKvTokensRead, n - start + anchors);
  count(kKvTokensFull, n);
  count(kAnchorsRead, anchors);
  count(kEntriesStored, stores);
  if (kv_head > 0) return;
  count(kSteps, 1);
  *p.ring.end(slot) = n;
  *p.ring.request(slot) = p.requests.request_ids ? p.requests.request_ids[request] : -1;
}

template <typename T>
void complete_all(const CompleteParams& p, CompleteWork& work) {
  Scratch& scratch = thread_scratch();
  const int G = p.shape.group_size, H = p.shape.num_kv_heads;
  const Carried carried{scratch.array<float>(0, static_cast<int64_t>(G) * p.shape.head_dim),
                        scratch.array<float>(1, G), scratch.array<int32_t>(2, G)};
  for (int64_t i; (i = work.next.fetch_add(1, std::memory_order_relaxed)) < work.num_tasks;) {
    complete_group<T>(p, static_cast<int>(i / H), static_cast<int>(i % H), carried);
  }
}

void complete(const CompleteParams& p, CompleteWork& work) {
  switch (p.dtype) {
    case DType::kFloat32: return complete_all<float>(p, work);
    case DType::kBFloat16: return complete_all<bfloat16>(p, work);
    case DType::kFloat16: return complete_all<float16>(p, work);
  }
}
