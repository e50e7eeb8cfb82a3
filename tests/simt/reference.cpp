#include "reference.h"

#include <algorithm>
#include <functional>
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
             const Softmax& softmax, const Vector& counts) {
  State state;
  const size_t size = tokens.empty() ? 0 : values[tokens[0]].size();  // may be less than the query's
  state.out.assign(size, 0.0);
  state.spread.assign(size, 0.0);
  Vector logits;
  for (const int token : tokens) {
    const size_t i = logits.size();
    logits.push_back(logit(query, keys[token], softmax) + (i < counts.size() ? std::log(counts[i]) : 0));
    state.lse = log_add(state.lse, logits.back());
  }
  for (size_t i = 0; i < tokens.size(); ++i) {
    const double weight = std::exp(logits[i] - state.lse);
    for (size_t d = 0; d < size; ++d) state.out[d] += weight * values[tokens[i]][d];
  }
  for (size_t i = 0; i < tokens.size(); ++i) {
    const double weight = std::exp(logits[i] - state.lse);
    for (size_t d = 0; d < size; ++d) {
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

int sample_size(int anchors, int end) {
  return std::min(anchors, std::max(1, end / 6));
}

double uniform(int position, int kv_head, int layer, int token) {
  constexpr uint64_t kBits32 = 0xffffffff;
  const auto scramble = [](uint64_t x) {
    x = ((x ^ x >> 16) * 0x7feb352d) & kBits32;
    return ((x ^ x >> 15) * 0x846ca68b) & kBits32;
  };
  uint64_t seed = 0;
  for (const int part : {position, kv_head, layer}) {
    const uint64_t x = scramble((seed + part) & kBits32);
    seed = x ^ x >> 16;
  }
  return std::ldexp(static_cast<double>((scramble((seed + token) & kBits32) >> 8) + 1), -24);
}

Vector sample_weights(const Rows& queries, const Rows& keys, int end, const Vector& last_lse,
                      const Softmax& softmax) {
  Vector weights(end, 0.0);
  for (int token = 0; token < end; ++token) {
    for (size_t g = 0; g < queries.size(); ++g) {
      const double weight = std::exp(logit(queries[g], keys[token], softmax) - last_lse[g]);
      if (weight > weights[token]) weights[token] = weight;
    }
  }
  return weights;
}

std::string judge_sample(const Sample& sample, const Vector& weights, const Vector& uniforms, double tau, int count,
                         double slack) {
  constexpr int kRoom = 4;
  Vector keys;
  for (size_t i = 0; i < weights.size(); ++i) keys.push_back(weights[i] / uniforms[i]);
  const auto above = [&](double bar) {
    return static_cast<int>(std::count_if(keys.begin(), keys.end(), [&](double key) { return key > bar; }));
  };
  const int certain = above(tau * (1 + slack)), possible = above(tau * (1 - slack));
  if (sample.candidates < certain || sample.candidates > possible) {
    return std::to_string(sample.candidates) + " candidates, must be " + std::to_string(certain) + " to " +
           std::to_string(possible);
  }
  if (sample.candidates > kRoom * count) return sample.tokens.empty() ? "" : "a sample without room for it";
  double cut = tau;
  if (sample.candidates > count) {
    Vector sorted = keys;
    std::sort(sorted.begin(), sorted.end(), std::greater<>());
    cut = sorted[count];
  }
  if (static_cast<int>(sample.tokens.size()) != std::min(sample.candidates, count)) {
    return std::to_string(sample.tokens.size()) + " of " + std::to_string(sample.candidates) + " candidates kept";
  }
  std::set<int> taken;
  for (size_t i = 0; i < sample.tokens.size(); ++i) {
    const int token = sample.tokens[i];
    const std::string name = "token " + std::to_string(token);
    if (token < 0 || token >= static_cast<int>(weights.size())) return name + " is not old";
    if (!taken.empty() && token <= *taken.rbegin()) return name + " is not above the one before";
    taken.insert(token);
    if (!(keys[token] > cut * (1 - slack))) return name + " has too small a key";
    const double a = std::max(0.0, cut / weights[token] - 1);
    if (!(std::abs(sample.a[i] - a) <= 2 * slack * (1 + a))) {
      return name + " has a " + std::to_string(sample.a[i]) + ", must be " + std::to_string(a);
    }
  }
  for (size_t i = 0; i < keys.size(); ++i) {
    if (keys[i] > cut * (1 + slack) && taken.count(static_cast<int>(i)) == 0) {
      return "token " + std::to_string(i) + " is missing";
    }
  }
  return "";
}

double light(const Vector& query, const Rows& keys, const Sample& sample, const Softmax& softmax) {
  double sum = -INFINITY;
  for (size_t i = 0; i < sample.tokens.size(); ++i) {
    sum = log_add(sum, std::log(sample.a[i]) + logit(query, keys[sample.tokens[i]], softmax));
  }
  return sum;
}

bool nothing_left(double entry, double replaced, double light) {
  return std::abs(1 - std::exp(replaced - entry)) < 1. / 1024 && std::exp(light - entry) < 1. / 1024;
}

double log_ratio(const Vector& now, const Vector& then, const Rows& keys, const Sample& sample,
                 const Softmax& softmax) {
  const double sum = light(then, keys, sample, softmax);
  return sum == -INFINITY ? 0 : light(now, keys, sample, softmax) - sum;
}

Vector counts(const Sample& sample, int anchors, int end) {
  Vector counts;
  for (const double a : sample.a) {
    counts.push_back(1 + (a > 0 ? 1 / (1 / a + static_cast<double>(sample_size(anchors, end)) / end) : 0));
  }
  return counts;
}

State hit(const State& entry, const State& replaced, double log_ratio, const State& fresh) {
  const double moved = entry.lse + log_ratio, high = std::max(moved, fresh.lse);
  if (moved == -INFINITY) return fresh;
  const double taken = std::exp(replaced.lse - entry.lse);
  const double old_sum = std::exp(moved - high), fresh_sum = std::exp(fresh.lse - high);
  const double total = old_sum * (1 - taken) + fresh_sum;
  if (total < fresh_sum / 4) return fresh;
  State state;
  for (size_t d = 0; d < entry.out.size(); ++d) {
    const double old = old_sum * (entry.out[d] - taken * replaced.out[d]);
    state.out.push_back((old + fresh_sum * fresh.out[d]) / total);
  }
  state.lse = high + std::log(total);
  return state;
}

double match_theta(const Vector& query, double threshold, bool relative, double max_drift, double spread) {
  double theta = relative ? threshold * dot(query, query) : threshold;
  if (max_drift > 0) theta = std::min(theta, max_drift / (spread > 0 ? spread : 16 / dot(query, query)));
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
