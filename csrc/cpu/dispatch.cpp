#include <cstdlib>
#include <cstring>

#include "common.h"

namespace mac_attn::cpu {

namespace {

bool wanted(const char* limit, const Kernels& table, bool supported, bool& limit_reached) {
  limit_reached = limit_reached || !limit || std::strcmp(limit, table.name) == 0;
  return supported && limit_reached;
}

const Kernels& choose() {
  const char* limit = std::getenv("MAC_ATTN_SIMD");
  bool reached = false;
#if MAC_X86
  const bool avx2 =
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  const bool avx512_bf16 = avx512 && __builtin_cpu_supports("avx512bf16");
  if (wanted(limit, avx512_bf16::table, avx512_bf16, reached)) return avx512_bf16::table;
  if (wanted(limit, avx512::table, avx512, reached)) return avx512::table;
  if (wanted(limit, avx2::table, avx2, reached)) return avx2::table;
#endif
  return generic::table;
}

}  // namespace

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

}  // namespace mac_attn::cpu
