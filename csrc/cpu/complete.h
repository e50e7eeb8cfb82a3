// Complete: merge the parts, write the output and the new ring entry.
//
//   carried = reused (+) old        out = carried (+) fresh
//   entry p = (q_match, carried, anchors, depth)
//
// Tasks: (request, query head). Traffic: two states, one ring row read and one written.

template <typename T>
MAC_INLINE void write_row(T* to, const float* a, float wa, const float* b, float wb, int head_dim) {
  for (int d = 0; d < head_dim; d += kLanes) store(to + d, load(a + d) * wa + load(b + d) * wb);
}

template <typename T>
void complete_head(const CompleteParams& p, int request, int head, float* carried) {
  const int G = p.shape.group_size, D = p.shape.head_dim, H = p.shape.num_kv_heads;
  const int Hq = p.shape.num_qo_heads();
  const int64_t row = static_cast<int64_t>(request) * Hq + head;
  const int64_t fresh_row = static_cast<int64_t>(p.shape.batch) * Hq + row;
  const float* old = p.states + row * D;
  const float* fresh = p.states + fresh_row * D;
  const int n = p.requests.seq_lens[request];

  float carried_lse = p.state_lse[row];
  if (!p.source || n == 0 || !has_ring(p.requests, request)) {
    std::memcpy(carried, old, D * sizeof(float));
  } else {
    const int M = p.ring.window, position = n - 1, source = p.source[row];
    const int64_t slot = p.requests.slots[request];
    const int64_t ring_row = (slot * H + head / G) * M;
    const int64_t to = (ring_row + position % M) * G + head % G;
    int32_t depth = 0;
    if (source == kMiss) {
      std::memcpy(carried, old, D * sizeof(float));
    } else {
      const int64_t from = (ring_row + source % M) * G + head % G;  // may be the place we write to
      const MergeWeights w = merge_weights(p.ring.lse[from], carried_lse);
      write_row(carried, p.ring.out + from * D, w.first, old, w.second, D);
      carried_lse = w.lse;
      depth = next_depth(p.ring.depth[from]);
    }
    std::memcpy(p.ring.out + to * D, carried, D * sizeof(float));
    p.ring.lse[to] = carried_lse;
    p.ring.depth[to] = depth;
    const T* query =
        static_cast<const T*>(p.query.data) + request * p.query.batch_stride + head * p.query.head_stride;
    std::memcpy(static_cast<T*>(p.ring.query) + to * D, query, D * sizeof(T));
  }

  const MergeWeights w = merge_weights(carried_lse, p.state_lse[fresh_row]);
  T* out = static_cast<T*>(p.out) + request * p.out_batch_stride + head * p.out_head_stride;
  write_row(out, carried, w.first, fresh, w.second, D);
  if (p.lse) p.lse[row] = w.lse;
}

// What all heads of a request share: the tag, the anchors, the slot's history and the counters.
inline void complete_request(const CompleteParams& p, int request) {
  const int n = p.requests.seq_lens[request], position = n - 1;
  if (!p.source || n == 0 || !has_ring(p.requests, request)) return;
  const int H = p.shape.num_kv_heads, G = p.shape.group_size, M = p.ring.window, S = p.ring.num_anchors;
  const int64_t slot = p.requests.slots[request];
  const int64_t id = p.requests.request_ids ? p.requests.request_ids[request] : -1;
  if (p.ring.end[slot] != position || p.ring.request[slot] != id) p.ring.begin[slot] = position;
  p.ring.end[slot] = n;
  p.ring.request[slot] = id;
  p.ring.position[slot * M + position % M] = position;

  int64_t* counters = p.ring.counters + slot * kNumCounters;
  counters[kSteps] += 1;
  for (int h = 0; h < H; ++h) {
    const int64_t group = static_cast<int64_t>(request) * H + h;
    const int32_t* anchors = p.anchors + group * S;
    std::copy(anchors, anchors + S, p.ring.anchors + ((slot * H + h) * M + position % M) * S);
    int hits = 0, start = n;
    for (int g = 0; g < G; ++g) {
      const int32_t source = p.source[group * G + g];
      hits += source != kMiss;
      start = std::min(start, source == kMiss ? 0 : band_start(source, p.band));
    }
    counters[kKvHeadSteps] += 1;
    counters[kKvHeadHits] += hits == G;
    counters[kQueryHeadHits] += hits;
    counters[kKvTokensRead] += n - start;
    if (hits == G) counters[kKvTokensRead] += S - std::count(anchors, anchors + S, kNoAnchor);
    counters[kKvTokensFull] += n;
  }
}

template <typename T>
void complete_all(const CompleteParams& p, CompleteWork& work) {
  Scratch& scratch = thread_scratch();
  float* carried = scratch.array<float>(0, p.shape.head_dim);
  const int Hq = p.shape.num_qo_heads();
  for (int64_t i; (i = work.next.fetch_add(1, std::memory_order_relaxed)) < work.num_tasks;) {
    const int request = static_cast<int>(i / Hq), head = static_cast<int>(i % Hq);
    complete_head<T>(p, request, head, carried);
    if (head == 0) complete_request(p, request);
  }
}

void complete(const CompleteParams& p, CompleteWork& work) {
  switch (p.dtype) {
    case DType::kFloat32: return complete_all<float>(p, work);
    case DType::kBFloat16: return complete_all<bfloat16>(p, work);
    case DType::kFloat16: return complete_all<float16>(p, work);
  }
}
