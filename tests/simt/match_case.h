// One call of match: a random case, the launch, the comparison.
#pragma once

#include "kernel_case.h"

namespace mac_attn::simt {

struct MatchSpec {
  DType dtype = DType::kBFloat16;
  int num_kv_heads = 2, group_size = 3, head_dim = 64;
  std::vector<int> seq_lens = {90, 60, 0, 41};
  int tokens = 1;               // T
  std::vector<int> query_lens;  // of each request, empty: T
  int entries = 40, window = 60, band = 16, min_context = 1, max_reuse_depth = 1 << 30;
  bool per_head = false, relative = true;
  bool request_ids = true;
  int anchors = 0;       // with them a hit must not read more than half of the tokens
  double rho = 0.2;      // the threshold, as a share of a query's expected square
  double max_drift = 0;  // 0: no bound
  double near = 0.15;    // share of the entries that lie near the query
  double holes = 0.1;    // share of the entries that are none: they hold the very query, as a trap
  int gap = 2;           // largest distance between the positions of two entries
  bool twins = false;    // entries come in equal pairs
  int splits = 1;
  uint64_t seed = 1;

  std::string name() const;
};

class MatchCase {
 public:
  explicit MatchCase(const MatchSpec& spec);

  void run(const Run& run = {Engine::kFibers, 1});
  void check() const;
  int count_hits() const;

  // For tests that break something, before run(). `errors` are expected; such a request answers misses.
  std::vector<int32_t> seq_lens, query_lens, slots, errors;
  RingTensors ring;
  std::vector<float> thresholds;
  HeadsTensor& query() { return query_; }
  // A query of the request, any token's, and some noise.
  void set_entry(int request, int kv_head, int place, double noise);

 private:
  int heads() const { return spec_.num_kv_heads * spec_.group_size; }
  int query_len(int request) const { return query_lens.empty() ? spec_.tokens : query_lens[request]; }
  int position(int request) const { return seq_lens[request] - query_len(request); }  // of the first query token
  // Of match's answer, [H, T, G].
  int64_t row(int request, int token, int head) const {
    const int G = spec_.group_size;
    return (int64_t{request * spec_.num_kv_heads + head / G} * spec_.tokens + token) * G + head % G;
  }
  void check_decision(int request, int first_head, int num_heads) const;
  // The smallest score of a token's candidates, and that of its answer. Of equal entries it must be the youngest.
  struct Scores {
    double best = INFINITY, answer = NAN;
  };
  Scores scores(int request, int token, int first_head, int num_heads) const;
  int oldest(int request, int token) const;    // position that may be reused
  int stored(int request, int kv_head) const;  // the answer, from the slot's history
  bool is_candidate(int request, int token, int head, int place) const;
  reference::Vector query_of(int request, int head, int place) const;

  MatchSpec spec_;
  Data data_;
  HeadsTensor query_;
  std::vector<int64_t> request_ids_;
  std::vector<int32_t> source_, place_, stored_, status_, done_, error_flag_;
  std::vector<unsigned long long> best_;
  Unchanged unchanged_;
};

}  // namespace mac_attn::simt
