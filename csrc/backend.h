// What ops.cpp hands a call to, once it has checked shapes, dtypes and devices and made the outputs.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

#include "params.h"

namespace mac_attn {

// Device memory that outlives a call. `workspace` [max_batch_size * (16 * (2 Hq + H) + 2 H + 1) + 1] int32 is the
// CUDA kernels' own, zero at first; 16 is the most tokens. `error_flag` [1] int32 is sticky.
struct Persistent {
  std::optional<at::Tensor> workspace;
  std::optional<at::Tensor> error_flag;
};

// Check the values too, before anything is written: they lie on the host.
namespace cpu_backend {
void match(const MatchParams& params);
void amend(const AmendParams& params);
void complete(const CompleteParams& params);
void unrotate(const UnrotateParams& params);
// Whether in a whole step amend hands on candidates and complete cuts the sample, as the CUDA kernels do it.
bool hands_on_candidates();
}  // namespace cpu_backend

// Launch on the device's current stream; values are checked by the kernels.
namespace cuda_backend {
void match(const MatchParams& params, const Persistent& persistent, const at::Tensor& on);
void amend(const AmendParams& params, const Persistent& persistent, const at::Tensor& on);
void complete(const CompleteParams& params, const Persistent& persistent, const at::Tensor& on);
void unrotate(const UnrotateParams& params, const at::Tensor& on);
}  // namespace cuda_backend

// The queries of a step before their rotary embedding, as `q`. Defined in unrotate.cpp.
at::Tensor unrotate_step(const at::Tensor& q, const at::Tensor& seq_lens,
                         const std::optional<at::Tensor>& query_lens, const at::Tensor& inv_freq, bool interleaved,
                         double scale);
// The op of that name.
at::Tensor unrotate_op(const at::Tensor& q, const at::Tensor& positions, const at::Tensor& inv_freq,
                       bool interleaved, double scale);

}  // namespace mac_attn
