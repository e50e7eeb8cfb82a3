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

MAC_INLINE void merge_partials(const AmendParams& p, const AmendWork& work, int request, int head, Span span,
                               Total& total) {
  const int Hq = p.shape.num_qo_heads(), D = p.shape.head_dim;
  const int64_t first = work.first_partial[request], last = work.first_partial[request + 1];
  for (int64_t i = first; i < last; ++i) {
    if (work.partial_span[i] == span) total.max = std::max(total.max, work.partial_max[i * Hq + head]);
  }
  const float base = std::isinf(total.max) && total.max < 0 ? 0.f : total.max;
  std::fill(total.out, total.out + D, 0.f);
  for (int64_t i = first; i < last; ++i) {
    const float sum = work.partial_sum[i * Hq + head];
    if (work.partial_span[i] != span || sum == 0.f) continue;  // a NaN sum stays
    const float weight = std::exp(work.partial_max[i * Hq + head] - base);
    const float* out = work.partial_out + (i * Hq + head) * D;
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

// Subtraction serves while this share of the old sum stays: it then costs at most 1.5 of float's seven digits, or 3
// for 16-bit values, which have two and a half. What it costs is weighted by what stays.
template <typename T>
constexpr float kSubtractableShare = sizeof(T) == 2 ? 1.f / 1024 : 1.f / 32;

struct Candidate {
  float weight;  // log of the largest softmax weight
  int32_t token;
};
// Orders, as types so that the sorts inline them. In both an equal one that is earlier comes first.
struct Heavier {
  bool operator()(const Candidate& a, const Candidate& b) const {
    return a.weight != b.weight ? a.weight > b.weight : a.token < b.token;
  }
};
struct Earlier {
  bool operator()(const Candidate& a, const Candidate& b) const { return a.token < b.token; }
};

// The logits of one KV head's old tokens and what attending to them has left about each block.
struct OldLogits {
  float* logits;             // [G, num_tokens]
  const BlockTotal* blocks;  // [G, num_blocks]
  int32_t num_tokens;
  int32_t num_blocks;

  float* row(int g) const { return logits + static_cast<int64_t>(g) * num_tokens; }
  const BlockTotal& block(int g, int i) const { return blocks[static_cast<int64_t>(g) * num_blocks + i]; }
};

// Log of the softmax weights of a block, the largest of the heads.
MAC_INLINE void group_weights(const OldLogits& old, const float* lse, int group_size, int32_t first, int size,
                              float* weights) {
  const float infinity = std::numeric_limits<float>::infinity();
  int t = 0;
  for (; t + kLanes <= size; t += kLanes) {
    vf weight = broadcast(-infinity);
    for (int g = 0; g < group_size; ++g) weight = vmax(load(old.row(g) + first + t) - lse[g], weight);
    store(weights + t, weight);
  }
  for (; t < size; ++t) {
    weights[t] = -infinity;
    for (int g = 0; g < group_size; ++g) weights[t] = std::max(weights[t], old.row(g)[first + t] - lse[g]);
  }
}

// The S heaviest tokens, ascending, to `chosen` (room for S blocks); returns how many. They lie in the S blocks
// whose heaviest tokens are the heaviest; only those are looked into. `blocks` has room for all.
inline int32_t choose_anchors(const OldLogits& old, const float* lse, int group_size, int32_t num_anchors,
                              Candidate* blocks, Candidate* chosen) {
  const float infinity = std::numeric_limits<float>::infinity();
  for (int32_t i = 0; i < old.num_blocks; ++i) {
    float high = -infinity;
    for (int g = 0; g < group_size; ++g) high = std::max(high, old.block(g, i).max - lse[g]);
    blocks[i] = {high, i};
  }
  int32_t num_blocks = old.num_blocks;
  float bound = -infinity;
  if (num_blocks > num_anchors) {
    num_blocks = num_anchors;
    std::nth_element(blocks, blocks + num_blocks - 1, blocks + old.num_blocks, Heavier());
    bound = blocks[num_blocks - 1].weight;
  }
  int32_t count = 0;
  for (int32_t i = 0; i < num_blocks; ++i) {
    const int32_t first = blocks[i].token * kBlock;
    const int size = std::min(kBlock, old.num_tokens - first);
    float weights[kBlock];
    group_weights(old, lse, group_size, first, size, weights);
    for (int t = 0; t < size; ++t) {
      // Neither NaN nor weight 0.
      if (weights[t] >= bound && weights[t] > -infinity) chosen[count++] = {weights[t], first + t};
    }
  }
  if (count > num_anchors) {
    std::nth_element(chosen, chosen + num_anchors - 1, chosen + count, Heavier());
    count = num_anchors;
  }
  std::sort(chosen, chosen + count, Earlier());
  return count;
}

// A block's weights exp(logit - base), 0 past its end; returns their sum.
MAC_INLINE float block_weights(const float* logits, int count, float base, float* weights) {
  std::fill(weights, weights + kBlock, -std::numeric_limits<float>::infinity());
  std::memcpy(weights, logits, count * sizeof(float));
  vf sum = vf{};
  for (int t = 0; t < kBlock; t += kLanes) {
    const vf weight = vexp(load(weights + t) - base);
    store(weights + t, weight);
    sum += weight;
  }
  return hsum(sum);
}

// A block's sum of exp(logit - base) may be taken to a base lower by this much: above, small terms were lost.
constexpr float kRebasable = 20.f;

// What is left of one head's old state once the anchors' logits are -inf: its max and sum anew, its `out` by
// subtracting what the anchors had added. Where they held nearly everything that would leave little but
// rounding errors, so there the values are summed up again. Only the anchors' own blocks are looked at.
template <typename T>
void take_out(const AmendParams& p, int request, int kv_head, const OldLogits& old, int g, const int32_t* anchors,
              int32_t count, const float* anchor_out, Total& state) {
  const int D = p.shape.head_dim;
  const float infinity = std::numeric_limits<float>::infinity();
  const float total = state.sum, total_max = state.max;
  const float* logits = old.row(g);
  float max = -infinity;
  for (int32_t i = 0, next = 0; i < old.num_blocks; ++i) {
    const int32_t first = i * kBlock, end = std::min(first + kBlock, old.num_tokens);
    if (next < count && anchors[next] < end) {
      for (int32_t t = first; t < end; ++t) max = std::max(max, logits[t]);
      while (next < count && anchors[next] < end) ++next;
    } else {
      max = std::max(max, old.block(g, i).max);
    }
  }
  const float base = max == -infinity ? 0.f : max;
  alignas(64) float weights[kBlock];
  state.max = max;
  state.sum = 0.f;
  for (int32_t i = 0, next = 0; i < old.num_blocks; ++i) {
    const int32_t first = i * kBlock, end = std::min(first + kBlock, old.num_tokens);
    const BlockTotal& block = old.block(g, i);
    const bool holds_anchor = next < count && anchors[next] < end;
    while (next < count && anchors[next] < end) ++next;
    if (holds_anchor || block.base - block.max > kRebasable) {
      state.sum += block_weights(logits + first, end - first, base, weights);
    } else {
      state.sum += block.sum * std::exp(block.base - base);
    }
  }

  const float rescale = std::exp(total_max - base);
  if (state.sum >= kSubtractableShare<T> * total * rescale) {
    for (int d = 0; d < D; d += kLanes) {
      store(state.out + d, (load(state.out + d) - load(anchor_out + d)) * rescale);
    }
    return;
  }
  std::fill(state.out, state.out + D, 0.f);
  // All that are lighter than this do not add up to a rounding error of the sum.
  const float lightest = state.sum * std::numeric_limits<float>::epsilon() / static_cast<float>(old.num_tokens);
  for (int32_t i = 0; i < old.num_blocks; ++i) {
    if (std::exp(old.block(g, i).max - base) < lightest) continue;
    const int32_t first = i * kBlock, size = std::min(kBlock, old.num_tokens - first);
    block_weights(logits + first, size, base, weights);
    for (int t = 0; t < size; ++t) {
      if (weights[t] < lightest) continue;  // a NaN stays
      const T* row = token_value<T>(p, request, kv_head, first + t);
      for (int d = 0; d < D; d += kLanes) {
        store(state.out + d, load(state.out + d) + load(row + d) * weights[t]);
      }
    }
  }
}

// Moves the chosen tokens' terms from the old totals to the fresh ones. The logits lose them.
template <typename T>
void move_anchors(const AmendParams& p, Total* totals, const OldLogits& logits, const int32_t* anchors,
                  int32_t count, int request, int kv_head, float* moved) {
  const int G = p.shape.group_size, D = p.shape.head_dim;
  for (int g = 0; g < G; ++g) {
    Total& old = totals[kOld * G + g];
    Total& fresh = totals[kFresh * G + g];
    if (old.sum == 0.f) continue;
    Total anchor{old.max, 0.f, moved};
    std::fill(moved, moved + D, 0.f);
    for (int i = 0; i < count; ++i) {
      float& logit = logits.row(g)[anchors[i]];
      const float weight = std::exp(logit - old.max);
      logit = -std::numeric_limits<float>::infinity();
      anchor.sum += weight;
      const T* row = token_value<T>(p, request, kv_head, anchors[i]);
      for (int d = 0; d < D; d += kLanes) {
        store(anchor.out + d, load(anchor.out + d) + load(row + d) * weight);
      }
    }
    take_out<T>(p, request, kv_head, logits, g, anchors, count, anchor.out, old);
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
      merge_partials(p, work, request, kv_head * G + g, static_cast<Span>(span), total);
    }
    lse[g] = merge_weights(totals[kOld * G + g].lse(), totals[kFresh * G + g].lse()).lse;
  }

  int32_t* anchors = p.anchors + static_cast<int64_t>(group_index) * p.num_anchors;
  std::fill(anchors, anchors + p.num_anchors, kNoAnchor);
  std::copy(group.inherited, group.inherited + group.num_inherited, anchors);

  if (group.logits >= 0) {
    const int32_t num_old = band_start(p.requests.seq_lens[request] - 1, p.band);
    const OldLogits old{work.logits + group.logits, work.block_totals + group.totals, num_old,
                        (num_old + kBlock - 1) / kBlock};
    Candidate* blocks = scratch.array<Candidate>(3, old.num_blocks);
    Candidate* chosen =
        scratch.array<Candidate>(5, static_cast<int64_t>(std::min(p.num_anchors, old.num_blocks)) * kBlock);
    const int32_t count = choose_anchors(old, lse, G, p.num_anchors, blocks, chosen);
    for (int i = 0; i < count; ++i) anchors[i] = chosen[i].token;
    float* moved = scratch.array<float>(4, D);
    move_anchors<T>(p, totals, old, anchors, count, request, kv_head, moved);
  }

  for (int span = 0; span < kNumSpans; ++span) {
    for (int g = 0; g < G; ++g) {
      write_state(p, static_cast<Span>(span), request, kv_head * G + g, totals[span * G + g]);
    }
  }
}
