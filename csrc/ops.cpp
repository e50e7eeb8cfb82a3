// The ops as torch sees them: schemas, argument checks, dispatch. Everything that computes lies behind
// params.h and knows no torch.
#include <ATen/Parallel.h>
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
#include "cpu/kernels.h"
#include "kv_cache.h"

namespace mac_attn {

namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

HeadsView heads_view(const Tensor& t) {
  return {t.const_data_ptr(), t.stride(0), t.stride(1)};
}

// Lengths, slots and ids of the call's rows.
Requests check_requests(const Shape& shape, const Tensor& seq_lens, const OptionalTensor& slots,
                        const OptionalTensor& request_ids, at::Device device) {
  check_array(seq_lens, "seq_lens", {shape.batch}, at::kInt, device);
  if (slots) check_array(*slots, "slots", {shape.batch}, at::kInt, device);
  if (request_ids) check_array(*request_ids, "request_ids", {shape.batch}, at::kLong, device);
  return {seq_lens.const_data_ptr<int32_t>(), slots ? slots->const_data_ptr<int32_t>() : nullptr,
          request_ids ? request_ids->const_data_ptr<int64_t>() : nullptr};
}

// The parts of the ring that match reads; complete adds the rest.
Ring check_ring(const Shape& shape, const Tensor& query, const Tensor& ring_query, const Tensor& ring_depth,
                const Tensor& ring_position, const Tensor& slot_begin, const Tensor& slot_end,
                const Tensor& slot_request) {
  const at::Device device = query.device();
  check_array(ring_query, "ring_query", {kAny, shape.num_kv_heads, kAny, shape.group_size, shape.head_dim},
              query.scalar_type(), device);
  const int64_t slots = ring_query.size(0), window = ring_query.size(2);
  check_int32(slots, "num_slots", 1);
  check_int32(window, "window", 1);
  check_array(ring_depth, "ring_depth", {slots, shape.num_kv_heads, window, shape.group_size}, at::kInt, device);
  check_array(ring_position, "ring_position", {slots, window}, at::kInt, device);
  check_array(slot_begin, "slot_begin", {slots}, at::kInt, device);
  check_array(slot_end, "slot_end", {slots}, at::kInt, device);
  check_array(slot_request, "slot_request", {slots}, at::kLong, device);
  Ring ring{};
  ring.query = ring_query.data_ptr();
  ring.depth = ring_depth.data_ptr<int32_t>();
  ring.position = ring_position.data_ptr<int32_t>();
  ring.begin = slot_begin.data_ptr<int32_t>();
  ring.end = slot_end.data_ptr<int32_t>();
  ring.request = slot_request.data_ptr<int64_t>();
  ring.num_slots = static_cast<int32_t>(slots);
  ring.window = static_cast<int32_t>(window);
  return ring;
}

Tensor match(const Tensor& q_match, const Tensor& seq_lens, const Tensor& slots, const OptionalTensor& request_ids,
             const Tensor& ring_query, const Tensor& ring_depth, const Tensor& ring_position,
             const Tensor& slot_begin, const Tensor& slot_end, const Tensor& slot_request, const Tensor& threshold,
             bool relative, bool per_head, int64_t band, int64_t min_context, int64_t max_reuse_depth,
             const OptionalTensor& workspace, const OptionalTensor& error_flag) {
  check_query(q_match, "q_match");
  const at::Device device = q_match.device();
  TORCH_CHECK_VALUE(ring_query.dim() == 5, "ring_query has shape ", ring_query.sizes(),
                    ", must be [num_slots, num_kv_heads, window, group_size, head_dim]");
  MatchParams p{};
  p.shape = make_shape(q_match, ring_query.size(1));
  p.dtype = dtype_of(q_match);
  p.query = heads_view(q_match);
  p.requests = check_requests(p.shape, seq_lens, slots, request_ids, device);
  p.ring = check_ring(p.shape, q_match, ring_query, ring_depth, ring_position, slot_begin, slot_end, slot_request);
  check_array(threshold, "threshold", {p.shape.num_qo_heads()}, at::kFloat, device);
  p.threshold = threshold.const_data_ptr<float>();
  p.relative = relative;
  p.per_head = per_head;
  p.band = check_int32(band, "band", 1);
  p.min_context = check_int32(min_context, "min_context", 0);
  p.max_reuse_depth = check_int32(max_reuse_depth, "max_reuse_depth", 0);

  Tensor source = at::empty({p.shape.batch, p.shape.num_qo_heads()}, seq_lens.options());
  p.source = source.data_ptr<int32_t>();
  if (device.is_cpu()) {
    cpu_backend::match(p);
  } else {
    cuda_backend::match(p, {workspace, error_flag}, q_match);
  }
  return source;
}

std::tuple<Tensor, Tensor, Tensor> attend(const Tensor& q, const KVCache& cache, const Tensor& block_table,
                                          const Tensor& seq_lens, const OptionalTensor& source,
                                          const OptionalTensor& slots, const OptionalTensor& ring_anchors,
                                          int64_t window, int64_t band, double sm_scale, double logits_soft_cap,
                                          const Persistent& persistent) {
  check_query(q, "q");
  AmendParams p{};
  p.shape = make_shape(q, cache.num_kv_heads());
  p.dtype = dtype_of(q);
  p.query = heads_view(q);
  p.kv = cache.check(p.shape, q, block_table);
  p.requests = check_requests(p.shape, seq_lens, slots, std::nullopt, q.device());
  p.window = check_int32(window, "window", 1);
  p.band = check_int32(band, "band", 1);
  TORCH_CHECK_VALUE(std::isfinite(sm_scale), "sm_scale is ", sm_scale, ", must be finite");
  TORCH_CHECK_VALUE(std::isfinite(logits_soft_cap) && logits_soft_cap >= 0, "logits_soft_cap is ", logits_soft_cap,
                    ", must be finite and not negative (0: off)");
  p.sm_scale = static_cast<float>(sm_scale);
  p.logits_soft_cap = static_cast<float>(logits_soft_cap);
  int32_t num_slots = 0;
  if (source) {
    check_array(*source, "source", {p.shape.batch, p.shape.num_qo_heads()}, at::kInt, q.device());
    p.source = source->const_data_ptr<int32_t>();
  }
  if (ring_anchors && ring_anchors->dim() == 4 && ring_anchors->size(3) > 0) {
    TORCH_CHECK_VALUE(source && slots, "ring_anchors is given, so source and slots must be given too");
    check_array(*ring_anchors, "ring_anchors", {kAny, p.shape.num_kv_heads, window, kAny}, at::kInt, q.device());
    num_slots = check_int32(ring_anchors->size(0), "num_slots", 1);
    p.num_anchors = check_int32(ring_anchors->size(3), "anchors", 1);
    p.ring_anchors = ring_anchors->const_data_ptr<int32_t>();
  }

  const auto options = q.options().dtype(at::kFloat);
  Tensor states = at::empty({kNumSpans, p.shape.batch, p.shape.num_qo_heads(), p.shape.head_dim}, options);
  Tensor state_lse = at::empty({kNumSpans, p.shape.batch, p.shape.num_qo_heads()}, options);
  Tensor anchors = at::empty({p.shape.batch, p.shape.num_kv_heads, p.num_anchors}, seq_lens.options());
  p.out = states.data_ptr<float>();
  p.lse = state_lse.data_ptr<float>();
  p.anchors = anchors.data_ptr<int32_t>();
  const AmendLimits limits{cache.num_pages(), block_table.size(1), num_slots};
  if (q.is_cpu()) {
    cpu_backend::amend(p, limits);
  } else {
    cuda_backend::amend(p, limits, persistent, q);
  }
  return {states, state_lse, anchors};
}

std::tuple<Tensor, Tensor, Tensor> amend(const Tensor& q, const Tensor& k_cache, const Tensor& v_cache,
                                         const Tensor& block_table, const Tensor& seq_lens,
                                         const OptionalTensor& source, const OptionalTensor& slots,
                                         const OptionalTensor& ring_anchors, int64_t window, int64_t band,
                                         double sm_scale, double logits_soft_cap, const OptionalTensor& workspace,
                                         const OptionalTensor& error_flag) {
  const OptionalTensor values = v_cache;
  return attend(q, {k_cache, values, false}, block_table, seq_lens, source, slots, ring_anchors, window, band,
                sm_scale, logits_soft_cap, {workspace, error_flag});
}

// The states of amend and the tensors that receive their merger.
CompleteParams check_merge(const Tensor& states, const Tensor& state_lse, int64_t num_kv_heads,
                           const Tensor& seq_lens, const Tensor& out, const Tensor& lse) {
  check_query(out, "out");
  check_rows_apart(out, "out");
  CompleteParams p{};
  p.shape = make_shape(out, num_kv_heads);
  p.dtype = dtype_of(out);
  const int64_t batch = p.shape.batch, heads = p.shape.num_qo_heads();
  p.requests = check_requests(p.shape, seq_lens, std::nullopt, std::nullopt, out.device());
  check_array(states, "states", {kNumSpans, batch, heads, p.shape.head_dim}, at::kFloat, out.device());
  check_array(state_lse, "state_lse", {kNumSpans, batch, heads}, at::kFloat, out.device());
  check_array(lse, "lse", {batch, heads}, at::kFloat, out.device());
  p.states = states.const_data_ptr<float>();
  p.state_lse = state_lse.const_data_ptr<float>();
  p.out = out.data_ptr();
  p.out_batch_stride = out.stride(0);
  p.out_head_stride = out.stride(1);
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

void complete_exact(const Tensor& states, const Tensor& state_lse, const Tensor& seq_lens, Tensor& out,
                    Tensor& lse) {
  run_complete(check_merge(states, state_lse, out.dim() == 3 ? out.size(1) : 1, seq_lens, out, lse), {}, out);
}

void complete(const Tensor& states, const Tensor& state_lse, const Tensor& anchors, const Tensor& source,
              const Tensor& q_match, const Tensor& seq_lens, const Tensor& slots, const OptionalTensor& request_ids,
              Tensor& ring_query, Tensor& ring_out, Tensor& ring_lse, Tensor& ring_depth, Tensor& ring_anchors,
              Tensor& ring_position, Tensor& slot_begin, Tensor& slot_end, Tensor& slot_request, Tensor& counters,
              int64_t band, const OptionalTensor& workspace, Tensor& out, Tensor& lse) {
  TORCH_CHECK_VALUE(ring_query.dim() == 5, "ring_query has shape ", ring_query.sizes(),
                    ", must be [num_slots, num_kv_heads, window, group_size, head_dim]");
  CompleteParams p = check_merge(states, state_lse, ring_query.size(1), seq_lens, out, lse);
  const at::Device device = out.device();
  const int64_t H = p.shape.num_kv_heads, G = p.shape.group_size, D = p.shape.head_dim;
  check_query(q_match, "q_match");
  check_tensor(q_match, "q_match", out.sizes(), out.scalar_type(), device);
  p.query = heads_view(q_match);
  p.requests = check_requests(p.shape, seq_lens, slots, request_ids, device);
  check_array(source, "source", {p.shape.batch, p.shape.num_qo_heads()}, at::kInt, device);
  p.source = source.const_data_ptr<int32_t>();
  p.ring = check_ring(p.shape, q_match, ring_query, ring_depth, ring_position, slot_begin, slot_end, slot_request);
  const int64_t N = p.ring.num_slots, M = p.ring.window;
  check_array(ring_out, "ring_out", {N, H, M, G, D}, at::kFloat, device);
  check_array(ring_lse, "ring_lse", {N, H, M, G}, at::kFloat, device);
  check_array(ring_anchors, "ring_anchors", {N, H, M, kAny}, at::kInt, device);
  const int64_t S = ring_anchors.size(3);
  check_array(anchors, "anchors", {p.shape.batch, H, S}, at::kInt, device);
  check_array(counters, "counters", {N, kNumCounters}, at::kLong, device);
  p.ring.out = ring_out.data_ptr<float>();
  p.ring.lse = ring_lse.data_ptr<float>();
  p.ring.anchors = ring_anchors.data_ptr<int32_t>();
  p.ring.counters = counters.data_ptr<int64_t>();
  p.ring.num_anchors = static_cast<int32_t>(S);
  p.anchors = anchors.const_data_ptr<int32_t>();
  p.band = check_int32(band, "band", 1);
  run_complete(p, {workspace, std::nullopt}, out);
}

// A whole decode step in one op: what a caller pays for an op, above all when nothing of it lies in a cache, is
// more than what a stage takes. So is what a tensor made in Python costs: the results are made here.
Tensor decode_exact_into(const Tensor& q, const Tensor& k_cache, const OptionalTensor& v_cache, bool hnd,
                         const Tensor& block_table, const Tensor& seq_lens, double sm_scale, double logits_soft_cap,
                         Tensor& out) {
  check_tensor(out, "out", q.sizes(), q.scalar_type(), q.device());
  const auto [states, state_lse, anchors] = attend(q, {k_cache, v_cache, hnd}, block_table, seq_lens, std::nullopt,
                                                   std::nullopt, std::nullopt, 1, 1, sm_scale, logits_soft_cap, {});
  Tensor lse = at::empty({q.size(0), q.size(1)}, state_lse.options());
  complete_exact(states, state_lse, seq_lens, out, lse);
  return lse;
}

std::tuple<Tensor, Tensor> decode_exact(const Tensor& q, const Tensor& k_cache, const OptionalTensor& v_cache,
                                        bool hnd, const Tensor& block_table, const Tensor& seq_lens,
                                        double sm_scale, double logits_soft_cap) {
  Tensor out = at::empty(q.sizes(), q.options());
  Tensor lse = decode_exact_into(q, k_cache, v_cache, hnd, block_table, seq_lens, sm_scale, logits_soft_cap, out);
  return {out, lse};
}

std::tuple<Tensor, Tensor> decode_reuse_into(
    const Tensor& q, const Tensor& k_cache, const OptionalTensor& v_cache, bool hnd, const Tensor& block_table,
    const Tensor& seq_lens, const Tensor& slots, const OptionalTensor& given_q_match,
    const OptionalTensor& request_ids, Tensor& ring_query, Tensor& ring_out, Tensor& ring_lse, Tensor& ring_depth,
    Tensor& ring_anchors, Tensor& ring_position, Tensor& slot_begin, Tensor& slot_end, Tensor& slot_request,
    Tensor& counters, const Tensor& threshold, bool relative, bool per_head, int64_t band, int64_t min_context,
    int64_t max_reuse_depth, double sm_scale, double logits_soft_cap, const OptionalTensor& workspace,
    const OptionalTensor& error_flag, const OptionalTensor& inv_freq, bool interleaved, double rotary_scale,
    Tensor& out) {
  TORCH_CHECK_VALUE(given_q_match.has_value() != inv_freq.has_value(),
                    "q_match and inv_freq: ", inv_freq ? "both are" : "neither is", " given, must be one of them");
  const Tensor q_match =
      given_q_match ? *given_q_match : unrotate(q, seq_lens, "seq_lens", 1, *inv_freq, interleaved, rotary_scale);
  check_tensor(q, "q", q_match.sizes(), q_match.scalar_type(), q_match.device());
  check_tensor(out, "out", q.sizes(), q.scalar_type(), q.device());
  const KVCache cache{k_cache, v_cache, hnd};
  const int64_t num_kv_heads = cache.num_kv_heads();
  TORCH_CHECK_VALUE(ring_query.dim() == 5 && num_kv_heads == ring_query.size(1), cache.name(), " has ",
                    num_kv_heads, " KV heads, must have those of the ring, ",
                    ring_query.dim() == 5 ? ring_query.size(1) : 0);
  const Tensor source =
      match(q_match, seq_lens, slots, request_ids, ring_query, ring_depth, ring_position, slot_begin, slot_end,
            slot_request, threshold, relative, per_head, band, min_context, max_reuse_depth, workspace, error_flag);
  const auto [states, state_lse, anchors] =
      attend(q, cache, block_table, seq_lens, source, slots, ring_anchors, ring_query.size(2), band, sm_scale,
             logits_soft_cap, {workspace, error_flag});
  Tensor lse = at::empty({q.size(0), q.size(1)}, state_lse.options());
  complete(states, state_lse, anchors, source, q_match, seq_lens, slots, request_ids, ring_query, ring_out,
           ring_lse, ring_depth, ring_anchors, ring_position, slot_begin, slot_end, slot_request, counters, band,
           workspace, out, lse);
  return {source, lse};
}

std::tuple<Tensor, Tensor, Tensor> decode_reuse(
    const Tensor& q, const Tensor& k_cache, const OptionalTensor& v_cache, bool hnd, const Tensor& block_table,
    const Tensor& seq_lens, const Tensor& slots, const OptionalTensor& q_match, const OptionalTensor& request_ids,
    Tensor& ring_query, Tensor& ring_out, Tensor& ring_lse, Tensor& ring_depth, Tensor& ring_anchors,
    Tensor& ring_position, Tensor& slot_begin, Tensor& slot_end, Tensor& slot_request, Tensor& counters,
    const Tensor& threshold, bool relative, bool per_head, int64_t band, int64_t min_context,
    int64_t max_reuse_depth, double sm_scale, double logits_soft_cap, const OptionalTensor& workspace,
    const OptionalTensor& error_flag, const OptionalTensor& inv_freq, bool interleaved, double rotary_scale) {
  Tensor out = at::empty(q.sizes(), q.options());
  const auto [source, lse] =
      decode_reuse_into(q, k_cache, v_cache, hnd, block_table, seq_lens, slots, q_match, request_ids, ring_query,
                        ring_out, ring_lse, ring_depth, ring_anchors, ring_position, slot_begin, slot_end,
                        slot_request, counters, threshold, relative, per_head, band, min_context, max_reuse_depth,
                        sm_scale, logits_soft_cap, workspace, error_flag, inv_freq, interleaved, rotary_scale, out);
  return {source, out, lse};
}

// mac_attn/_extension.py looks for this in the file before it is opened.
[[gnu::used]] const char kBuiltFor[] = "mac_attn built for torch " MAC_ATTN_TORCH "\n";

pybind11::dict build_info() {
  pybind11::dict info;
  info["version"] = MAC_ATTN_VERSION;
  std::vector<std::string> arches;
#ifdef MAC_ATTN_CUDA_ARCHES
  std::string arch;
  for (const char c : std::string(MAC_ATTN_CUDA_ARCHES) + ";") {
    if (c != ';') {
      arch += c;
    } else if (!arch.empty()) {
      arches.push_back(arch);
      arch.clear();
    }
  }
#endif
  info["cuda_arches"] = arches;
  info["simd"] = cpu::kernels().name;
  info["threads"] = at::get_num_threads();
#ifdef __clang__
  info["compiler"] = __VERSION__;
#else
  info["compiler"] = "GCC " __VERSION__;
#endif
  return info;
}

void define(torch::Library& m) {
  m.def(
      "match(Tensor q_match, Tensor seq_lens, Tensor slots, Tensor? request_ids, Tensor ring_query, "
      "Tensor ring_depth, Tensor ring_position, Tensor slot_begin, Tensor slot_end, Tensor slot_request, "
      "Tensor threshold, bool relative, bool per_head, int band, int min_context, int max_reuse_depth, "
      "Tensor(a!)? workspace, Tensor(b!)? error_flag) -> Tensor");
  m.def(
      "amend(Tensor q, Tensor k_cache, Tensor v_cache, Tensor block_table, Tensor seq_lens, Tensor? source, "
      "Tensor? slots, Tensor? ring_anchors, int window, int band, float sm_scale, float logits_soft_cap, "
      "Tensor(a!)? workspace, Tensor(b!)? error_flag) "
      "-> (Tensor states, Tensor state_lse, Tensor anchors)");
  m.def("complete_exact(Tensor states, Tensor state_lse, Tensor seq_lens, Tensor(a!) out, Tensor(b!) lse) -> ()");
  m.def(
      "complete(Tensor states, Tensor state_lse, Tensor anchors, Tensor source, Tensor q_match, Tensor seq_lens, "
      "Tensor slots, Tensor? request_ids, Tensor(a!) ring_query, Tensor(b!) ring_out, Tensor(c!) ring_lse, "
      "Tensor(d!) ring_depth, Tensor(e!) ring_anchors, Tensor(f!) ring_position, Tensor(g!) slot_begin, "
      "Tensor(h!) slot_end, Tensor(i!) slot_request, Tensor(j!) counters, int band, "
      "Tensor? workspace, Tensor(k!) out, Tensor(l!) lse) -> ()");
  // Each as a function, and `into` a tensor that the caller has. For the cache see KVCache.
  const std::string exact =
      "Tensor q, Tensor k_cache, Tensor? v_cache, bool hnd, Tensor block_table, Tensor seq_lens, float sm_scale, "
      "float logits_soft_cap";
  m.def(("decode_exact(" + exact + ") -> (Tensor out, Tensor lse)").c_str());
  m.def(("decode_exact.into(" + exact + ", Tensor(a!) out) -> Tensor lse").c_str());
  const std::string reuse =
      "Tensor q, Tensor k_cache, Tensor? v_cache, bool hnd, Tensor block_table, Tensor seq_lens, Tensor slots, "
      "Tensor? q_match, Tensor? request_ids, Tensor(a!) ring_query, Tensor(b!) ring_out, Tensor(c!) ring_lse, "
      "Tensor(d!) ring_depth, Tensor(e!) ring_anchors, Tensor(f!) ring_position, Tensor(g!) slot_begin, "
      "Tensor(h!) slot_end, Tensor(i!) slot_request, Tensor(j!) counters, Tensor threshold, bool relative, "
      "bool per_head, int band, int min_context, int max_reuse_depth, float sm_scale, float logits_soft_cap, "
      "Tensor(k!)? workspace, Tensor(l!)? error_flag, Tensor? inv_freq, bool interleaved, float rotary_scale";
  m.def(("decode_reuse(" + reuse + ") -> (Tensor source, Tensor out, Tensor lse)").c_str());
  m.def(("decode_reuse.into(" + reuse + ", Tensor(m!) out) -> (Tensor source, Tensor lse)").c_str());
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

PYBIND11_MODULE(_C, m) {
  using namespace mac_attn;
  register_ops();
  m.attr("library") = own_path();
  m.doc() = "Registers the mac_attn ops; build_info() tells how they were built.";
  m.def("decode_exact", plain_function("mac_attn::decode_exact", "", decode_exact));
  m.def("decode_exact_into", plain_function("mac_attn::decode_exact", "into", decode_exact_into));
  m.def("decode_reuse", plain_function("mac_attn::decode_reuse", "", decode_reuse));
  m.def("decode_reuse_into", plain_function("mac_attn::decode_reuse", "into", decode_reuse_into));
  m.def("build_info", &mac_attn::build_info, "Version, CUDA architectures, SIMD level, threads, compiler.");
}
