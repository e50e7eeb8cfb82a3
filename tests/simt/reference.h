// Match, amend and complete in double precision, written from the formulas (README.md) and sharing no code with
// the kernels: one query head, or one KV head, at a time, no pages, no tiles.
#pragma once

#include <cmath>
#include <cstdint>
#include <string>
#include <vector>

namespace mac_attn::reference {

using Vector = std::vector<double>;
using Rows = std::vector<Vector>;  // by token position; those that nobody attends to may be empty

// An attention state over a set of tokens; the empty set is (0, -inf).
struct State {
  Vector out;
  double lse = -INFINITY;
  // Sum of p_t |v_t - out|, element by element. If every weight is known within a relative error u, then `out` is
  // within u / (1 - u) times this, and `lse` within -log(1 - u).
  Vector spread;
};

struct Softmax {
  double scale;
  double soft_cap;  // 0: off; else a logit becomes soft_cap * tanh(logit / soft_cap)
};

// E(p): the entry of position p stands for the tokens [0, E(p)).
int old_end(int position, int band);

double logit(const Vector& query, const Vector& key, const Softmax& softmax);

// The first tokens count as often as `counts` says, the others once.
State attend(const Vector& query, const Rows& keys, const Rows& values, const std::vector<int>& tokens,
             const Softmax& softmax, const Vector& counts = {});

// State of the union of two disjoint sets of tokens.
State merge(const State& a, const State& b);

// How many tokens an entry keeps at most that stands for [0, end) and has `anchors` places: a sixth of them.
int sample_size(int anchors, int end);

// u of a token, as the hash of the entry's position, the KV head and the layer has it.
double uniform(int position, int kv_head, int layer, int token);

// The weights by which a miss samples the tokens [0, end): by how much the group's logits exceed `last_lse`, the
// most of any head. NaN is none.
Vector sample_weights(const Rows& queries, const Rows& keys, int end, const Vector& last_lse,
                      const Softmax& softmax);

// A sample: how many candidates there were, the tokens that were kept and their a.
struct Sample {
  int candidates;
  std::vector<int> tokens;
  Vector a;
};

// Says what is wrong with a sample of at most `count` tokens; empty if nothing is. Weights are known within a
// relative error `slack`.
std::string judge_sample(const Sample& sample, const Vector& weights, const Vector& uniforms, double tau, int count,
                         double slack);

// ln of the sum over the sample's tokens of a exp(logit).
double light(const Vector& query, const Rows& keys, const Sample& sample, const Softmax& softmax);

// Whether anchors leave no more of an entry's sum than a 1024th, nor stand for more.
bool nothing_left(double entry, double replaced, double light);

// By how much `light` changes from one query to another; 0 where there is none.
double log_ratio(const Vector& now, const Vector& then, const Rows& keys, const Sample& sample,
                 const Softmax& softmax);

// How many tokens each of an entry's sample of the old tokens [0, end) is counted as: 1 + b, 1 / b = 1 / a + size /
// end.
Vector counts(const Sample& sample, int anchors, int end);

// A hit with anchors: an entry's sums over [0, E(c)) without those of `replaced`, moved by `log_ratio`, and the
// fresh ones. Just those, if nothing is left of the entry's or would be left of the fresh ones.
State hit(const State& entry, const State& replaced, double log_ratio, const State& fresh);

// One candidate of a match decision over one or several heads.
struct MatchHead {
  Vector query;
  double theta;  // NaN: never a hit
};
double match_theta(const Vector& query, double threshold, bool relative, double max_drift, double spread);
double match_score(const std::vector<MatchHead>& heads, const Rows& stored);

}  // namespace mac_attn::reference
