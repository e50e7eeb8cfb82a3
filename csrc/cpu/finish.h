// The end of amend for one KV head: merge the partial states of its tasks and bring the sample that a miss has
// drawn into its form.

// Sums of exp(logit - max), of a exp(logit - max) and of exp(logit - max) * value over a set of tokens, for one
// head.
struct Total {
  float max;
  float sum;
  float light;
  float* out;  // [D]
};

// Which span a partial state belongs to, of a KV head that hits with anchors or does not.
MAC_INLINE Span span_of(Tokens tokens, bool anchors) {
  if (anchors) return tokens == Tokens::kReplaced ? kOld : kFresh;
  return tokens == Tokens::kOld ? kOld : kFresh;
}

MAC_INLINE void merge_partials(const AmendParams& p, const AmendWork& work, int request, int head, Span span,
                               bool anchors, Total& total) {
  const int Hq = p.shape.num_qo_heads(), D = p.shape.head_dim;
  const int64_t first = work.first_partial[request], last = work.first_partial[request + 1];
  for (int64_t i = first; i < last; ++i) {
    if (span_of(work.partial_tokens[i], anchors) != span) continue;
    total.max = std::max(total.max, work.partial_max[i * Hq + head]);
  }
  const float base = std::isinf(total.max) && total.max < 0 ? 0.f : total.max;
  std::fill(total.out, total.out + D, 0.f);
  for (int64_t i = first; i < last; ++i) {
    const float sum = work.partial_sum[i * Hq + head];
    if (span_of(work.partial_tokens[i], anchors) != span || sum == 0.f) continue;  // a NaN sum stays
    const float weight = std::exp(work.partial_max[i * Hq + head] - base);
    const float* out = work.partial_out + (i * Hq + head) * D;
    total.sum += sum * weight;
    total.light += work.partial_light[i * Hq + head] * weight;
    for (int d = 0; d < D; d += kLanes) store(total.out + d, load(total.out + d) + load(out + d) * weight);
  }
}

// Writes a state where amend's caller wants it.
MAC_INLINE void write_state(const AmendParams& p, Span span, int64_t row, const Total& total) {
  const int D = p.shape.head_dim;
  row += static_cast<int64_t>(span) * p.shape.batch * p.shape.num_qo_heads();
  const float scale = total.sum == 0.f ? 0.f : 1.f / total.sum;
  for (int d = 0; d < D; d += kLanes) store(p.out + row * D + d, load(total.out + d) * scale);
  p.lse[row] = total.sum == 0.f ? -std::numeric_limits<float>::infinity() : total.max + std::log(total.sum);
}

// The sample of a new entry, or none.
MAC_INLINE void write_sample(const AmendParams& p, const AmendWork& work, int64_t group_index) {
  const AmendGroup& group = work.groups[group_index];
  int32_t* anchors = p.anchors + group_index * p.num_anchors;
  float* weights = p.anchor_weights + group_index * p.num_anchors;
  std::fill(anchors, anchors + p.num_anchors, kNoAnchor);
  std::fill(weights, weights + p.num_anchors, 0.f);
  p.sampled[group_index] = group.hit ? group.num_anchors : kNotSampled;
  if (group.candidates < 0) return;
  const int32_t sampled = work.num_candidates[group_index].load(std::memory_order_relaxed);
  p.sampled[group_index] = sampled;
  if (sampled > kCandidateRoom * p.num_anchors) return;
  int32_t* tokens = work.candidate_tokens + group.candidates;
  float* a = work.candidate_weights + group.candidates;
  const int32_t count = cut_sample(tokens, a, sampled, p.num_anchors, group.tau, group.seed);
  std::copy(tokens, tokens + count, anchors);
  std::copy(a, a + count, weights);
}

inline void finish_group(const AmendParams& p, const AmendWork& work, int64_t group_index, Scratch& scratch) {
  const int G = p.shape.group_size, D = p.shape.head_dim, H = p.shape.num_kv_heads;
  const int request = static_cast<int>(group_index / H), kv_head = static_cast<int>(group_index % H);
  const bool hit = work.groups[group_index].hit;
  float* out = scratch.array<float>(0, D);
  for (int g = 0; g < G; ++g) {
    const int64_t row = group_index * G + g;
    float log_light[kNumSpans];
    for (int span = 0; span < kNumSpans; ++span) {
      Total total{-std::numeric_limits<float>::infinity(), 0.f, 0.f, out};
      merge_partials(p, work, request, kv_head * G + g, static_cast<Span>(span), hit, total);
      write_state(p, static_cast<Span>(span), row, total);
      log_light[span] = total.max + std::log(total.light);
    }
    // Without a token that stands for others nothing is known of those.
    constexpr float kNone = -std::numeric_limits<float>::infinity();
    if (p.matched.source)
      p.log_ratio[row] = !hit || log_light[kOld] == kNone ? 0.f : log_light[kFresh] - log_light[kOld];
  }
  if (p.matched.source) write_sample(p, work, group_index);
}
