// The parameters of match, amend and complete, but for the arrays that they hand on, from a call's arguments: all
// checks of shapes, dtypes and devices.
#pragma once

#include <ATen/core/Tensor.h>

#include <cmath>
#include <optional>

#include "checks.h"
#include "kv_cache.h"
#include "params.h"

namespace mac_attn {

inline HeadsView heads_view(const at::Tensor& t) {
  return {t.const_data_ptr(), t.stride(0), t.stride(-2), t.dim() == 4 ? t.stride(1) : 0};
}

// How many tokens each row of the call has, of them query tokens.
struct Lengths {
  const at::Tensor& seq_lens;
  const std::optional<at::Tensor>& query_lens;
};

// Lengths, slots and ids of the call's rows.
inline Requests check_requests(const Shape& shape, const Lengths& lengths, const std::optional<at::Tensor>& slots,
                               const std::optional<at::Tensor>& request_ids, at::Device device) {
  const auto& [seq_lens, query_lens] = lengths;
  check_array(seq_lens, "seq_lens", {shape.batch}, at::kInt, device);
  if (query_lens) check_array(*query_lens, "query_lens", {shape.batch}, at::kInt, device);
  if (slots) check_array(*slots, "slots", {shape.batch}, at::kInt, device);
  if (request_ids) check_array(*request_ids, "request_ids", {shape.batch}, at::kLong, device);
  return {seq_lens.const_data_ptr<int32_t>(), slots ? slots->const_data_ptr<int32_t>() : nullptr,
          request_ids ? request_ids->const_data_ptr<int64_t>() : nullptr,
          query_lens ? query_lens->const_data_ptr<int32_t>() : nullptr};
}

// The rings of a cache, see ring.h.
inline Ring check_ring(const at::Tensor& ring, const Shape& shape, const at::Tensor& query, int64_t entries,
                       int64_t anchors) {
  constexpr int64_t kMost = 1 << 24;  // of each, so that places and the layout's sums fit their types
  TORCH_CHECK_VALUE(entries >= 1 && entries <= kMost, "entries is ", entries, ", must be from 1 to ", kMost);
  TORCH_CHECK_VALUE(anchors >= 0 && anchors <= kMost, "anchors is ", anchors, ", must be from 0 to ", kMost);
  Ring r{};
  r.layout =
      ring_layout({shape.num_kv_heads, shape.group_size, shape.head_dim, static_cast<int32_t>(entries),
                   static_cast<int32_t>(anchors), static_cast<int32_t>(query.element_size()), shape.head_dim_v});
  check_array(ring, "ring", {kAny, r.layout.slot_bytes}, at::kByte, query.device());
  r.num_slots = check_int32(ring.size(0), "num_slots", 1);
  r.data = static_cast<char*>(ring.data_ptr());
  return r;
}

// What match has answered, for the calls that go by it.
inline Matched check_matched(const Shape& shape, const at::Tensor& source, const at::Tensor& place,
                             const at::Tensor& stored, at::Device device) {
  check_array(source, "source", {shape.batch, shape.num_queries()}, at::kInt, device);
  check_array(place, "place", {shape.batch, shape.num_queries()}, at::kInt, device);
  check_array(stored, "stored", {shape.batch, shape.num_kv_heads}, at::kInt, device);
  return {source.data_ptr<int32_t>(), place.data_ptr<int32_t>(), stored.data_ptr<int32_t>()};
}

// What decides about a hit.
struct MatchOptions {
  const at::Tensor& threshold;
  bool relative;
  double max_drift;
  bool per_head;
  int64_t window, band, min_context, max_reuse_depth;
};

// All of match's parameters but where its answer goes.
inline MatchParams check_match(const at::Tensor& q_match, const Shape& shape, const Requests& requests,
                               const Ring& ring, const MatchOptions& options) {
  MatchParams p{};
  p.shape = shape;
  p.dtype = dtype_of(q_match);
  p.query = heads_view(q_match);
  p.requests = requests;
  p.ring = ring;
  check_array(options.threshold, "threshold", {shape.num_qo_heads()}, at::kFloat, q_match.device());
  p.threshold = options.threshold.const_data_ptr<float>();
  p.relative = options.relative;
  TORCH_CHECK_VALUE(options.max_drift >= 0 && std::isfinite(options.max_drift), "max_drift is ", options.max_drift,
                    ", must be finite and not negative (0: no bound)");
  p.max_drift = static_cast<float>(options.max_drift);
  p.per_head = options.per_head;
  p.window = check_int32(options.window, "window", 1);
  p.band = check_int32(options.band, "band", 1);
  p.min_context = check_int32(options.min_context, "min_context", 0);
  p.max_reuse_depth = check_int32(options.max_reuse_depth, "max_reuse_depth", 0);
  return p;
}

// What amend is to reuse.
struct Reuse {
  Matched matched;
  Ring ring;
  int64_t band, layer;
};

// All of amend's parameters but where its answer goes.
inline AmendParams check_amend(const at::Tensor& q, const KVCache& cache, const at::Tensor& block_table,
                               const Shape& shape, const Requests& requests, const Reuse& reuse, double sm_scale,
                               double logits_soft_cap, bool batch_invariant) {
  AmendParams p{};
  p.shape = shape;
  p.dtype = dtype_of(q);
  p.query = heads_view(q);
  p.kv = cache.check(shape, q, block_table);
  p.requests = requests;
  p.matched = reuse.matched;
  p.ring = reuse.ring;
  p.num_anchors = reuse.ring.layout.shape.anchors;
  p.band = check_int32(reuse.band, "band", 1);
  p.layer = check_int32(reuse.layer, "layer", 0);
  TORCH_CHECK_VALUE(std::isfinite(sm_scale), "sm_scale is ", sm_scale, ", must be finite");
  TORCH_CHECK_VALUE(std::isfinite(logits_soft_cap) && logits_soft_cap >= 0, "logits_soft_cap is ", logits_soft_cap,
                    ", must be finite and not negative (0: off)");
  p.sm_scale = static_cast<float>(sm_scale);
  p.logits_soft_cap = static_cast<float>(logits_soft_cap);
  p.batch_invariant = batch_invariant;
  return p;
}

// Complete's parameters of a call without reuse, but for the states.
inline CompleteParams check_complete(const Shape& shape, const Requests& requests,
                                     const std::optional<at::Tensor>& sinks, const at::Tensor& out,
                                     const at::Tensor& lse) {
  check_rows_apart(out, "out");
  CompleteParams p{};
  p.shape = shape;
  p.dtype = dtype_of(out);
  p.requests = requests;
  check_array(lse, "lse", out.sizes().slice(0, out.dim() - 1), at::kFloat, out.device());
  if (sinks) check_array(*sinks, "sinks", {shape.num_qo_heads()}, at::kFloat, out.device());
  p.sinks = sinks ? sinks->const_data_ptr<float>() : nullptr;
  p.out = out.data_ptr();
  p.out_batch_stride = out.stride(0);
  p.out_head_stride = out.stride(-2);
  p.out_token_stride = out.dim() == 4 ? out.stride(1) : 0;
  p.lse = lse.data_ptr<float>();
  return p;
}

inline void check_states(const at::Tensor& states, const at::Tensor& state_lse, at::Device device,
                         CompleteParams& p) {
  const int64_t batch = p.shape.batch, queries = p.shape.num_queries();
  check_array(states, "states", {kNumSpans, batch, queries, p.shape.head_dim_v}, at::kFloat, device);
  check_array(state_lse, "state_lse", {kNumSpans, batch, queries}, at::kFloat, device);
  p.states = states.const_data_ptr<float>();
  p.state_lse = state_lse.const_data_ptr<float>();
}

}  // namespace mac_attn
