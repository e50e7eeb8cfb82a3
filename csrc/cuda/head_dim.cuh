// The head sizes that the kernels are compiled for.
//
// kHeadDim is what a row has in shared memory and registers. With kExact it has as much in global memory, else
// less, as the shape says: of that no more is read or written, and what is beyond is zero in shared memory, so that
// it adds nothing to a logit and its sums are nobody's.
#pragma once

#include <type_traits>

#include "kernels.h"

namespace mac_attn::cuda {

template <int kHeadDim, bool kIsExact = true>
struct HeadDim : std::integral_constant<int, kHeadDim> {
  static constexpr bool kExact = kIsExact;
};

// Elements of a row in global memory, a multiple of 8.
template <int kHeadDim, bool kExact>
constexpr int row_elements(const Shape& shape) {
  return kExact ? kHeadDim : shape.head_dim;
}

// Calls `use` with the head size of the kernels that serve one.
template <typename Use>
auto with_head_dim(int head_dim, const Use& use) {
  switch (head_dim) {
    case 64: return use(HeadDim<64>());
    case 80: return use(HeadDim<80>());
    case 96: return use(HeadDim<96>());
    case 128: return use(HeadDim<128>());
    case 256: return use(HeadDim<256>());
    case 512: return use(HeadDim<512>());
    default: return head_dim < 128 ? use(HeadDim<128, false>()) : use(HeadDim<256, false>());
  }
}

}  // namespace mac_attn::cuda
