// Undoes a rotary embedding on the CPU in one pass: R(-p) q / scale. mac_attn/rope.py has the same in torch ops for
// other devices and shapes; a decode step calls it once a layer, where a dozen of small ops cost more than the step
// saves.
#include <ATen/Dispatch.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "backend.h"
#include "checks.h"

namespace mac_attn {

at::Tensor cpu_backend::unrotate(const at::Tensor& q, const at::Tensor& positions, const char* name, int32_t back,
                                 const at::Tensor& inv_freq, bool interleaved, double scale) {
  check_query(q, "q");
  check_array(positions, name, {q.size(0)}, at::kInt, q.device());
  check_array(inv_freq, "inv_freq", {kAny}, at::kFloat, q.device());
  const int64_t pairs = inv_freq.size(0), heads = q.size(1), head_dim = q.size(2);
  TORCH_CHECK_VALUE(2 * pairs <= head_dim, "inv_freq has ", pairs,
                    " frequencies, must have at most head_dim / 2 = ", head_dim / 2);
  TORCH_CHECK_VALUE(scale > 0, "scale is ", scale, ", must be above 0");
  at::Tensor out = at::empty_like(q, at::MemoryFormat::Contiguous);
  const int64_t step = interleaved ? 2 : 1, second = interleaved ? 1 : pairs;
  const float inverse = static_cast<float>(1 / scale);
  std::vector<float> cos(pairs), sin(pairs);
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, q.scalar_type(), "unrotate", [&] {
    for (int64_t b = 0; b < q.size(0); ++b) {
      const int64_t token = int64_t{positions.const_data_ptr<int32_t>()[b]} - back;
      const float position = static_cast<float>(token);
      for (int64_t i = 0; i < pairs; ++i) {
        const float angle = position * inv_freq.const_data_ptr<float>()[i];
        cos[i] = std::cos(angle) * inverse;
        sin[i] = std::sin(angle) * inverse;
      }
      for (int64_t h = 0; h < heads; ++h) {
        const scalar_t* from = q.const_data_ptr<scalar_t>() + b * q.stride(0) + h * q.stride(1);
        scalar_t* to = out.data_ptr<scalar_t>() + (b * heads + h) * head_dim;
        for (int64_t i = 0; i < pairs; ++i) {
          const float x = static_cast<float>(from[i * step]), y = static_cast<float>(from[i * step + second]);
          to[i * step] = static_cast<scalar_t>(x * cos[i] + y * sin[i]);
          to[i * step + second] = static_cast<scalar_t>(y * cos[i] - x * sin[i]);
        }
        std::copy(from + 2 * pairs, from + head_dim, to + 2 * pairs);
      }
    }
  });
  return out;
}

namespace {

at::Tensor unrotate(const at::Tensor& q, const at::Tensor& positions, const at::Tensor& inv_freq, bool interleaved,
                    double scale) {
  return cpu_backend::unrotate(q, positions, "positions", 0, inv_freq, interleaved, scale);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(mac_attn, m) {
  m.def("unrotate(Tensor q, Tensor positions, Tensor inv_freq, bool interleaved, float scale) -> Tensor");
}
TORCH_LIBRARY_IMPL(mac_attn, CPU, m) {
  m.impl("unrotate", unrotate);
}

}  // namespace mac_attn
