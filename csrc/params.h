// What every backend is handed: plain pointers, strides and sizes. No torch here, so that the
// kernels build and run on their own (CMakeLists.txt).
//
// Letters in the shape comments: B requests, T query tokens of each, Hq query heads, H KV heads, G = Hq / H query
// heads per KV head, Q = T Hq queries, [H, T, G], D head_dim, V head_dim_v, M entries of a ring, S anchors. Strides
// count elements, the last one is 1.
#pragma once

#include <cstdint>

#include "ring.h"
#include "sample.h"

namespace mac_attn {

enum class DType : int32_t { kFloat32, kBFloat16, kFloat16 };

constexpr int32_t kMiss = -1;      // in `source`: no entry is reused
constexpr int32_t kNoAnchor = -1;  // in `anchors`: the place is not used
constexpr int32_t kNoSlot = -1;    // in `slots`: the request has no ring

constexpr int32_t kMaxQueryTokens = 16;  // of a request in a step

struct Shape {
  int32_t batch;
  int32_t num_kv_heads;
  int32_t group_size;
  int32_t head_dim;
  int32_t tokens = 1;             // T
  int32_t head_dim_v = head_dim;  // of values, and so of outputs and states: no more than of keys and queries
  constexpr int32_t num_qo_heads() const { return num_kv_heads * group_size; }
  // Queries of a KV head: those of a token's heads, [T, G], one token after another.
  constexpr int32_t group_queries() const { return tokens * group_size; }
  constexpr int32_t num_queries() const { return num_kv_heads * group_queries(); }
};

// A [B, T, Hq, D] tensor whose outer strides are free.
struct HeadsView {
  const void* data;
  int64_t batch_stride;
  int64_t head_stride;
  int64_t token_stride;
};

// The rows of the call: which request, how long, which slot.
struct Requests {
  const int32_t* seq_lens;     // [B], 0 marks a padding row
  const int32_t* slots;        // [B] or kNoSlot, null without reuse
  const int64_t* request_ids;  // [B] or null
  const int32_t* query_lens;   // [B] of the T tokens those that are there, from 1; null: all
};

// Whether a step that begins at this position goes on where a slot's last one ended.
MAC_HOST_DEVICE inline bool goes_on(const Ring& ring, int64_t slot, int32_t position) {
  return *ring.end(slot) <= position && position <= *ring.reach(slot);
}

// How many query tokens a request has, and the position of the first of them. What a step of several leaves in the
// ring is its first token's: the only one that nobody can reject.
constexpr int32_t query_len(const Shape& shape, const Requests& requests, int32_t request) {
  return requests.query_lens ? requests.query_lens[request] : shape.tokens;
}
constexpr bool fits_query(const Shape& shape, const Requests& requests, int32_t request) {
  const int32_t tokens = query_len(shape, requests, request);
  return tokens >= 1 && tokens <= shape.tokens && tokens <= requests.seq_lens[request];
}
constexpr int32_t first_position(const Shape& shape, const Requests& requests, int32_t request) {
  return requests.seq_lens[request] - query_len(shape, requests, request);
}

// Whether a request has a ring, in a call with reuse; else it is attended to exactly, and nothing is stored.
constexpr bool has_ring(const Requests& requests, int32_t request) {
  return !requests.slots || requests.slots[request] != kNoSlot;
}

// What the numbers of a float8 cache are multiplied by: one for each KV head (stride 1) or for all (0).
struct Scale {
  const float* data;  // null: the cache is not float8
  int32_t stride;
  constexpr float of(int32_t kv_head) const { return data ? data[kv_head * stride] : 1.f; }
};

struct KVPages {
  const void* k;  // [num_pages, page_size, H, D], any strides but the last
  const void* v;  // the same of V
  int64_t k_page_stride, k_token_stride, k_head_stride;
  int64_t v_page_stride, v_token_stride, v_head_stride;
  const int32_t* block_table;  // [B, max_pages]
  int64_t block_table_stride;
  int32_t page_size, num_pages, max_pages;
  bool float8;  // k and v are float8_e4m3fn, else of the queries' type
  Scale k_scale, v_scale;
};

// Queries without their rotary embedding: R(-p) q / scale for p = positions[b] - back + t. KV heads do not matter
// here: the shape has one for each query head.
struct UnrotateParams {
  Shape shape;
  DType dtype;
  HeadsView query;           // post-RoPE
  const int32_t* positions;  // [B]
  int32_t back;
  const int32_t* each_back;  // [B] instead of `back`, or null
  const float* inv_freq;     // [pairs] radians per position
  int32_t pairs;             // of dimensions that turn, the first 2 * pairs of D
  bool interleaved;          // pairs are (2i, 2i + 1), else (i, i + pairs)
  float inverse_scale;
  void* out;  // out: [B, T, Hq, D] dtype
};

// What match answers, and the other stages go by. A head hits with all of a request's tokens or with none.
struct Matched {
  int32_t* source;  // [B, Q] position of the entry to reuse, or kMiss, as for a token that is not there
  int32_t* place;   // [B, Q] where in the ring it lies, kMiss for a miss
  int32_t* stored;  // [B, H] Ring::stored, or kNoHistory: the request does not go on where its slot ended
};
constexpr int32_t kNoHistory = -1;

struct MatchParams {
  Shape shape;
  DType dtype;
  HeadsView query;  // pre-RoPE
  Requests requests;
  Ring ring;
  const float* threshold;  // [Hq] theta (absolute) or rho (relative)
  bool relative;
  float max_drift;  // see `drift_bound`; 0: none
  bool per_head;    // granularity "head"
  int32_t window;
  int32_t band;
  int32_t min_context;
  int32_t max_reuse_depth;
  Matched matched;  // out
};

struct AmendParams {
  Shape shape;
  DType dtype;
  HeadsView query;  // post-RoPE
  KVPages kv;
  Requests requests;
  Matched matched;  // source is null: exact attention, everything is fresh
  Ring ring;        // looked at if S > 0
  int32_t num_anchors;
  int32_t band;
  int32_t layer;  // see sample_seed
  float sm_scale;
  float logits_soft_cap;  // 0: off
  bool batch_invariant;   // a request's tokens are cut up the same way in whatever company
  float* out;             // out: [2, B, Q, V], see `Span`
  float* lse;             // out: [2, B, Q]
  float* log_ratio;       // out: [B, Q] on a hit ln of sum a exp(s_p) / sum a exp(s_c) over the anchors, or -inf if
                          // those leave nothing of the entry; else 0
  int32_t* anchors;       // out: [B, H, S] of a new entry, ascending, then kNoAnchor
  float* anchor_weights;  // out: [B, H, S] a of each, then 0
  void* candidates;  // null; or out, [B, H, kCandidateRoom S] that complete is to make them of itself: then the
                     // two before are not written. The CUDA kernels' alone
  int32_t* sampled;  // out: [B, H, T] on a hit the anchors read; on a miss the candidates there were, or
                     // kNotSampled, at the first token, kNotSampled at the others
};

// The two states that amend yields for every query. With p the position of the request's first query token and c
// the matched one:
enum Span : int32_t {
  kOld,    // a miss: [0, E(p)), the new entry's state. A hit without anchors: [E(c), E(p)), joins the reused state.
           // A hit with anchors: those, attended by the entry's query; they leave the reused state.
  kFresh,  // a miss, and a hit without anchors: [E(p), ..) up to the query's own token. A hit with anchors: those
           // and [E(c), ..).
  kNumSpans
};

struct CompleteParams {
  Shape shape;
  DType dtype;
  Requests requests;
  const float* states;     // [2, B, Q, V] from amend
  const float* state_lse;  // [2, B, Q]
  Matched matched;         // source is null without reuse; then what follows is not looked at
  const float* log_ratio;  // [B, Q] from amend, as are the next three
  const int32_t* anchors;  // [B, H, S]
  const float* anchor_weights;
  const void* candidates;  // see AmendParams
  const int32_t* sampled;
  const float* sinks;  // [Hq] a logit that each head attends to besides, whose value is 0; or null
  HeadsView query;     // pre-RoPE, stored in the ring
  HeadsView rotated;   // post-RoPE, stored if S > 0
  Ring ring;
  int32_t band;
  int32_t layer;  // looked at with candidates
  int32_t max_reuse_depth;
  KVPages kv;  // its keys tell how far they spread; k is null: nobody does
  float sm_scale;
  void* out;  // out: [B, T, Hq, V] dtype
  int64_t out_batch_stride;
  int64_t out_head_stride;
  int64_t out_token_stride;
  float* lse;  // out: [B, T, Hq]
};

// First position that the entry of position `p` leaves out: E(p) = max(0, p + 1 - band).
constexpr int32_t band_start(int32_t p, int32_t band) {
  return p >= band ? p - band + 1 : 0;
}

// Oldest position whose entry the query of position `p` may reuse, one of `tokens` of its request's step: within
// the window, with old tokens, and so young that with anchors hits of them all read no more than half of the
// tokens, which a miss reads once.
constexpr int32_t oldest_candidate(int32_t p, int32_t window, int32_t band, int32_t anchors, int32_t tokens) {
  const int32_t cheap = (p + 1) / 2 / (tokens > 1 ? tokens : 1) - band - sample_size(anchors, band_start(p, band));
  const int32_t most = anchors > 0 && cheap < window ? cheap : window, reach = most > 0 ? most : 0;
  return p - reach > band ? p - reach : band;
}

// The largest squared distance from a query, of squared length `norm`, at which logits are expected to move by no
// more than `max_drift`, squared: the expected square is `spread` times the distance. Where `spread` is not known,
// as it is for the sharpest heads: a query of theirs has logits whose variance is some 16.
constexpr float kUnknownVariance = 16.f;
constexpr float drift_bound(float max_drift, float spread, float norm) {
  return spread > 0.f ? max_drift / spread : max_drift / kUnknownVariance * norm;
}

// When that spread is measured: as a slot starts and whenever its request has grown to a power of two, from so many
// keys, evenly over the request. Fewer tell too little.
constexpr int32_t kSpreadKeys = 512;
constexpr bool measures_spread(int32_t seq_len, int32_t tokens, bool starts) {
  return starts || (seq_len ^ (seq_len - tokens)) > seq_len - tokens;
}
constexpr int32_t spread_key(int32_t i, int32_t seq_len) {
  return static_cast<int32_t>(int64_t{i} * seq_len / kSpreadKeys);
}

// What the query tokens of a step attend to, one after another, the last of them to `seq_len`.
constexpr int64_t tokens_of_steps(int32_t seq_len, int32_t tokens) {
  return int64_t{tokens} * seq_len - int64_t{tokens} * (tokens - 1) / 2;
}

// Depth of an entry that reuses one of depth `depth`.
constexpr int32_t next_depth(int32_t depth) {
  return depth < INT32_MAX ? depth + 1 : depth;
}

}  // namespace mac_attn
