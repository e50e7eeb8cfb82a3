// unrotate_kernel: test_simt_unrotate DTYPE
#include <algorithm>
#include <cmath>

#include "kernel_case.h"

namespace mac_attn::simt {
namespace {

struct Spec {
  DType dtype;
  int heads, head_dim, pairs;
  bool interleaved;
  int tokens = 1;                                           // T
  std::vector<int> seq_lens = {1, 131072, 0, 77, 5000001};  // 0: padding, position -1
};

void test(const Spec& spec, const std::vector<Run>& runs) {
  const CaseReport report("unrotate heads=" + std::to_string(spec.heads) + " D=" + std::to_string(spec.head_dim) +
                          " pairs=" + std::to_string(spec.pairs) + (spec.interleaved ? " interleaved" : ""));
  const int batch = static_cast<int>(spec.seq_lens.size()), D = spec.head_dim;
  Data data(spec.heads * 1000 + D);
  const int rows = spec.tokens * spec.heads;  // of a request
  const HeadsTensor query(spec.dtype, batch, rows, D, 1, data);
  const std::vector<int32_t> lens(spec.seq_lens.begin(), spec.seq_lens.end());
  std::vector<float> inv_freq;
  for (int i = 0; i < spec.pairs; ++i) inv_freq.push_back(static_cast<float>(std::pow(1e4, -1.0 * i / spec.pairs)));
  std::vector<uint16_t> out(batch * rows * D);

  UnrotateParams p{};
  p.shape = {batch, spec.heads, 1, D, spec.tokens};
  p.dtype = spec.dtype;
  p.query = query.view(spec.heads);
  p.positions = lens.data();
  p.back = spec.tokens;
  p.inv_freq = inv_freq.data();
  p.pairs = spec.pairs;
  p.interleaved = spec.interleaved;
  p.inverse_scale = 0.8f;
  p.out = out.data();
  for (const Run& run : runs) {
    const CaseReport schedule(name_of(run));
    std::fill(out.begin(), out.end(), encode(spec.dtype, NAN));
    Unchanged unchanged;
    unchanged.note(query.bits()), unchanged.note(lens), unchanged.note(inv_freq);
    (spec.dtype == DType::kBFloat16 ? launch_unrotate_bf16 : launch_unrotate_fp16)(p, run);
    CHECK(unchanged.holds());
    for (int row = 0; row < batch * rows; ++row) {
      reference::Vector want = query.row(row / rows, row % rows);
      const int position = lens[row / rows] - spec.tokens + row % rows / spec.heads;
      for (int i = 0; i < spec.pairs; ++i) {
        double& x = want[spec.interleaved ? 2 * i : i];
        double& y = want[spec.interleaved ? 2 * i + 1 : i + spec.pairs];
        // Models round the angle to float32; so it is what is turned by.
        const float angle = static_cast<float>(position) * inv_freq[i];
        const double cos = std::cos(double{angle}) * 0.8, sin = std::sin(double{angle}) * 0.8, from = x;
        x = from * cos + y * sin, y = y * cos - from * sin;
      }
      for (int d = 0; d < D; ++d) {
        const double got = decode(spec.dtype, out[row * D + d]);
        // Some roundings of numbers up to 4 in fp32, then one to the dtype.
        CHECK(std::abs(got - want[d]) <= unit_roundoff(spec.dtype) * std::abs(want[d]) + 2e-6);
        if (d >= 2 * spec.pairs) CHECK(got == want[d]);
      }
    }
  }
}

void test_all(DType dtype) {
  for (const bool interleaved : {false, true}) {
    for (const int head_dim : {8, 24, 64, 72, 80, 96, 128, 136, 256, 512}) {
      for (const int pairs : {head_dim / 2, head_dim / 4, 1}) {
        test({dtype, 1 + head_dim % 7, head_dim, pairs, interleaved}, {{Engine::kFibers, 1}});
      }
    }
  }
  test({dtype, 9, 64, 24, false}, all_runs(3));
  test({dtype, 9, 64, 24, false, 5}, all_runs(3));
}

}  // namespace
}  // namespace mac_attn::simt

int main(int argc, char** argv) {
  using namespace mac_attn;
  if (argc != 2) return 2;
  simt::test_all(std::string(argv[1]) == "fp16" ? DType::kFloat16 : DType::kBFloat16);
  return simt::test_result("unrotate");
}
