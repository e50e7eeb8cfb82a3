// Whether this processor has the instruction set that MAC_ATTN_SIMD names. Where it lacks it the kernels run the
// best one below, which has a test of its own: CTest counts the exit status kSkipped as skipped.
#pragma once

#include <cstdlib>
#include <string>

#include "cpu/schedule.h"

constexpr int kSkipped = 77;

inline bool has_asked_level() {
  const char* given = std::getenv("MAC_ATTN_SIMD");
  const std::string asked = given ? given : "";
  return asked.empty() || asked == mac_attn::cpu::best_kernels().name;
}
