// The CPU kernels for aarch64, whose NEON every processor has.
#include "common.h"

#if MAC_ARM
#include <arm_neon.h>

#define MAC_LEVEL 0
#undef MAC_NEON
#define MAC_NEON 1
#define MAC_LEVEL_NAME neon
namespace mac_attn::cpu::neon {
#include "level.h"
}  // namespace mac_attn::cpu::neon
#endif  // MAC_ARM
