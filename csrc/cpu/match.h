// Match: for every decision, the stored query with the smallest score.
//
//   d2_h(c) = |q_h - ring_query_h(c)|^2,   score(c) = mean over the group of d2_h / theta_h
//   (granularity "head": every head alone);  a hit is a score below 1, a tie goes to the newest.
//   Each query token of a step looks for itself; what only some of them find is no hit, see write_matched.
//   Below, `total` is the sum where the formula has the mean: a hit is a total below the group size.
//
// Tasks: (request, KV head, query token, chunk of candidates). Traffic: with group decisions half a row of every
// candidate; partial sums only grow, so a candidate is left as soon as it cannot win, which skips most of the rest.

template <typename T>
MAC_INLINE float squared_distance(const float* query, const T* row, int head_dim) {
  vf sum = vf{};
  for (int d = 0; d < head_dim; d += kLanes) {
    const vf difference = load(query + d) - load(row + d);
    sum += difference * difference;
  }
  return hsum(sum);
}

// Of four rows at a time.
template <typename T>
MAC_INLINE void squared_distances(const float* query, const T* const* rows, int head_dim, float* distances) {
  vf sum[4] = {};
  for (int d = 0; d < head_dim; d += kLanes) {
    const vf q = load(query + d);
    for (int i = 0; i < 4; ++i) {
      const vf difference = q - load(rows[i] + d);
      sum[i] += difference * difference;
    }
  }
  hsum4(sum[0], sum[1], sum[2], sum[3], distances);
}

// A NaN is not below.
MAC_INLINE bool any_below(const float (&values)[4], float limit) {
  return values[0] <= limit || values[1] <= limit || values[2] <= limit || values[3] <= limit;
}

constexpr int kFetchAge = 24;  // how many candidates ahead rows are fetched
// A part of a distance may exceed the whole by rounding, in a sum of another order: 512 * 2^-24 at most.
constexpr float kRoundingMargin = 1.f - 4e-5f;

// theta of a head, or NaN when it can never hit (theta 0 or not finite, query not finite).
MAC_INLINE float usable_threshold(const MatchParams& p, const float* query, int head, float spread) {
  const int head_dim = p.shape.head_dim;
  vf sum = vf{};
  for (int d = 0; d < head_dim; d += kLanes) sum += load(query + d) * load(query + d);
  const float norm = hsum(sum);
  float theta = p.relative ? p.threshold[head] * norm : p.threshold[head];
  if (p.max_drift > 0.f) theta = std::min(theta, drift_bound(p.max_drift, spread, norm));
  const bool usable = std::isfinite(norm) && std::isfinite(theta) && theta > 0.f;
  return usable ? theta : std::numeric_limits<float>::quiet_NaN();
}

MAC_INLINE void keep_smaller(std::atomic<uint64_t>& best, uint64_t key) {
  uint64_t seen = best.load(std::memory_order_relaxed);
  while (key < seen && !best.compare_exchange_weak(seen, key, std::memory_order_relaxed)) {
  }
}

template <typename T>
void match_task(const MatchParams& p, MatchWork& work, int64_t task, float* query, float* theta) {
  const int G = p.shape.group_size, D = p.shape.head_dim, M = p.ring.layout.shape.entries;
  const int64_t searcher = task / work.chunks_per_token, group = searcher / p.shape.tokens;
  const int chunk = static_cast<int>(task % work.chunks_per_token);
  const int token = static_cast<int>(searcher % p.shape.tokens);
  const int request = static_cast<int>(group / p.shape.num_kv_heads);
  const int kv_head = static_cast<int>(group % p.shape.num_kv_heads);

  const int tokens = query_len(p.shape, p.requests, request);
  if (p.requests.seq_lens[request] == 0 || token >= tokens) return;
  const int first_token = first_position(p.shape, p.requests, request), position = first_token + token;
  if (position + 1 < p.min_context) return;
  const int stored = stored_entries(p, request, kv_head);
  if (stored == kNoHistory) return;
  const int64_t slot = p.requests.slots[request];

  const float spread = *p.ring.spread(slot, kv_head);
  const T* rows =
      static_cast<const T*>(p.query.data) + request * p.query.batch_stride + token * p.query.token_stride;
  for (int g = 0; g < G; ++g) {
    const int head = kv_head * G + g;
    const T* row = rows + head * p.query.head_stride;
    for (int d = 0; d < D; d += kLanes) store(query + g * D + d, load(row + d));
    theta[g] = usable_threshold(p, query + g * D, head, spread);
    // One head that cannot hit decides for its group; with decisions per head it only skips itself.
    if (!p.per_head && std::isnan(theta[g])) return;
  }

  // The youngest entry has age 1; their positions fall with the age. E(c) > 0 needs c >= band.
  const int first_age = 1 + chunk * work.chunk;
  const int last_age = std::min({first_age + work.chunk - 1, M, stored});
  const int oldest = oldest_candidate(position, p.window, p.band, p.ring.layout.shape.anchors, tokens);
  std::atomic<uint64_t>* best = &work.best[searcher * work.decisions_per_group];

  const auto place = [&](int age) { return place_of(stored, age, M); };
  const auto holds = [&](int age) {
    const int c = *p.ring.position(slot, kv_head, place(age));
    return c >= oldest && c < first_token;
  };
  const auto entry = [&](int age) { return p.ring.query<const T>(slot, kv_head, place(age)); };
  const auto depth = [&](int age) { return p.ring.depth(slot, kv_head, place(age)); };

  if (p.per_head) {
    for (int age = first_age; age <= last_age; ++age) {
      if (age + kFetchAge <= last_age) prefetch_row(entry(age + kFetchAge), static_cast<int64_t>(G) * D);
      if (!holds(age)) continue;
      for (int g = 0; g < G; ++g) {
        if (std::isnan(theta[g]) || depth(age)[g] >= p.max_reuse_depth) continue;
        const float total = squared_distance(query + g * D, entry(age) + g * D, D) / theta[g];
        if (total < 1.f) keep_smaller(best[g], match_key(total, age));
      }
    }
    return;
  }
  // Half of the first head's row is often enough to be rid of a candidate; where it was not, whole entries are
  // fetched from then on.
  const int half = D / 2 >= kLanes ? D / 2 / kLanes * kLanes : D;
  int64_t fetched = half;
  for (int age = first_age; age < std::min(first_age + kFetchAge, last_age + 1); ++age)
    prefetch_row(entry(age), half);
  for (int first = first_age; first <= last_age; first += 4) {
    const T* rows[4];
    for (int i = 0; i < 4; ++i) {
      rows[i] = entry(std::min(first + i, last_age));
      if (first + i + kFetchAge <= last_age) prefetch_row(entry(first + i + kFetchAge), fetched);
    }
    const float limit = match_total(best[0].load(std::memory_order_relaxed));
    float distance[4], total[4] = {};
    squared_distances(query, rows, half, distance);
    for (float& part : distance) part *= kRoundingMargin;
    const bool near = any_below(distance, limit * theta[0]);
    fetched = near ? static_cast<int64_t>(G) * D : half;
    if (!near) continue;
    for (int g = 0; g < G && any_below(total, limit); ++g) {
      squared_distances(query + g * D, rows, D, distance);
      for (int i = 0; i < 4; ++i) {
        total[i] += distance[i] / theta[g];
        rows[i] += D;
      }
    }
    for (int i = 0; i < 4; ++i) {
      const int age = first + i;
      if (!(total[i] <= limit) || age > last_age || !holds(age) || depth(age)[0] >= p.max_reuse_depth) continue;
      keep_smaller(*best, match_key(total[i], age));
    }
  }
}

template <typename T>
void match_all(const MatchParams& p, MatchWork& work) {
  Scratch& scratch = thread_scratch();
  float* query = scratch.array<float>(0, static_cast<int64_t>(p.shape.group_size) * p.shape.head_dim);
  float* theta = scratch.array<float>(1, p.shape.group_size);
  for (int64_t task; (task = work.next.fetch_add(1, std::memory_order_relaxed)) < work.num_tasks;) {
    match_task<T>(p, work, task, query, theta);
  }
}

void match(const MatchParams& p, MatchWork& work) {
  switch (p.dtype) {
    case DType::kFloat32: return match_all<float>(p, work);
    case DType::kBFloat16: return match_all<bfloat16>(p, work);
    case DType::kFloat16: return match_all<float16>(p, work);
  }
}
