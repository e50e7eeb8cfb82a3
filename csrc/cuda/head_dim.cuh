// The head sizes that the kernels are compiled for.
//
// kHeadDim is what a row has in shared memory and registers. With kExact it has as much in global memory, else
// less, as the shape says: of that no more is read or written, and what is beyond is zero in shared memory, so that
// it adds nothing to a logit and its sums are nobody's. So rows of values may be shorter than those of keys.
#pragma once

#include <type_traits>

#include "kernels.h"

namespace mac_attn::cuda {

template <int kHeadDim, bool kIsExact = true>
struct HeadDim : std::integral_constant<int, kHeadDim> {
  static constexpr bool kExact = kIsExact;
};

// Elements of a row in global memory, a multiple of 8: of a query or key, and of a value or state.
template <int kHeadDim, bool kExact>
constexpr int row_elements(const Shape& shape) {
  return kExact ? kHeadDim : shape.head_dim;
}
template <int kHeadDim, bool kExact>
constexpr int value_elements(const Shape& shape) {
  return kExact ? kHeadDim : shape.head_dim_v;
}

// Calls `use` with the head size of the kernels that serve one.
template <typename Use>
auto with_head_dim(int head_dim, const Use& use, bool exact = true) {
  switch (exact ? head_dim : 0) {
    case 64: return use(HeadDim<64>());
    case 80: return use(HeadDim<80>());
    case 96: return use(HeadDim<96>());
    case 128: return use(HeadDim<128>());
    case 256: return use(HeadDim<256>());
    case 512: return use(HeadDim<512>());
    default: return head_dim <= 128 ? use(HeadDim<128, false>()) : use(HeadDim<256, false>());
  }
}
// The same of kernels that touch values.
template <typename Use>
auto with_head_dim(const Shape& shape, const Use& use) {
  return with_head_dim(shape.head_dim, use, shape.head_dim_v == shape.head_dim);
}

}  // namespace mac_attn::cuda
