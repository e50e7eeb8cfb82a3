// The CPU kernels without torch: a decode loop on random data with std::thread as the team, compared with
// sums in double written out below. Small on purpose: tests/*.py go through the shapes; this one shows that
// the kernels stand alone, and is what the sanitizers (-DMAC_ATTN_SANITIZE=...) run on.
#include <cmath>
#include <cstdio>
#include <random>
#include <thread>
#include <vector>

#include "asked_level.h"
#include "cpu/schedule.h"

namespace {

using namespace mac_attn;

constexpr int kBatch = 2, kKvHeads = 2, kGroup = 3, kHeadDim = 80, kPageSize = 7;
constexpr int kHeads = kKvHeads * kGroup, kSlots = 3, kEntries = 24, kBand = 16, kAnchors = 8, kThreads = 3;
constexpr int kFirst = 60, kTokens = 200;
constexpr int kLongFirst = 6000, kLongTokens = 3;  // so long that threads draw tasks ahead

std::mt19937 generator(7);
float normal() {
  static std::normal_distribution<float> distribution;
  return distribution(generator);
}
std::vector<float> random_floats(size_t count) {
  std::vector<float> values(count);
  for (float& value : values) value = normal();
  return values;
}

template <typename Kernel, typename Params, typename Work>
void run_team(Kernel kernel, const Params& params, Work& work) {
  std::vector<std::thread> team;
  for (int i = 0; i < kThreads; ++i) team.emplace_back([&] { kernel(params, work); });
  for (std::thread& thread : team) thread.join();
}

struct State {
  double lse = -INFINITY;
  std::vector<double> out = std::vector<double>(kHeadDim, 0.0);
};

// float8_e4m3fn but for NaN, with as many subnormals as any other exponent.
std::vector<uint8_t> random_bytes(size_t count) {
  std::vector<uint8_t> bytes(count);
  for (uint8_t& byte : bytes) {
    do byte = static_cast<uint8_t>(generator());
    while ((byte & 127) == 127);
  }
  return bytes;
}
float float8_value(uint8_t byte) {
  const int exponent = byte >> 3 & 15, mantissa = byte & 7;
  const float magnitude = std::ldexp(float(exponent ? 8 + mantissa : mantissa), std::max(exponent, 1) - 10);
  return byte & 128 ? -magnitude : magnitude;
}

struct Model {
  int max_pages;
  std::vector<float> k, v;
  std::vector<uint8_t> k_bytes, v_bytes;  // of a float8 cache, whose values are in k and v
  std::vector<float> k_scale, v_scale;
  std::vector<int32_t> block_table;
  std::vector<float> query = random_floats(kBatch * kHeads * kHeadDim);
  std::vector<int32_t> seq_lens = std::vector<int32_t>(kBatch);
  std::vector<int32_t> slots = {2, 0};

  // Page i of request b is page i * kBatch + b of the cache.
  Model(int longest, bool float8)
      : max_pages((longest + kPageSize - 1) / kPageSize),
        k(random_floats(size_t(kBatch) * max_pages * kPageSize * kKvHeads * kHeadDim)),
        v(random_floats(k.size())) {
    if (float8) {
      k_bytes = random_bytes(k.size()), v_bytes = random_bytes(v.size());
      k_scale = {0.01f, 0.02f}, v_scale = {0.03f};
      for (size_t i = 0; i < k.size(); ++i) {
        k[i] = float8_value(k_bytes[i]) * k_scale[i / kHeadDim % kKvHeads];
        v[i] = float8_value(v_bytes[i]) * v_scale[0];
      }
    }
    for (int b = 0; b < kBatch; ++b) {
      for (int i = 0; i < max_pages; ++i) block_table.push_back(i * kBatch + b);
    }
  }
  size_t row(int b, int token, int kv_head) const {
    const size_t page = block_table[b * max_pages + token / kPageSize];
    return ((page * kPageSize + token % kPageSize) * kKvHeads + kv_head) * kHeadDim;
  }
  // Exact attention of one head over [0, n).
  State attend(int b, int head, int n) const {
    const float* q = &query[(b * kHeads + head) * kHeadDim];
    std::vector<double> logits(n);
    double high = -INFINITY, sum = 0;
    for (int t = 0; t < n; ++t) {
      double dot = 0;
      for (int d = 0; d < kHeadDim; ++d) dot += double(q[d]) * k[row(b, t, head / kGroup) + d];
      logits[t] = dot / std::sqrt(double(kHeadDim));
      high = std::max(high, logits[t]);
    }
    State state;
    for (int t = 0; t < n; ++t) {
      const double weight = std::exp(logits[t] - high);
      sum += weight;
      for (int d = 0; d < kHeadDim; ++d) state.out[d] += weight * v[row(b, t, head / kGroup) + d];
    }
    for (double& value : state.out) value /= sum;
    state.lse = high + std::log(sum);
    return state;
  }
};

struct RingMemory {
  RingLayout layout = ring_layout({kKvHeads, kGroup, kHeadDim, kEntries, kAnchors, sizeof(float)});
  std::vector<int64_t> bytes = std::vector<int64_t>(kSlots * layout.slot_bytes / 8);

  Ring view() { return {reinterpret_cast<char*>(bytes.data()), layout, kSlots}; }
};

// Decodes `tokens` tokens after `first`, with `drafts` more in each step that are then rejected; all have the same
// query. It changes only every `repeat` steps, so with a threshold above 0 the steps between are hits on an equal
// query, whose result must still be exact: what the anchors tell of the rest is that it has not moved. Returns the
// largest error.
double decode(int first, int tokens, float threshold, int repeat, int64_t& hits, bool float8 = false,
              int drafts = 0) {
  const int wide = 1 + drafts, queries = kBatch * wide * kHeads;
  Model model(first + tokens + drafts + 5, float8);
  RingMemory ring;
  std::vector<float> thresholds(kHeads, threshold);
  const Shape shape{kBatch, kKvHeads, kGroup, kHeadDim, wide};
  const Requests requests{model.seq_lens.data(), model.slots.data(), nullptr, nullptr};
  double error = 0;
  for (int step = 0; step < tokens; ++step) {
    if (step % repeat == 0) model.query = random_floats(model.query.size());
    for (int b = 0; b < kBatch; ++b) model.seq_lens[b] = first + step + drafts + 5 * b;
    const HeadsView now{model.query.data(), kHeads * kHeadDim, kHeadDim, 0};

    std::vector<int32_t> source(queries), place = source, stored(kBatch * kKvHeads), sampled(stored.size() * wide);
    std::vector<int32_t> anchors(kBatch * kKvHeads * kAnchors);
    std::vector<float> states(kNumSpans * queries * kHeadDim), state_lse(kNumSpans * queries);
    std::vector<float> out(queries * kHeadDim), lse(queries), log_ratio = lse;
    std::vector<float> anchor_weights(anchors.size());
    const Matched matched{source.data(), place.data(), stored.data()};

    MatchParams match{};
    match.shape = shape, match.dtype = DType::kFloat32, match.query = now, match.requests = requests;
    match.ring = ring.view(), match.threshold = thresholds.data(), match.relative = true, match.matched = matched;
    match.window = kEntries, match.band = kBand, match.min_context = 1, match.max_reuse_depth = 1;
    cpu::MatchWork match_work(match, kThreads);
    run_team(cpu::kernels(match.shape).match, match, match_work);
    match_work.write_matched(match);

    AmendParams amend{};
    amend.shape = shape, amend.dtype = DType::kFloat32, amend.query = now, amend.requests = requests;
    amend.kv.k = model.k.data(), amend.kv.v = model.v.data();
    if (float8) {
      amend.kv.k = model.k_bytes.data(), amend.kv.v = model.v_bytes.data(), amend.kv.float8 = true;
      amend.kv.k_scale = {model.k_scale.data(), 1}, amend.kv.v_scale = {model.v_scale.data(), 0};
    }
    amend.kv.k_page_stride = amend.kv.v_page_stride = kPageSize * kKvHeads * kHeadDim;
    amend.kv.k_token_stride = amend.kv.v_token_stride = kKvHeads * kHeadDim;
    amend.kv.k_head_stride = amend.kv.v_head_stride = kHeadDim;
    amend.kv.block_table = model.block_table.data(), amend.kv.block_table_stride = model.max_pages;
    amend.kv.page_size = kPageSize;
    amend.matched = matched, amend.ring = ring.view(), amend.band = kBand, amend.num_anchors = kAnchors;
    amend.sm_scale = 1 / std::sqrt(float(kHeadDim));
    amend.out = states.data(), amend.lse = state_lse.data(), amend.log_ratio = log_ratio.data();
    amend.anchors = anchors.data(), amend.anchor_weights = anchor_weights.data(), amend.sampled = sampled.data();
    cpu::AmendWork amend_work(amend, kThreads);
    run_team(cpu::kernels(amend.shape).amend, amend, amend_work);

    CompleteParams complete{};
    complete.shape = shape, complete.dtype = DType::kFloat32, complete.requests = requests;
    complete.states = states.data(), complete.state_lse = state_lse.data(), complete.matched = matched;
    complete.log_ratio = log_ratio.data(), complete.anchors = anchors.data();
    complete.anchor_weights = anchor_weights.data(), complete.sampled = sampled.data();
    complete.query = now, complete.rotated = now, complete.ring = ring.view();
    complete.band = kBand, complete.max_reuse_depth = 1;
    complete.out = out.data(), complete.out_head_stride = kHeadDim, complete.out_token_stride = kHeads * kHeadDim;
    complete.out_batch_stride = wide * complete.out_token_stride;
    complete.lse = lse.data();
    cpu::CompleteWork complete_work(complete);
    run_team(cpu::kernels(complete.shape).complete, complete, complete_work);

    for (int row = 0; row < queries; ++row) {
      const int head = row % kHeads, token = row / kHeads % wide, b = row / kHeads / wide;
      const State exact = model.attend(b, head, model.seq_lens[b] - drafts + token);
      error = std::max(error, std::abs(exact.lse - lse[row]));
      for (int d = 0; d < kHeadDim; ++d) error = std::max(error, std::abs(exact.out[d] - out[row * kHeadDim + d]));
    }
  }
  hits = ring.view().counters(2)[kKvHeadHits] + ring.view().counters(0)[kKvHeadHits];
  return error;
}

int check(const char* what, bool holds, double error, int64_t hits, int tokens = kTokens) {
  std::printf("%s: %s (largest error %.2g, %lld hits of %d)\n", holds ? "ok" : "FAILED", what, error,
              static_cast<long long>(hits), kBatch * kKvHeads * tokens);
  return holds ? 0 : 1;
}

}  // namespace

int main() {
  if (!has_asked_level()) return kSkipped;
  std::printf("SIMD level: %s\n", cpu::best_kernels().name);
  // float32 sums over at most 264 tokens of values near 1: some 264 * 6e-8.
  constexpr double kTolerance = 2e-5;
  int64_t hits = 0;
  double error = decode(kFirst, kTokens, 0.f, 1, hits);
  int failed = check("threshold 0 is exact", error < kTolerance && hits == 0, error, hits);
  error = decode(kFirst, kTokens, 1e-6f, 8, hits);
  // 7 of every 8 steps meet an equal query, but the first step stores nothing, nor does one whose list overflows.
  const int64_t most = int64_t{kBatch} * kKvHeads * (kTokens - kTokens / 8), least = most - most / 20;
  const auto expected = [&] { return hits >= least && hits < most; };
  failed += check("a hit on an equal query is exact", error < kTolerance && expected(), error, hits);
  error = decode(kFirst, kTokens, 0.5f, 8, hits);
  failed += check("queries further apart do not hit", error < kTolerance && expected(), error, hits);
  error = decode(kLongFirst, kLongTokens, 1e-6f, kLongTokens, hits);
  const int64_t last_step = kBatch * kKvHeads;
  failed += check("a long context is exact", error < kTolerance && hits == last_step, error, hits, kLongTokens);
  error = decode(kFirst, kTokens, 0.f, 1, hits, true);
  failed += check("float8 at threshold 0 is exact", error < kTolerance && hits == 0, error, hits);
  error = decode(kFirst, kTokens, 1e-6f, 8, hits, true);
  failed += check("a hit on float8 is exact", error < kTolerance && expected(), error, hits);
  error = decode(kFirst, kTokens, 0.f, 1, hits, false, 3);
  failed += check("four query tokens at threshold 0 are exact", error < kTolerance && hits == 0, error, hits);
  error = decode(4 * kFirst, kTokens, 1e-6f, 8, hits, false, 3);  // in so long a context four may hit
  const bool each = hits % 4 == 0;
  hits /= 4;
  failed += check("a hit of four query tokens is exact", error < kTolerance && each && expected(), error, hits);
  return failed;
}
