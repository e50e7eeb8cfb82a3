// The ops as torch sees them: schemas, argument checks, dispatch. Everything that computes lies behind
// params.h and knows no torch.
#include <ATen/ops/empty.h>
#include <dlfcn.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/utils/pybind.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <string>
#include <tuple>
#include <vector>

#include "backend.h"
#include "checks.h"
#include "describe.h"
#include "kv_cache.h"

namespace mac_attn {

namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

HeadsView heads_view(const Tensor& t) {
  return {t.const_data_ptr(), t.stride(0), t.stride(-2), t.dim() == 4 ? t.stride(1) : 0};
}

// How many tokens each row of the call has, of them query tokens.
struct Lengths {
  const Tensor& seq_lens;
  const OptionalTensor& query_lens;
};

// Lengths, slots and ids of the call's rows.
Requests check_requests(const Shape& shape, const Lengths& lengths, const OptionalTensor& slots,
                        const OptionalTensor& request_ids, at::Device device) {
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
Ring check_ring(const Tensor& ring, const Shape& shape, const Tensor& query, int64_t entries, int64_t anchors) {
  constexpr int64_t kMost = 1 << 24;  // of each, so that places and the layout's sums fit their types
  TORCH_CHECK_VALUE(entries >= 1 && entries <= kMost, "entries is ", entries, ", must be from 1 to ", kMost);
  TORCH_CHECK_VALUE(anchors >= 0 && anchors <= kMost, "anchors is ", anchors, ", must be from 0 to ", kMost);
  Ring r{};
  r.layout = ring_layout({shape.num_kv_heads, shape.group_size, shape.head_dim, static_cast<int32_t>(entries),
                          static_cast<int32_t>(anchors), static_cast<int32_t>(query.element_size())});
  check_array(ring, "ring", {kAny, r.layout.slot_bytes}, at::kByte, query.device());
  r.num_slots = check_int32(ring.size(0), "num_slots", 1);
  r.data = static_cast<char*>(ring.data_ptr());
  return r;
}

// What match has answered, for the calls that go by it.
Matched check_matched(const Shape& shape, const Tensor& source, const Tensor& place, const Tensor& stored,
                      at::Device device) {
  check_array(source, "source", {shape.batch, shape.num_qo_heads()}, at::kInt, device);
  check_array(place, "place", {shape.batch, shape.num_qo_heads()}, at::kInt, device);
  check_array(stored, "stored", {shape.batch, shape.num_kv_heads}, at::kInt, device);
  return {source.data_ptr<int32_t>(), place.data_ptr<int32_t>(), stored.data_ptr<int32_t>()};
}

std::tuple<Tensor, Tensor, Tensor> match(const Tensor& q_match, const Tensor& seq_lens,
                                         const OptionalTensor& query_lens, const Tensor& slots,
                                         const OptionalTensor& request_ids, const Tensor& ring,
                                         int64_t num_kv_heads, int64_t entries, int64_t anchors,
                                         const Tensor& threshold, bool relative, double max_drift, bool per_head,
                                         int64_t window, int64_t band, int64_t min_context, int64_t max_reuse_depth,
                                         const OptionalTensor& workspace, const OptionalTensor& error_flag) {
  check_query(q_match, "q_match");
  const at::Device device = q_match.device();
  MatchParams p{};
  p.shape = make_shape(q_match, num_kv_heads);
  p.dtype = dtype_of(q_match);
  p.query = heads_view(q_match);
  p.requests = check_requests(p.shape, {seq_lens, query_lens}, slots, request_ids, device);
  p.ring = check_ring(ring, p.shape, q_match, entries, anchors);
  check_array(threshold, "threshold", {p.shape.num_qo_heads()}, at::kFloat, device);
  p.threshold = threshold.const_data_ptr<float>();
  p.relative = relative;
  TORCH_CHECK_VALUE(max_drift >= 0 && std::isfinite(max_drift), "max_drift is ", max_drift,
                    ", must be finite and not negative (0: no bound)");
  p.max_drift = static_cast<float>(max_drift);
  p.per_head = per_head;
  p.window = check_int32(window, "window", 1);
  p.band = check_int32(band, "band", 1);
  p.min_context = check_int32(min_context, "min_context", 0);
  p.max_reuse_depth = check_int32(max_reuse_depth, "max_reuse_depth", 0);

  Tensor source = at::empty({p.shape.batch, p.shape.num_qo_heads()}, seq_lens.options());
  Tensor place = at::empty(source.sizes(), source.options());
  Tensor stored = at::empty({p.shape.batch, p.shape.num_kv_heads}, seq_lens.options());
  p.matched = {source.data_ptr<int32_t>(), place.data_ptr<int32_t>(), stored.data_ptr<int32_t>()};
  if (device.is_cpu()) {
    cpu_backend::match(p);
  } else {
    cuda_backend::match(p, {workspace, error_flag}, q_match);
  }
  return {source, place, stored};
}

// What match answered and the rings that it searched, if amend is to go by them.
struct Reuse {
  const Tensor &source, &place, &stored, &slots, &ring;
  int64_t entries, anchors, band, layer;
};

using AmendedTensors = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

AmendedTensors attend(const Tensor& q, const KVCache& cache, const Tensor& block_table, const Lengths& lengths,
                      const Reuse* reuse, double sm_scale, double logits_soft_cap, const Persistent& persistent) {
  check_query(q, "q");
  AmendParams p{};
  p.shape = make_shape(q, cache.num_kv_heads());
  p.dtype = dtype_of(q);
  p.query = heads_view(q);
  p.kv = cache.check(p.shape, q, block_table);
  const OptionalTensor slots = reuse ? OptionalTensor(reuse->slots) : std::nullopt;
  p.requests = check_requests(p.shape, lengths, slots, std::nullopt, q.device());
  p.band = 1;
  if (reuse) {
    p.matched = check_matched(p.shape, reuse->source, reuse->place, reuse->stored, q.device());
    p.ring = check_ring(reuse->ring, p.shape, q, reuse->entries, reuse->anchors);
    p.num_anchors = p.ring.layout.shape.anchors;
    p.band = check_int32(reuse->band, "band", 1);
    p.layer = check_int32(reuse->layer, "layer", 0);
  }
  TORCH_CHECK_VALUE(std::isfinite(sm_scale), "sm_scale is ", sm_scale, ", must be finite");
  TORCH_CHECK_VALUE(std::isfinite(logits_soft_cap) && logits_soft_cap >= 0, "logits_soft_cap is ", logits_soft_cap,
                    ", must be finite and not negative (0: off)");
  p.sm_scale = static_cast<float>(sm_scale);
  p.logits_soft_cap = static_cast<float>(logits_soft_cap);

  const int64_t B = p.shape.batch, H = p.shape.num_kv_heads, Q = p.shape.num_queries(), S = p.num_anchors;
  const auto floats = q.options().dtype(at::kFloat), ints = lengths.seq_lens.options();
  Tensor states = at::empty({kNumSpans, B, Q, p.shape.head_dim}, floats);
  Tensor state_lse = at::empty({kNumSpans, B, Q}, floats);
  Tensor log_ratio = at::empty({B, reuse ? Q : 0}, floats);
  Tensor anchors = at::empty({B, H, S}, ints);
  Tensor anchor_weights = at::empty({B, H, S}, floats);
  Tensor sampled = at::empty({B, reuse ? H : 0}, ints);
  p.out = states.data_ptr<float>();
  p.lse = state_lse.data_ptr<float>();
  p.log_ratio = log_ratio.data_ptr<float>();
  p.anchors = anchors.data_ptr<int32_t>();
  p.anchor_weights = anchor_weights.data_ptr<float>();
  p.sampled = sampled.data_ptr<int32_t>();
  const AmendLimits limits{cache.num_pages(), block_table.size(1)};
  if (q.is_cpu()) {
    cpu_backend::amend(p, limits);
  } else {
    cuda_backend::amend(p, limits, persistent, q);
  }
  return {states, state_lse, log_ratio, anchors, anchor_weights, sampled};
}

AmendedTensors amend(const Tensor& q, const Tensor& k_cache, const Tensor& v_cache, const OptionalTensor& k_scale,
                     const OptionalTensor& v_scale, const Tensor& block_table, const Tensor& seq_lens,
                     const OptionalTensor& query_lens, const OptionalTensor& source, const OptionalTensor& place,
                     const OptionalTensor& stored, const OptionalTensor& slots, const OptionalTensor& ring,
                     int64_t entries, int64_t anchors, int64_t band, int64_t layer, double sm_scale,
                     double logits_soft_cap, const OptionalTensor& workspace, const OptionalTensor& error_flag) {
  const OptionalTensor values = v_cache;
  const KVCache cache{k_cache, values, false, k_scale, v_scale};
  const Persistent persistent{workspace, error_flag};
  const Lengths lengths{seq_lens, query_lens};
  if (!source) return attend(q, cache, block_table, lengths, nullptr, sm_scale, logits_soft_cap, persistent);
  TORCH_CHECK_VALUE(place && stored && slots && ring,
                    "source is given, so place, stored, slots and ring must be given too");
  const Reuse reuse{*source, *place, *stored, *slots, *ring, entries, anchors, band, layer};
  return attend(q, cache, block_table, lengths, &reuse, sm_scale, logits_soft_cap, persistent);
}

// The states of amend and the tensors that receive their merger.
CompleteParams check_merge(const Tensor& states, const Tensor& state_lse, int64_t num_kv_heads,
                           const Lengths& lengths, const OptionalTensor& sinks, const Tensor& out,
                           const Tensor& lse) {
  check_query(out, "out");
  check_rows_apart(out, "out");
  CompleteParams p{};
  p.shape = make_shape(out, num_kv_heads);
  p.dtype = dtype_of(out);
  const int64_t batch = p.shape.batch, heads = p.shape.num_qo_heads(), queries = p.shape.num_queries();
  p.requests = check_requests(p.shape, lengths, std::nullopt, std::nullopt, out.device());
  check_array(states, "states", {kNumSpans, batch, queries, p.shape.head_dim}, at::kFloat, out.device());
  check_array(state_lse, "state_lse", {kNumSpans, batch, queries}, at::kFloat, out.device());
  check_array(lse, "lse", out.sizes().slice(0, out.dim() - 1), at::kFloat, out.device());
  if (sinks) check_array(*sinks, "sinks", {heads}, at::kFloat, out.device());
  p.sinks = sinks ? sinks->const_data_ptr<float>() : nullptr;
  p.states = states.const_data_ptr<float>();
  p.state_lse = state_lse.const_data_ptr<float>();
  p.out = out.data_ptr();
  p.out_batch_stride = out.stride(0);
  p.out_head_stride = out.stride(-2);
  p.out_token_stride = out.dim() == 4 ? out.stride(1) : 0;
  p.lse = lse.data_ptr<float>();
  return p;
}

void run_complete(const CompleteParams& p, const Persistent& persistent, const Tensor& on) {
  if (on.is_cpu()) {
    cpu_backend::complete(p);
  } else {
    cuda_backend::complete(p, persistent, on);
  }
}

void complete_exact(const Tensor& states, const Tensor& state_lse, const Tensor& seq_lens,
                    const OptionalTensor& query_lens, int64_t num_kv_heads, const OptionalTensor& sinks,
                    Tensor& out, Tensor& lse) {
  run_complete(check_merge(states, state_lse, num_kv_heads, {seq_lens, query_lens}, sinks, out, lse), {}, out);
}

void complete(const Tensor& states, const Tensor& state_lse, const Tensor& log_ratio, const Tensor& anchors,
              const Tensor& anchor_weights, const Tensor& sampled, const Tensor& source, const Tensor& place,
              const Tensor& stored, const Tensor& q, const Tensor& q_match, const Tensor& seq_lens,
              const OptionalTensor& query_lens, const Tensor& slots, const OptionalTensor& request_ids,
              Tensor& ring, int64_t num_kv_heads, int64_t entries, int64_t band, int64_t max_reuse_depth,
              const OptionalTensor& sinks, const OptionalTensor& workspace, Tensor& out, Tensor& lse) {
  const Lengths lengths{seq_lens, query_lens};
  CompleteParams p = check_merge(states, state_lse, num_kv_heads, lengths, sinks, out, lse);
  const at::Device device = out.device();
  const int64_t B = p.shape.batch, H = p.shape.num_kv_heads, Q = p.shape.num_queries();
  check_query(q_match, "q_match");
  check_tensor(q_match, "q_match", out.sizes(), out.scalar_type(), device);
  check_tensor(q, "q", out.sizes(), out.scalar_type(), device);
  p.query = heads_view(q_match);
  p.rotated = heads_view(q);
  p.requests = check_requests(p.shape, lengths, slots, request_ids, device);
  p.matched = check_matched(p.shape, source, place, stored, device);
  check_array(anchors, "anchors", {B, H, kAny}, at::kInt, device);
  check_array(anchor_weights, "anchor_weights", anchors.sizes(), at::kFloat, device);
  check_array(sampled, "sampled", {B, H}, at::kInt, device);
  check_array(log_ratio, "log_ratio", {B, Q}, at::kFloat, device);
  p.ring = check_ring(ring, p.shape, q_match, entries, anchors.size(2));
  p.log_ratio = log_ratio.const_data_ptr<float>();
  p.anchors = anchors.const_data_ptr<int32_t>();
  p.anchor_weights = anchor_weights.const_data_ptr<float>();
  p.sampled = sampled.const_data_ptr<int32_t>();
  p.band = check_int32(band, "band", 1);
  p.max_reuse_depth = check_int32(max_reuse_depth, "max_reuse_depth", 0);
  run_complete(p, {workspace, std::nullopt}, out);
}

// A whole decode step in one op: what a caller pays for an op, above all when nothing of it lies in a cache, is
// more than what a stage takes. So is what a tensor made in Python costs: the results are made here.
Tensor decode_exact_into(Tensor& out, const Tensor& q, const Tensor& k_cache, const OptionalTensor& v_cache,
                         bool hnd, const OptionalTensor& k_scale, const OptionalTensor& v_scale,
                         const Tensor& block_table, const Tensor& seq_lens, const OptionalTensor& query_lens,
                         double sm_scale, double logits_soft_cap, const OptionalTensor& sinks) {
  check_tensor(out, "out", q.sizes(), q.scalar_type(), q.device());
  const KVCache cache{k_cache, v_cache, hnd, k_scale, v_scale};
  const AmendedTensors amended =
      attend(q, cache, block_table, {seq_lens, query_lens}, nullptr, sm_scale, logits_soft_cap, {});
  Tensor lse = at::empty(q.sizes().slice(0, q.dim() - 1), q.options().dtype(at::kFloat));
  complete_exact(std::get<0>(amended), std::get<1>(amended), seq_lens, query_lens, cache.num_kv_heads(), sinks, out,
                 lse);
  return lse;
}

std::tuple<Tensor, Tensor> decode_reuse_into(
    Tensor& out, const Tensor& q, const Tensor& k_cache, const OptionalTensor& v_cache, bool hnd,
    const OptionalTensor& k_scale, const OptionalTensor& v_scale, const Tensor& block_table, const Tensor& seq_lens,
    const OptionalTensor& query_lens, const Tensor& slots, const OptionalTensor& given_q_match,
    const OptionalTensor& request_ids, Tensor& ring, int64_t num_kv_heads, int64_t entries, int64_t num_anchors,
    const Tensor& threshold, bool relative, double max_drift, bool per_head, int64_t window, int64_t band,
    int64_t min_context, int64_t max_reuse_depth, bool learn, int64_t layer, double sm_scale,
    double logits_soft_cap, const OptionalTensor& sinks, const OptionalTensor& workspace,
    const OptionalTensor& error_flag, const OptionalTensor& inv_freq, bool interleaved, double rotary_scale) {
  TORCH_CHECK_VALUE(given_q_match.has_value() != inv_freq.has_value(),
                    "q_match and inv_freq: ", inv_freq ? "both are" : "neither is", " given, must be one of them");
  const Tensor q_match = given_q_match
                             ? *given_q_match
                             : unrotate_first(q, seq_lens, query_lens, *inv_freq, interleaved, rotary_scale);
  check_tensor(q, "q", q_match.sizes(), q_match.scalar_type(), q_match.device());
  check_tensor(out, "out", q.sizes(), q.scalar_type(), q.device());
  const KVCache cache{k_cache, v_cache, hnd, k_scale, v_scale};
  TORCH_CHECK_VALUE(cache.num_kv_heads() == num_kv_heads, cache.name(), " has ", cache.num_kv_heads(),
                    " KV heads, must have those of the ring, ", num_kv_heads);
  const auto [source, place, stored] =
      match(q_match, seq_lens, query_lens, slots, request_ids, ring, num_kv_heads, entries, num_anchors, threshold,
            relative, max_drift, per_head, window, band, min_context, max_reuse_depth, workspace, error_flag);
  const Reuse reuse{source, place, stored, slots, ring, entries, num_anchors, band, layer};
  const auto [states, state_lse, log_ratio, anchors, anchor_weights, sampled] = attend(
      q, cache, block_table, {seq_lens, query_lens}, &reuse, sm_scale, logits_soft_cap, {workspace, error_flag});
  Tensor lse = at::empty(q.sizes().slice(0, q.dim() - 1), state_lse.options());
  complete(states, state_lse, log_ratio, anchors, anchor_weights, sampled, source, place, stored, q, q_match,
           seq_lens, query_lens, slots, request_ids, ring, num_kv_heads, entries, band,
           learn ? max_reuse_depth : 0,  // nothing is less deep
           sinks, workspace, out, lse);
  return {source, lse};
}

// The op that makes `out` itself of one that is given it: (out, what the other answers).
template <typename Result>
struct WithOut {
  using type = std::tuple<Tensor, Result>;
};
template <typename... Results>
struct WithOut<std::tuple<Results...>> {
  using type = std::tuple<Tensor, Results...>;
};
template <auto kInto>
struct MakingOut;
template <typename Result, typename... Rest, Result (*kInto)(Tensor&, const Tensor&, Rest...)>
struct MakingOut<kInto> {
  static typename WithOut<Result>::type call(const Tensor& q, Rest... rest) {
    Tensor out = at::empty(q.sizes(), q.options());
    if constexpr (std::is_same_v<Result, Tensor>) {
      return {out, kInto(out, q, rest...)};
    } else {
      return std::tuple_cat(std::make_tuple(out), kInto(out, q, rest...));
    }
  }
};
constexpr auto decode_exact = MakingOut<decode_exact_into>::call;
constexpr auto decode_reuse = MakingOut<decode_reuse_into>::call;

void define(torch::Library& m) {
  m.def(
      "match(Tensor q_match, Tensor seq_lens, Tensor? query_lens, Tensor slots, Tensor? request_ids, Tensor ring, "
      "int num_kv_heads, "
      "int entries, int anchors, Tensor threshold, bool relative, float max_drift, bool per_head, int window, int "
      "band, "
      "int min_context, int max_reuse_depth, Tensor(a!)? workspace, Tensor(b!)? error_flag) "
      "-> (Tensor source, Tensor place, Tensor stored)");
  m.def(
      "amend(Tensor q, Tensor k_cache, Tensor v_cache, Tensor? k_scale, Tensor? v_scale, Tensor block_table, "
      "Tensor seq_lens, Tensor? query_lens, Tensor? source, Tensor? place, Tensor? stored, Tensor? slots, Tensor? "
      "ring, int entries, "
      "int anchors, int band, int layer, "
      "float sm_scale, float logits_soft_cap, Tensor(a!)? workspace, Tensor(b!)? error_flag) "
      "-> (Tensor states, Tensor state_lse, Tensor log_ratio, Tensor anchors, Tensor anchor_weights, "
      "Tensor sampled)");
  m.def(
      "complete_exact(Tensor states, Tensor state_lse, Tensor seq_lens, Tensor? query_lens, int num_kv_heads, "
      "Tensor? sinks, Tensor(a!) out, Tensor(b!) lse) -> ()");
  m.def(
      "complete(Tensor states, Tensor state_lse, Tensor log_ratio, Tensor anchors, Tensor anchor_weights, "
      "Tensor sampled, Tensor source, Tensor place, Tensor stored, Tensor q, Tensor q_match, Tensor seq_lens, "
      "Tensor? query_lens, Tensor slots, Tensor? request_ids, Tensor(a!) ring, int num_kv_heads, int entries, int "
      "band, "
      "int max_reuse_depth, Tensor? sinks, Tensor? workspace, Tensor(b!) out, Tensor(c!) lse) -> ()");
  // Each as a function, and `into` a tensor that the caller has, q's shape. For the cache see KVCache.
  const std::string exact =
      "Tensor q, Tensor k_cache, Tensor? v_cache, bool hnd, Tensor? k_scale, Tensor? v_scale, Tensor block_table, "
      "Tensor seq_lens, Tensor? query_lens, float sm_scale, float logits_soft_cap, Tensor? sinks";
  m.def(("decode_exact(" + exact + ") -> (Tensor out, Tensor lse)").c_str());
  m.def(("decode_exact.into(Tensor(a!) out, " + exact + ") -> Tensor lse").c_str());
  const std::string reuse =
      "Tensor q, Tensor k_cache, Tensor? v_cache, bool hnd, Tensor? k_scale, Tensor? v_scale, Tensor block_table, "
      "Tensor seq_lens, Tensor? query_lens, Tensor slots, "
      "Tensor? q_match, Tensor? request_ids, Tensor(a!) ring, int num_kv_heads, int entries, int anchors, "
      "Tensor threshold, bool relative, float max_drift, bool per_head, int window, int band, int min_context, "
      "int max_reuse_depth, bool learn, int layer, float sm_scale, float logits_soft_cap, Tensor? sinks, "
      "Tensor(b!)? workspace, "
      "Tensor(c!)? error_flag, "
      "Tensor? inv_freq, bool interleaved, float rotary_scale";
  m.def(("decode_reuse(" + reuse + ") -> (Tensor out, Tensor source, Tensor lse)").c_str());
  m.def(("decode_reuse.into(Tensor(d!) out, " + reuse + ") -> (Tensor source, Tensor lse)").c_str());
  m.def("unrotate(Tensor q, Tensor positions, Tensor inv_freq, bool interleaved, float scale) -> Tensor");
}

void implement(torch::Library& m) {
  m.impl("match", match);
  m.impl("amend", amend);
  m.impl("complete_exact", complete_exact);
  m.impl("complete", complete);
  m.impl("decode_exact", decode_exact);
  m.impl("decode_exact.into", decode_exact_into);
  m.impl("decode_reuse", decode_reuse);
  m.impl("decode_reuse.into", decode_reuse_into);
  m.impl("unrotate", unrotate_op);
}

// The path of the file that holds this function.
std::string own_path() {
  Dl_info info{};
  dladdr(reinterpret_cast<const void*>(&own_path), &info);
  return info.dli_fname ? info.dli_fname : "mac_attn._C";
}

// Once, when Python makes the module. TORCH_LIBRARY registers as the file is opened, where an error ends the
// process: with a second copy of the extension that was one.
void register_ops() {
  static const std::string path = own_path();
  static std::vector<torch::Library> libraries;
  if (!libraries.empty()) return;
  if (const auto other = c10::Dispatcher::singleton().findSchema({"mac_attn::decode_exact", ""})) {
    throw pybind11::import_error("another copy of mac_attn is loaded in this process (" + other->debug() +
                                 "), so " + path + " cannot be: keep one of them on sys.path");
  }
  const auto add = [](torch::Library::Kind kind, std::optional<c10::DispatchKey> key) -> torch::Library& {
    return libraries.emplace_back(kind, "mac_attn", key, path.c_str(), 0);
  };
  define(add(torch::Library::DEF, std::nullopt));
  implement(add(torch::Library::IMPL, c10::DispatchKey::CPU));
  implement(add(torch::Library::IMPL, c10::DispatchKey::CUDA));
}

}  // namespace

#ifndef MAC_ATTN_WITH_CUDA
// So that a CUDA tensor meets a sentence, not a missing dispatch key.
namespace cuda_backend {
[[noreturn]] void not_built() {
  TORCH_CHECK(false, "the tensors are on CUDA, but mac_attn was built without it; see `python -m mac_attn.info`");
}
void match(const MatchParams&, const Persistent&, const at::Tensor&) {
  not_built();
}
void amend(const AmendParams&, const AmendLimits&, const Persistent&, const at::Tensor&) {
  not_built();
}
void complete(const CompleteParams&, const Persistent&, const at::Tensor&) {
  not_built();
}
void unrotate(const UnrotateParams&, const at::Tensor&) {
  not_built();
}
}  // namespace cuda_backend
#endif

}  // namespace mac_attn

// An op as a plain Python function. It calls through the dispatcher, as torch.ops does, but need not match what it
// is given with a schema and box it first: a third of what a call of thirty arguments costs (bench/README.md).
template <typename Result, typename... Args>
auto plain_function(const char* name, const char* overload, Result (*)(Args...)) {
  const auto op = c10::Dispatcher::singleton().findSchemaOrThrow(name, overload).typed<Result(Args...)>();
  return torch::wrap_pybind_function_no_gil([op](Args... args) -> Result { return op.call(args...); });
}

// What it keeps is made while it is imported, or per thread: no GIL is needed, and its ops run without one.
PYBIND11_MODULE(_C, m, pybind11::mod_gil_not_used()) {
  using namespace mac_attn;
  register_ops();
  m.attr("library") = own_path();
  m.doc() = "Registers the mac_attn ops; build_info() tells how they were built.";
  m.def("decode_exact", plain_function("mac_attn::decode_exact", "", decode_exact));
  m.def("decode_exact_into", plain_function("mac_attn::decode_exact", "into", decode_exact_into));
  m.def("decode_reuse", plain_function("mac_attn::decode_reuse", "", decode_reuse));
  m.def("decode_reuse_into", plain_function("mac_attn::decode_reuse", "into", decode_reuse_into));
  m.def("ring_layout", &mac_attn::describe_ring, "Parts of a slot of a ring, see mac_attn.cache; and its bytes.");
  m.def("build_info", &mac_attn::build_info, "Version, CUDA architectures, SIMD level, threads, compiler.");
}
