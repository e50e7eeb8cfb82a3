// The 16-bit formats as the kernels store them, and what a KV cache may hold besides; arithmetic is fp32.
#pragma once

#include <cstdint>

namespace mac_attn {

struct bf16 {
  uint16_t bits;
};
struct fp16 {
  uint16_t bits;
};
struct fp8 {  // e4m3fn
  uint8_t bits;
};

}  // namespace mac_attn
