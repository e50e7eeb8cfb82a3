// The CPU kernels for any machine that GCC or Clang compile for.
#include "common.h"

#define MAC_LEVEL 0
#define MAC_LEVEL_NAME generic
namespace mac_attn::cpu::generic {
#include "level.h"
}  // namespace mac_attn::cpu::generic
