// The 16-bit formats as the kernels store them; arithmetic is fp32.
#pragma once

#include <cstdint>

namespace mac_attn {

struct bf16 {
  uint16_t bits;
};
struct fp16 {
  uint16_t bits;
};

}  // namespace mac_attn
