// The host meaning of the instructions in csrc/cuda/ptx against the tables of the PTX ISA, which are written out
// here element by element, and whole matrix products through them against sums in double.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "check.h"
#include "ptx/math.h"
#include "ptx/matrix.h"
#include "ptx/warp.h"

namespace mac_attn::cuda {

// Kernels under test; the statics of this namespace are shared memory.

struct Fragments {
  uint32_t plain[32][4], trans[32][4], moved[32];
};

__global__ void load_fragments(const uint16_t* tile, Fragments* out) {  // tile [32, 8]
  __shared__ __align__(16) uint16_t shared[32][8];
  const int lane = ptx::lane_id();
  for (int i = 0; i < 8; ++i) shared[lane][i] = tile[lane * 8 + i];
  ptx::sync_warp();
  ptx::ldmatrix_x4(out->plain[lane], shared[lane]);
  ptx::ldmatrix_x4_trans(out->trans[lane], shared[lane]);
  out->moved[lane] = ptx::movmatrix_trans(out->plain[lane][0]);
}

template <typename T>
__global__ void multiply_fragments(const uint32_t* a, const uint32_t* b, float* c) {  // [32][4], [32][2], [32][4]
  const int lane = ptx::lane_id();
  uint32_t mine[4];
  float sums[4];
  for (int i = 0; i < 4; ++i) mine[i] = a[lane * 4 + i], sums[i] = c[lane * 4 + i];
  ptx::mma_m16n8k16<T>(sums, mine, b[lane * 2], b[lane * 2 + 1]);
  for (int i = 0; i < 4; ++i) c[lane * 4 + i] = sums[i];
}

constexpr int kRow = 24;  // elements of a padded row in shared memory

template <typename T>
MAC_DEVICE void fill_tile(T (&shared)[16][kRow], const T* tile) {
  for (int i = ptx::lane_id(); i < 256; i += 32) shared[i / 16][i % 16] = tile[i];
}

// The fragment of a 16x16 matrix that lies in rows.
template <typename T>
MAC_DEVICE void load_a(uint32_t (&a)[4], const T (&shared)[16][kRow]) {
  ptx::ldmatrix_x4(a, &shared[ptx::lane_id() % 16][ptx::lane_id() / 16 * 8]);
}

// out[16, 16] = x y^T and x y, all 16x16: logits and P V of an attention kernel.
template <typename T>
__global__ void multiply_tiles(const T* x, const T* y, float* by_rows, float* by_columns) {
  __shared__ __align__(16) T shared_x[16][kRow];
  __shared__ __align__(16) T shared_y[16][kRow];
  const int lane = ptx::lane_id();
  fill_tile(shared_x, x);
  fill_tile(shared_y, y);
  ptx::sync_warp();
  uint32_t a[4], rows[4], columns[4];
  load_a(a, shared_x);
  // Rows of y are columns of y^T: matrices n 0-7 / k 0-7, n 0-7 / k 8-15, then n 8-15.
  ptx::ldmatrix_x4(rows, &shared_y[lane % 8 + lane / 16 * 8][lane / 8 % 2 * 8]);
  // k 0-7 / n 0-7, k 8-15 / n 0-7, then n 8-15, transposed on the way.
  ptx::ldmatrix_x4_trans(columns, &shared_y[lane % 16][lane / 16 * 8]);
  for (int half = 0; half < 2; ++half) {
    float logits[4] = {}, values[4] = {};
    ptx::mma_m16n8k16<T>(logits, a, rows[half * 2], rows[half * 2 + 1]);
    ptx::mma_m16n8k16<T>(values, a, columns[half * 2], columns[half * 2 + 1]);
    for (int i = 0; i < 4; ++i) {
      const int row = lane / 4 + i / 2 * 8, column = half * 8 + lane % 4 * 2 + i % 2;
      by_rows[row * 16 + column] = logits[i];
      by_columns[row * 16 + column] = values[i];
    }
  }
}

}  // namespace mac_attn::cuda

namespace mac_attn::simt {
namespace {

std::mt19937 generator(11);

uint16_t half_of(uint32_t pair, int i) {
  return static_cast<uint16_t>(pair >> 16 * i);
}

// PTX ISA 9.7.14.5.15, fragment of an 8x8 matrix: lane 4 row + column / 2, half column % 2.
void test_ldmatrix(const Run& run) {
  std::vector<uint16_t> tile(256);
  for (uint16_t& x : tile) x = static_cast<uint16_t>(generator());
  std::vector<cuda::Fragments> out(1);
  launch({1, 32, 0, run.engine, run.seed}, cuda::load_fragments, tile.data(), out.data());
  for (int matrix = 0; matrix < 4; ++matrix) {
    for (int row = 0; row < 8; ++row) {
      for (int column = 0; column < 8; ++column) {
        const uint16_t element = tile[(matrix * 8 + row) * 8 + column];
        CHECK(half_of(out[0].plain[4 * row + column / 2][matrix], column % 2) == element);
        CHECK(half_of(out[0].trans[4 * column + row / 2][matrix], row % 2) == element);
        if (matrix == 0) CHECK(half_of(out[0].moved[4 * column + row / 2], row % 2) == element);
      }
    }
  }
}

// What fp32 sums of 16 products may be off by: each of the 16 additions rounds.
double tolerance(double sum_of_magnitudes) {
  return 16 * 0x1p-24 * sum_of_magnitudes;
}

// PTX ISA 9.7.14.5.8, mma.m16n8k16 with 16-bit floats.
template <typename T>
void test_mma(const Run& run) {
  std::normal_distribution<float> normal;
  std::vector<uint32_t> a(128), b(64);
  std::vector<float> c(128);
  for (uint32_t& x : a) x = ptx::pack2<T>(normal(generator), normal(generator));
  for (uint32_t& x : b) x = ptx::pack2<T>(normal(generator), normal(generator));
  for (float& x : c) x = normal(generator);
  double ma[16][16], mb[16][8], mc[16][8];
  for (int lane = 0; lane < 32; ++lane) {
    const int group = lane >> 2, thread_in_group = lane % 4;
    for (int i = 0; i < 8; ++i) {
      const int row = (0 <= i && i < 2) || (4 <= i && i < 6) ? group : group + 8;
      const int column = i < 4 ? thread_in_group * 2 + (i & 1) : thread_in_group * 2 + (i & 1) + 8;
      ma[row][column] = ptx::to_float(T{half_of(a[lane * 4 + i / 2], i % 2)});
    }
    for (int i = 0; i < 4; ++i) {
      const int row = i < 2 ? thread_in_group * 2 + (i & 1) : thread_in_group * 2 + (i & 1) + 8;
      mb[row][group] = ptx::to_float(T{half_of(b[lane * 2 + i / 2], i % 2)});
      mc[i < 2 ? group : group + 8][thread_in_group * 2 + (i & 1)] = c[lane * 4 + i];
    }
  }
  launch({1, 32, 0, run.engine, run.seed}, cuda::multiply_fragments<T>, a.data(), b.data(), c.data());
  for (int lane = 0; lane < 32; ++lane) {
    for (int i = 0; i < 4; ++i) {
      const int row = i < 2 ? lane >> 2 : (lane >> 2) + 8, column = lane % 4 * 2 + (i & 1);
      double sum = mc[row][column], magnitude = std::fabs(sum);
      for (int k = 0; k < 16; ++k)
        sum += ma[row][k] * mb[k][column], magnitude += std::fabs(ma[row][k] * mb[k][column]);
      CHECK(std::fabs(c[lane * 4 + i] - sum) <= tolerance(magnitude));
    }
  }
}

template <typename T>
void test_products(const Run& run) {
  std::normal_distribution<float> normal;
  std::vector<T> x(256), y(256);
  for (T& v : x) v = ptx::from_float<T>(normal(generator));
  for (T& v : y) v = ptx::from_float<T>(normal(generator));
  std::vector<float> by_rows(256), by_columns(256);
  launch({1, 32, 0, run.engine, run.seed}, cuda::multiply_tiles<T>, x.data(), y.data(), by_rows.data(),
         by_columns.data());
  for (int row = 0; row < 16; ++row) {
    for (int column = 0; column < 16; ++column) {
      double logit = 0, logit_size = 0, value = 0, value_size = 0;
      for (int k = 0; k < 16; ++k) {
        const double left = ptx::to_float(x[row * 16 + k]);
        const double down = ptx::to_float(y[column * 16 + k]), across = ptx::to_float(y[k * 16 + column]);
        logit += left * down, logit_size += std::fabs(left * down);
        value += left * across, value_size += std::fabs(left * across);
      }
      CHECK(std::fabs(by_rows[row * 16 + column] - logit) <= tolerance(logit_size));
      CHECK(std::fabs(by_columns[row * 16 + column] - value) <= tolerance(value_size));
    }
  }
}

// Every 16-bit number survives the way through a float, and floats go to the nearest, ties to even.
template <typename T>
void test_conversions(float largest) {
  int wrong = 0;
  for (uint32_t bits = 0; bits < 0x10000; ++bits) {
    const float x = ptx::to_float(T{static_cast<uint16_t>(bits)});
    const uint16_t back = ptx::from_float<T>(x).bits;
    wrong += std::isnan(x) ? back != 0x7fff : back != bits;
  }
  std::uniform_int_distribution<uint32_t> any;
  for (int i = 0; i < 200000; ++i) {
    uint32_t bits = any(generator);
    if (i % 2) bits = (bits & 0x8fffffffu) | 0x30000000u;        // mostly numbers that fp16 has, subnormals too
    if (i % 4 == 3) bits &= 0xffffe000u, bits |= (i & 4) << 10;  // ties, or nothing to round, in fp16
    if (i % 16 == 5) bits &= 0xffff8000u;                        // the same in bf16
    const float x = bits_float(bits);
    if (!(std::fabs(x) < largest)) continue;
    const uint16_t y = ptx::from_float<T>(x).bits;
    const double error = std::fabs(ptx::to_float(T{y}) - static_cast<double>(x));
    for (int step = -1; step <= 1; step += 2) {
      const uint16_t magnitude = y & 0x7fff;
      if ((magnitude == 0 && step < 0) || std::signbit(x) != (y >> 15 != 0)) continue;
      const double other = ptx::to_float(T{static_cast<uint16_t>(y + step)});
      const double distance = std::fabs(other - static_cast<double>(x));
      wrong += distance < error || (distance == error && y % 2 == 1);
    }
    wrong += std::signbit(x) != (y >> 15 != 0);
  }
  CHECK(wrong == 0);
  CHECK(ptx::from_float<T>(INFINITY).bits == ptx::from_float<T>(3.4e38f).bits || largest > 1e30f);
  CHECK(std::isinf(ptx::to_float(ptx::from_float<T>(-INFINITY))));
  const float2 pair = ptx::unpack2<T>(ptx::pack2<T>(1.5f, -2.f));
  CHECK(pair.x == 1.5f && pair.y == -2.f);
}

// Each fp8 number in each place; what the host runs of fp8_to_fp16 is what GPUs before sm_89 do.
void test_fp8() {
  for (uint32_t bits = 0; bits < 256; ++bits) {
    const int exponent = bits >> 3 & 15, mantissa = bits & 7;
    const double magnitude = std::ldexp(exponent ? 8 + mantissa : mantissa, std::max(exponent, 1) - 10);
    for (int place = 0; place < 4; ++place) {
      const uint32_t others = 0x7f38c0ffu;  // NaN, 1, -2, NaN
      const uint32_t four = (others & ~(0xffu << 8 * place)) | bits << 8 * place;
      const uint2 pairs = ptx::fp8_to_fp16(four);
      const float2 pair = ptx::unpack2<fp16>(place < 2 ? pairs.x : pairs.y);
      const float got = place % 2 ? pair.y : pair.x, other = ptx::unpack2<fp16>(place < 2 ? pairs.y : pairs.x).x;
      CHECK((bits & 127) == 127 ? std::isnan(got) : got == (bits & 128 ? -magnitude : magnitude));
      CHECK(std::signbit(got) == (bits >> 7) || std::isnan(got));
      CHECK(place < 2 ? other == 1.f : std::isnan(other));
    }
  }
  CHECK(ptx::swap_middle_bytes(0x44332211u) == 0x44223311u);
}

void test_functions() {
  for (float x = -140.f; x < 128.f; x += 0.37f) {
    const double exact = std::exp2(static_cast<double>(x));
    // ex2.approx.ftz: 2 ulp, results below the normal numbers are 0.
    CHECK(x < -126.f ? ptx::ex2(x) == 0.f : std::fabs(ptx::ex2(x) - exact) <= 2 * 0x1p-23 * exact);
  }
  CHECK(ptx::ex2(-INFINITY) == 0.f && std::isnan(ptx::ex2(NAN)));
  CHECK(ptx::lg2(8.f) == 3.f);
  for (float x = -100.f; x < 100.f; x += 0.037f) CHECK(std::fabs(ptx::tanh(x) - std::tanh(double{x})) < 3e-7);
  CHECK(ptx::divide(1.f, 3.f) == 1.f / 3.f);
}

}  // namespace
}  // namespace mac_attn::simt

int main() {
  using namespace mac_attn;
  for (const simt::Run& run : simt::all_runs()) {
    simt::test_ldmatrix(run);
    simt::test_mma<bf16>(run);
    simt::test_mma<fp16>(run);
    simt::test_products<bf16>(run);
    simt::test_products<fp16>(run);
  }
  simt::test_conversions<bf16>(3.38e38f);
  simt::test_conversions<fp16>(65504.f);
  simt::test_fp8();
  simt::test_functions();
  return simt::test_result("instructions");
}
