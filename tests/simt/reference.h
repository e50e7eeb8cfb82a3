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

State attend(const Vector& query, const Rows& keys, const Rows& values, const std::vector<int>& tokens,
             const Softmax& softmax);

// State of the union of two disjoint sets of tokens.
State merge(const State& a, const State& b);

// What a query head of position n - 1 attends to afresh.
struct Spans {
  std::vector<int> old;    // [s, E(p)) without the anchors
  std::vector<int> fresh;  // the anchors and [E(p), n)
};
// `source` is the position of the reused entry, or -1. Without reuse (`exact`) everything is fresh.
Spans spans(int n, int source, int band, bool exact, const std::vector<int>& anchors);

// What the choice of anchors on a miss has to fulfil.
struct ChoiceRules {
  int end;            // tokens [0, end) may be chosen
  int count;          // at most so many are
  double least_log2;  // weights this much below a head's largest logit must not count, lighter ones may not
  double slack_log2;  // how far the order of two weights may be wrong
  double floor_log2;  // weights below this, as softmax, are all alike
};

// Says what is wrong with the anchors that a KV head chose; empty if nothing is. queries: of the group.
std::string judge_choice(const std::vector<int>& anchors, const Rows& queries, const Rows& keys, int n,
                         const Softmax& softmax, const ChoiceRules& rules);

// One candidate of a match decision over one or several heads.
struct MatchHead {
  Vector query;
  double theta;  // NaN: never a hit
};
double match_theta(const Vector& query, double threshold, bool relative);
double match_score(const std::vector<MatchHead>& heads, const Rows& stored);

}  // namespace mac_attn::reference
