// What amend answers, as tensors: for whoever calls it apart from complete.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include "params.h"

namespace mac_attn {

struct Amended {
  at::Tensor states, state_lse, log_ratio, anchors, anchor_weights, sampled;

  // Makes them and lets `p` point to them. `on`: their device.
  Amended(AmendParams& p, at::Device on) {
    const int64_t B = p.shape.batch, H = p.shape.num_kv_heads, Hq = p.shape.num_qo_heads(), S = p.num_anchors;
    const bool reuses = p.matched.source;
    const auto floats = at::TensorOptions(on).dtype(at::kFloat), ints = at::TensorOptions(on).dtype(at::kInt);
    states = at::empty({kNumSpans, B, Hq, p.shape.head_dim}, floats);
    state_lse = at::empty({kNumSpans, B, Hq}, floats);
    log_ratio = at::empty({B, reuses ? Hq : 0}, floats);
    anchors = at::empty({B, H, S}, ints);
    anchor_weights = at::empty({B, H, S}, floats);
    sampled = at::empty({B, reuses ? H : 0}, ints);
    p.out = states.data_ptr<float>();
    p.lse = state_lse.data_ptr<float>();
    p.log_ratio = log_ratio.data_ptr<float>();
    p.anchors = anchors.data_ptr<int32_t>();
    p.anchor_weights = anchor_weights.data_ptr<float>();
    p.sampled = sampled.data_ptr<int32_t>();
  }
};

// Lets complete go by what amend answers.
inline void take_over(CompleteParams& c, const AmendParams& p) {
  c.states = p.out, c.state_lse = p.lse, c.log_ratio = p.log_ratio;
  c.anchors = p.anchors, c.anchor_weights = p.anchor_weights, c.sampled = p.sampled;
}

}  // namespace mac_attn
