#include <cstdlib>
#include <stdexcept>
#include <string>

#include "common.h"

namespace mac_attn::cpu {

namespace {

enum Level { kGeneric, kAvx2, kAvx512, kAvx512Bf16 };

// The level that MAC_ATTN_SIMD names, the highest one if it is not set.
Level limit() {
  const char* given = std::getenv("MAC_ATTN_SIMD");
  const std::string name = given ? given : "";
  if (name.empty() || name == "avx512_bf16") return kAvx512Bf16;
  if (name == "avx512") return kAvx512;
  if (name == "avx2") return kAvx2;
  if (name == "generic") return kGeneric;
  throw std::invalid_argument("MAC_ATTN_SIMD is '" + name + "', must be generic, avx2, avx512 or avx512_bf16");
}

const Kernels& choose() {
  [[maybe_unused]] const Level most = limit();
#if MAC_X86
  const bool avx2 =
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  const bool avx512_bf16 = avx512 && __builtin_cpu_supports("avx512bf16");
  if (most >= kAvx512Bf16 && avx512_bf16) return avx512_bf16::table;
  if (most >= kAvx512 && avx512) return avx512::table;
  if (most >= kAvx2 && avx2) return avx2::table;
#endif
  return generic::table;
}

}  // namespace

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

}  // namespace mac_attn::cpu
