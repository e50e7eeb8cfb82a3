// amend_kernel: test_simt_amend shapes|mixes|errors|samples|schedules bf16|fp16|bf16_fp8|fp16_fp8
//
// The dtype is the queries', then the cache's if that is another one.
//
// shapes     every instantiation and the awkward lengths, one or two schedules each
// mixes      hits, misses, anchors, soft cap, granularities, grids
// errors     what a request with bad lengths, pages or slots does to itself and not to others
// samples    how a sample is drawn, cut and refused; that the comparison finds faults; the estimate it gives
// schedules  small cases under many schedules of the fibers, and on threads
#include <algorithm>
#include <cmath>
#include <set>

#include "amend_case.h"
#include "schedule.cuh"
#include "stage.cuh"

namespace mac_attn::simt {
namespace {

void test(const AmendSpec& spec, const std::vector<Run>& runs) {
  const CaseReport report(spec.name());
  AmendCase amend(spec);
  for (const Run& run : runs) {
    const CaseReport schedule(name_of(run));
    amend.run(run);
    amend.check();
  }
}

// An asynchronous copy of 128 bytes must not straddle two lines of shared memory (it would be two requests to the
// L2 cache), and the eight rows that an ldmatrix reads a piece of must lie in different banks.
template <int kHeadDim, typename T>
void test_stage() {
  using Stage = cuda::Stage<kHeadDim, T>;
  constexpr int kUnit = Stage::kUnit, kLine = 8 * kUnit;  // elements
  CHECK(Stage::kRow >= kHeadDim && (Stage::kRow % kLine == 0 || Stage::kRow * 2 == kLine));
  const int pieces_of_line = std::min(8, Stage::kRow / kUnit);
  for (int row = 0; row < cuda::kWarpTokens; ++row) {
    for (int first = 0; first < Stage::kRow / kUnit; first += pieces_of_line) {
      std::set<int> places;
      for (int piece = first; piece < first + pieces_of_line; ++piece) {
        const int place = Stage::place(row, piece);
        CHECK(place / kUnit / pieces_of_line == first / pieces_of_line && place % kUnit == 0);
        places.insert(place);
      }
      CHECK(static_cast<int>(places.size()) == pieces_of_line);
    }
  }
  for (int piece = 0; piece < kHeadDim / kUnit; ++piece) {
    for (const int first_row : {0, 8}) {
      std::set<int> banks;
      for (int row = first_row; row < first_row + 8; ++row) {
        banks.insert((row * Stage::kRow + Stage::place(row, piece)) % kLine);
      }
      CHECK(banks.size() == 8);
    }
  }
}

template <typename T>
void test_stages() {
  test_stage<64, T>(), test_stage<80, T>(), test_stage<96, T>(), test_stage<128, T>(), test_stage<256, T>();
  test_stage<512, T>();
}

// The division that rounds up, around multiples of the divisor, against integers.
void test_divide_up() {
  for (const int b : {1, 2, 3, 7, 31, 62, 96, 1000, 33333}) {
    for (int64_t q = 0; q < (1 << 20) && q * b < (1 << 30); q = q * 5 / 4 + 1) {
      for (int rest = -1; rest <= 1; ++rest) {
        const int a = static_cast<int>(q * b) + rest;
        if (a >= 0) CHECK(cuda::divide_up(a, b) == (a + b - 1) / b);
      }
    }
  }
}

// One schedule that no other case has.
std::vector<Run> one_run() {
  static uint64_t seed = 0;
  return {{Engine::kFibers, ++seed}};
}

void test_shapes(const AmendSpec& base) {
  base.fp8 ? test_stages<fp8>() : test_stages<bf16>();
  test_divide_up();
  const int pages[] = {1, 7, 16, 64}, head_dims[] = {64, 128, 96, 256, 512};
  int i = 0;
  const auto test_shape = [&](int head_dim, int group_size, int page_size, int shorter = 0) {
    AmendSpec spec = base;
    spec.head_dim = head_dim, spec.group_size = group_size;
    spec.page_size = page_size, spec.hnd = i % 2 == 1;
    spec.num_kv_heads = 1 + i / 3 % 2;
    spec.seq_lens = {70 + i % 40, 0, 1 + i % 3};
    spec.ages = {i % 3 == 0 ? 5 : 0, 12};
    spec.anchors = group_size <= cuda::most_replaced_heads(head_dim) ? 4 : 0;
    spec.candidates = 0.5 + i % 5;
    spec.exact = i % 7 == 4;
    spec.ctas = 1 + i % 4;
    spec.shorter = shorter;
    spec.seed = i++;
    if (!kFewShapes || spec.seed % 3 == 1) test(spec, one_run());
  };
  for (const int head_dim : {64, 80, 96, 128, 256, 512}) {
    for (const int group_size : {1, 3, 5, 8, 16, 32}) {
      for (const int page_size : pages) test_shape(head_dim, group_size, page_size);
    }
  }
  // Sizes that are filled up; float8 rows are whole pieces of 16.
  for (const int head_dim : {8, 16, 24, 40, 48, 72, 88, 104, 112, 120, 136, 160, 192, 200, 240, 248}) {
    if (base.fp8 && head_dim % 16 != 0) continue;
    for (const int group_size : {1, 5, 12, 20}) test_shape(head_dim, group_size, pages[(i + head_dim / 8) % 4]);
  }
  // Shorter values, of sizes that have kernels of their own and others.
  const int narrow[][2] = {{192, 64}, {64, 32}, {80, 16}, {96, 48}, {128, 64}, {256, 128}, {128, 8}, {40, 16}};
  for (const auto& [head_dim, shorter] : narrow) {
    if (base.fp8 && (head_dim % 16 != 0 || shorter % 16 != 0)) continue;
    for (const int group_size : {1, 5, 12, 20}) test_shape(head_dim, group_size, pages[i % 4], shorter);
  }
  // Lengths around the band, tiles and pages.
  for (const int page_size : pages) {
    AmendSpec spec = base;
    spec.page_size = page_size, spec.num_kv_heads = 1, spec.band = 24, spec.hnd = page_size == 7;
    spec.seq_lens = {1, 0, spec.band, spec.band + 1, 2 * page_size, 2 * page_size + 1, 64, 65, spec.band + 64};
    spec.anchors = 3;
    for (const int age : {0, 1}) {
      spec.ages = {age};
      spec.exact = false, test(spec, one_run());
    }
    spec.exact = true, test(spec, one_run());
  }
  // Several query tokens: passes of every width, all of them there or some.
  for (const int tokens : {2, 4, 7, 16}) {
    for (const int group_size : {1, 3, 4, 20}) {
      AmendSpec spec = base;
      spec.tokens = tokens, spec.group_size = group_size, spec.page_size = pages[i % 4], spec.hnd = i % 2;
      spec.head_dim = head_dims[(i + i / 4) % 5], spec.num_kv_heads = 1 + i % 2, spec.ctas = 1 + i % 5;
      spec.seq_lens = {130, tokens, 0, 24 + tokens, 63 + tokens, 90};
      spec.ages = {5, 20, 0, 1}, spec.per_head = (i + i / 4) % 4 == 2, spec.batch_invariant = i % 5 == 2;
      if (i % 4) spec.query_lens = {tokens, 1, kGarbage, tokens, (tokens + 1) / 2, 1};
      const bool replaces = !spec.per_head && group_size <= cuda::most_replaced_heads(spec.head_dim);
      spec.anchors = replaces ? 6 : 0, spec.exact = i % 5 == 0;
      if (i % 3 == 1) spec.without_ring = {0, 3};
      spec.soft_cap = i % 6 == 2 ? 9 : 0;
      spec.shorter = i % 3 == 2 && spec.head_dim < 512 ? 16 : 0;
      spec.seed = i++;
      test(spec, one_run());
    }
  }
}

void test_mixes(const AmendSpec& base) {
  AmendSpec spec = base;
  spec.page_size = 7, spec.seq_lens = {210, 90, 0, 150};
  const std::vector<int> all_ages[] = {{0}, {1}, {70}, {0, 3}, {20, 0, 66, 1, 0}};
  for (const std::vector<int>& ages : all_ages) {
    spec.ages = ages;
    for (const int anchors : {0, 16, 64}) {
      spec.anchors = anchors;
      spec.heavy_tokens = 5;
      spec.soft_cap = anchors == 16 ? 9 : 0;
      for (const int ctas : {1, 5, 40}) {  // 40 are more than there are tiles
        spec.ctas = ctas;
        ++spec.seed;
        test(spec, one_run());
      }
    }
  }
  // Anchors that come twice: several tiles of them, in pieces that begin and end anywhere among both times.
  spec.head_dim = 512, spec.heavy_tokens = 5, spec.seq_lens = {1000, 0, 500}, spec.num_kv_heads = 1;
  for (const std::vector<int>& ages : {std::vector<int>{70}, {20, 0, 1}}) {
    for (const int ctas : {1, 2, 3, 5, 40}) {
      spec.ages = ages, spec.ctas = ctas, spec.anchors = ctas == 3 ? 10 : 150, spec.soft_cap = ctas == 2 ? 9 : 0;
      spec.full_lists = ctas == 5, spec.tokens = ctas == 40 ? 3 : 1;
      ++spec.seed, test(spec, one_run());
    }
  }
  spec = base;
  spec.page_size = 7, spec.seq_lens = {210, 90, 0, 150}, spec.heavy_tokens = 5;
  // Two blocks of heads and two passes, each query head with a source of its own.
  spec.anchors = 0, spec.per_head = true;
  for (const int group_size : {3, 12, 24}) {
    spec.group_size = group_size, spec.ages = {9, 0, 4, 70, 1}, test(spec, one_run());
    spec.ages = {9, 30, 4, 70, 1}, test(spec, one_run());
  }
  // Large logits: the maximum moves often, and most of the weight is in the anchors.
  spec = base;
  spec.seq_lens = {300}, spec.heavy_tokens = 12, spec.ages = {0, 20};
  for (const double sharpness : {0.1, 2.0, 4.0}) {
    for (const int group_size : {1, 16}) {
      spec.sharpness = sharpness, spec.group_size = group_size, spec.anchors = 8;
      ++spec.seed, test(spec, one_run());
      spec.soft_cap = 5, test(spec, one_run());
      spec.soft_cap = 0;
    }
  }
  // More candidates than the block has threads; all of one weight.
  spec.seq_lens = {2300}, spec.group_size = 2, spec.num_kv_heads = 1, spec.page_size = 64, spec.anchors = 50;
  spec.ages = {0};
  for (const double sharpness : {0.0, 1.0}) {
    for (const int ctas : {1, 9}) {
      spec.heavy_tokens = sharpness > 0 ? 10 : 0, spec.sharpness = sharpness, spec.ctas = ctas,
      test(spec, one_run());
    }
  }
  // Long enough for every CTA that pieces are drawn, with more passes than CTAs and the other way.
  for (const int ctas : {1, 2, 3}) {
    spec.seq_lens = {2300, 0, 700, 30, 40, 35, 1900}, spec.ages = {0, 0, 7, 0, 0, 9}, spec.num_kv_heads = 2;
    spec.ctas = ctas, spec.anchors = 4, spec.group_size = 2, ++spec.seed, test(spec, one_run());
  }
  spec.without_ring = {0, 2, 3}, ++spec.seed, test(spec, one_run());
  spec.anchors = 0, test(spec, one_run());
  spec.without_ring = {};
  // The same cut up by each request alone: by what is worth a piece, and by the CTAs.
  for (const int ctas : {2, 11, 300}) {
    spec.batch_invariant = true, spec.ctas = ctas, spec.anchors = ctas == 11 ? 0 : 4;
    ++spec.seed, test(spec, one_run());
  }
  spec.batch_invariant = false;
  spec.seq_lens = {2300}, spec.ages = {0}, spec.num_kv_heads = 1;
  spec.anchors = 200, spec.candidates = 2.2, test(spec, one_run());
  spec.seq_lens = {8 * cuda::kMaxAnchors + spec.band}, spec.group_size = 1, spec.anchors = cuda::kMaxAnchors;
  spec.candidates = 3.9, test(spec, one_run());
  spec.ages = {10}, test(spec, one_run());
  spec.seq_lens = {90}, spec.group_size = cuda::kMaxGroup, spec.anchors = 0, test(spec, one_run());
  spec.page_size = 16, spec.group_size = 3;
  // Fewer old tokens than anchors; a band longer than the context.
  spec.seq_lens = {40, 24, 26}, spec.anchors = 64, spec.sharpness = 1, test(spec, one_run());
  spec.band = 100, test(spec, one_run());
}

void test_errors(const AmendSpec& base) {
  AmendSpec spec = base;
  spec.seq_lens = {130, 70, 100, 45}, spec.page_size = 8, spec.ages = {0, 0, 0, 0, 20, 20, 20, 20};
  const int ctas[] = {1, 3, 9};
  for (int i = 0; i < 9; ++i) {
    spec.anchors = i % 3 == 0 ? 0 : 8, spec.ctas = ctas[i / 3];
    spec.tokens = i % 2 ? 1 : 4, spec.query_lens = i % 2 ? std::vector<int>() : std::vector<int>{4, 2, 3, 1};
    const CaseReport report(spec.name());
    const auto broken = [&](const char* what, auto change) {
      const CaseReport report(what);
      AmendCase amend(spec);
      change(amend);
      amend.run(one_run()[0]);
      amend.check();
    };
    broken("too long", [](AmendCase& a) { a.seq_lens[1] = 1000, a.errors[1] = cuda::kBadLength; });
    broken("negative", [](AmendCase& a) { a.seq_lens[0] = -3, a.errors[0] = cuda::kBadLength; });
    if (spec.tokens > 1) {
      broken("no query token", [](AmendCase& a) { a.query_lens[1] = 0, a.errors[1] = cuda::kBadLength; });
      broken("more than there are", [](AmendCase& a) { a.query_lens[3] = 5, a.errors[3] = cuda::kBadLength; });
      broken("more than tokens", [](AmendCase& a) { a.seq_lens[2] = 2, a.errors[2] = cuda::kBadLength; });
    }
    broken("page too large",
           [](AmendCase& a) { a.pages().page_id(0, 3) = a.pages().num_pages(), a.errors[0] = cuda::kBadPage; });
    broken("negative page", [](AmendCase& a) { a.pages().page_id(3, 5) = -1, a.errors[3] = cuda::kBadPage; });
    broken("garbage page", [](AmendCase& a) { a.pages().page_id(1, 0) = kGarbage, a.errors[1] = cuda::kBadPage; });
    broken("match found a bad slot", [](AmendCase& a) { a.status[2] = a.errors[2] = cuda::kBadSlot; });
    broken("all at once", [](AmendCase& a) {
      a.seq_lens[0] = 1 << 30, a.errors[0] = cuda::kBadLength;
      a.pages().page_id(1, 8) = -2, a.errors[1] = cuda::kBadPage;
      a.status[3] = a.errors[3] = cuda::kBadSlot;
    });
  }
  // A page that nobody reads may hold anything.
  spec.anchors = 0, spec.ages = {20}, spec.tokens = 1, spec.query_lens = {};
  AmendCase unread(spec);
  CHECK(unread.start(0, 0) > 8);
  unread.pages().page_id(0, 0) = kGarbage;
  unread.run();
  unread.check();
}

// What the slot knows decides whether a sample is drawn.
void test_refusals(const AmendSpec& base) {
  AmendSpec spec = base;
  spec.seq_lens = {150, 90}, spec.anchors = 8;
  const auto changed = [&](const char* what, bool draws, auto change) {
    const CaseReport report(what);
    AmendCase amend(spec);
    const int slot = amend.slot(0);
    change(amend, *amend.ring.view().tau(slot, 1), amend.ring.view().last_lse(slot, 1));
    amend.run(one_run()[0]);
    amend.check();
    CHECK((amend.tau(0, 1) > 0) == draws && (amend.sample(0, 1).candidates != kNotSampled) == draws);
    CHECK(amend.tau(0, 0) > 0 && amend.tau(1, 1) > 0);
  };
  changed("nothing", true, [](AmendCase&, float&, float*) {});
  changed("no history", false, [](AmendCase& a, float&, float*) { a.stored[1] = kNoHistory; });
  changed("no entry yet", true, [](AmendCase& a, float&, float*) { a.stored[1] = 0; });
  for (const int missed : {31, 32, 33, 39}) {
    changed("steps in a row without a hit", missed <= 32,
            [&](AmendCase& a, float&, float*) { *a.ring.view().missed(a.slot(0), 1) = missed; });
  }
  for (const float tau : {NAN, 0.f, -1.f, 64.5f, INFINITY}) {
    changed("tau that cannot be gone by", false, [&](AmendCase&, float& to, float*) { to = tau; });
  }
  for (const float lse : {NAN, INFINITY, -INFINITY}) {
    changed("no log-sum-exp", false, [&](AmendCase&, float&, float* last_lse) { last_lse[2] = lse; });
  }
  changed("weights that overflow", true, [](AmendCase&, float&, float* last_lse) {
    for (int g = 0; g < 3; ++g) last_lse[g] = -30000;
  });
  changed("no weight at all", true, [](AmendCase&, float&, float* last_lse) {
    for (int g = 0; g < 3; ++g) last_lse[g] = 30000;
  });
  changed("all the weight in one token", true,
          [](AmendCase&, float& tau, float* last_lse) { tau = 64, last_lse[0] = -1; });
  for (const double cap : {0, 5}) {
    spec.soft_cap = cap;
    changed("NaN in a key", true, [](AmendCase& a, float&, float*) { a.set_key(0, 40, 1, NAN); });
  }
}

// The comparison has to find faults: those of a right answer that is changed as a wrong kernel would have it.
void test_faults(const AmendSpec& base) {
  AmendSpec spec = base;
  spec.seq_lens = {600, 600}, spec.anchors = 30, spec.num_kv_heads = 1, spec.ages = {0, 9};
  for (const double candidates : {0.7, 2.5}) {
    spec.candidates = candidates;
    const CaseReport report(spec.name());
    AmendCase amend(spec);
    amend.run(one_run()[0]);
    amend.check();
    const reference::Sample right = amend.sample(0, 0);
    const reference::Vector weights = amend.weights(0, 0), uniforms = amend.uniforms(0, 0);
    const double tau = amend.tau(0, 0), slack = AmendCase::kSampleSlack;
    const auto found = [&](const char* what, const reference::Sample& sample) {
      const CaseReport report(what);
      CHECK(!reference::judge_sample(sample, weights, uniforms, tau, spec.anchors, slack).empty());
    };
    reference::Sample wrong = right;
    for (double& a : wrong.a) a = a > 0 ? a + 1 : a;  // 1 / pi
    found("weights off by the inclusion probability", wrong);
    wrong = right;
    for (size_t i = 0; i < wrong.a.size(); ++i) wrong.a[i] = std::max(0.0, tau / weights[wrong.tokens[i]] - 1);
    if (candidates > 1) found("tau not raised by a cut", wrong);
    wrong = right, wrong.tokens.pop_back(), wrong.a.pop_back();
    found("a token too few", wrong);
    // What the kernel would draw if all tokens had the first one's hash.
    wrong = {0, {}, {}};
    for (size_t i = 0; i < weights.size(); ++i) {
      if (!(weights[i] > tau * uniforms[0])) continue;
      if (++wrong.candidates > spec.anchors) continue;
      wrong.tokens.push_back(static_cast<int>(i)), wrong.a.push_back(std::max(0.0, tau / weights[i] - 1));
    }
    found("one hash for all tokens", wrong);
    for (int g = 0; g < spec.group_size; ++g) {
      const double other = amend.log_ratio(1, (g + 1) % spec.group_size);
      CHECK(std::abs(other - amend.expected_log_ratio(1, g)) > AmendCase::kSampleSlack);
    }
  }
}

// Over many hashes, which change with the layer: a token is taken as often as its weight by tau says, and the sums
// that the samples stand for are those over all old tokens.
void test_estimate(const AmendSpec& base) {
  constexpr int kHashes = 300;
  AmendSpec spec = base;
  spec.seq_lens = {340}, spec.num_kv_heads = 1, spec.group_size = 2, spec.anchors = 40;
  spec.candidates = 0.5;
  const CaseReport report(spec.name());
  AmendCase amend(spec);
  const reference::Vector weights = amend.weights(0, 0);
  const double tau = amend.tau(0, 0);
  double exact = 0, mean = 0, square = 0;
  std::vector<int> taken(weights.size());
  for (const double weight : weights) exact += weight;
  for (amend.layer = 0; amend.layer < kHashes; ++amend.layer) {
    amend.run(one_run()[0]);
    const reference::Sample sample = amend.sample(0, 0);
    CHECK(sample.candidates <= spec.anchors);
    double sum = 0;
    for (size_t i = 0; i < sample.tokens.size(); ++i) {
      sum += (1 + sample.a[i]) * weights[sample.tokens[i]], ++taken[sample.tokens[i]];
    }
    mean += sum / kHashes, square += sum * sum / kHashes;
  }
  CHECK(std::abs(mean - exact) < 3 * std::sqrt((square - mean * mean) / kHashes));
  double deviation = 0;  // sum of squares of as many about normal numbers
  int light = 0;
  for (size_t i = 0; i < weights.size(); ++i) {
    const double pi = std::min(1.0, weights[i] / tau), expected = kHashes * pi;
    if (pi == 1) CHECK(taken[i] == kHashes);
    if (pi == 1) continue;
    deviation += std::pow(taken[i] - expected, 2) / (expected * (1 - pi)), ++light;
  }
  CHECK(light > 50 && std::abs(deviation - light) < 4 * std::sqrt(2. * light));
}

void test_samples(const AmendSpec& base) {
  AmendSpec spec = base;
  spec.seq_lens = {500, 90}, spec.anchors = 16, spec.page_size = 64;
  for (const double candidates : {0.0, 0.6, 1.0, 1.1, 3.9, 4.0, 4.1, 6.0, 100.0}) {
    for (const int ctas : {1, 5}) {
      spec.candidates = candidates, spec.ctas = ctas, spec.heavy_tokens = ctas, ++spec.seed;
      test(spec, {one_run()[0], one_run()[0]});
    }
  }
  for (const int group_size : {1, 8, 13}) {  // a token's heads lie with several lanes
    spec.group_size = group_size, spec.candidates = 1.5, ++spec.seed, test(spec, one_run());
  }
  spec.group_size = 3;
  spec.anchors = 1, spec.candidates = 3, test(spec, one_run());
  spec.sharpness = 0, spec.anchors = 20, spec.heavy_tokens = 0;  // all of one weight
  for (const double candidates : {0.5, 2.0}) spec.candidates = candidates, test(spec, one_run());
  test_refusals(base);
  test_faults(base);
  if (base.dtype == DType::kBFloat16 && !base.fp8) test_estimate(base);
}

void test_schedules(const AmendSpec& base) {
  AmendSpec spec = base;
  spec.seq_lens = {140, 0, 70, 25}, spec.page_size = 7, spec.ages = {0, 6, 20, 0};
  spec.anchors = 8, spec.heavy_tokens = 3, spec.group_size = 3, spec.ctas = 4;
  test(spec, all_runs());
  spec.group_size = 11, spec.head_dim = 80, spec.ctas = 2, spec.hnd = true, spec.num_kv_heads = 1;
  test(spec, all_runs());
  spec.group_size = 20, spec.head_dim = 64, spec.anchors = 0, spec.per_head = true, spec.ages = {0, 6, 20};
  test(spec, all_runs());
  spec.exact = true, spec.group_size = 1;
  test(spec, all_runs());
  spec.exact = spec.per_head = false, spec.head_dim = 112, spec.group_size = 4, spec.anchors = 8;
  test(spec, all_runs());
  spec.head_dim = 192, spec.shorter = 64;
  test(spec, all_runs());
  spec.shorter = 0;
  spec.head_dim = 512, spec.ages = {6, 0};
  test(spec, all_runs());
}

}  // namespace
}  // namespace mac_attn::simt

int main(int argc, char** argv) {
  using namespace mac_attn;
  if (argc != 3) return 2;
  const std::string part = argv[1];
  const std::string dtypes = argv[2];
  simt::AmendSpec base;
  base.dtype = dtypes.rfind("fp16", 0) == 0 ? DType::kFloat16 : DType::kBFloat16;
  base.fp8 = dtypes.size() > 4;
  if (part == "shapes") simt::test_shapes(base);
  if (part == "mixes") simt::test_mixes(base);
  if (part == "errors") simt::test_errors(base);
  if (part == "samples") simt::test_samples(base);
  if (part == "schedules") simt::test_schedules(base);
  return simt::test_result(("amend " + part).c_str());
}
