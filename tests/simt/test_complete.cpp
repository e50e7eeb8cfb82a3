// complete_kernel: test_simt_complete DTYPE
#include "complete_case.h"

namespace mac_attn::simt {
namespace {

// Returns the entries that were stored.
int64_t test(const CompleteSpec& spec, const std::vector<Run>& runs) {
  const CaseReport report(spec.name());
  CompleteCase complete(spec);
  for (const Run& run : runs) {
    const CaseReport schedule(name_of(run));
    complete.run(run);
    complete.check();
  }
  return complete.entries_stored();
}

std::vector<Run> one_run() {
  static uint64_t seed = 0;
  return {{Engine::kFibers, ++seed}};
}

void test_all(DType dtype) {
  CompleteSpec spec;
  spec.dtype = dtype;
  const std::vector<int> all_ages[] = {{0}, {1}, {30}, {0, 3, 30}};
  struct Sizes {
    int head_dim, shorter = 0;
  };
  for (const auto& [head_dim, shorter] : {Sizes{64},
                                          {80},
                                          {96},
                                          {128},
                                          {256},
                                          {512},
                                          {8},
                                          {24},
                                          {40},
                                          {72},
                                          {104},
                                          {120},
                                          {136},
                                          {200},
                                          {248},
                                          {192, 64},
                                          {64, 24},
                                          {128, 64},
                                          {40, 32}}) {
    for (const int group_size : {1, 3, 5, 8, 16, 32}) {
      for (const std::vector<int>& ages : all_ages) {
        spec.head_dim = head_dim, spec.shorter = shorter, spec.group_size = group_size, spec.ages = ages;
        spec.request_ids = spec.seed % 3 != 0, spec.exact = spec.seed % 5 == 0;
        spec.max_reuse_depth = 1 + static_cast<int>(spec.seed % 6);
        spec.num_kv_heads = 1 + static_cast<int>(spec.seed % 3);
        spec.sinks = spec.seed % 4 == 2;
        ++spec.seed;
        spec.per_head = spec.seed / 4 % 2, spec.anchors = !spec.per_head && spec.seed % 2 ? 4 : 0;
        spec.candidates = spec.anchors > 0 && spec.seed / 2 % 2;
        test(spec, one_run());
      }
    }
  }
  // More heads than a warp has lanes; many KV heads; more anchors than threads.
  spec = {};
  spec.dtype = dtype, spec.num_kv_heads = 40, spec.group_size = 2, spec.anchors = 16, test(spec, one_run());
  spec.num_kv_heads = 1, spec.anchors = 200, test(spec, one_run());
  spec.group_size = cuda::kMaxGroup, spec.anchors = 0, spec.per_head = true, test(spec, one_run());
  // Samples that are cut: more candidates than the block has threads, and few; under every schedule.
  for (const int head_dim : {64, 256, 512, 40, 200}) {
    spec = {};
    spec.shorter = head_dim == 200 ? 72 : 0;
    spec.dtype = dtype, spec.candidates = true, spec.ages = {0}, spec.head_dim = head_dim, spec.seed = head_dim;
    spec.anchors = 300, spec.seq_lens = {2500, 1300, 200};
    CHECK(test(spec, one_run()) > 0);
    spec.anchors = 8, spec.seq_lens = {150, 60}, spec.tokens = 2;
    CHECK(test(spec, all_runs()) > 0);
  }
  // How far keys spread: of slots that start, of requests that have grown to a power of two, of too few keys.
  for (const int head_dim : {64, 80, 128, 256, 512, 40, 200}) {
    for (const bool fp8 : {false, true}) {
      if (fp8 && head_dim % 16 != 0) continue;
      spec = {};
      spec.dtype = dtype, spec.keys = true, spec.fp8 = fp8, spec.head_dim = head_dim, spec.ages = {0, 300};
      spec.seed = head_dim + fp8, spec.seq_lens = {512, 600, 513, 511, 1024, 1030, 0, 2048}, test(spec, one_run());
      spec.anchors = 0, spec.num_kv_heads = 1, spec.seed += 2, test(spec, one_run());
      spec.tokens = 4, spec.seq_lens = {1026, 600}, spec.seed += 2;
      test(spec, head_dim == 80 ? all_runs() : one_run());
    }
  }
  // A hit with anchors stores nothing, nor does an entry without old tokens.
  spec = {};
  spec.dtype = dtype, spec.ages = {5}, spec.seq_lens = {150, 60};
  CHECK(test(spec, one_run()) == 0);
  spec.anchors = 0, spec.max_reuse_depth = 10;
  CHECK(test(spec, one_run()) == 4);
  spec.seq_lens = {spec.band, 3};
  CHECK(test(spec, one_run()) == 0);
  spec.seq_lens = {spec.band + 1, 3};
  CHECK(test(spec, one_run()) == 2);

  spec = {};
  spec.dtype = dtype, spec.entries = 1, test(spec, all_runs());  // the new entry's place is the matched one's
  spec.anchors = 0, test(spec, all_runs());
  spec.per_head = true, spec.group_size = 6, spec.ages = {0, 5, 7}, spec.max_reuse_depth = 2,
  test(spec, all_runs());
  spec = {};
  spec.dtype = dtype, spec.num_kv_heads = 3, spec.ages = {30}, test(spec, all_runs());
  spec.without_ring = {0, 3}, test(spec, all_runs());
  spec.sinks = true, test(spec, all_runs());
  spec.exact = true, test(spec, all_runs());
  // Several query tokens.
  for (const int tokens : {2, 5, 16}) {
    spec = {};
    spec.dtype = dtype, spec.tokens = tokens, spec.seed = 900 + tokens, spec.sinks = tokens == 5;
    spec.seq_lens = {150, tokens, 0, 24 + tokens, 61, 90}, spec.ages = {5, 0, 3, 9}, test(spec, one_run());
    spec.query_lens = {tokens, 1, kGarbage, tokens, 2, 1}, spec.without_ring = {4}, test(spec, all_runs());
    spec.anchors = 0, spec.group_size = 20, test(spec, one_run());
    spec.ages = {5, 3}, spec.per_head = true, test(spec, one_run());  // all heads of a KV head hit
    spec.ages = {5, 3, 0, 9}, ++spec.seed, test(spec, one_run());
    spec.exact = true, test(spec, one_run());
  }
}

void test_errors(DType dtype) {
  for (int i = 0; i < 6; ++i) {
    CompleteSpec spec;
    spec.dtype = dtype, spec.seed = 50 + i, spec.sinks = i % 3 == 0, spec.per_head = i % 2,
    spec.anchors = i % 2 ? 0 : 4;
    const CaseReport report(spec.name());
    CompleteCase complete(spec);
    complete.status[0] = cuda::kBadSlot, complete.slots[0] = i < 2 ? kGarbage : i < 4 ? -2 : complete.slots[1];
    complete.status[3] = cuda::kBadLength, complete.seq_lens[3] = i % 2 ? -7 : 1 << 30;
    complete.run(one_run()[0]);
    complete.check();
  }
  // Without reuse there is no status: amend's NaN goes through.
  CompleteSpec spec;
  spec.dtype = dtype, spec.exact = true;
  CompleteCase complete(spec);
  const size_t rows = complete.state_lse.size(), one = rows / kNumSpans / spec.seq_lens.size();
  for (const size_t first : {one, rows / kNumSpans + one}) {
    std::fill_n(&complete.state_lse[first], one, NAN);
    std::fill_n(&complete.states[first * spec.head_dim], one * spec.head_dim, NAN);
  }
  complete.run();
  complete.check();
}

}  // namespace
}  // namespace mac_attn::simt

int main(int argc, char** argv) {
  using namespace mac_attn;
  if (argc != 2) return 2;
  const DType dtype = std::string(argv[1]) == "fp16" ? DType::kFloat16 : DType::kBFloat16;
  simt::test_all(dtype);
  simt::test_errors(dtype);
  return simt::test_result("complete");
}
