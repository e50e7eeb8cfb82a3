// The end of amend for one KV head: merge the partial states of its tasks and bring the sample that a miss has
// drawn into its form.

// Sums of exp(logit - max), of a exp(logit - max) and of exp(logit - max) * value over a set of tokens, for one
// head.
struct Total {
  float max;
  float sum;
  float light;
  float* out;  // [V]
};

// Which span a partial state belongs to, of a query that hits with anchors or does not.
MAC_INLINE Span span_of(Tokens tokens, bool anchors) {
  if (anchors) return tokens == Tokens::kReplaced ? kOld : kFresh;
  return tokens == Tokens::kOld ? kOld : kFresh;
}

MAC_INLINE void merge_partials(const AmendParams& p, const AmendWork& work, int request, int query, Span span,
                               bool anchors, Total& total) {
  const int V = p.shape.head_dim_v;
  const int64_t queries = p.shape.num_queries();
  const int64_t first = work.first_partial[request], last = work.first_partial[request + 1];
  for (int64_t i = first; i < last; ++i) {
    if (span_of(work.partial_tokens[i], anchors) != span) continue;
    total.max = std::max(total.max, work.partial_max[i * queries + query]);
  }
  const float base = std::isinf(total.max) && total.max < 0 ? 0.f : total.max;
  std::fill(total.out, total.out + V, 0.f);
  for (int64_t i = first; i < last; ++i) {
    const float sum = work.partial_sum[i * queries + query];
    if (span_of(work.partial_tokens[i], anchors) != span || sum == 0.f) continue;  // a NaN sum stays
    const float weight = std::exp(work.partial_max[i * queries + query] - base);
    const float* out = work.partial_out + (i * queries + query) * V;
    total.sum += sum * weight;
    total.light += work.partial_light[i * queries + query] * weight;
    for (int d = 0; d < V; d += kLanes) store(total.out + d, load(total.out + d) + load(out + d) * weight);
  }
}

// Writes a state where amend's caller wants it. `unit`: what the values that were summed are multiplied by.
MAC_INLINE void write_state(const AmendParams& p, Span span, int64_t row, const Total& total, float unit) {
  const int V = p.shape.head_dim_v;
  row += static_cast<int64_t>(span) * p.shape.batch * p.shape.num_queries();
  const float scale = total.sum == 0.f ? 0.f : unit / total.sum;
  for (int d = 0; d < V; d += kLanes) store(p.out + row * V + d, load(total.out + d) * scale);
  p.lse[row] = total.sum == 0.f ? -std::numeric_limits<float>::infinity() : total.max + std::log(total.sum);
}

// How many of the values are at least `bound`; `count` is of whole vectors.
MAC_INLINE int32_t count_at_least(const float* values, int32_t count, float bound) {
  vi found{};
  for (int32_t i = 0; i < count; i += kLanes) found += load(values + i) >= bound;
  int32_t sum = 0;
  for (int i = 0; i < kLanes; ++i) sum -= found[i];
  return sum;
}

// The k-th largest of values that are not negative, of which there are at least k: bisection over their bits, which
// are ordered as they are.
inline float kth_largest(const float* values, int32_t count, int32_t k) {
  uint32_t low = 0, high = 0x7f800001u;  // at least k are not below the first, fewer not below the second
  while (high - low > 1) {
    const uint32_t middle = low + (high - low) / 2;
    float bound;
    std::memcpy(&bound, &middle, sizeof bound);
    (count_at_least(values, count, bound) >= k ? low : high) = middle;
  }
  float found;
  std::memcpy(&found, &low, sizeof found);
  return found;
}

// Cuts the candidates of one KV head to the S largest keys and brings them in order, with their a. Candidates and
// keys have room for whole vectors; `words` has a bit for every old token. A token's place is the number of kept
// ones before it. Returns how many stay.
inline int32_t cut_sample(const AmendGroup& group, int32_t* tokens, const float* weights, int32_t count,
                          int32_t num_anchors, int32_t old_end, float* keys, uint64_t* words, int32_t* anchors,
                          float* a) {
  const int32_t padded = (count + kLanes - 1) / kLanes * kLanes;
  for (int32_t i = 0; i < count; i += kLanes) {
    vu token;
    std::memcpy(&token, tokens + i, sizeof token);
    store(keys + i, load(weights + i) / uniforms(group.seed, token));
  }
  for (int32_t i = count; i < padded; ++i) keys[i] = 0.f;
  // Those with the very key that is cut go, too: which of equals comes first would be chance.
  const bool cut = count > num_anchors;
  const float tau = cut ? kth_largest(keys, padded, num_anchors + 1) : group.tau;
  const int32_t num_words = old_end / 64 + 1;
  std::fill(words, words + 2 * num_words, 0);
  uint64_t* before = words + num_words;
  for (int32_t i = 0; i < count; ++i) {
    if (!cut || keys[i] > tau) words[tokens[i] / 64] |= uint64_t{1} << tokens[i] % 64;
  }
  for (int32_t i = 1; i < num_words; ++i) before[i] = before[i - 1] + __builtin_popcountll(words[i - 1]);
  for (int32_t i = 0; i < count; ++i) {
    if (cut && !(keys[i] > tau)) continue;
    const int32_t word = tokens[i] / 64;
    const uint64_t lower = words[word] & ((uint64_t{1} << tokens[i] % 64) - 1);
    const int64_t place = static_cast<int64_t>(before[word]) + __builtin_popcountll(lower);
    anchors[place] = tokens[i];
    a[place] = std::max(0.f, tau / weights[i] - 1.f);
  }
  return static_cast<int32_t>(before[num_words - 1]) + __builtin_popcountll(words[num_words - 1]);
}

// The sample of a new entry, or none; and how many anchors or candidates there were.
inline void write_sample(const AmendParams& p, const AmendWork& work, int64_t group_index, Scratch& scratch) {
  const AmendGroup& group = work.groups[group_index];
  const int32_t S = p.num_anchors;
  int32_t* anchors = p.anchors + group_index * S;
  float* a = p.anchor_weights + group_index * S;
  int32_t count = 0, sampled = kNotSampled;
  if (group.candidates >= 0) {
    sampled = work.num_candidates[group_index].load(std::memory_order_relaxed);
    const int request = static_cast<int>(group_index / p.shape.num_kv_heads);
    const int32_t old_end = band_start(first_position(p.shape, p.requests, request), p.band);
    const int32_t size = sample_size(S, old_end), room = kCandidateRoom * size;
    if (sampled <= room) {
      count = cut_sample(group, work.candidate_tokens + group.candidates, work.candidate_weights + group.candidates,
                         sampled, size, old_end, scratch.array<float>(0, room + kLanes),
                         scratch.array<uint64_t>(1, old_end / 32 + 2), anchors, a);
    }
  }
  for (int token = 0; token < p.shape.tokens; ++token) {
    const AmendHit& hit = work.hits[group_index * p.shape.tokens + token];
    p.sampled[group_index * p.shape.tokens + token] = hit.anchors ? hit.num_anchors
                                                      : token > 0 ? kNotSampled
                                                                  : sampled;
  }
  std::fill(anchors + count, anchors + S, kNoAnchor);
  std::fill(a + count, a + S, 0.f);
}

inline void finish_group(const AmendParams& p, const AmendWork& work, int64_t group_index, Scratch& scratch) {
  const int G = p.shape.group_size, queries = p.shape.group_queries(), H = p.shape.num_kv_heads;
  const int request = static_cast<int>(group_index / H), kv_head = static_cast<int>(group_index % H);
  const float unit = p.kv.v_scale.of(kv_head) * (p.kv.float8 ? kUnit<float8> : 1.f);
  float* out = scratch.array<float>(0, p.shape.head_dim_v);
  for (int i = 0; i < queries; ++i) {
    const int64_t row = group_index * queries + i;
    const bool hit = work.hits[row / G].anchors != nullptr;
    float log_light[kNumSpans], lse[kNumSpans];
    for (int span = 0; span < kNumSpans; ++span) {
      Total total{-std::numeric_limits<float>::infinity(), 0.f, 0.f, out};
      merge_partials(p, work, request, kv_head * queries + i, static_cast<Span>(span), hit, total);
      write_state(p, static_cast<Span>(span), row, total, unit);
      log_light[span] = total.max + std::log(total.light);
      lse[span] = p.lse[span * static_cast<int64_t>(p.shape.batch) * p.shape.num_queries() + row];
    }
    if (!p.matched.source) continue;
    p.log_ratio[row] = 0.f;
    if (!hit) continue;
    constexpr float kNone = -std::numeric_limits<float>::infinity();
    const float entry = p.ring.lse(p.requests.slots[request], kv_head, p.matched.place[row])[i % G];
    // Without a token that stands for others nothing is known of those.
    if (log_light[kOld] != kNone) p.log_ratio[row] = log_light[kFresh] - log_light[kOld];
    if (nothing_left(entry, lse[kOld], log_light[kOld])) p.log_ratio[row] = kNone;
  }
  if (p.matched.source) write_sample(p, work, group_index, scratch);
}
