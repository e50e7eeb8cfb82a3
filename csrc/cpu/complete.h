// Complete: merge the parts, write the output and, if it may be reused, the new entry.
//
//   carried = old on a miss; reused (+) old on a hit without anchors
//   out = carried (+) fresh; by hit_weights on a hit with anchors, which nobody reuses
//   entry p = (q_match, q, carried, anchors, depth)
//   a sink joins `out` and its log-sum-exp, and nothing else
//
// Tasks: (request, KV head). Traffic: two states, one record of the ring read and perhaps one entry written.

template <typename T>
MAC_INLINE void write_row(T* to, const float* a, float wa, const float* b, float wb, int head_dim_v) {
  for (int d = 0; d < head_dim_v; d += kLanes) store(to + d, load(a + d) * wa + load(b + d) * wb);
}

// One query of the call: a token's head `g` of its KV head.
struct Query {
  int request, kv_head, token, g;

  int head(const Shape& shape) const { return kv_head * shape.group_size + g; }
  // In what match answered.
  int64_t row(const Shape& shape) const {
    const int64_t group = int64_t{request} * shape.num_kv_heads + kv_head;
    return (group * shape.tokens + token) * shape.group_size + g;
  }
  // In amend's states, of either span.
  int64_t row(const Shape& shape, Span span) const {
    return int64_t{span} * shape.batch * shape.num_queries() + row(shape);
  }
};

template <typename T>
MAC_INLINE T* out_of(const CompleteParams& p, const Query& q) {
  return static_cast<T*>(p.out) + q.request * p.out_batch_stride + q.token * p.out_token_stride +
         q.head(p.shape) * p.out_head_stride;
}

// Writes the log-sum-exp that a query answers from that of its tokens; returns their share of it, which is all but
// for a sink.
MAC_INLINE float write_lse(const CompleteParams& p, const Query& q, float lse) {
  const int head = q.head(p.shape);
  const bool attends = p.requests.seq_lens[q.request] != 0 && q.token < query_len(p.shape, p.requests, q.request);
  const MergeWeights w = p.sinks && attends ? merge_weights(lse, p.sinks[head]) : MergeWeights{1.f, 0.f, lse};
  p.lse[(int64_t{q.request} * p.shape.tokens + q.token) * p.shape.num_qo_heads() + head] = w.lse;
  return w.first;
}

// A query's output from its carried state; returns the log-sum-exp of its tokens.
template <typename T>
float write_out(const CompleteParams& p, const Query& q, const float* carried, float carried_lse) {
  const int V = p.shape.head_dim_v;
  const int64_t fresh_row = q.row(p.shape, kFresh);
  const MergeWeights w = merge_weights(carried_lse, p.state_lse[fresh_row]);
  const float share = write_lse(p, q, w.lse);
  write_row(out_of<T>(p, q), carried, w.first * share, p.states + fresh_row * V, w.second * share, V);
  return w.lse;
}

// The same of one that reuses nothing.
template <typename T>
float write_miss(const CompleteParams& p, const Query& q) {
  const int64_t row = q.row(p.shape, kOld);
  return write_out<T>(p, q, p.states + row * p.shape.head_dim_v, p.state_lse[row]);
}

// The same on a hit with anchors.
template <typename T>
float write_hit(const CompleteParams& p, const Query& q) {
  const int V = p.shape.head_dim_v;
  const int64_t slot = p.requests.slots[q.request], row = q.row(p.shape, kOld), fresh_row = q.row(p.shape, kFresh);
  const int place = p.matched.place[q.row(p.shape)];
  HitWeights w = hit_weights(p.ring.lse(slot, q.kv_head, place)[q.g], p.state_lse[row], p.log_ratio[q.row(p.shape)],
                             p.state_lse[fresh_row]);
  const float* entry = p.ring.out(slot, q.kv_head, place) + int64_t{q.g} * V;
  const float *replaced = p.states + row * V, *fresh = p.states + fresh_row * V;
  T* out = out_of<T>(p, q);
  const float share = write_lse(p, q, w.lse);
  w.entry *= share, w.replaced *= share, w.fresh *= share;
  for (int d = 0; d < V; d += kLanes) {
    store(out + d, load(entry + d) * w.entry + load(replaced + d) * w.replaced + load(fresh + d) * w.fresh);
  }
  return w.lse;
}

// What the heads of a query token carry on: states [G, V] with their lse and depths.
struct Carried {
  float* out;
  float* lse;
  int32_t* depth;
};

MAC_INLINE void carry(const CompleteParams& p, int64_t slot, const Query& q, const Carried& to) {
  const int V = p.shape.head_dim_v, kv_head = q.kv_head, g = q.g;
  const int64_t row = q.row(p.shape, kOld), matched = q.row(p.shape);
  const float *old = p.states + row * V, old_lse = p.state_lse[row];
  float* out = to.out + static_cast<int64_t>(g) * V;
  to.lse[g] = old_lse;
  to.depth[g] = 0;
  if (p.matched.source[matched] == kMiss) {
    std::memcpy(out, old, V * sizeof(float));
    return;
  }
  const int place = p.matched.place[matched];
  const float reused_lse = p.ring.lse(slot, kv_head, place)[g];
  const MergeWeights w = merge_weights(reused_lse, old_lse);
  write_row(out, p.ring.out(slot, kv_head, place) + static_cast<int64_t>(g) * V, w.first, old, w.second, V);
  to.lse[g] = w.lse;
  to.depth[g] = next_depth(p.ring.depth(slot, kv_head, place)[g]);
}

// A query's output in a call with reuse, and what it carries on; returns the log-sum-exp of its tokens. A hit with
// anchors carries nothing on but its depth.
template <typename T>
float answer(const CompleteParams& p, int64_t slot, const Query& q, const Carried& carried) {
  const int64_t row = q.row(p.shape);
  if (p.ring.layout.shape.anchors == 0 || p.matched.source[row] == kMiss) {
    carry(p, slot, q, carried);
    return write_out<T>(p, q, carried.out + int64_t{q.g} * p.shape.head_dim_v, carried.lse[q.g]);
  }
  carried.depth[q.g] = next_depth(p.ring.depth(slot, q.kv_head, p.matched.place[row])[q.g]);
  return write_hit<T>(p, q);
}

template <typename T>
void store_entry(const CompleteParams& p, int request, int kv_head, int place, const Carried& carried) {
  const int G = p.shape.group_size, D = p.shape.head_dim, V = p.shape.head_dim_v, S = p.ring.layout.shape.anchors;
  const int64_t slot = p.requests.slots[request];
  const int64_t group = static_cast<int64_t>(request) * p.shape.num_kv_heads + kv_head;
  const auto copy_rows = [&](const HeadsView& from, T* to) {
    const T* rows = static_cast<const T*>(from.data) + request * from.batch_stride;
    for (int g = 0; g < G; ++g) {
      std::memcpy(to + static_cast<int64_t>(g) * D, rows + (kv_head * G + g) * from.head_stride, D * sizeof(T));
    }
  };
  *p.ring.position(slot, kv_head, place) = first_position(p.shape, p.requests, request);
  copy_rows(p.query, p.ring.query<T>(slot, kv_head, place));
  std::memcpy(p.ring.out(slot, kv_head, place), carried.out, static_cast<int64_t>(G) * V * sizeof(float));
  std::copy(carried.lse, carried.lse + G, p.ring.lse(slot, kv_head, place));
  std::copy(carried.depth, carried.depth + G, p.ring.depth(slot, kv_head, place));
  if (S == 0) return;
  copy_rows(p.rotated, p.ring.rotated<T>(slot, kv_head, place));
  std::copy(p.anchors + group * S, p.anchors + (group + 1) * S, p.ring.anchors(slot, kv_head, place));
  std::copy(p.anchor_weights + group * S, p.anchor_weights + (group + 1) * S,
            p.ring.anchor_weights(slot, kv_head, place));
}

// How far the keys of a KV head spread, see `drift_bound`; 0: not known. `parts`: [2, D] for sums.
template <typename T>
float key_spread(const CompleteParams& p, int request, int kv_head, float* parts) {
  const int D = p.shape.head_dim, n = p.requests.seq_lens[request];
  if (!p.kv.k || n < kSpreadKeys) return 0.f;
  const int32_t* pages = p.kv.block_table + request * p.kv.block_table_stride;
  const T* keys = static_cast<const T*>(p.kv.k) + kv_head * p.kv.k_head_stride;
  const auto row = [&](int i) {
    const int token = spread_key(i, n);
    // A step that hits has not looked at every page.
    const int page = std::min(std::max(pages[token / p.kv.page_size], 0), p.kv.num_pages - 1);
    return keys + page * p.kv.k_page_stride + token % p.kv.page_size * p.kv.k_token_stride;
  };
  float *sum = parts, *squares = parts + D;
  std::fill(parts, parts + 2 * D, 0.f);
  const T* first = row(0);
  for (int i = 1; i < kSpreadKeys; ++i) {
    const T* key = row(i);
    for (int d = 0; d < D; d += kLanes) {  // from the first key, as means may be far from 0
      const vf x = load(key + d) - load(first + d);
      store(sum + d, load(sum + d) + x);
      store(squares + d, load(squares + d) + x * x);
    }
  }
  vf variance{};
  for (int d = 0; d < D; d += kLanes) {
    const vf mean = load(sum + d) * (1.f / kSpreadKeys);
    variance += load(squares + d) * (1.f / kSpreadKeys) - mean * mean;
  }
  const float unit = p.sm_scale * p.kv.k_scale.of(kv_head) * kUnit<T>;
  return hsum(variance) / static_cast<float>(D) * unit * unit;
}

template <typename T>
void complete_group(const CompleteParams& p, int request, int kv_head, const Carried& carried) {
  const int G = p.shape.group_size, H = p.shape.num_kv_heads, T_ = p.shape.tokens;
  const int64_t group = static_cast<int64_t>(request) * H + kv_head;
  const int n = p.requests.seq_lens[request];
  if (!p.matched.source || n == 0 || !has_ring(p.requests, request)) {
    for (int i = 0; i < T_ * G; ++i) write_miss<T>(p, {request, kv_head, i / G, i % G});
    return;
  }
  const int tokens = query_len(p.shape, p.requests, request), position = n - tokens;
  const int M = p.ring.layout.shape.entries, S = p.ring.layout.shape.anchors;
  const int64_t slot = p.requests.slots[request];
  const int stored = std::max(p.matched.stored[group], 0);
  const int32_t* sampled = p.sampled + group * T_;
  int hits = 0, least_depth = INT32_MAX;
  int64_t read = 0, anchors = 0;
  // The first token comes last, so that what it carries on is left, to be stored.
  for (int token = T_ - 1; token >= 0; --token) {
    int start = n;
    for (int g = 0; g < G; ++g) {
      const Query q{request, kv_head, token, g};
      const int32_t source = p.matched.source[q.row(p.shape)];
      const float lse = answer<T>(p, slot, q, carried);
      start = std::min(start, source == kMiss ? 0 : band_start(source, p.band));
      if (token > 0) continue;
      p.ring.last_lse(slot, kv_head)[g] = lse;
      hits += source != kMiss;
      least_depth = std::min(least_depth, carried.depth[g]);
    }
    if (token < tokens) read += position + token + 1 - start;
    if (S > 0 && token < tokens && p.matched.source[(group * T_ + token) * G] != kMiss) anchors += sampled[token];
  }
  const int old_end = band_start(position, p.band), size = sample_size(S, old_end);
  const bool drawn = S == 0 || (hits == 0 && *sampled >= 0 && *sampled <= kCandidateRoom * size);
  const bool stores = old_end > 0 && least_depth < p.max_reuse_depth && drawn;
  if (stores) store_entry<T>(p, request, kv_head, stored % M, carried);
  *p.ring.stored(slot, kv_head) = stores ? next_stored(stored, M) : stored;
  if (measures_spread(n, tokens, p.matched.stored[group] == kNoHistory)) {
    float* parts = thread_scratch().array<float>(3, 2 * int64_t{p.shape.head_dim});
    *p.ring.spread(slot, kv_head) =
        p.kv.float8 ? key_spread<float8>(p, request, kv_head, parts) : key_spread<T>(p, request, kv_head, parts);
  }
  if (S > 0) {
    int32_t& missed = *p.ring.missed(slot, kv_head);
    missed = hits > 0 ? 0 : next_missed(p.matched.stored[group] == kNoHistory ? 0 : missed);
    float& tau = *p.ring.tau(slot, kv_head);
    if (p.matched.stored[group] == kNoHistory || !usable_tau(tau)) tau = first_tau(size);
    if (hits == 0 && *sampled >= 0) tau = next_tau(tau, *sampled, size);
  }

  // Its own part of the slot's counters: tasks of the request's other KV heads count at the same time.
  const auto count = [&](Counter which, int64_t number) {
    __atomic_fetch_add(p.ring.counters(slot) + which, number, __ATOMIC_RELAXED);
  };
  count(kKvHeadSteps, tokens);
  count(kKvHeadHits, hits == G ? tokens : 0);
  count(kQueryHeadHits, int64_t{hits} * tokens);
  // All tokens that miss read the same.
  count(kKvTokensRead, hits == G ? read + anchors : n);
  count(kKvTokensFull, tokens_of_steps(n, tokens));
  count(kAnchorsRead, anchors);
  count(kEntriesStored, stores);
  if (kv_head > 0) return;
  count(kSteps, tokens);
  *p.ring.end(slot) = position + 1;
  *p.ring.reach(slot) = n;
  *p.ring.request(slot) = p.requests.request_ids ? p.requests.request_ids[request] : -1;
}

template <typename T>
void complete_all(const CompleteParams& p, CompleteWork& work) {
  Scratch& scratch = thread_scratch();
  const int G = p.shape.group_size, H = p.shape.num_kv_heads;
  const Carried carried{scratch.array<float>(0, static_cast<int64_t>(G) * p.shape.head_dim_v),
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
