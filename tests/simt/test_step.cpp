// amend_kernel when it completes too: test_simt_step bf16|fp16|bf16_fp8|fp16_fp8, as for test_simt_amend
//
// Amend and complete, each of which has tests of its own against the reference, must leave the same bits as the two
// in one launch: output, log-sum-exp and rings.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "amend_case.h"

namespace mac_attn::simt {
namespace {

constexpr uint16_t kGap = 0x1234;  // between the rows of `out`

class StepCase {
 public:
  explicit StepCase(const AmendSpec& spec, int max_reuse_depth = 1)
      : amend(spec),
        spec_(spec),
        max_reuse_depth_(max_reuse_depth),
        query_([&] {
          Data data(spec.seed + 2000);
          return HeadsTensor(spec.dtype, batch(), heads(), spec.head_dim, 1, data);
        }()),
        before_(amend.ring) {
    for (int b = 0; b < batch(); ++b) ids_.push_back(100 + b);
    for (int h = 0; h < heads(); ++h) sinks_.push_back(h % 5 == 3 ? -INFINITY : static_cast<float>(h % 7 - 2));
  }

  // In two launches.
  void run_apart(const Run& run) {
    begin();
    amend.run(run);
    CompleteParams c = params();
    const AmendParams p = amend.params();
    c.states = p.out, c.state_lse = p.lse, c.log_ratio = p.log_ratio, c.sampled = p.sampled;
    c.anchors = p.anchors, c.anchor_weights = p.anchor_weights;
    const cuda::CompleteWorkspace w{spec_.exact ? nullptr : amend.status.data()};
    (spec_.dtype == DType::kBFloat16 ? launch_complete_bf16 : launch_complete_fp16)(c, w, run);
  }
  void run_step(const Run& run) {
    begin();
    amend.run_step(params(), run);
    amend.check_workspace();
  }
  bool same(const StepCase& other) const {
    return out == other.out && std::memcmp(lse.data(), other.lse.data(), lse.size() * sizeof(float)) == 0 &&
           amend.ring.bytes == other.amend.ring.bytes;
  }
  bool is_nan(int request, int head) const {
    const uint16_t* row = &out[request * batch_stride() + head * head_stride()];
    const bool all =
        std::all_of(row, row + spec_.head_dim, [&](uint16_t x) { return std::isnan(decode(spec_.dtype, x)); });
    return all && std::isnan(lse[request * heads() + head]);
  }
  int64_t counted(int request, Counter counter) const {
    const int slot = amend.slot(request);
    return amend.ring.view().counters(slot)[counter] - before_.view().counters(slot)[counter];
  }
  const RingTensors& before() const { return before_; }

  AmendCase amend;
  std::vector<uint16_t> out;
  std::vector<float> lse;

 private:
  int batch() const { return static_cast<int>(spec_.seq_lens.size()); }
  int heads() const { return spec_.num_kv_heads * spec_.group_size; }
  int64_t head_stride() const { return spec_.head_dim + 3; }
  int64_t batch_stride() const { return heads() * head_stride() + 5; }
  void begin() {
    amend.ring = before_;
    std::fill(amend.status.begin(), amend.status.end(), 0);
    out.assign((batch() - 1) * batch_stride() + (heads() - 1) * head_stride() + spec_.head_dim, kGap);
    lse.assign(batch() * heads(), 12345.f);
  }
  CompleteParams params() {
    const AmendParams p = amend.params();
    CompleteParams c{};
    c.shape = p.shape, c.dtype = p.dtype, c.requests = p.requests;
    c.matched = p.matched, c.band = p.band;
    c.out = out.data(), c.out_batch_stride = batch_stride(), c.out_head_stride = head_stride();
    c.lse = lse.data();
    if (spec_.seed % 3 == 1) c.sinks = sinks_.data();
    if (spec_.exact) return c;
    if (spec_.seed % 2) c.requests.request_ids = ids_.data();
    c.query = query_.view(), c.rotated = p.query, c.ring = amend.ring.view();
    c.max_reuse_depth = max_reuse_depth_;
    return c;
  }

  AmendSpec spec_;
  int max_reuse_depth_;
  HeadsTensor query_;
  RingTensors before_;
  std::vector<int64_t> ids_;
  std::vector<float> sinks_;
};

// Returns the entries stored.
int64_t test(const AmendSpec& spec, const std::vector<Run>& runs, int max_reuse_depth = 1) {
  const CaseReport report(spec.name());
  StepCase apart(spec, max_reuse_depth), together(spec, max_reuse_depth);
  apart.run_apart({Engine::kFibers, 1});
  for (const Run& run : runs) {
    const CaseReport schedule(name_of(run));
    together.run_step(run);
    CHECK(together.same(apart));
  }
  int64_t stored = 0;
  for (size_t b = 0; b < spec.seq_lens.size() && !spec.exact; ++b) {
    if (spec.seq_lens[b] > 0) stored += together.counted(static_cast<int>(b), kEntriesStored);
  }
  return stored;
}

std::vector<Run> one_run() {
  static uint64_t seed = 0;
  return {{Engine::kFibers, ++seed}};
}

void test_all(const AmendSpec& base) {
  const std::vector<int> all_ages[] = {{0}, {6}, {0, 20, 3}};
  AmendSpec spec = base;
  spec.seq_lens = {150, 0, 70, 25};
  for (const int head_dim : {64, 80, 96, 128, 256}) {
    for (const int group_size : {1, 3, 8, 16, 20}) {
      for (const std::vector<int>& ages : all_ages) {
        spec.head_dim = head_dim, spec.group_size = group_size, spec.ages = ages, ++spec.seed;
        const bool fits = group_size <= std::min(cuda::kMaxTileHeads, cuda::kMostReplaced / head_dim * 8);
        spec.anchors = fits && spec.seed % 2 ? 8 : 0, spec.per_head = spec.anchors == 0 && spec.seed % 3 == 0;
        spec.exact = spec.seed % 7 == 0, spec.ctas = 1 + static_cast<int>(spec.seed % 5);
        test(spec, one_run(), spec.anchors > 0 ? 1 : 1 + static_cast<int>(spec.seed % 4));
      }
    }
  }
  // Misses with their sample, and refused ones; hits that store nothing, and some that do.
  spec = base;
  spec.seq_lens = {400, 90}, spec.anchors = 16;
  for (const double candidates : {0.5, 1.5, 3.9}) {
    spec.candidates = candidates;
    CHECK(test(spec, one_run()) == 4);
  }
  spec.candidates = 6;
  CHECK(test(spec, one_run()) < 4);
  spec.candidates = 1.5, spec.ages = {20};
  CHECK(test(spec, one_run()) == 0);
  spec.anchors = 0, spec.group_size = 1;
  CHECK(test(spec, one_run(), 10) == 4);
  spec.group_size = cuda::kMaxGroup, spec.per_head = true, spec.ages = {0, 7, 30}, test(spec, one_run(), 3);
  // A long list of partial states.
  spec = base;
  spec.seq_lens = {6200}, spec.num_kv_heads = 1, spec.group_size = 16, spec.ctas = 120;
  for (const int anchors : {0, 256}) spec.anchors = anchors, test(spec, one_run());
  spec.ages = {9}, test(spec, one_run());

  spec = base;
  spec.seq_lens = {140, 0, 70, 25}, spec.page_size = 7, spec.ages = {0, 6, 20, 0};
  spec.anchors = 8, spec.ctas = 4, test(spec, all_runs());
  spec.without_ring = {2}, test(spec, all_runs());
  spec.anchors = 0, spec.per_head = true, spec.group_size = 5, test(spec, all_runs(), 3);
  spec.exact = true, test(spec, all_runs());
}

// What a request's errors do to its answer and its slot, and not to others.
void test_errors(const AmendSpec& base) {
  AmendSpec spec = base;
  spec.seq_lens = {130, 90, 100}, spec.page_size = 8, spec.ages = {0, 20};
  const int G = spec.group_size;
  for (const int anchors : {0, 8}) {
    spec.anchors = anchors;
    const CaseReport report(spec.name());
    StepCase right(spec), wrong(spec);
    right.run_step(one_run()[0]);

    wrong.amend.seq_lens[1] = 1000, wrong.amend.errors[1] = cuda::kBadLength;
    wrong.run_step(one_run()[0]);
    for (int head = 0; head < 2 * G; ++head) {
      CHECK(wrong.is_nan(1, head) && !wrong.is_nan(0, head) && !wrong.is_nan(2, head));
    }
    CHECK(wrong.counted(1, kKvHeadSteps) == 0 && wrong.counted(0, kKvHeadSteps) == 2);
    CHECK(wrong.amend.status == (std::vector<int32_t>{0, cuda::kBadLength, 0}));
    const RingTensors want = right.amend.ring;
    const int64_t bytes = want.layout.slot_bytes;
    for (const int b : {0, 2}) {
      const int64_t first = wrong.amend.slot(b) * bytes;
      CHECK(std::memcmp(&wrong.amend.ring.bytes[first], &want.bytes[first], bytes) == 0);
    }
    const int64_t first = wrong.amend.slot(1) * bytes;
    CHECK(std::memcmp(&wrong.amend.ring.bytes[first], &wrong.before().bytes[first], bytes) == 0);

    // A page that only the KV head reads that misses: the one that hits is served.
    if (anchors > 0) continue;
    StepCase torn(spec);
    torn.amend.pages().page_id(0, 2) = kGarbage, torn.amend.errors[0] = cuda::kBadPage;
    CHECK(torn.amend.start(0, 0) == 0 && torn.amend.start(0, 1) > 3 * spec.page_size);
    for (const Run& run : all_runs()) {
      torn.run_step(run);
      const int slot = torn.amend.slot(0);
      const Ring ring = torn.amend.ring.view(), before = torn.before().view();
      for (int g = 0; g < G; ++g) {
        CHECK(torn.is_nan(0, g) && torn.lse[G + g] == right.lse[G + g]);
        CHECK(ring.last_lse(slot, 0)[g] == before.last_lse(slot, 0)[g]);
      }
      CHECK(*ring.end(slot) == *before.end(slot) && *ring.stored(slot, 0) == *before.stored(slot, 0));
      CHECK(torn.counted(0, kKvHeadSteps) == 1 && torn.counted(0, kEntriesStored) == 0);
      CHECK(torn.amend.status == (std::vector<int32_t>{cuda::kBadPage, 0, 0}));
    }
  }
}

}  // namespace
}  // namespace mac_attn::simt

int main(int argc, char** argv) {
  using namespace mac_attn;
  if (argc != 2) return 2;
  const std::string dtypes = argv[1];
  simt::AmendSpec base;
  base.dtype = dtypes.rfind("fp16", 0) == 0 ? DType::kFloat16 : DType::kBFloat16;
  base.fp8 = dtypes.size() > 4;
  simt::test_all(base);
  simt::test_errors(base);
  return simt::test_result("step");
}
