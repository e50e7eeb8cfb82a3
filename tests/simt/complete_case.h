// One call of complete: a random case, the launch, the comparison.
#pragma once

#include "kernel_case.h"

namespace mac_attn::simt {

struct CompleteSpec {
  DType dtype = DType::kBFloat16;
  int num_kv_heads = 2, group_size = 3, head_dim = 64;
  int shorter = 0;  // by so many elements values are shorter than keys
  std::vector<int> seq_lens = {150, 37, 0, 61};
  int tokens = 1;  // as in AmendSpec
  std::vector<int> query_lens;
  bool exact = false;
  int entries = 4, band = 24, anchors = 4;
  int max_reuse_depth = 4;         // without anchors; with them it is 1
  std::vector<int> ages = {0, 5};  // as in AmendSpec
  bool candidates = false;         // are handed on in place of anchors, for complete to cut
  bool per_head = false;
  bool request_ids = true;
  bool sinks = false;
  bool keys = false, fp8 = false;      // whether there is a KV cache to tell how far keys spread, and its type
  std::vector<int> without_ring = {};  // requests that have no slot
  uint64_t seed = 1;

  int head_dim_v() const { return head_dim - shorter; }
  std::string name() const;
};

class CompleteCase {
 public:
  explicit CompleteCase(const CompleteSpec& spec);

  void run(const Run& run = {Engine::kFibers, 1});
  void check() const;
  int64_t entries_stored() const;  // by the last run

  // For tests that break something, before run(). A request with a status answers NaN and leaves the ring alone.
  std::vector<int32_t> seq_lens, query_lens, slots, status;
  RingTensors ring;
  Pages pages;
  std::vector<float> states, state_lse;  // [2, B, Q, V], [2, B, Q]

 private:
  struct Carried {
    reference::State state;
    int depth;
    reference::State whole;  // the output
  };
  bool exact(int request) const { return spec_.exact || slots[request] == kNoSlot; }
  int heads() const { return spec_.num_kv_heads * spec_.group_size; }
  int queries() const { return heads() * spec_.tokens; }
  int query_len(int request) const {
    return seq_lens[request] == 0 ? 0 : query_lens.empty() ? spec_.tokens : query_lens[request];
  }
  int position(int request) const { return seq_lens[request] - query_len(request); }
  int group(int request, int kv_head) const { return request * spec_.num_kv_heads + kv_head; }
  // Of a query, [B, H, T, G].
  int64_t row(int request, int token, int head) const {
    const int G = spec_.group_size;
    return (int64_t{group(request, head / G)} * spec_.tokens + token) * G + head % G;
  }
  void match(int request, bool has_ring);
  void draw(int request, int kv_head);
  reference::Sample kept(int request, int kv_head) const;  // of the candidates
  void fill_keys(int request, int kv_head);
  float spread(int request, int kv_head, float before) const;
  int64_t tokens_read(int request, int kv_head) const;
  reference::State state(Span span, int request, int token, int head) const;
  Carried carried(int request, int token, int head) const;  // from the ring before the run
  bool near(const float* got, const reference::Vector& want, const char* what) const;
  void check_head(int request, int token, int head, const Carried& carried) const;
  void expect_entry(int request, int kv_head, const std::vector<Carried>& carried, RingTensors& want) const;
  void expect_group(int request, int kv_head, const std::vector<Carried>& carried, RingTensors& want) const;

  CompleteSpec spec_;
  Data data_;
  HeadsTensor query_, rotated_;
  std::vector<int32_t> source_, place_, stored_, anchors_, sampled_;
  size_t next_age_ = 0;
  std::vector<float> log_ratio_, anchor_weights_, sinks_;
  std::vector<cuda::Candidate> candidates_;  // [B, H, room]
  std::vector<double> spreads_;              // [B, H] 0 for too few keys
  std::vector<int64_t> request_ids_;
  std::vector<uint16_t> out_;
  std::vector<float> lse_;
  int64_t head_stride_, batch_stride_;  // of out_
  RingTensors before_;
  bool ran_ = false;
  Unchanged unchanged_;
};

}  // namespace mac_attn::simt
