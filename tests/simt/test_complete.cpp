// complete_kernel: test_simt_complete DTYPE
#include "complete_case.h"

namespace mac_attn::simt {
namespace {

void test(const CompleteSpec& spec, const std::vector<Run>& runs) {
  const CaseReport report(spec.name());
  CompleteCase complete(spec);
  for (const Run& run : runs) {
    const CaseReport schedule(name_of(run));
    complete.run(run);
    complete.check();
  }
}

std::vector<Run> one_run() {
  static uint64_t seed = 0;
  return {{Engine::kFibers, ++seed}};
}

void test_all(DType dtype) {
  CompleteSpec spec;
  spec.dtype = dtype;
  spec.window = 5;  // a ring is filled element by element
  const std::vector<int> all_ages[] = {{0}, {1}, {spec.window}, {0, 3, spec.window}};
  for (const int head_dim : {64, 80, 96, 128, 256}) {
    for (const int group_size : {1, 3, 5, 8, 16, 32}) {
      for (const std::vector<int>& ages : all_ages) {
        spec.head_dim = head_dim, spec.group_size = group_size, spec.ages = ages;
        spec.request_ids = spec.seed % 3 != 0, spec.exact = spec.seed % 5 == 0;
        spec.no_lse = spec.seed % 4 == 1;
        spec.num_kv_heads = 1 + static_cast<int>(spec.seed % 3);
        ++spec.seed;
        spec.per_head = spec.seed / 4 % 2, spec.anchors = !spec.per_head && spec.seed % 2 ? 4 : 0;
        test(spec, one_run());
      }
    }
  }
  // More KV heads than a warp has lanes, as one warp sees to all of a request's.
  spec = {};
  spec.dtype = dtype, spec.num_kv_heads = 40, spec.group_size = 2, spec.anchors = 16, test(spec, one_run());

  spec = {};
  spec.dtype = dtype;
  test(spec, all_runs());
  spec.num_kv_heads = 3, spec.ages = {spec.window}, spec.no_lse = true, test(spec, all_runs());
  spec.without_ring = {0, 3}, test(spec, all_runs());
  spec.exact = true, test(spec, all_runs());
}

void test_errors(DType dtype) {
  for (int i = 0; i < 6; ++i) {
    CompleteSpec spec;
    spec.dtype = dtype, spec.seed = 50 + i, spec.per_head = i % 2, spec.anchors = i % 2 ? 0 : 4;
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
