// One call of amend: a random case, the launch, the comparison.
#pragma once

#include "kernel_case.h"

namespace mac_attn::simt {

struct AmendSpec {
  DType dtype = DType::kBFloat16;
  bool fp8 = false;  // the cache
  int num_kv_heads = 2, group_size = 3, head_dim = 64, page_size = 16;
  int shorter = 0;  // by so many elements values are shorter than keys
  std::vector<int> seq_lens = {150, 37};
  int tokens = 1;               // T
  std::vector<int> query_lens;  // of each request, empty: T
  bool hnd = false;
  bool exact = false;  // without reuse
  int band = 24, anchors = 0;
  // For (request, KV head) after another, or (request, query head), over and over: the age of the entry that the
  // first query token reuses, 0 for a miss; the other tokens' are a little older. A hit that this request cannot
  // have is a miss.
  std::vector<int> ages = {0};
  bool per_head = false;
  bool full_lists = false;  // else a matched entry may have fewer anchors than there is room for
  double candidates = 1.4;  // about so many of a miss, in multiples of its sample
  double soft_cap = 0;
  double sharpness = 1;  // standard deviation of a logit
  int heavy_tokens = 0;  // of each KV head: tokens whose logit for one of the heads is far above the others
  int ctas = 3;
  bool batch_invariant = false;
  int layer = 7;
  std::vector<int> without_ring = {};  // requests that have no slot
  uint64_t seed = 1;                   // of the data

  int head_dim_v() const { return head_dim - shorter; }
  std::string name() const;
};

class AmendCase {
 public:
  explicit AmendCase(const AmendSpec& spec);

  void run(const Run& run = {Engine::kFibers, 1});
  // Everything that the last run must have fulfilled. Requests with bits in `errors` have answered NaN.
  void check() const;

  // For tests that break something, before run().
  Pages& pages() { return pages_; }
  std::vector<int32_t> seq_lens, query_lens, status;
  std::vector<int32_t> errors;  // [B] Error bits that amend has to find, or finds in `status`
  std::vector<int32_t> stored;  // [B, H]
  RingTensors ring;
  int layer;
  void set_key(int request, int token, int kv_head, double value);  // all of its elements
  int slot(int request) const { return slots_[request]; }
  int start(int request, int kv_head, int token = 0) const;  // first token that is read, other than anchors
  AmendParams params();

  // For tests that look closer. The sample is the answer of a miss; `tau` 0 is none.
  reference::Sample sample(int request, int kv_head) const;
  double tau(int request, int kv_head) const;
  reference::Vector weights(int request, int kv_head) const;  // of a miss, by old token
  reference::Vector uniforms(int request, int kv_head) const;
  double log_ratio(int request, int query) const { return log_ratio_[request * queries() + query]; }
  double expected_log_ratio(int request, int query) const;
  static constexpr double kSampleSlack = 2e-4;  // of weights, relatively; of a log_ratio

 private:
  void check_request(int request) const;
  void check_nan(int request) const;
  void check_query(int request, int query) const;
  void check_state(int request, int query, Span span, const reference::State& want) const;
  void check_sample(int request, int kv_head) const;
  void prepare_miss(int request, int kv_head);
  cuda::AmendWorkspace workspace();
  int heads() const { return spec_.num_kv_heads * spec_.group_size; }
  // Queries are [H, T, G].
  int queries() const { return heads() * spec_.tokens; }
  int token_of(int query) const { return query / spec_.group_size % spec_.tokens; }
  int head_of(int query) const {
    const int G = spec_.group_size;
    return query / (G * spec_.tokens) * G + query % G;
  }
  int query_len(int request) const { return query_lens.empty() ? spec_.tokens : query_lens[request]; }
  int position(int request) const { return seq_lens[request] - query_len(request); }  // of the first query token
  bool exact(int request) const { return spec_.exact || slots_[request] == kNoSlot; }
  bool hits(int request, int kv_head) const { return !exact(request) && start(request, kv_head) > 0; }
  int group(int request, int kv_head) const { return request * spec_.num_kv_heads + kv_head; }
  int old_end(int request) const;  // E(p), 0 without a ring
  bool there(int request, int token) const { return seq_lens[request] > 0 && token < query_len(request); }
  int matched(int request, int kv_head, int token) const {  // in source_ and place_: the first head's
    return (group(request, kv_head) * spec_.tokens + token) * spec_.group_size;
  }
  void match(int request);
  void fill_entry(int request, int kv_head, int token);
  reference::Rows queries(int request, int kv_head) const;  // of the first token
  reference::Vector entry_query(int request, int query) const;
  reference::Sample entry_sample(int request, int kv_head, int token) const;  // the matched entry's

  AmendSpec spec_;
  Data data_;
  reference::Softmax softmax_;
  HeadsTensor query_;
  Pages pages_;
  std::vector<int32_t> slots_, source_, place_;
  size_t next_age_ = 0;
  std::vector<std::vector<reference::Rows>> keys_, values_;  // by request and KV head
  std::vector<float> out_, lse_, log_ratio_, anchor_weights_;
  std::vector<int32_t> anchors_, sampled_, done_, drawn_, counts_, error_flag_;
  std::vector<float> partial_out_, partial_sums_;
  std::vector<cuda::Candidate> candidate_;
  std::vector<float> first_weights_;  // of the first run; the others must be the same
  std::vector<int32_t> first_anchors_;
  int32_t expected_flag_ = 0;
  Unchanged unchanged_;
};

}  // namespace mac_attn::simt
