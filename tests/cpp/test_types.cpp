// Exact decode by the CPU kernels without torch in every type of query and cache, against sums in double: many head
// sizes and groups, on random data. What reuse adds is in test_kernels.cpp. This runs under an emulator too, where
// there is no torch (`make aarch64`).
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <thread>
#include <utility>
#include <vector>

#include "asked_level.h"
#include "cpu/schedule.h"

namespace {

using namespace mac_attn;

constexpr int kPageSize = 5, kThreads = 2;
std::mt19937 generator(11);

// The float formats, written apart from those of the kernels: a number is decoded, one is encoded by looking for
// the nearest.
double decode16(uint16_t bits, int exponent_bits) {
  const int mantissa_bits = 15 - exponent_bits, bias = (1 << (exponent_bits - 1)) - 1;
  const int exponent = bits >> mantissa_bits & ((1 << exponent_bits) - 1),
            mantissa = bits & ((1 << mantissa_bits) - 1);
  const double scale = std::ldexp(1.0, std::max(exponent, 1) - bias - mantissa_bits);
  const double magnitude = ((exponent ? 1 << mantissa_bits : 0) + mantissa) * scale;
  return bits & 0x8000 ? -magnitude : magnitude;
}
double decode8(uint8_t bits) {
  const int exponent = bits >> 3 & 15, mantissa = bits & 7;
  const double magnitude = std::ldexp((exponent ? 8 : 0) + mantissa, std::max(exponent, 1) - 10);
  return bits & 128 ? -magnitude : magnitude;
}

struct Format {
  const char* name;
  DType dtype;
  int bytes;
  double epsilon;  // of the output
  double value(const unsigned char* at) const {
    uint16_t bits = 0;
    float x = 0;
    if (bytes == 4) return std::memcpy(&x, at, 4), x;
    std::memcpy(&bits, at, 2);
    return decode16(bits, dtype == DType::kBFloat16 ? 8 : 5);
  }
};
// Half a unit in the last place of the output, and sums in float32 of products that dot products of bfloat16 may
// round on their own (Arm's round to odd).
constexpr Format kFormats[] = {{"float32", DType::kFloat32, 4, 1e-5},
                               {"bfloat16", DType::kBFloat16, 2, 0x1p-8},
                               {"float16", DType::kFloat16, 2, 0x1p-10}};

// Random numbers of the format near 1 and some tiny ones, subnormal in float16.
std::vector<unsigned char> random_numbers(const Format& format, size_t count) {
  std::vector<unsigned char> bytes(count * format.bytes);
  std::normal_distribution<float> normal;
  for (size_t i = 0; i < count; ++i) {
    unsigned char* at = &bytes[i * format.bytes];
    if (format.bytes == 4) {
      const float x = normal(generator);
      std::memcpy(at, &x, 4);
      continue;
    }
    // A random mantissa and sign, and an exponent of 2^-3 to 2, or for one of eight of 0.
    const int exponent_bits = format.dtype == DType::kBFloat16 ? 8 : 5, mantissa_bits = 15 - exponent_bits;
    const uint32_t random = generator(), bias = (1u << (exponent_bits - 1)) - 1;
    const uint32_t exponent = random >> 16 & 7 ? bias - 3 + (random >> 19 & 3) : 0;
    const uint16_t bits = static_cast<uint16_t>((random & 0x8000u) | exponent << mantissa_bits |
                                                (random & ((1u << mantissa_bits) - 1)));
    std::memcpy(at, &bits, 2);
  }
  return bytes;
}

template <typename Kernel, typename Params, typename Work>
void run_team(Kernel kernel, const Params& params, Work& work) {
  std::vector<std::thread> team;
  for (int i = 0; i < kThreads; ++i) team.emplace_back([&] { kernel(params, work); });
  for (std::thread& thread : team) thread.join();
}

// One step of two requests; returns the largest error over what it may be.
double decode(const Format& format, bool float8, int kv_heads, int group, int head_dim, int head_dim_v) {
  const int batch = 2, heads = kv_heads * group, lengths[] = {37, 70}, max_pages = 14;
  const size_t rows = size_t(batch) * max_pages * kPageSize * kv_heads;
  const auto q = random_numbers(format, size_t(batch) * heads * head_dim);
  std::vector<unsigned char> k, v;
  if (float8) {
    k.resize(rows * head_dim), v.resize(rows * head_dim_v);
    for (auto* bytes : {&k, &v}) {
      for (unsigned char& byte : *bytes) {
        do byte = static_cast<unsigned char>(generator());
        while ((byte & 127) == 127);
      }
    }
  } else {
    k = random_numbers(format, rows * head_dim), v = random_numbers(format, rows * head_dim_v);
  }
  const float k_scale = float8 ? 0.01f : 1.f, v_scale = float8 ? 0.02f : 1.f;
  const auto element = [&](const std::vector<unsigned char>& of, size_t i) {
    return float8 ? decode8(of[i]) : format.value(&of[i * format.bytes]);
  };
  std::vector<int32_t> block_table, seq_lens(lengths, lengths + batch);
  for (int b = 0; b < batch; ++b) {
    for (int i = 0; i < max_pages; ++i) block_table.push_back((max_pages - 1 - i) * batch + b);
  }

  AmendParams amend{};
  amend.shape = {batch, kv_heads, group, head_dim, 1, head_dim_v}, amend.dtype = format.dtype;
  amend.query = {q.data(), int64_t{heads} * head_dim, head_dim, 0};
  amend.requests = {seq_lens.data(), nullptr, nullptr, nullptr};
  amend.kv.k = k.data(), amend.kv.v = v.data(), amend.kv.float8 = float8;
  if (float8) amend.kv.k_scale = {&k_scale, 0}, amend.kv.v_scale = {&v_scale, 0};
  amend.kv.k_page_stride = int64_t{kPageSize} * kv_heads * head_dim;
  amend.kv.v_page_stride = int64_t{kPageSize} * kv_heads * head_dim_v;
  amend.kv.k_token_stride = int64_t{kv_heads} * head_dim, amend.kv.v_token_stride = int64_t{kv_heads} * head_dim_v;
  amend.kv.k_head_stride = head_dim, amend.kv.v_head_stride = head_dim_v;
  amend.kv.block_table = block_table.data(), amend.kv.block_table_stride = max_pages;
  amend.kv.page_size = kPageSize, amend.band = 1, amend.sm_scale = 1 / std::sqrt(float(head_dim));
  std::vector<float> states(size_t(kNumSpans) * batch * heads * head_dim_v), state_lse(kNumSpans * batch * heads);
  amend.out = states.data(), amend.lse = state_lse.data();
  cpu::AmendWork amend_work(amend, kThreads);
  run_team(cpu::kernels(amend.shape).amend, amend, amend_work);

  CompleteParams complete{};
  complete.shape = amend.shape, complete.dtype = format.dtype, complete.requests = amend.requests;
  complete.states = states.data(), complete.state_lse = state_lse.data();
  std::vector<unsigned char> out(size_t(batch) * heads * head_dim_v * format.bytes);
  std::vector<float> lse(batch * heads);
  complete.out = out.data(), complete.out_batch_stride = int64_t{heads} * head_dim_v;
  complete.out_head_stride = head_dim_v, complete.lse = lse.data();
  cpu::CompleteWork complete_work(complete);
  run_team(cpu::kernels(complete.shape).complete, complete, complete_work);

  double worst = 0;
  const auto judge = [&](double got, double expected, double epsilon) {
    const double error = std::abs(got - expected) / (epsilon * std::max(1.0, std::abs(expected)));
    if (!(error <= worst)) worst = error;  // a NaN stays
  };
  for (int b = 0; b < batch; ++b) {
    for (int head = 0; head < heads; ++head) {
      const auto row = [&](int t) {
        const size_t page = block_table[b * max_pages + t / kPageSize];
        return (page * kPageSize + t % kPageSize) * kv_heads + head / group;
      };
      std::vector<double> weights(lengths[b]), mean(head_dim_v);
      double sum = 0, high = -INFINITY;
      for (int t = 0; t < lengths[b]; ++t) {
        double dot = 0;
        for (int d = 0; d < head_dim; ++d) {
          const size_t at = (size_t(b) * heads + head) * head_dim + d;
          dot += format.value(&q[at * format.bytes]) * element(k, row(t) * head_dim + d);
        }
        weights[t] = dot * k_scale * amend.sm_scale;
        high = std::max(high, weights[t]);
      }
      for (double& weight : weights) sum += weight = std::exp(weight - high);
      for (int t = 0; t < lengths[b]; ++t) {
        for (int d = 0; d < head_dim_v; ++d) {
          mean[d] += weights[t] / sum * element(v, row(t) * head_dim_v + d) * v_scale;
        }
      }
      judge(lse[b * heads + head], high + std::log(sum), 1e-4);
      for (int d = 0; d < head_dim_v; ++d) {
        const size_t at = (size_t(b) * heads + head) * head_dim_v + d;
        judge(format.value(&out[at * format.bytes]), mean[d], format.epsilon);
      }
    }
  }
  return worst;
}

}  // namespace

int main() {
  if (!has_asked_level()) return kSkipped;
  std::printf("SIMD level: %s\n", cpu::best_kernels().name);
  int failed = 0;
  for (const Format& format : kFormats) {
    for (const bool float8 : {false, true}) {
      double worst = 0;
      const auto try_groups = [&](int head_dim, int head_dim_v) {
        for (const int group : {1, 2, 3, 4, 5, 7}) {
          const double error = decode(format, float8, 1 + group % 2, group, head_dim, head_dim_v);
          if (!(error <= worst)) worst = error;
        }
      };
      for (const int size : {8, 16, 24, 32, 40, 48, 64, 72, 80, 96, 104, 128, 176, 248, 256, 512}) {
        try_groups(size, size);
      }
      // Values of fewer elements than keys; of them too AVX-512 has no half vectors.
      const std::pair<int, int> narrow[] = {{16, 8}, {24, 16}, {64, 56}, {96, 64}, {192, 128}, {512, 256}};
      for (const auto& [head_dim, head_dim_v] : narrow) try_groups(head_dim, head_dim_v);
      const bool holds = worst <= 1;
      std::printf("%s: queries of %s, cache of %s: at most %.2g of the tolerance\n", holds ? "ok" : "FAILED",
                  format.name, float8 ? "float8" : "the same", worst);
      failed += !holds;
    }
  }
  return failed;
}
