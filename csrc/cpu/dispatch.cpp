#include <algorithm>
#include <cstdlib>
#include <stdexcept>
#include <string>
#include <vector>

#include "common.h"

#if MAC_X86
#include <cpuid.h>
#elif MAC_ARM && defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

namespace mac_attn::cpu {

namespace {

struct Level {
  const char* name;
  const Kernels* table;
  bool runs;  // on this machine
};

#if MAC_X86
// Clang 14 does not know the name.
bool has_f16c() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
}
#elif MAC_ARM
bool has_bf16() {
#if defined(__linux__) && defined(HWCAP2_BF16)
  return getauxval(AT_HWCAP2) & HWCAP2_BF16;
#else
  return false;
#endif
}
#endif

// From the least to the best.
std::vector<Level> levels() {
  std::vector<Level> all{{"generic", &generic::table, true}};
#if MAC_X86
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  all.push_back({"avx2", &avx2::table, has_avx2});
  all.push_back({"avx512", &avx512::table, has_avx512});
  all.push_back({"avx512_bf16", &avx512_bf16::table, has_avx512 && __builtin_cpu_supports("avx512bf16")});
#elif MAC_ARM
  all.push_back({"neon", &neon::table, true});
  all.push_back({"neon_bf16", &neon_bf16::table, has_bf16()});
#endif
  return all;
}

// The best level that runs here, up to the one that MAC_ATTN_SIMD names.
const Kernels& choose() {
  const std::vector<Level> all = levels();
  const char* given = std::getenv("MAC_ATTN_SIMD");
  const std::string name = given ? given : "";
  auto most = all.end() - 1;
  if (!name.empty()) {
    most = std::find_if(all.begin(), all.end(), [&](const Level& level) { return name == level.name; });
    if (most == all.end()) {
      std::string names;
      for (size_t i = 0; i < all.size(); ++i) {
        names += (i == 0 ? "" : i + 1 == all.size() ? " or " : ", ") + std::string(all[i].name);
      }
      throw std::invalid_argument("MAC_ATTN_SIMD is '" + name + "', must be " + names);
    }
  }
  while (!most->runs) --most;
  return *most->table;
}

}  // namespace

const Kernels& best_kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

// Sizes that end with half a vector of AVX-512 are rare, and AVX2 takes as long (float32) to two fifths longer
// (bfloat16, 8 query heads of a KV head): not worth a tail in every loop. All other levels' vectors fit every size.
const Kernels& kernels([[maybe_unused]] const Shape& shape) {
#if MAC_X86
  const int32_t lanes = best_kernels().lanes;
  if (shape.head_dim % lanes != 0 || shape.head_dim_v % lanes != 0) return avx2::table;
#endif
  return best_kernels();
}

}  // namespace mac_attn::cpu
