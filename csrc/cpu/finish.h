// The end of amend for one KV head: merge the partial states of its tasks and, on a miss, choose the
// anchors of the new entry.
//
// Anchors are the S tokens of [0, E(p)) with the largest softmax weight, maximum over the heads of the
// group. They leave the old state after the fact, see take_out.

// Sums of exp(logit - max) and of exp(logit - max) * value over a set of tokens, for one head.
struct Total {
  float max;
  float sum;
  float* out;  // [D]

  float lse() const { return sum == 0.f ? -std::numeric_limits<float>::infinity() : max + std::log(sum); }
};

MAC_INLINE void merge_partials(const AmendParams& p, const AmendWork& work, const AmendGroup& group, int g,
                               Span span, Total& total) {
  const int G = p.shape.group_size, D = p.shape.head_dim;
  const int64_t last = group.first_partial + group.num_partials;
  for (int64_t i = group.first_partial; i < last; ++i) {
    if (work.partial_span[i] == span) total.max = std::max(total.max, work.partial_max[i * G + g]);
  }
  const float base = std::isinf(total.max) && total.max < 0 ? 0.f : total.max;
  std::fill(total.out, total.out + D, 0.f);
  for (int64_t i = group.first_partial; i < last; ++i) {
    const float sum = work.partial_sum[i * G + g];
    if (work.partial_span[i] != span || sum == 0.f) continue;  // a NaN sum stays
    const float weight = std::exp(work.partial_max[i * G + g] - base);
    const float* out = work.partial_out.get() + (i * G + g) * D;
    total.sum += sum * weight;
    for (int d = 0; d < D; d += kLanes) store(total.out + d, load(total.out + d) + load(out + d) * weight);
  }
}

// Writes a state where amend's caller wants it.
MAC_INLINE void write_state(const AmendParams& p, Span span, int request, int head, const Total& total) {
  const int D = p.shape.head_dim;
  const int64_t row = (static_cast<int64_t>(span) * p.shape.batch + request) * p.shape.num_qo_heads() + head;
  const float scale = total.sum == 0.f ? 0.f : 1.f / total.sum;
  for (int d = 0; d < D; d += kLanes) store(p.out + row * D + d, load(total.out + d) * scale);
  p.lse[row] = total.lse();
}

// Subtraction serves while this share of the old sum stays: it then costs at most 1.5 of float's seven digits.
constexpr float kSubtractableShare = 1.f / 32;

struct Candidate {
  float weight;  // log of the largest softmax weight
  int32_t token;
};
inline bool heavier(const Candidate& a, const Candidate& b) {
  return a.weight != b.weight ? a.weight > b.weight : a.token < b.token;
}

inline bool earlier(const Candidate& a, const Candidate& b) {
  return a.token < b.token;
}

// The heaviest tokens of [0, num_tokens), ascending, to `kept` (room for 2 S); returns how many. Once S
// are kept, the lightest of them is a bound below which all others pass unlooked.
inline int32_t choose_anchors(const float* logits, const float* lse, int group_size, int32_t num_tokens,
                              int32_t num_anchors, Candidate* kept) {
  int32_t count = 0;
  float bound = -std::numeric_limits<float>::infinity();
  for (int32_t first = 0; first < num_tokens; first += kLanes) {
    const int lanes = std::min(kLanes, num_tokens - first);
    float weights[kLanes];
    if (lanes == kLanes) {
      vf weight = broadcast(-std::numeric_limits<float>::infinity());
      for (int g = 0; g < group_size; ++g) {
        weight = vmax(load(logits + static_cast<int64_t>(g) * num_tokens + first) - lse[g], weight);
      }
      if (!(hmax(weight) > bound)) continue;
      store(weights, weight);
    } else {
      for (int i = 0; i < lanes; ++i) {
        weights[i] = -std::numeric_limits<float>::infinity();
        for (int g = 0; g < group_size; ++g) {
          weights[i] = std::max(weights[i], logits[static_cast<int64_t>(g) * num_tokens + first + i] - lse[g]);
        }
      }
    }
    for (int i = 0; i < lanes; ++i) {
      if (!(weights[i] > bound)) continue;  // also leaves NaN and weight 0 out
      kept[count++] = {weights[i], first + i};
      if (count < 2 * num_anchors) continue;
      count = num_anchors;
      std::nth_element(kept, kept + count - 1, kept + 2 * count, heavier);
      bound = kept[count - 1].weight;
    }
  }
  std::sort(kept, kept + count, heavier);
  count = std::min(count, num_anchors);
  std::sort(kept, kept + count, earlier);
  return count;
}

// What is left of one head's old state once the anchors' logits are -inf: its max and sum anew, its `out` by
// subtracting what the anchors had added. Where they held nearly everything that would leave little but
// rounding errors, so there the values are summed up again.
template <typename T>
void take_out(const AmendParams& p, const AmendTask& task, const float* logits, int32_t num_old,
              const float* anchor_out, Total& old) {
  const int D = p.shape.head_dim;
  const float infinity = std::numeric_limits<float>::infinity();
  const float total = old.sum, total_max = old.max;
  vf high = broadcast(-infinity), sum = vf{};
  int32_t t = 0;
  for (; t + kLanes <= num_old; t += kLanes) high = vmax(load(logits + t), high);
  float max = hmax(high);
  for (; t < num_old; ++t) max = std::max(max, logits[t]);
  const float base = max == -infinity ? 0.f : max;
  for (t = 0; t + kLanes <= num_old; t += kLanes) sum += vexp(load(logits + t) - base);
  old.max = max;
  old.sum = hsum(sum);
  for (; t < num_old; ++t) old.sum += std::exp(logits[t] - base);

  const float rescale = std::exp(total_max - base);
  if (old.sum >= kSubtractableShare * total * rescale) {
    for (int d = 0; d < D; d += kLanes) {
      store(old.out + d, (load(old.out + d) - load(anchor_out + d)) * rescale);
    }
    return;
  }
  std::fill(old.out, old.out + D, 0.f);
  // All that are lighter than this do not add up to a rounding error of the sum.
  const float lightest = old.sum * std::numeric_limits<float>::epsilon() / static_cast<float>(num_old);
  for (int32_t first = 0; first < num_old; first += kBlock) {
    const int count = std::min(kBlock, num_old - first);
    alignas(64) float weights[kBlock];
    std::fill(weights, weights + kBlock, -infinity);
    std::memcpy(weights, logits + first, count * sizeof(float));
    for (int i = 0; i < kBlock; i += kLanes) store(weights + i, vexp(load(weights + i) - base));
    for (int i = 0; i < count; ++i) {
      if (weights[i] < lightest) continue;  // a NaN stays
      const T* row = token_value<T>(p, task, first + i);
      for (int d = 0; d < D; d += kLanes) {
        store(old.out + d, load(old.out + d) + load(row + d) * weights[i]);
      }
    }
  }
}

// Moves the chosen tokens' terms from the old totals to the fresh ones. `logits` [G, num_old] loses them.
template <typename T>
void move_anchors(const AmendParams& p, Total* totals, float* logits, int32_t num_old, const int32_t* anchors,
                  int32_t count, int request, int kv_head, float* moved) {
  const int G = p.shape.group_size, D = p.shape.head_dim;
  AmendTask task{};
  task.group = request * p.shape.num_kv_heads + kv_head;
  Rows<T> rows;
  for (int g = 0; g < G; ++g) {
    Total& old = totals[kOld * G + g];
    Total& fresh = totals[kFresh * G + g];
    if (old.sum == 0.f) continue;
    float* row = logits + static_cast<int64_t>(g) * num_old;
    Total anchor{old.max, 0.f, moved};
    std::fill(moved, moved + D, 0.f);
    task.end = count;
    for (int first = 0; first < count; first += kBlock) {
      find_rows(p, task, anchors, first, rows);
      for (int t = 0; t < rows.count; ++t) {
        const int32_t token = anchors[first + t];
        const float weight = std::exp(row[token] - old.max);
        row[token] = -std::numeric_limits<float>::infinity();
        anchor.sum += weight;
        for (int d = 0; d < D; d += kLanes) {
          store(anchor.out + d, load(anchor.out + d) + load(rows.v[t] + d) * weight);
        }
      }
    }
    take_out<T>(p, task, row, num_old, anchor.out, old);
    // fresh (+) anchors
    const float high = std::max(fresh.max, anchor.max);
    const float w_fresh = std::exp(fresh.max - high), w_anchor = std::exp(anchor.max - high);
    for (int d = 0; d < D; d += kLanes) {
      store(fresh.out + d, load(fresh.out + d) * w_fresh + load(anchor.out + d) * w_anchor);
    }
    fresh.sum = fresh.sum * w_fresh + anchor.sum * w_anchor;
    fresh.max = high;
  }
}

template <typename T>
void finish_group(const AmendParams& p, AmendWork& work, int32_t group_index, Scratch& scratch) {
  const int G = p.shape.group_size, D = p.shape.head_dim;
  const int request = group_index / p.shape.num_kv_heads;
  const int kv_head = group_index % p.shape.num_kv_heads;
  const AmendGroup& group = work.groups[group_index];

  float* sums = scratch.array<float>(0, static_cast<int64_t>(kNumSpans) * G * D);
  Total* totals = scratch.array<Total>(1, static_cast<int64_t>(kNumSpans) * G);
  float* lse = scratch.array<float>(2, G);
  for (int g = 0; g < G; ++g) {
    for (int span = 0; span < kNumSpans; ++span) {
      Total& total = totals[span * G + g];
      total = {-std::numeric_limits<float>::infinity(), 0.f, sums + static_cast<int64_t>(span * G + g) * D};
      merge_partials(p, work, group, g, static_cast<Span>(span), total);
    }
    lse[g] = merge_weights(totals[kOld * G + g].lse(), totals[kFresh * G + g].lse()).lse;
  }

  int32_t* anchors = p.anchors + static_cast<int64_t>(group_index) * p.num_anchors;
  std::fill(anchors, anchors + p.num_anchors, kNoAnchor);
  std::copy(group.inherited, group.inherited + group.num_inherited, anchors);

  if (group.logits >= 0) {
    const int32_t num_old = band_start(p.requests.seq_lens[request] - 1, p.band);
    float* logits = work.logits.get() + group.logits;
    Candidate* chosen = scratch.array<Candidate>(3, 2 * static_cast<int64_t>(p.num_anchors));
    const int32_t count = choose_anchors(logits, lse, G, num_old, p.num_anchors, chosen);
    for (int i = 0; i < count; ++i) anchors[i] = chosen[i].token;
    float* moved = scratch.array<float>(4, D);
    move_anchors<T>(p, totals, logits, num_old, anchors, count, request, kv_head, moved);
  }

  for (int span = 0; span < kNumSpans; ++span) {
    for (int g = 0; g < G; ++g) {
      write_state(p, static_cast<Span>(span), request, kv_head * G + g, totals[span * G + g]);
    }
  }
}
