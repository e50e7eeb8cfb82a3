// A block of one KV head's rows, attended by a tile of query heads: dots, an online softmax, the weighted values.
//
// Traffic: the rows of K and V, which `next` and `stream` have brought near; what comes after them is asked for
// here.

constexpr int kTileHeads = MAC_LEVEL >= 1 || MAC_NEON ? 4 : 2;  // query heads that share a loaded K or V row
// Rows whose dots are computed together, and vectors of a V row kept in registers, of which AVX2 has 16.
template <int kHeads>
constexpr int kDotRows = MAC_LEVEL == 1 && kHeads > 2 ? 2 : 4;
template <int kHeads>
constexpr int kTileVectors = MAC_LEVEL == 1 && kHeads > 2 ? 2 : 4;
constexpr int kFetchedRows = 2;   // V rows that are fetched beside a head's softmax
constexpr int kFetchedLines = 4;  // and lines of the stream

// T is what the cache holds. With bf16 dot products the query stays bf16, in all other cases it is expanded once.
// It is stored as the dots read it: for every tile of heads and kDotElements of a row, those of each head.
template <typename T>
struct QueryType {
  using type = float;
};
#if MAC_LEVEL >= 3 || MAC_NEON >= 2
template <>
struct QueryType<bfloat16> {
  using type = bfloat16;
};
#endif
template <typename Q>
constexpr int kDotElements = sizeof(Q) == 2 ? 2 * kLanes : kLanes;
template <typename Q>
MAC_INLINE int query_tile_size(int head_dim) {
  return (head_dim + kDotElements<Q> - 1) / kDotElements<Q> * kDotElements<Q> * kTileHeads;
}

// Dots of kHeads queries with some rows, kDotElements at a time.
template <typename T, int kHeads, int kRows>
MAC_INLINE const float* add_dots(vf (&sum)[kHeads][kRows], const float* query, const T* const* rows, int64_t d) {
  vf k[kRows];
  for (int i = 0; i < kRows; ++i) k[i] = load(rows[i] + d);
  for (int h = 0; h < kHeads; ++h) {
    const vf q = load(query + h * kLanes);
    for (int i = 0; i < kRows; ++i) sum[h][i] += q * k[i];
  }
  return query + kTileHeads * kLanes;
}

#if MAC_LEVEL >= 3
template <int kHeads>
MAC_INLINE void add_pairs(vf (&sum)[kHeads][4], const bfloat16* query, const __m512bh (&k)[4]) {
  for (int h = 0; h < kHeads; ++h) {
    const __m512bh q = (__m512bh)_mm512_loadu_si512(query + h * 32);
    for (int i = 0; i < 4; ++i) sum[h][i] = (vf)_mm512_dpbf16_ps((__m512)sum[h][i], q, k[i]);
  }
}
template <typename T, int kHeads, int kRows>
MAC_INLINE const bfloat16* add_dots(vf (&sum)[kHeads][kRows], const bfloat16* query, const T* const* rows,
                                    int64_t d) {
  __m512bh k[4];
  for (int i = 0; i < 4; ++i) k[i] = (__m512bh)_mm512_loadu_si512(rows[i] + d);
  add_pairs<kHeads>(sum, query, k);
  return query + kTileHeads * 32;
}
// The last 16 elements of a row of, say, 80; the other half is zero.
template <typename T, int kHeads, int kRows>
MAC_INLINE void add_last_dots(vf (&sum)[kHeads][kRows], const bfloat16* query, const T* const* rows, int64_t d) {
  __m512bh k[4];
  for (int i = 0; i < 4; ++i) {
    k[i] = (__m512bh)_mm512_zextsi256_si512(_mm256_loadu_si256((const __m256i*)(rows[i] + d)));
  }
  add_pairs<kHeads>(sum, query, k);
}
#elif MAC_NEON >= 2
template <typename T, int kHeads, int kRows>
MAC_INLINE const bfloat16* add_dots(vf (&sum)[kHeads][kRows], const bfloat16* query, const T* const* rows,
                                    int64_t d) {
  const auto eight = [](const bfloat16* p) { return vreinterpretq_bf16_u16(vld1q_u16(&p->bits)); };
  bfloat16x8_t k[4];
  for (int i = 0; i < 4; ++i) k[i] = eight(rows[i] + d);
  for (int h = 0; h < kHeads; ++h) {
    const bfloat16x8_t q = eight(query + h * 8);
    for (int i = 0; i < 4; ++i) sum[h][i] = (vf)vbfdotq_f32((float32x4_t)sum[h][i], q, k[i]);
  }
  return query + kTileHeads * 8;
}
// A row is whole dots.
template <typename T, int kHeads, int kRows>
MAC_INLINE void add_last_dots(vf (&)[kHeads][kRows], const bfloat16*, const T* const*, int64_t) {}
#endif
template <typename T, int kHeads, int kRows>
MAC_INLINE void add_last_dots(vf (&)[kHeads][kRows], const float*, const T* const*, int64_t) {}

// While a KV head's rows are computed, the `next` head's are fetched into the L1 cache and the next block's, as
// `stream` has them, into the L2 cache, a few lines at a time in each of the three loops below: a core keeps only
// so many lines on their way, so they have to be asked for steadily.

// Logits of kHeads heads for one block, [kHeads, kBlock], ahead of scale and soft cap.
template <typename T, int kHeads, typename Q>
MAC_ALONE void block_logits(const Q* query, const Rows<T>& rows, const Rows<T>& next, Stream& stream,
                            int64_t head_dim, float* logits) {
  constexpr int kStep = kDotElements<Q>, kRows = kDotRows<kHeads>;
  for (int t = 0; t < rows.count; t += kRows) {
    const T *k[kRows], *next_k[kRows];
    for (int i = 0; i < kRows; ++i) {
      k[i] = rows.k + rows.k_at[t + i];
      next_k[i] = next.k + next.k_at[t + i];
    }
    vf sum[kHeads][kRows] = {};
    const Q* q = query;
    int64_t d = 0;
    for (; d + kStep <= head_dim; d += kStep) {
      if (kStep == kLineElements<T> || d % kLineElements<T> == 0) {
        for (int i = 0; i < kRows; ++i) prefetch(next_k[i] + d);
        for (int i = 0; i < kRows; i += 2) stream.fetch<2>();
      }
      q = add_dots<T, kHeads, kRows>(sum, q, k, d);
    }
    if (d < head_dim) add_last_dots<T, kHeads, kRows>(sum, q, k, d);
    // Four sums at a time.
    for (int h = 0; h < kHeads; h += 4 / kRows) {
      const int other = kRows == 4 || h + 1 == kHeads ? h : h + 1;
      float four[4];
      hsum4(sum[h][0], sum[h][1], sum[other][kRows - 2], sum[other][kRows - 1], four);
      std::memcpy(logits + h * kBlock + t, four, 4 * kRows);
      if (other > h) std::memcpy(logits + other * kBlock + t, four + kRows, 4 * kRows);
    }
  }
}

// out[h] = out[h] * rescale[h] + sum over the block of weight * value, for kVectors vectors of a row.
template <typename T, int kHeads, int kVectors>
MAC_ALONE void add_values(const Rows<T>& rows, const Rows<T>& next, Stream& stream, const float* weights,
                          const float* rescale, int64_t d, int64_t head_dim_v, float* out) {
  vf sum[kHeads][kVectors];
  for (int h = 0; h < kHeads; ++h) {
    for (int i = 0; i < kVectors; ++i) {
      sum[h][i] = load(out + h * head_dim_v + d + i * kLanes) * rescale[h];
    }
  }
  const T* const first = rows.v + d;
  const T* const next_first = next.v + d;
  constexpr int kLines = (kVectors * kLanes + kLineElements<T> - 1) / kLineElements<T>;
  const bool first_of_line = d % kLineElements<T> == 0;
  const int64_t count = rows.count;
  for (int64_t t = 0; t < count; ++t) {
    const T* row = first + rows.v_at[t];
    const T* next_row = next_first + next.v_at[t];
    if (first_of_line) {
      for (int i = 0; i < kVectors * kLanes; i += kLineElements<T>) prefetch(next_row + i);
      stream.fetch<kLines>();
    }
    vf v[kVectors];
    for (int i = 0; i < kVectors; ++i) v[i] = load(row + i * kLanes);
    for (int h = 0; h < kHeads; ++h) {
      const vf weight = broadcast(weights[h * kBlock + t]);
      for (int i = 0; i < kVectors; ++i) sum[h][i] += weight * v[i];
    }
  }
  for (int h = 0; h < kHeads; ++h) {
    for (int i = 0; i < kVectors; ++i) store(out + h * head_dim_v + d + i * kLanes, sum[h][i]);
  }
}

// Running softmax of kHeads heads over one task: the state (max, sum, out) of each head in place.
struct Running {
  float* max;
  float* sum;
  float* out;             // [kHeads, V]
  float* light;           // [kHeads] sum of a exp(logit - max)
  const float* a;         // [kBlock] of anchors, else null
  const float* counts;    // [kBlock] how many tokens each of those is counted as
  const float* last_lse;  // [kHeads] while a sample is drawn, else null
  float* weight;          // [kBlock] then raised to each head's exp(logit - last_lse)
  float scale;            // of the logits
};

template <typename T, int kHeads, typename Q>
void attend_block(const AmendParams& p, const Q* query, const Rows<T>& rows, const Rows<T>& next, Stream& stream,
                  const Running& state) {
  const int D = p.shape.head_dim, V = p.shape.head_dim_v;
  alignas(64) float logits[kHeads * kBlock] = {};
  float rescale[kHeads];
  block_logits<T, kHeads>(query, rows, next, stream, D, logits);
  for (int h = 0; h < kHeads; ++h) {
    float* row = logits + h * kBlock;
    for (int t = 0; t < kFetchedRows; ++t) prefetch_row(next.v + next.v_at[kBlock - 1 - h * kFetchedRows - t], V);
    stream.fetch<kFetchedLines>();
    for (int t = 0; t < kBlock; t += kLanes) {
      vf x = load(row + t) * state.scale;
      if (p.logits_soft_cap > 0.f) x = p.logits_soft_cap * vtanh(x / p.logits_soft_cap);
      store(row + t, x);
    }
    for (int t = rows.count; t < kBlock; ++t) row[t] = -std::numeric_limits<float>::infinity();
    vf high = broadcast(-std::numeric_limits<float>::infinity());
    for (int t = 0; t < kBlock; t += kLanes) high = vmax(load(row + t), high);
    const float block_max = hmax(high), before = state.max[h];
    const float max = block_max > before ? block_max : before;
    const float base = max == -std::numeric_limits<float>::infinity() ? 0.f : max;
    rescale[h] = before == max ? 1.f : std::exp(before - base);
    vf sum = vf{};
    for (int t = 0; t < kBlock; t += kLanes) {
      const vf weight = vexp(load(row + t) - base);
      store(row + t, weight);
      sum += weight;
    }
    if (state.a) {
      vf light = sum = vf{};
      for (int t = 0; t < kBlock; t += kLanes) {
        const vf weight = load(row + t), counted = weight * load(state.counts + t);
        light += weight * load(state.a + t);
        store(row + t, counted);
        sum += counted;
      }
      state.light[h] = state.light[h] * rescale[h] + hsum(light);
    }
    state.sum[h] = state.sum[h] * rescale[h] + hsum(sum);
    if (state.last_lse) {
      const float factor = std::exp(base - state.last_lse[h]);
      for (int t = 0; t < kBlock; t += kLanes) {
        store(state.weight + t, vmax(load(row + t) * factor, load(state.weight + t)));
      }
    }
    state.max[h] = max;
  }
  int d = 0;
  constexpr int kVectors = kTileVectors<kHeads>;
  for (; d + kVectors * kLanes <= V; d += kVectors * kLanes) {
    add_values<T, kHeads, kVectors>(rows, next, stream, logits, rescale, d, V, state.out);
  }
  for (; d < V; d += kLanes) add_values<T, kHeads, 1>(rows, next, stream, logits, rescale, d, V, state.out);
}
