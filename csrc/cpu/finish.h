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

// A float's bits as a number that orders as the floats do, and back.
MAC_INLINE uint32_t ordered(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits ^ (bits >> 31 ? ~0u : 1u << 31);
}
MAC_INLINE float unordered(uint32_t key) {
  const uint32_t bits = key ^ (key >> 31 ? 1u << 31 : ~0u);
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

// How many values are at least `bound`; NaN is not. `count` is of whole vectors.
MAC_INLINE int32_t count_at_least(const float* values, int32_t count, float bound) {
  vu found{};
  for (int32_t i = 0; i < count; i += kLanes) found -= (vu)(load(values + i) >= bound);
  uint32_t sum = 0;
  for (int i = 0; i < kLanes; ++i) sum += found[i];
  return static_cast<int32_t>(sum);
}

// The largest values: those above `bound`, and the first `ties` of those equal to it.
struct Cut {
  float bound;
  int32_t ties;
};

// The cut that leaves the `wanted` largest of `count` values (of whole vectors), or all that are finite. Bisection
// over their bits, until one leaves just as many: a few passes over what lies in the nearest cache.
inline Cut cut_largest(const float* values, int32_t count, int32_t wanted) {
  constexpr float kLowest = std::numeric_limits<float>::lowest();
  if (count_at_least(values, count, kLowest) <= wanted) return {kLowest, count};
  vf highest = broadcast(kLowest), lowest = broadcast(std::numeric_limits<float>::max());
  for (int32_t i = 0; i < count; i += kLanes) {
    const vf x = load(values + i);
    highest = x > highest ? x : highest;
    lowest = (x >= kLowest) & (x < lowest) ? x : lowest;
  }
  // At least so many are not below the first, fewer than so many not below the second.
  uint32_t low = ordered(-hmax(-lowest)), high = ordered(hmax(highest)) + 1;
  while (high - low > 1) {
    const uint32_t middle = low + (high - low) / 2;
    const int32_t found = count_at_least(values, count, unordered(middle));
    if (found == wanted) return {unordered(middle), count};
    (found > wanted ? low : high) = middle;
  }
  return {unordered(low), wanted - count_at_least(values, count, unordered(high))};
}

MAC_INLINE OldLogits old_logits(const AmendParams& p, const AmendWork& work, int request, const AmendGroup& group) {
  return OldLogits(work.logits + group.logits, work.block_totals + group.totals, p.shape.group_size,
                   band_start(p.requests.seq_lens[request] - 1, p.band));
}

// Log of the softmax weights of a block's tokens, the largest of the heads.
MAC_INLINE void group_weights(const OldLogits& old, const float* lse, int group_size, int block, float* weights) {
  for (int t = 0; t < kBlock; t += kLanes) {
    vf weight = broadcast(-std::numeric_limits<float>::infinity());
    for (int g = 0; g < group_size; ++g) weight = vmax(load(old.block(g, block) + t) - lse[g], weight);
    store(weights + t, weight);
  }
}

// The `wanted` blocks whose heaviest tokens are the heaviest, or all there are, ascending, to `blocks`; returns how
// many. Leaves in `weights` (room for OldLogits::num_padded) those of the heaviest tokens of all.
inline int32_t heaviest_blocks(const OldLogits& old, const float* lse, int group_size, int32_t wanted,
                               float* weights, int32_t* blocks) {
  for (int32_t i = 0; i < old.num_padded; i += kLanes) {
    vf weight = broadcast(-std::numeric_limits<float>::infinity());
    for (int g = 0; g < group_size; ++g) weight = vmax(load(old.total(g, OldLogits::kMax, i)) - lse[g], weight);
    store(weights + i, weight);
  }
  Cut cut = cut_largest(weights, old.num_padded, wanted);
  int32_t count = 0;
  for (int32_t i = 0; i < old.num_padded; i += kLanes) {
    for (uint32_t lanes = lanes_at_least(load(weights + i), cut.bound); lanes; lanes &= lanes - 1) {
      const int32_t block = i + __builtin_ctz(lanes);
      if (weights[block] == cut.bound && cut.ties-- <= 0) continue;
      blocks[count++] = block;
    }
  }
  return count;
}

// The S heaviest tokens, ascending, to `tokens`; returns how many. They lie in the S heaviest blocks; only those
// are looked into. `tokens` and `token_weights` have room for all their tokens and a vector, `blocks` and `weights`
// as above.
inline int32_t choose_anchors(const OldLogits& old, const float* lse, int group_size, int32_t num_anchors,
                              float* weights, int32_t* blocks, float* token_weights, int32_t* tokens) {
  const int32_t num_blocks = heaviest_blocks(old, lse, group_size, num_anchors, weights, blocks);
  // Each of S blocks has a token at least as heavy as the lightest of them. Neither NaN nor weight 0 counts.
  float bound = std::numeric_limits<float>::lowest();
  if (num_blocks == num_anchors && num_anchors > 0) {
    bound = weights[blocks[0]];
    for (int32_t i = 1; i < num_blocks; ++i) bound = std::min(bound, weights[blocks[i]]);
  }
  for (int32_t i = 0; i < num_blocks; ++i) {
    prefetch_row(old.block(0, blocks[i]), static_cast<int64_t>(group_size) * kBlock);
  }
  int32_t count = 0;
  for (int32_t i = 0; i < num_blocks; ++i) {
    alignas(64) float block[kBlock];
    group_weights(old, lse, group_size, blocks[i], block);
    for (int t = 0; t < kBlock; t += kLanes) {
      for (uint32_t lanes = lanes_at_least(load(block + t), bound); lanes; lanes &= lanes - 1) {
        const int at = t + __builtin_ctz(lanes);
        token_weights[count] = block[at], tokens[count++] = blocks[i] * kBlock + at;
      }
    }
  }
  if (count <= num_anchors) return count;
  store(token_weights + count, broadcast(-std::numeric_limits<float>::infinity()));
  Cut cut = cut_largest(token_weights, (count + kLanes - 1) / kLanes * kLanes, num_anchors);
  int32_t kept = 0;
  for (int32_t i = 0; i < count; ++i) {
    if (token_weights[i] < cut.bound || (token_weights[i] == cut.bound && cut.ties-- <= 0)) continue;
    tokens[kept++] = tokens[i];
  }
  return kept;
}

// A block's weights exp(logit - base); returns their sum.
MAC_INLINE float block_weights(const float* logits, float base, float* weights) {
  vf sum = vf{};
  for (int t = 0; t < kBlock; t += kLanes) {
    const vf weight = vexp(load(logits + t) - base);
    store(weights + t, weight);
    sum += weight;
  }
  return hsum(sum);
}

// The totals of the blocks that hold anchors, anew.
inline void renew_totals(const OldLogits& old, int g, const int32_t* anchors, int32_t count) {
  const float infinity = std::numeric_limits<float>::infinity();
  for (int32_t i = 0; i < count;) {
    const int32_t block = anchors[i] / kBlock;
    while (i < count && anchors[i] / kBlock == block) ++i;
    const float* logits = old.block(g, block);
    vf high = broadcast(-infinity);
    for (int t = 0; t < kBlock; t += kLanes) high = vmax(load(logits + t), high);
    const float max = hmax(high), base = max == -infinity ? 0.f : max;
    alignas(64) float weights[kBlock];
    *old.total(g, OldLogits::kMax, block) = max;
    *old.total(g, OldLogits::kBase, block) = base;
    *old.total(g, OldLogits::kSum, block) = block_weights(logits, base, weights);
  }
}

// A block's sum of exp(logit - base) may be taken to a base lower by this much: above, small terms were lost.
constexpr float kRebasable = 20.f;

// The sum of exp(logit - base) over all blocks; `base` is the largest of their logits.
inline float sum_of_blocks(const OldLogits& old, int g, float base) {
  vf total = vf{};
  float rest = 0.f;
  for (int32_t i = 0; i < old.num_padded; i += kLanes) {
    const vf high = load(old.total(g, OldLogits::kMax, i)), from = load(old.total(g, OldLogits::kBase, i));
    const vf lost = from - high;
    const vf sum = load(old.total(g, OldLogits::kSum, i)) * vexp(from - base);
    total += lost > kRebasable ? vf{} : sum;
    if (!(hmax(lost) > kRebasable)) continue;
    for (int j = 0; j < kLanes; ++j) {
      if (!(lost[j] > kRebasable) || std::isinf(high[j])) continue;
      alignas(64) float weights[kBlock];
      rest += block_weights(old.block(g, i + j), base, weights);
    }
  }
  return hsum(total) + rest;
}

// What is left of one head's old state once the anchors' logits are -inf: its max and sum anew, its `out` by
// subtracting what the anchors had added. Where they held nearly everything that would leave little but
// rounding errors, so there the values are summed up again. Only the anchors' own blocks are looked at.
template <typename T>
void take_out(const AmendParams& p, int request, int kv_head, const OldLogits& old, int g, const int32_t* anchors,
              int32_t count, const float* anchor_out, Total& state) {
  const int D = p.shape.head_dim;
  const float infinity = std::numeric_limits<float>::infinity();
  const float total = state.sum, total_max = state.max;
  renew_totals(old, g, anchors, count);
  vf high = broadcast(-infinity);
  for (int32_t i = 0; i < old.num_padded; i += kLanes) high = vmax(load(old.total(g, OldLogits::kMax, i)), high);
  state.max = hmax(high);
  const float base = state.max == -infinity ? 0.f : state.max;
  state.sum = sum_of_blocks(old, g, base);

  const float rescale = std::exp(total_max - base);
  if (state.sum >= kSubtractableShare<T> * total * rescale) {
    for (int d = 0; d < D; d += kLanes) {
      store(state.out + d, (load(state.out + d) - load(anchor_out + d)) * rescale);
    }
    return;
  }
  std::fill(state.out, state.out + D, 0.f);
  // All that are lighter than this do not add up to a rounding error of the sum.
  const float num_tokens = static_cast<float>(old.num_blocks) * kBlock;
  const float lightest = state.sum * std::numeric_limits<float>::epsilon() / num_tokens;
  const float lowest = base + std::log(lightest);
  for (int32_t i = 0; i < old.num_blocks; ++i) {
    if (*old.total(g, OldLogits::kMax, i) < lowest) continue;
    alignas(64) float weights[kBlock];
    block_weights(old.block(g, i), base, weights);
    for (int t = 0; t < kBlock; ++t) {
      if (weights[t] < lightest || weights[t] == 0.f) continue;  // a NaN stays
      const T* row = token_value<T>(p, request, kv_head, i * kBlock + t);
      for (int d = 0; d < D; d += kLanes) {
        store(state.out + d, load(state.out + d) + load(row + d) * weights[t]);
      }
    }
  }
}

// Moves the chosen tokens' terms from the old totals to the fresh ones. The logits lose them. `weights` has room
// for the anchors in whole vectors.
template <typename T>
void move_anchors(const AmendParams& p, Total* totals, const OldLogits& logits, const int32_t* anchors,
                  int32_t count, int request, int kv_head, float* moved, float* weights) {
  const int G = p.shape.group_size, D = p.shape.head_dim;
  for (int i = 0; i < count; ++i) prefetch_row(token_value<T>(p, request, kv_head, anchors[i]), D);
  for (int g = 0; g < G; ++g) {
    Total& old = totals[kOld * G + g];
    Total& fresh = totals[kFresh * G + g];
    if (old.sum == 0.f) continue;
    Total anchor{old.max, 0.f, moved};
    std::fill(moved, moved + D, 0.f);
    for (int i = 0; i < count; ++i) {
      float& logit = logits.block(g, anchors[i] / kBlock)[anchors[i] % kBlock];
      weights[i] = logit - old.max;
      logit = -std::numeric_limits<float>::infinity();
    }
    for (int i = 0; i < count; i += kLanes) store(weights + i, vexp(load(weights + i)));
    for (int i = 0; i < count; ++i) {
      anchor.sum += weights[i];
      const T* row = token_value<T>(p, request, kv_head, anchors[i]);
      for (int d = 0; d < D; d += kLanes) {
        store(anchor.out + d, load(anchor.out + d) + load(row + d) * weights[i]);
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

// The last totals of every row, beyond the blocks.
MAC_INLINE void pad_totals(const OldLogits& old, int group_size) {
  for (int g = 0; g < group_size; ++g) {
    for (int32_t i = old.num_blocks; i < old.num_padded; ++i) {
      *old.total(g, OldLogits::kMax, i) = -std::numeric_limits<float>::infinity();
      *old.total(g, OldLogits::kBase, i) = 0.f;
      *old.total(g, OldLogits::kSum, i) = 0.f;
    }
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
    const OldLogits old = old_logits(p, work, request, group);
    pad_totals(old, G);
    const int64_t most = static_cast<int64_t>(std::min(p.num_anchors, old.num_blocks)) * kBlock + kLanes;
    int32_t* tokens = scratch.array<int32_t>(6, most);
    const int32_t count =
        choose_anchors(old, lse, G, p.num_anchors, scratch.array<float>(3, old.num_padded),
                       scratch.array<int32_t>(4, old.num_blocks), scratch.array<float>(5, most), tokens);
    std::copy(tokens, tokens + count, anchors);
    float* moved = scratch.array<float>(3, D);
    float* weights = scratch.array<float>(4, (count + kLanes - 1) / kLanes * kLanes);
    move_anchors<T>(p, totals, old, anchors, count, request, kv_head, moved, weights);
  }

  for (int span = 0; span < kNumSpans; ++span) {
    for (int g = 0; g < G; ++g) {
      write_state(p, static_cast<Span>(span), request, kv_head * G + g, totals[span * G + g]);
    }
  }
}
