// Amend: split-KV decode attention over just the tokens that reuse does not cover.
//
//   s = E(c) on a hit, 0 on a miss
//   old   = state([s, E(p)) without the anchors)        fresh = state(anchors) (+) state([E(p), n))
//
// Tasks: pieces of the tokens of one KV head, at most 512 long, for all query heads that share it (see
// schedule.cpp). Each leaves a partial state; whoever finishes the last task of a KV head merges its
// partials and, on a miss, chooses the anchors. Traffic: the K and V rows of [s, n) once, in place from
// their pages, plus the inherited anchors' rows; on a miss with anchors also 8 G bytes of logits a token.

constexpr int kTileHeads = MAC_LEVEL >= 2 ? 4 : 2;  // query heads that share a loaded K or V row
constexpr int kTileVectors = 4;                     // vectors of a V row kept in registers

// With bf16 dot products the query stays bf16, in all other cases it is expanded once.
template <typename T>
struct QueryType {
  using type = float;
};
#if MAC_LEVEL >= 3
template <>
struct QueryType<bfloat16> {
  using type = bfloat16;
};
#endif

template <typename T, int kHeads>
MAC_INLINE void accumulate_dots(vf (&sum)[kHeads][4], const float* query, const T* const* rows, int head_dim) {
  for (int d = 0; d < head_dim; d += kLanes) {
    vf k[4];
    for (int i = 0; i < 4; ++i) k[i] = load(rows[i] + d);
    for (int h = 0; h < kHeads; ++h) {
      const vf q = load(query + h * head_dim + d);
      for (int i = 0; i < 4; ++i) sum[h][i] += q * k[i];
    }
  }
}

#if MAC_LEVEL >= 3
// Half a register, the rest zero: a row of 80 elements ends with one.
MAC_INLINE __m512bh load_pairs(const bfloat16* p, bool half) {
  return half ? (__m512bh)_mm512_zextsi256_si512(_mm256_loadu_si256((const __m256i*)p))
              : (__m512bh)_mm512_loadu_si512(p);
}
template <typename T, int kHeads>
MAC_INLINE void accumulate_dots(vf (&sum)[kHeads][4], const bfloat16* query, const T* const* rows, int head_dim) {
  for (int d = 0; d < head_dim; d += 32) {
    const bool half = d + 32 > head_dim;
    __m512bh k[4];
    for (int i = 0; i < 4; ++i) k[i] = load_pairs(rows[i] + d, half);
    for (int h = 0; h < kHeads; ++h) {
      const __m512bh q = load_pairs(query + h * head_dim + d, half);
      for (int i = 0; i < 4; ++i) sum[h][i] = (vf)_mm512_dpbf16_ps((__m512)sum[h][i], q, k[i]);
    }
  }
}
#endif

// Logits of kHeads heads for one block, [kHeads, kBlock], ahead of scale and soft cap. Strided rows are
// more than the hardware prefetcher follows, so the next block is asked for here.
template <typename T, int kHeads, typename Q>
MAC_INLINE void block_logits(const Q* query, const Rows<T>& rows, const Rows<T>& next, int head_dim,
                             float* logits) {
  const int row_bytes = head_dim * static_cast<int>(sizeof(T));
  for (int t = 0; t < rows.count; t += 4) {
    if (t < next.count) {
      for (int i = 0; i < 4; ++i) {
        for (int byte = 0; byte < row_bytes; byte += 64) {
          prefetch(reinterpret_cast<const char*>(next.k[t + i]) + byte);
          prefetch(reinterpret_cast<const char*>(next.v[t + i]) + byte);
        }
      }
    }
    vf sum[kHeads][4] = {};
    accumulate_dots<T, kHeads>(sum, query, rows.k + t, head_dim);
    for (int h = 0; h < kHeads; ++h) {
      hsum4(sum[h][0], sum[h][1], sum[h][2], sum[h][3], logits + h * kBlock + t);
    }
  }
}

// out[h] = out[h] * rescale[h] + sum over the block of weight * value, for kVectors vectors of a row.
template <typename T, int kHeads, int kVectors>
MAC_INLINE void add_values(const Rows<T>& rows, const float* weights, const float* rescale, int d, int head_dim,
                           float* out) {
  vf sum[kHeads][kVectors];
  for (int h = 0; h < kHeads; ++h) {
    for (int i = 0; i < kVectors; ++i) {
      sum[h][i] = load(out + h * head_dim + d + i * kLanes) * rescale[h];
    }
  }
  for (int t = 0; t < rows.count; ++t) {
    vf v[kVectors];
    for (int i = 0; i < kVectors; ++i) v[i] = load(rows.v[t] + d + i * kLanes);
    for (int h = 0; h < kHeads; ++h) {
      const vf weight = broadcast(weights[h * kBlock + t]);
      for (int i = 0; i < kVectors; ++i) sum[h][i] += weight * v[i];
    }
  }
  for (int h = 0; h < kHeads; ++h) {
    for (int i = 0; i < kVectors; ++i) store(out + h * head_dim + d + i * kLanes, sum[h][i]);
  }
}

// Running softmax of kHeads heads over one task: the state (max, sum, out) of each head in place.
struct Running {
  float* max;
  float* sum;
  float* out;     // [kHeads, D]
  float* logits;  // where to keep the logits for choosing anchors, or null
  int64_t logits_stride;
};

template <typename T, int kHeads, typename Q>
void attend_block(const AmendParams& p, const Q* query, const Rows<T>& rows, const Rows<T>& next,
                  const Running& state) {
  const int D = p.shape.head_dim;
  alignas(64) float logits[kHeads * kBlock] = {};
  float rescale[kHeads];
  block_logits<T, kHeads>(query, rows, next, D, logits);
  for (int h = 0; h < kHeads; ++h) {
    float* row = logits + h * kBlock;
    for (int t = 0; t < kBlock; t += kLanes) {
      vf x = load(row + t) * p.sm_scale;
      if (p.logits_soft_cap > 0.f) x = p.logits_soft_cap * vtanh(x / p.logits_soft_cap);
      store(row + t, x);
    }
    for (int t = rows.count; t < kBlock; ++t) row[t] = -std::numeric_limits<float>::infinity();
    if (state.logits) {
      std::memcpy(state.logits + h * state.logits_stride, row, rows.count * sizeof(float));
    }
    vf high = broadcast(state.max[h]);
    for (int t = 0; t < kBlock; t += kLanes) high = vmax(load(row + t), high);
    const float max = hmax(high);
    const float base = max == -std::numeric_limits<float>::infinity() ? 0.f : max;
    rescale[h] = state.max[h] == max ? 1.f : std::exp(state.max[h] - base);
    vf sum = vf{};
    for (int t = 0; t < kBlock; t += kLanes) {
      const vf weight = vexp(load(row + t) - base);
      store(row + t, weight);
      sum += weight;
    }
    state.sum[h] = state.sum[h] * rescale[h] + hsum(sum);
    state.max[h] = max;
  }
  int d = 0;
  for (; d + kTileVectors * kLanes <= D; d += kTileVectors * kLanes) {
    add_values<T, kHeads, kTileVectors>(rows, logits, rescale, d, D, state.out);
  }
  for (; d < D; d += kLanes) add_values<T, kHeads, 1>(rows, logits, rescale, d, D, state.out);
}

// One task: its active heads' queries side by side, their running states in `scratch`.
template <typename T>
void amend_task(const AmendParams& p, AmendWork& work, const AmendTask& task, Scratch& scratch) {
  using Q = typename QueryType<T>::type;
  const int G = p.shape.group_size, D = p.shape.head_dim;
  const int kv_head = task.group % p.shape.num_kv_heads;
  const int request = task.group / p.shape.num_kv_heads;
  const AmendGroup& group = work.groups[task.group];
  const int32_t* anchors = task.anchors ? group.inherited : nullptr;

  float* out = scratch.array<float>(0, static_cast<int64_t>(G) * D);  // [G, D]
  float* max = scratch.array<float>(1, G);
  float* sum = scratch.array<float>(2, G);
  int32_t* head_of = scratch.array<int32_t>(3, G);  // which head of the group
  Q* query = scratch.array<Q>(4, static_cast<int64_t>(G) * D);

  int heads = 0;
  const T* rows = static_cast<const T*>(p.query.data) + request * p.query.batch_stride;
  for (int g = 0; g < G; ++g) {
    const int head = kv_head * G + g;
    if (!task.anchors && amend_start(p, request, head) > task.begin) continue;
    const T* row = rows + head * p.query.head_stride;
    for (int d = 0; d < D; d += kLanes) store(query + heads * D + d, load(row + d));
    head_of[heads++] = g;
  }
  std::fill(out, out + static_cast<int64_t>(heads) * D, 0.f);
  std::fill(max, max + heads, -std::numeric_limits<float>::infinity());
  std::fill(sum, sum + heads, 0.f);

  const int64_t logits_stride = group.logits < 0 ? 0 : band_start(p.requests.seq_lens[request] - 1, p.band);
  float* kept = group.logits >= 0 && task.span == kOld ? work.logits.get() + group.logits : nullptr;

  Rows<T> current, next;
  find_rows(p, task, anchors, task.begin, current);
  for (int first = task.begin; current.count > 0; first += kBlock) {
    find_rows(p, task, anchors, first + kBlock, next);
    Rows<T> none;
    none.count = 0;
    for (int h = 0; h < heads;) {
      const Running state{max + h, sum + h, out + static_cast<int64_t>(h) * D,
                          kept ? kept + h * logits_stride + first : nullptr, logits_stride};
      const Q* q = query + static_cast<int64_t>(h) * D;
      const Rows<T>& ahead = h == 0 ? next : none;
      const int tile = std::min(heads - h, kTileHeads);
      switch (tile) {
        case 1: attend_block<T, 1>(p, q, current, ahead, state); break;
        case 2: attend_block<T, 2>(p, q, current, ahead, state); break;
#if MAC_LEVEL >= 2
        case 3: attend_block<T, 3>(p, q, current, ahead, state); break;
        case 4: attend_block<T, 4>(p, q, current, ahead, state); break;
#endif
      }
      h += tile;
    }
    current = next;
  }

  // Heads that take no part leave an empty state.
  float* partial_max = work.partial_max.get() + task.partial * G;
  float* partial_sum = work.partial_sum.get() + task.partial * G;
  std::fill(partial_max, partial_max + G, -std::numeric_limits<float>::infinity());
  std::fill(partial_sum, partial_sum + G, 0.f);
  for (int h = 0; h < heads; ++h) {
    partial_max[head_of[h]] = max[h];
    partial_sum[head_of[h]] = sum[h];
    float* partial = work.partial_out.get() + (task.partial * G + head_of[h]) * D;
    std::memcpy(partial, out + static_cast<int64_t>(h) * D, D * sizeof(float));
  }
}

template <typename T>
void amend_all(const AmendParams& p, AmendWork& work) {
  Scratch scratch;
  const int64_t num_tasks = static_cast<int64_t>(work.tasks.size());
  for (int64_t i; (i = work.next.fetch_add(1, std::memory_order_relaxed)) < num_tasks;) {
    const AmendTask& task = work.tasks[i];
    amend_task<T>(p, work, task, scratch);
    // Release our partial and, as the last one, acquire everybody's.
    if (work.pending[task.group].fetch_sub(1, std::memory_order_acq_rel) == 1) {
      finish_group<T>(p, work, task.group, scratch);
    }
  }
}

void amend(const AmendParams& p, AmendWork& work) {
  switch (p.dtype) {
    case DType::kFloat32: return amend_all<float>(p, work);
    case DType::kBFloat16: return amend_all<bfloat16>(p, work);
    case DType::kFloat16: return amend_all<float16>(p, work);
  }
}
