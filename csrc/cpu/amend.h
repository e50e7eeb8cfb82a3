// Amend: split-KV decode attention over just the tokens that reuse does not cover, see Span.
//
// Tasks: pieces of one request's tokens for all of its KV heads that need them (see schedule.cpp), so that
// rows are read in about the order in which they lie in memory. Each leaves a partial state; when a request's
// tasks are done, whoever is free merges its KV heads' partials. Traffic: the K and V rows of the tokens once, in
// place from their pages; those of a hit's anchors serve both queries.

// A task's candidates of one KV head: brought to the list that all tasks share a few at a time.
struct Found {
  static constexpr int kRoom = 64;
  int count;
  int32_t tokens[kRoom];
  float weights[kRoom];
};

inline void hand_over(const AmendParams& p, const AmendWork& work, int64_t group_index, Found& found) {
  const int64_t first = work.groups[group_index].candidates, room = int64_t{kCandidateRoom} * p.num_anchors;
  const int32_t at = work.num_candidates[group_index].fetch_add(found.count, std::memory_order_relaxed);
  const int64_t count = std::min<int64_t>(found.count, room - at);
  for (int i = 0; i < count; ++i) {
    work.candidate_tokens[first + at + i] = found.tokens[i];
    work.candidate_weights[first + at + i] = found.weights[i];
  }
  found.count = 0;
}

// Takes down which of a block's tokens, the first of which is `token`, are candidates by their weights.
inline void take_candidates(const AmendParams& p, const AmendWork& work, int64_t group_index, int token, int count,
                            const float* weight, Found& found) {
  const AmendGroup& group = work.groups[group_index];
  if (found.count + kBlock > Found::kRoom) hand_over(p, work, group_index, found);
  for (int t = 0; t < count; t += kLanes) {
    const vf bound = uniforms(group.seed, count_from(token + t)) * group.tau;
    uint32_t lanes = lanes_above(load(weight + t), bound);
    if (count - t < kLanes) lanes &= (1u << (count - t)) - 1;
    for (; lanes; lanes &= lanes - 1) {
      const int i = t + __builtin_ctz(lanes);
      found.tokens[found.count] = token + i;
      found.weights[found.count++] = weight[i];
    }
  }
}

// One thread's part of a task: the states of all queries, in the order of `AmendWork::queries`, so that of the
// heads of a KV head the ones that attend to a token come first.
template <typename T>
struct TaskState {
  typename QueryType<T>::type* query;  // [H, T, tiles of heads, query_tile_size]
  float* out;                          // [Q, V]
  float* max;                          // [Q]
  float* sum;                          // [Q]
  float* light;                        // [Q]
  Found* found;                        // [H]
};

MAC_INLINE int num_tiles(int group_size) {
  return (group_size + kTileHeads - 1) / kTileHeads;
}

// The first `heads` query heads of a KV head, of one query token, attend to rows, the first of which is `token`, or
// to anchors of these weights `a`, counted as `counts`.
template <typename T>
void attend(const AmendParams& p, const AmendWork& work, const AmendTask& task, const TaskState<T>& state,
            int kv_head, int query_token, int heads, int token, const float* a, const float* counts,
            const Rows<T>& rows, const Rows<T>& next, Stream& stream) {
  using Q = typename QueryType<T>::type;
  const int G = p.shape.group_size, D = p.shape.head_dim;
  const int64_t group_index = static_cast<int64_t>(task.request) * p.shape.num_kv_heads + kv_head;
  const AmendGroup& group = work.groups[group_index];
  const bool draws = group.candidates >= 0 && task.tokens == Tokens::kOld && query_token == 0;
  const int64_t first_tile = (static_cast<int64_t>(kv_head) * p.shape.tokens + query_token) * num_tiles(G);
  const int64_t tile_size = query_tile_size<Q>(D);
  const float scale = p.sm_scale * kUnit<T> * p.kv.k_scale.of(kv_head);
  alignas(64) float weight[kBlock];
  if (draws) std::fill(weight, weight + kBlock, 0.f);
  for (int h = 0; h < heads; h += kTileHeads) {
    const int head = (kv_head * p.shape.tokens + query_token) * G + h;
    const Running running{state.max + head,
                          state.sum + head,
                          state.out + static_cast<int64_t>(head) * p.shape.head_dim_v,
                          state.light + head,
                          a,
                          counts,
                          draws ? group.last_lse + h : nullptr,
                          weight,
                          scale};
    const Q* query = state.query + (first_tile + h / kTileHeads) * tile_size;
    switch (std::min(heads - h, kTileHeads)) {
      case 1: attend_block<T, 1>(p, query, rows, next, stream, running); break;
      case 2: attend_block<T, 2>(p, query, rows, next, stream, running); break;
#if MAC_LEVEL >= 1 || MAC_NEON
      case 3: attend_block<T, 3>(p, query, rows, next, stream, running); break;
      case 4: attend_block<T, 4>(p, query, rows, next, stream, running); break;
#endif
    }
  }
  if (draws) take_candidates(p, work, group_index, token, rows.count, weight, state.found[kv_head]);
}

template <typename T>
void fetch(const Rows<T>& rows, const Shape& shape) {
  for (int t = 0; t < rows.count; ++t) {
    prefetch_row(rows.k + rows.k_at[t], shape.head_dim);
    prefetch_row(rows.v + rows.v_at[t], shape.head_dim_v);
  }
}

// `now` by the current query, `then` by the matched entries'.
template <typename T>
void attend_anchors(const AmendParams& p, const AmendWork& work, const AmendTask& task, const TaskState<T>& now,
                    const TaskState<T>& then) {
  const int G = p.shape.group_size, T_ = p.shape.tokens;
  const int64_t S = p.num_anchors;
  const AmendHit* hits = &work.hits[static_cast<int64_t>(task.request) * p.shape.num_kv_heads * T_];
  struct Listed {
    Block block;
    int kv_head, query_token;
    alignas(64) float a[kBlock], counts[kBlock];
  };
  int64_t at = task.begin;
  const auto find_next = [&](Listed& listed) {
    while (at < task.end && at % S >= hits[at / S].num_anchors) at = (at / S + 1) * S;
    listed.block.count = 0;
    if (at >= task.end) return;
    const int64_t list = at / S, first = at % S;
    listed.kv_head = static_cast<int>(list / T_), listed.query_token = static_cast<int>(list % T_);
    const AmendHit& hit = hits[list];
    const int64_t count = std::min(hit.num_anchors - first, task.end - at);
    find_listed(p, task.request, hit.anchors + first, static_cast<int>(count), listed.block);
    std::fill(listed.a, listed.a + kBlock, 0.f);
    std::copy(hit.anchor_weights + first, hit.anchor_weights + first + listed.block.count, listed.a);
    for (int t = 0; t < kBlock; ++t) listed.counts[t] = counted(listed.a[t], hit.density);
    at += listed.block.count;
  };
  // They lie anywhere, so what is waited for is memory's latency: rows are asked for two blocks ahead, steadily,
  // and brought nearer one block ahead.
  Listed lists[3];
  const auto rows_of = [&](const Listed& listed) { return head_rows<T>(p, listed.block, listed.kv_head); };
  find_next(lists[0]);
  find_next(lists[1]);
  fetch(rows_of(lists[0]), p.shape);
  if (lists[1].block.count > 0) fetch(rows_of(lists[1]), p.shape);
  for (int i = 0; lists[i].block.count > 0; i = (i + 1) % 3) {
    const Listed &listed = lists[i], &following = lists[(i + 1) % 3];
    Listed& after = lists[(i + 2) % 3];
    find_next(after);
    Stream stream;
    if (after.block.count > 0) stream.add_listed<T>(p, after.block, after.kv_head);
    const Rows<T> rows = rows_of(listed), next = following.block.count > 0 ? rows_of(following) : rows;
    for (const TaskState<T>* state : {&now, &then}) {
      attend<T>(p, work, task, *state, listed.kv_head, listed.query_token, G, 0, listed.a, listed.counts, rows,
                next, stream);
    }
  }
}

// How many of a request's KV heads, in their order, attend to a token before `end`; at least `active`.
inline int active_heads(const AmendParams& p, const AmendWork& work, int request, int end, int active) {
  const int H = p.shape.num_kv_heads;
  const int32_t* starts = work.kv_starts.data() + static_cast<int64_t>(request) * H;
  while (active < H && starts[active] < end) ++active;
  return active;
}

// `following`: the thread's next task if that is known, whose first block is fetched beside the last one of this
// task. `fetched`: that has been done for this one.
template <typename T>
void attend_tokens(const AmendParams& p, const AmendWork& work, const AmendTask& task, const AmendTask* following,
                   bool fetched, const TaskState<T>& state) {
  const int G = p.shape.group_size, H = p.shape.num_kv_heads, task_end = static_cast<int>(task.end);
  const int32_t* order = work.kv_heads.data() + static_cast<int64_t>(task.request) * H;
  const int32_t* starts = work.starts.data() + static_cast<int64_t>(task.request) * p.shape.num_queries();
  Block blocks[2];
  find_tokens(p, task.request, static_cast<int>(task.begin), task_end, blocks[0]);
  if (!fetched) fetch(head_rows<T>(p, blocks[0], order[0]), p.shape);
  const int tokens = query_len(p.shape, p.requests, task.request);
  const int position = first_position(p.shape, p.requests, task.request);
  int active = 0;  // KV heads that attend to a token of the block
  for (int first = static_cast<int>(task.begin), i = 0; first < task_end; first += kBlock, i ^= 1) {
    const Block& block = blocks[i];
    const int end = first + block.count;
    active = active_heads(p, work, task.request, end, active);

    Block& next_block = blocks[i ^ 1];
    const bool last = end >= task_end;
    const AmendTask& next_task = last && following ? *following : task;
    const int next_first = last && following ? static_cast<int>(following->begin) : end;
    const int32_t* next_order = work.kv_heads.data() + static_cast<int64_t>(next_task.request) * H;
    find_tokens(p, next_task.request, next_first, static_cast<int>(next_task.end), next_block);
    const int next_active = active_heads(p, work, next_task.request, next_first + next_block.count, 0);
    Stream stream;
    stream.add<T>(p, next_block, next_first, next_order, next_active);

    for (int j = 0; j < active; ++j) {
      const Rows<T> rows = head_rows<T>(p, block, order[j]);
      const Rows<T> next = j + 1 < active         ? head_rows<T>(p, block, order[j + 1])
                           : next_block.count > 0 ? head_rows<T>(p, next_block, next_order[0])
                                                  : rows;
      int final = tokens - 1;  // the last query token that attends to the block
      while (final > 0 && starts[(order[j] * p.shape.tokens + final) * G] >= end) --final;
      for (int k = 0; k <= final; ++k) {
        const int32_t* start = starts + (order[j] * p.shape.tokens + k) * G;
        const int last = std::min(end, position + k + 1);  // a query attends to its own token and those before
        int heads = 0;
        for (int t = std::max(first, start[0]); t < last;) {
          while (heads < G && start[heads] <= t) ++heads;
          const int cut = heads < G ? std::min(last, start[heads]) : last;
          attend<T>(p, work, task, state, order[j], k, heads, t, nullptr, nullptr, rows.from(t - first, cut - t),
                    k < final ? rows : next, stream);
          t = cut;
        }
      }
    }
  }
}

// A query as the dots read it: number `i` in the order.
template <typename T, typename Q>
MAC_INLINE void arrange_query(const AmendParams& p, int i, const T* row, Q* query) {
  const int G = p.shape.group_size, D = p.shape.head_dim;
  Q* to = query + (static_cast<int64_t>(i / G) * num_tiles(G) + i % G / kTileHeads) * query_tile_size<Q>(D) +
          i % G % kTileHeads * kDotElements<Q>;
  for (int d = 0; d < D; d += kLanes) {
    store(to + d / kDotElements<Q> * kDotElements<Q> * kTileHeads + d % kDotElements<Q>, load(row + d));
  }
}

// An empty state, with room from place `first` of the scratch memory on.
template <typename T>
TaskState<T> empty_state(const AmendParams& p, Scratch& scratch, int first) {
  using Q = typename QueryType<T>::type;
  const int D = p.shape.head_dim, V = p.shape.head_dim_v, H = p.shape.num_kv_heads;
  const int64_t queries = p.shape.num_queries();
  const int64_t query_size = int64_t{H} * p.shape.tokens * num_tiles(p.shape.group_size) * query_tile_size<Q>(D);
  float* out = scratch.array<float>(first + 1, queries * (V + 3));
  float* max = out + queries * V;
  const TaskState<T> state{scratch.array<Q>(first, query_size), out, max, max + queries, max + 2 * queries,
                           scratch.array<Found>(6, H)};
  std::memset(state.query, 0, query_size * sizeof(Q));
  std::fill(out, out + queries * (V + 3), 0.f);
  std::fill(state.max, state.max + queries, -std::numeric_limits<float>::infinity());
  for (int h = 0; h < p.shape.num_kv_heads; ++h) state.found[h].count = 0;
  return state;
}

template <typename T>
void write_partial(const AmendParams& p, const AmendWork& work, const int32_t* order, int64_t partial,
                   const TaskState<T>& state) {
  const int V = p.shape.head_dim_v;
  for (int i = 0; i < p.shape.num_queries(); ++i) {
    const int64_t place = partial * p.shape.num_queries() + order[i];
    work.partial_max[place] = state.max[i];
    work.partial_sum[place] = state.sum[i];
    work.partial_light[place] = state.light[i];
    if (state.sum[i] == 0.f) continue;
    std::memcpy(work.partial_out + place * V, state.out + static_cast<int64_t>(i) * V, V * sizeof(float));
  }
}

// Q: the queries' type.
template <typename Q, typename T>
void amend_task(const AmendParams& p, AmendWork& work, const AmendTask& task, const AmendTask* following,
                bool fetched, Scratch& scratch) {
  const int G = p.shape.group_size, T_G = p.shape.group_queries(), queries = p.shape.num_queries();
  const int tokens = query_len(p.shape, p.requests, task.request);
  const int32_t* order = work.queries.data() + static_cast<int64_t>(task.request) * queries;
  const Q* rows = static_cast<const Q*>(p.query.data) + task.request * p.query.batch_stride;
  const TaskState<T> state = empty_state<T>(p, scratch, 0);
  for (int i = 0; i < queries; ++i) {
    const int query = order[i], kv_head = query / T_G, token = query % T_G / G;
    if (token >= tokens) continue;
    const Q* row = rows + (kv_head * G + query % G) * p.query.head_stride + token * p.query.token_stride;
    arrange_query(p, i, row, state.query);
  }
  if (task.tokens != Tokens::kAnchors) {
    attend_tokens<T>(p, work, task, following, fetched, state);
    write_partial(p, work, order, task.partial, state);
    for (int h = 0; h < p.shape.num_kv_heads; ++h) {
      const int64_t group_index = static_cast<int64_t>(task.request) * p.shape.num_kv_heads + h;
      if (state.found[h].count > 0) hand_over(p, work, group_index, state.found[h]);
    }
    return;
  }
  // With anchors a group decides as one, so that its heads are in their own order.
  const TaskState<T> replaced = empty_state<T>(p, scratch, 2);
  for (int i = 0; i < queries; ++i) {
    const int64_t row = static_cast<int64_t>(task.request) * queries + i;
    if (p.matched.source[row] == kMiss) continue;
    const Q* entry = p.ring.rotated<Q>(p.requests.slots[task.request], i / T_G, p.matched.place[row]);
    arrange_query(p, i, entry + static_cast<int64_t>(i % G) * p.shape.head_dim, replaced.query);
  }
  attend_anchors<T>(p, work, task, state, replaced);
  write_partial(p, work, order, task.partial, state);
  write_partial(p, work, order, task.partial + 1, replaced);
}

template <typename Q, typename T>
void amend_all(const AmendParams& p, AmendWork& work) {
  Scratch& scratch = thread_scratch();
  const int64_t num_tasks = static_cast<int64_t>(work.tasks.size());
  const auto draw = [&] { return work.next.fetch_add(1, std::memory_order_relaxed); };
  bool fetched = false, short_of_memory = false;
  for (int64_t i = draw(), next; i < num_tasks; i = next) {
    const AmendTask& task = work.tasks[i];
    // Near the end a task that waits for its thread would keep others waiting.
    const bool early = i < work.num_drawn_early;
    next = early ? draw() : num_tasks;
    const auto listed = [](const AmendTask& one) { return one.tokens == Tokens::kAnchors; };
    const AmendTask* following = next < num_tasks && !listed(work.tasks[next]) ? &work.tasks[next] : nullptr;
    try {
      amend_task<Q, T>(p, work, task, following, fetched, scratch);
    } catch (const std::bad_alloc&) {
      short_of_memory = true;  // others wait for this task all the same
    }
    fetched = following && !listed(task);
    work.pending[task.request].fetch_sub(1, std::memory_order_release);
    if (!early) next = draw();
  }
  const int64_t num_groups = static_cast<int64_t>(work.groups.size());
  for (int64_t i; (i = work.next_finish.fetch_add(1, std::memory_order_relaxed)) < num_groups;) {
    // All tasks are drawn, so what is not done yet is being done.
    wait_for_zero(work.pending[i / p.shape.num_kv_heads]);
    finish_group(p, work, i, scratch);
  }
  if (short_of_memory) throw_out_of_memory();
}

template <typename Q>
void amend_type(const AmendParams& p, AmendWork& work) {
  p.kv.float8 ? amend_all<Q, float8>(p, work) : amend_all<Q, Q>(p, work);
}

void amend(const AmendParams& p, AmendWork& work) {
  switch (p.dtype) {
    case DType::kFloat32: return amend_type<float>(p, work);
    case DType::kBFloat16: return amend_type<bfloat16>(p, work);
    case DType::kFloat16: return amend_type<float16>(p, work);
  }
}
