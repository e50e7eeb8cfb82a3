// Undoes a rotary embedding in one pass: R(-p) q / scale. mac_attn/rope.py has the same in torch ops for other
// shapes; a decode step calls it once a layer, where a dozen of small ops cost more than the step saves.
#include <ATen/ops/empty_like.h>

#include "backend.h"
#include "checks.h"

namespace mac_attn {

namespace {

// `name` is what the caller calls `positions`.
void run(UnrotateParams& p, const at::Tensor& q, const at::Tensor& positions, const char* name,
         const at::Tensor& inv_freq, bool interleaved, double scale, at::Tensor& out) {
  check_array(positions, name, {q.size(0)}, at::kInt, q.device());
  check_array(inv_freq, "inv_freq", {kAny}, at::kFloat, q.device());
  TORCH_CHECK_VALUE(2 * inv_freq.size(0) <= q.size(-1), "inv_freq has ", inv_freq.size(0),
                    " frequencies, must have at most head_dim / 2 = ", q.size(-1) / 2);
  TORCH_CHECK_VALUE(scale > 0, "scale is ", scale, ", must be above 0");
  p.shape = make_shape(q, q.size(-2));
  p.dtype = dtype_of(q);
  p.query = {q.const_data_ptr(), q.stride(0), q.stride(-2), q.dim() == 4 ? q.stride(1) : 0};
  p.positions = positions.const_data_ptr<int32_t>();
  p.inv_freq = inv_freq.const_data_ptr<float>();
  p.pairs = static_cast<int32_t>(inv_freq.size(0));
  p.interleaved = interleaved;
  p.inverse_scale = static_cast<float>(1 / scale);
  p.out = out.data_ptr();
  if (q.is_cpu()) {
    cpu_backend::unrotate(p);
  } else {
    cuda_backend::unrotate(p, q);
  }
}

}  // namespace

at::Tensor unrotate_step(const at::Tensor& q, const at::Tensor& seq_lens,
                         const std::optional<at::Tensor>& query_lens, const at::Tensor& inv_freq, bool interleaved,
                         double scale) {
  check_query(q, "q");
  UnrotateParams p{};
  p.back = q.dim() == 4 ? static_cast<int32_t>(q.size(1)) : 1;
  if (query_lens) {
    check_array(*query_lens, "query_lens", {q.size(0)}, at::kInt, q.device());
    p.each_back = query_lens->const_data_ptr<int32_t>();
  }
  at::Tensor out = at::empty_like(q, at::MemoryFormat::Contiguous);
  run(p, q, seq_lens, "seq_lens", inv_freq, interleaved, scale, out);
  return out;
}

at::Tensor unrotate_op(const at::Tensor& q, const at::Tensor& positions, const at::Tensor& inv_freq,
                       bool interleaved, double scale) {
  check_query(q, "q");
  TORCH_CHECK_VALUE(q.dim() == 3, "q has shape ", q.sizes(), ", must be [batch, num_qo_heads, head_dim]");
  UnrotateParams p{};
  at::Tensor out = at::empty_like(q, at::MemoryFormat::Contiguous);
  run(p, q, positions, "positions", inv_freq, interleaved, scale, out);
  return out;
}

}  // namespace mac_attn
