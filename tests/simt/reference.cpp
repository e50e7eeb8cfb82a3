#include "reference.h"

#include <algorithm>
#include <set>

namespace mac_attn::reference {

namespace {

double dot(const Vector& a, const Vector& b) {
  double sum = 0;
  for (size_t i = 0; i < a.size(); ++i) sum += a[i] * b[i];
  return sum;
}

double log_add(double a, double b) {
  const double high = std::max(a, b);
  return high == -INFINITY ? high : high + std::log(std::exp(a - high) + std::exp(b - high));
}

}  // namespace

int old_end(int position, int band) {
  return std::max(0, position + 1 - band);
}

double logit(const Vector& query, const Vector& key, const Softmax& softmax) {
  const double x = softmax.scale * dot(query, key);
  return softmax.soft_cap == 0 ? x : softmax.soft_cap * std::tanh(x / softmax.soft_cap);
}

State attend(const Vector& query, const Rows& keys, const Rows& values, const std::vector<int>& tokens,
             const Softmax& softmax) {
  State state;
  state.out.assign(query.size(), 0.0);
  state.spread.assign(query.size(), 0.0);
  Vector logits;
  for (const int token : tokens) {
    logits.push_back(logit(query, keys[token], softmax));
    state.lse = log_add(state.lse, logits.back());
  }
  for (size_t i = 0; i < tokens.size(); ++i) {
    const double weight = std::exp(logits[i] - state.lse);
    for (size_t d = 0; d < query.size(); ++d) state.out[d] += weight * values[tokens[i]][d];
  }
  for (size_t i = 0; i < tokens.size(); ++i) {
    const double weight = std::exp(logits[i] - state.lse);
    for (size_t d = 0; d < query.size(); ++d) {
      state.spread[d] += weight * std::abs(values[tokens[i]][d] - state.out[d]);
    }
  }
  return state;
}

State merge(const State& a, const State& b) {
  State state;
  state.lse = log_add(a.lse, b.lse);
  const double wa = a.lse == -INFINITY ? 0 : std::exp(a.lse - state.lse);
  const double wb = b.lse == -INFINITY ? 0 : std::exp(b.lse - state.lse);
  for (size_t d = 0; d < a.out.size(); ++d) state.out.push_back(wa * a.out[d] + wb * b.out[d]);
  return state;
}

Spans spans(int n, int source, int band, bool exact, const std::vector<int>& anchors) {
  const int end = exact ? 0 : old_end(n - 1, band);
  const int start = exact || source < 0 ? 0 : old_end(source, band);
  Spans result;
  for (int token = start; token < end; ++token) {
    if (std::find(anchors.begin(), anchors.end(), token) == anchors.end()) result.old.push_back(token);
  }
  result.fresh = anchors;
  for (int token = end; token < n; ++token) result.fresh.push_back(token);
  return result;
}

std::string judge_choice(const std::vector<int>& anchors, const Rows& queries, const Rows& keys, int n,
                         const Softmax& softmax, const ChoiceRules& rules) {
  std::set<int> taken;
  for (const int token : anchors) {
    if (token < 0 || token >= rules.end) return "token " + std::to_string(token) + " is not old";
    if (!taken.insert(token).second) return "token " + std::to_string(token) + " twice";
  }
  if (!std::is_sorted(anchors.begin(), anchors.end())) return "not ascending";
  // By head and token: the logit, in log2, less the head's log-sum-exp and less its maximum.
  Rows weights, leads;
  for (const Vector& query : queries) {
    Vector x;
    double lse = -INFINITY;
    for (int token = 0; token < n; ++token) {
      x.push_back(logit(query, keys[token], softmax));
      lse = log_add(lse, x.back());
    }
    const double max = *std::max_element(x.begin(), x.begin() + rules.end);
    weights.push_back({}), leads.push_back({});
    for (int token = 0; token < rules.end; ++token) {
      weights.back().push_back((x[token] - lse) / std::log(2.0));
      leads.back().push_back((x[token] - max) / std::log(2.0));
    }
  }
  const auto weight_of = [&](int token) {
    double weight = -INFINITY;
    for (const Vector& head : weights) weight = std::max(weight, head[token]);
    return weight;
  };
  double lightest = INFINITY;
  for (const int token : anchors) lightest = std::min(lightest, weight_of(token));
  const double bar = std::max(lightest + rules.slack_log2, rules.floor_log2);

  int worthy = 0;  // tokens that cannot be too light
  for (int token = 0; token < rules.end; ++token) {
    double lead = -INFINITY;
    for (const Vector& head : leads) lead = std::max(lead, head[token]);
    if (!(lead > rules.least_log2)) continue;
    ++worthy;
    const bool all_used = static_cast<int>(anchors.size()) == rules.count;
    if (taken.count(token) == 0 && all_used && weight_of(token) > bar) {
      return "token " + std::to_string(token) + " is heavier (2^" + std::to_string(weight_of(token)) +
             ") than the lightest chosen (2^" + std::to_string(lightest) + ")";
    }
  }
  const int chosen = static_cast<int>(anchors.size());
  if (chosen > rules.count || chosen < std::min(rules.count, worthy)) {
    return std::to_string(chosen) + " anchors of " + std::to_string(worthy) + " worthy tokens";
  }
  return "";
}

double match_theta(const Vector& query, double threshold, bool relative) {
  const double theta = relative ? threshold * dot(query, query) : threshold;
  return std::isfinite(theta) && std::isfinite(dot(query, query)) && theta > 0 ? theta : NAN;
}

double match_score(const std::vector<MatchHead>& heads, const Rows& stored) {
  double sum = 0;
  for (size_t h = 0; h < heads.size(); ++h) {
    double distance = 0;
    for (size_t d = 0; d < stored[h].size(); ++d) {
      distance += (heads[h].query[d] - stored[h][d]) * (heads[h].query[d] - stored[h][d]);
    }
    sum += distance / heads[h].theta;
  }
  return sum / static_cast<double>(heads.size());
}

}  // namespace mac_attn::reference
