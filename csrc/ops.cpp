// The ops as torch sees them: schemas, argument checks, dispatch. Everything that computes lies behind
// params.h and knows no torch.
#include <Python.h>

#include <ATen/ops/empty.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/library.h>

#include <string>
#include <tuple>
#include <vector>

#include "arguments.h"
#include "backend.h"
#include "describe.h"
#include "plain_function.h"

namespace mac_attn {

namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

void run_match(const MatchParams& p, const Persistent& persistent, const Tensor& on) {
  on.is_cpu() ? cpu_backend::match(p) : cuda_backend::match(p, persistent, on);
}

void run_amend(const AmendParams& p, const Persistent& persistent, const Tensor& on) {
  on.is_cpu() ? cpu_backend::amend(p) : cuda_backend::amend(p, persistent, on);
}

void run_complete(const CompleteParams& p, const Persistent& persistent, const Tensor& on) {
  on.is_cpu() ? cpu_backend::complete(p) : cuda_backend::complete(p, persistent, on);
}

std::tuple<Tensor, Tensor, Tensor> match(const Tensor& q_match, const Tensor& seq_lens,
                                         const OptionalTensor& query_lens, const Tensor& slots,
                                         const OptionalTensor& request_ids, const Tensor& ring,
                                         int64_t num_kv_heads, int64_t head_dim_v, int64_t entries, int64_t anchors,
                                         const Tensor& threshold, bool relative, double max_drift, bool per_head,
                                         int64_t window, int64_t band, int64_t min_context, int64_t max_reuse_depth,
                                         const OptionalTensor& workspace, const OptionalTensor& error_flag) {
  check_query(q_match, "q_match");
  check_head_dim_v(head_dim_v, q_match.size(-1), "ring");
  Shape shape = make_shape(q_match, num_kv_heads);
  shape.head_dim_v = static_cast<int32_t>(head_dim_v);
  const Requests requests = check_requests(shape, {seq_lens, query_lens}, slots, request_ids, q_match.device());
  MatchParams p =
      check_match(q_match, shape, requests, check_ring(ring, shape, q_match, entries, anchors),
                  {threshold, relative, max_drift, per_head, window, band, min_context, max_reuse_depth});
  Tensor source = at::empty({shape.batch, shape.num_queries()}, seq_lens.options());
  Tensor place = at::empty(source.sizes(), source.options());
  Tensor stored = at::empty({shape.batch, shape.num_kv_heads}, seq_lens.options());
  p.matched = {source.data_ptr<int32_t>(), place.data_ptr<int32_t>(), stored.data_ptr<int32_t>()};
  run_match(p, {workspace, error_flag}, q_match);
  return {source, place, stored};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> amend(
    const Tensor& q, const Tensor& k_cache, const Tensor& v_cache, const OptionalTensor& k_scale,
    const OptionalTensor& v_scale, const Tensor& block_table, const Tensor& seq_lens,
    const OptionalTensor& query_lens, const OptionalTensor& source, const OptionalTensor& place,
    const OptionalTensor& stored, const OptionalTensor& slots, const OptionalTensor& ring, int64_t entries,
    int64_t num_anchors, int64_t band, int64_t layer, double sm_scale, double logits_soft_cap, bool batch_invariant,
    const OptionalTensor& workspace, const OptionalTensor& error_flag) {
  const OptionalTensor values = v_cache;
  const KVCache cache{k_cache, values, false, k_scale, v_scale};
  TORCH_CHECK_VALUE(!source || (place && stored && slots && ring),
                    "source is given, so place, stored, slots and ring must be given too");
  check_query(q, "q");
  const Shape shape = cache.shape(q);
  const Requests requests =
      check_requests(shape, {seq_lens, query_lens}, source ? slots : std::nullopt, std::nullopt, q.device());
  Reuse reuse{{}, {}, 1, 0};
  if (source) {
    reuse = {check_matched(shape, *source, *place, *stored, q.device()),
             check_ring(*ring, shape, q, entries, num_anchors), band, layer};
  }
  AmendParams p =
      check_amend(q, cache, block_table, shape, requests, reuse, sm_scale, logits_soft_cap, batch_invariant);
  const int64_t B = shape.batch, H = shape.num_kv_heads, Q = shape.num_queries(), S = p.num_anchors;
  const auto floats = q.options().dtype(at::kFloat), ints = seq_lens.options();
  Tensor states = at::empty({kNumSpans, B, Q, shape.head_dim_v}, floats);
  Tensor state_lse = at::empty({kNumSpans, B, Q}, floats);
  Tensor log_ratio = at::empty({B, source ? Q : 0}, floats);
  Tensor anchors = at::empty({B, H, S}, ints);
  Tensor anchor_weights = at::empty({B, H, S}, floats);
  Tensor sampled = at::empty({B, source ? H * shape.tokens : 0}, ints);
  p.out = states.data_ptr<float>();
  p.lse = state_lse.data_ptr<float>();
  p.log_ratio = log_ratio.data_ptr<float>();
  p.anchors = anchors.data_ptr<int32_t>();
  p.anchor_weights = anchor_weights.data_ptr<float>();
  p.sampled = sampled.data_ptr<int32_t>();
  run_amend(p, {workspace, error_flag}, q);
  return {states, state_lse, log_ratio, anchors, anchor_weights, sampled};
}

void complete_exact(const Tensor& states, const Tensor& state_lse, const Tensor& seq_lens,
                    const OptionalTensor& query_lens, int64_t num_kv_heads, const OptionalTensor& sinks,
                    Tensor& out, Tensor& lse) {
  check_query(out, "out");
  const Shape shape = make_shape(out, num_kv_heads);
  const Requests requests = check_requests(shape, {seq_lens, query_lens}, std::nullopt, std::nullopt, out.device());
  CompleteParams p = check_complete(shape, requests, sinks, out, lse);
  check_states(states, state_lse, out.device(), p);
  run_complete(p, {}, out);
}

void complete(const Tensor& states, const Tensor& state_lse, const Tensor& log_ratio, const Tensor& anchors,
              const Tensor& anchor_weights, const Tensor& sampled, const Tensor& source, const Tensor& place,
              const Tensor& stored, const Tensor& q, const Tensor& q_match, const Tensor& seq_lens,
              const OptionalTensor& query_lens, const Tensor& slots, const OptionalTensor& request_ids,
              Tensor& ring, int64_t num_kv_heads, int64_t entries, int64_t band, int64_t max_reuse_depth,
              const OptionalTensor& k_cache, const OptionalTensor& k_scale, const OptionalTensor& block_table,
              double sm_scale, const OptionalTensor& sinks, const OptionalTensor& workspace, Tensor& out,
              Tensor& lse) {
  TORCH_CHECK_VALUE(k_cache.has_value() == block_table.has_value(), "block_table is ",
                    block_table ? "given" : "None", ", must be ", k_cache ? "given" : "None", ", as k_cache is");
  check_query(out, "out");
  check_query(q_match, "q_match");
  check_head_dim_v(out.size(-1), q_match.size(-1), "out");
  const at::Device device = out.device();
  Shape shape = make_shape(out, num_kv_heads);
  shape.head_dim = static_cast<int32_t>(q_match.size(-1));
  const Requests requests = check_requests(shape, {seq_lens, query_lens}, slots, request_ids, device);
  CompleteParams p = check_complete(shape, requests, sinks, out, lse);
  if (k_cache) {
    const KVCache keys{*k_cache, k_cache, false, k_scale, k_scale};
    p.kv = keys.check(shape, out, *block_table);
    p.sm_scale = static_cast<float>(sm_scale);
  }
  check_states(states, state_lse, device, p);
  const int64_t B = shape.batch, H = shape.num_kv_heads, Q = shape.num_queries();
  const at::DimVector sizes = with_last(out.sizes(), shape.head_dim);
  check_tensor(q_match, "q_match", sizes, out.scalar_type(), device);
  check_tensor(q, "q", sizes, out.scalar_type(), device);
  check_apart(out, "out", q, "q");
  check_apart(out, "out", q_match, "q_match");
  p.query = heads_view(q_match);
  p.rotated = heads_view(q);
  p.matched = check_matched(shape, source, place, stored, device);
  check_array(anchors, "anchors", {B, H, kAny}, at::kInt, device);
  check_array(anchor_weights, "anchor_weights", anchors.sizes(), at::kFloat, device);
  check_array(sampled, "sampled", {B, H * shape.tokens}, at::kInt, device);
  check_array(log_ratio, "log_ratio", {B, Q}, at::kFloat, device);
  p.ring = check_ring(ring, shape, q_match, entries, anchors.size(2));
  p.log_ratio = log_ratio.const_data_ptr<float>();
  p.anchors = anchors.const_data_ptr<int32_t>();
  p.anchor_weights = anchor_weights.const_data_ptr<float>();
  p.sampled = sampled.const_data_ptr<int32_t>();
  p.band = check_int32(band, "band", 1);
  p.max_reuse_depth = check_int32(max_reuse_depth, "max_reuse_depth", 0);
  run_complete(p, {workspace, std::nullopt}, out);
}

// A whole decode step in one op: what a caller pays for an op, above all when nothing of it lies in a cache, is
// more than what a stage takes. So is what a tensor costs: those that the stages hand on are one piece of memory.
struct HandedOn {
  Tensor memory;
  int32_t *place, *stored;
  float *states, *state_lse, *log_ratio;
  int32_t* anchors;
  float* anchor_weights;
  int32_t* sampled;
  void* candidates;

  HandedOn(const Shape& shape, bool reuse, int64_t num_anchors, const Tensor& on) {
    const bool hands_on = !on.is_cpu() || cpu_backend::hands_on_candidates();
    const int64_t B = shape.batch, H = shape.num_kv_heads, Q = shape.num_queries(), r = reuse;
    const int64_t S = hands_on ? 0 : num_anchors, S_drawn = num_anchors - S;
    const int64_t counts[] = {kNumSpans * B * Q * shape.head_dim_v,
                              kNumSpans * B * Q,
                              r * B * Q,
                              r * B * Q,
                              r * B * H,
                              r * B * H * S,
                              r * B * H * S,
                              r * B * H * shape.tokens,
                              r * B * H * kCandidateRoom * S_drawn * (kCandidateBytes / int64_t{sizeof(float)})};
    constexpr int64_t kAlign = 64 / sizeof(float);
    int64_t begin[std::size(counts)], total = 0;
    for (size_t i = 0; i < std::size(counts); ++i) {
      begin[i] = total;
      total += (counts[i] + kAlign - 1) / kAlign * kAlign;
    }
    memory = at::empty({total}, on.options().dtype(at::kFloat));
    float* first = memory.data_ptr<float>();
    const auto ints = [&](int i) { return reinterpret_cast<int32_t*>(first + begin[i]); };
    states = first, state_lse = first + begin[1], log_ratio = first + begin[2];
    place = ints(3), stored = ints(4), anchors = ints(5), anchor_weights = first + begin[6], sampled = ints(7);
    candidates = S_drawn > 0 ? first + begin[8] : nullptr;
  }

  void receive(AmendParams& p) const {
    p.out = states, p.lse = state_lse, p.log_ratio = log_ratio;
    p.anchors = anchors, p.anchor_weights = anchor_weights, p.sampled = sampled, p.candidates = candidates;
  }
  void give(CompleteParams& p) const {
    p.states = states, p.state_lse = state_lse, p.log_ratio = log_ratio;
    p.anchors = anchors, p.anchor_weights = anchor_weights, p.sampled = sampled, p.candidates = candidates;
  }
};

Tensor decode_exact_into(Tensor& out, const Tensor& q, const Tensor& k_cache, const OptionalTensor& v_cache,
                         bool hnd, const OptionalTensor& k_scale, const OptionalTensor& v_scale,
                         const Tensor& block_table, const Tensor& seq_lens, const OptionalTensor& query_lens,
                         double sm_scale, double logits_soft_cap, bool batch_invariant,
                         const OptionalTensor& sinks) {
  check_query(q, "q");
  check_tensor(out, "out", with_last(q.sizes(), head_dim_v(q, v_cache)), q.scalar_type(), q.device());
  const KVCache cache{k_cache, v_cache, hnd, k_scale, v_scale};
  const Shape shape = cache.shape(q);
  const Requests requests = check_requests(shape, {seq_lens, query_lens}, std::nullopt, std::nullopt, q.device());
  AmendParams a = check_amend(q, cache, block_table, shape, requests, {{}, {}, 1, 0}, sm_scale, logits_soft_cap,
                              batch_invariant);
  Tensor lse = at::empty(q.sizes().slice(0, q.dim() - 1), q.options().dtype(at::kFloat));
  CompleteParams c = check_complete(shape, requests, sinks, out, lse);
  const HandedOn handed(shape, false, 0, q);
  handed.receive(a);
  handed.give(c);
  run_amend(a, {}, q);
  run_complete(c, {}, q);
  return lse;
}

std::tuple<Tensor, Tensor> decode_reuse_into(
    Tensor& out, const Tensor& q, const Tensor& k_cache, const OptionalTensor& v_cache, bool hnd,
    const OptionalTensor& k_scale, const OptionalTensor& v_scale, const Tensor& block_table, const Tensor& seq_lens,
    const OptionalTensor& query_lens, const Tensor& slots, const OptionalTensor& given_q_match,
    const OptionalTensor& request_ids, Tensor& ring, int64_t num_kv_heads, int64_t ring_head_dim_v, int64_t entries,
    int64_t num_anchors, const Tensor& threshold, bool relative, double max_drift, bool per_head, int64_t window,
    int64_t band, int64_t min_context, int64_t max_reuse_depth, bool exact, bool learn, int64_t layer,
    double sm_scale, double logits_soft_cap, bool batch_invariant, const OptionalTensor& sinks,
    const OptionalTensor& workspace, const OptionalTensor& error_flag, const OptionalTensor& inv_freq,
    bool interleaved, double rotary_scale) {
  TORCH_CHECK_VALUE(given_q_match.has_value() != inv_freq.has_value(),
                    "q_match and inv_freq: ", inv_freq ? "both are" : "neither is", " given, must be one of them");
  check_query(q, "q");
  const at::Device device = q.device();
  const Tensor q_match =
      given_q_match ? *given_q_match : unrotate_step(q, seq_lens, query_lens, *inv_freq, interleaved, rotary_scale);
  if (given_q_match) check_query(q_match, "q_match");
  check_tensor(q, "q", q_match.sizes(), q_match.scalar_type(), q_match.device());
  check_tensor(out, "out", with_last(q.sizes(), head_dim_v(q, v_cache)), q.scalar_type(), device);
  check_apart(out, "out", q, "q");
  check_apart(out, "out", q_match, "q_match");
  const KVCache cache{k_cache, v_cache, hnd, k_scale, v_scale};
  TORCH_CHECK_VALUE(cache.num_kv_heads() == num_kv_heads, cache.name(), " has ", cache.num_kv_heads(),
                    " KV heads, must have those of the ring, ", num_kv_heads);
  TORCH_CHECK_VALUE(head_dim_v(q, v_cache) == ring_head_dim_v, v_cache ? "v_cache" : "kv_cache", " has head_dim_v ",
                    head_dim_v(q, v_cache), ", must have that of the ring, ", ring_head_dim_v);
  const Shape shape = cache.shape(q);
  const Requests requests = check_requests(shape, {seq_lens, query_lens}, slots, request_ids, device);
  const Ring rings = check_ring(ring, shape, q, entries, num_anchors);
  const Persistent persistent{workspace, error_flag};

  Tensor source = at::empty({shape.batch, shape.num_queries()}, seq_lens.options());
  Tensor lse = at::empty(q.sizes().slice(0, q.dim() - 1), q.options().dtype(at::kFloat));
  const HandedOn handed(shape, true, num_anchors, q);
  const Matched matched{source.data_ptr<int32_t>(), handed.place, handed.stored};
  MatchParams m =
      check_match(q_match, shape, requests, rings,
                  {threshold, relative, max_drift, per_head, window, band, min_context, max_reuse_depth});
  if (exact) m.min_context = INT32_MAX;  // nothing is looked for
  m.matched = matched;
  AmendParams a = check_amend(q, cache, block_table, shape, requests, {matched, rings, band, layer}, sm_scale,
                              logits_soft_cap, batch_invariant);
  handed.receive(a);
  CompleteParams c = check_complete(shape, requests, sinks, out, lse);
  handed.give(c);
  c.query = m.query;
  c.rotated = a.query;
  c.matched = matched;
  c.ring = rings;
  c.band = m.band;
  c.layer = a.layer;
  c.max_reuse_depth = learn ? m.max_reuse_depth : 0;  // nothing is less deep
  c.kv = a.kv;
  c.sm_scale = a.sm_scale;
  run_match(m, persistent, q);
  run_amend(a, persistent, q);
  run_complete(c, persistent, q);
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
template <typename Result, typename... Rest,
          Result (*kInto)(Tensor&, const Tensor&, const Tensor&, const OptionalTensor&, Rest...)>
struct MakingOut<kInto> {
  static typename WithOut<Result>::type call(const Tensor& q, const Tensor& k_cache, const OptionalTensor& v_cache,
                                             Rest... rest) {
    // No more than what a call that is not refused can have.
    const int64_t last = q.dim() > 0 ? std::min(head_dim_v(q, v_cache), q.size(-1)) : 0;
    Tensor out = at::empty(with_last(q.sizes(), last), q.options());
    if constexpr (std::is_same_v<Result, Tensor>) {
      return {out, kInto(out, q, k_cache, v_cache, rest...)};
    } else {
      return std::tuple_cat(std::make_tuple(out), kInto(out, q, k_cache, v_cache, rest...));
    }
  }
};
constexpr auto decode_exact = MakingOut<decode_exact_into>::call;
constexpr auto decode_reuse = MakingOut<decode_reuse_into>::call;

void define(torch::Library& m) {
  m.def(
      "match(Tensor q_match, Tensor seq_lens, Tensor? query_lens, Tensor slots, Tensor? request_ids, Tensor ring, "
      "int num_kv_heads, int head_dim_v, "
      "int entries, int anchors, Tensor threshold, bool relative, float max_drift, bool per_head, int window, int "
      "band, "
      "int min_context, int max_reuse_depth, Tensor(a!)? workspace, Tensor(b!)? error_flag) "
      "-> (Tensor source, Tensor place, Tensor stored)");
  m.def(
      "amend(Tensor q, Tensor k_cache, Tensor v_cache, Tensor? k_scale, Tensor? v_scale, Tensor block_table, "
      "Tensor seq_lens, Tensor? query_lens, Tensor? source, Tensor? place, Tensor? stored, Tensor? slots, Tensor? "
      "ring, int entries, "
      "int anchors, int band, int layer, "
      "float sm_scale, float logits_soft_cap, bool batch_invariant, Tensor(a!)? workspace, Tensor(b!)? error_flag) "
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
      "int max_reuse_depth, Tensor? k_cache, Tensor? k_scale, Tensor? block_table, float sm_scale, Tensor? sinks, "
      "Tensor? workspace, Tensor(b!) out, Tensor(c!) lse) -> ()");
  // Each as a function, and `into` a tensor that the caller has, q's shape but for head_dim_v. For the cache see
  // KVCache.
  const std::string exact =
      "Tensor q, Tensor k_cache, Tensor? v_cache, bool hnd, Tensor? k_scale, Tensor? v_scale, Tensor block_table, "
      "Tensor seq_lens, Tensor? query_lens, float sm_scale, float logits_soft_cap, bool batch_invariant, Tensor? "
      "sinks";
  m.def(("decode_exact(" + exact + ") -> (Tensor out, Tensor lse)").c_str());
  m.def(("decode_exact.into(Tensor(a!) out, " + exact + ") -> Tensor lse").c_str());
  const std::string reuse =
      "Tensor q, Tensor k_cache, Tensor? v_cache, bool hnd, Tensor? k_scale, Tensor? v_scale, Tensor block_table, "
      "Tensor seq_lens, Tensor? query_lens, Tensor slots, "
      "Tensor? q_match, Tensor? request_ids, Tensor(a!) ring, int num_kv_heads, int head_dim_v, "
      "int entries, int anchors, "
      "Tensor threshold, bool relative, float max_drift, bool per_head, int window, int band, int min_context, "
      "int max_reuse_depth, bool exact, bool learn, int layer, float sm_scale, float logits_soft_cap, bool "
      "batch_invariant, "
      "Tensor? sinks, "
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

std::string file_of(PyObject* module) {
  PyObject* file = PyModule_GetFilenameObject(module);
  const char* text = file ? PyUnicode_AsUTF8AndSize(file, nullptr) : nullptr;
  const std::string answer = text ? text : "mac_attn._C";
  Py_XDECREF(file);
  PyErr_Clear();
  return answer;
}

// Once, when Python makes the module. TORCH_LIBRARY registers as the file is opened, where an error ends the
// process: with a second copy of the extension that was one. False, and Python's error, with such a one.
bool register_ops(PyObject* module) {
  static const std::string path = file_of(module);
  static std::vector<torch::Library> libraries;
  if (!libraries.empty()) return true;
  if (const auto other = c10::Dispatcher::singleton().findSchema({"mac_attn::decode_exact", ""})) {
    const std::string message = "another copy of mac_attn is loaded in this process (" + other->debug() +
                                "): " + path + " cannot be, too; keep one of them on sys.path";
    PyErr_SetString(PyExc_ImportError, message.c_str());
    return false;
  }
  const auto add = [](torch::Library::Kind kind, std::optional<c10::DispatchKey> key) -> torch::Library& {
    return libraries.emplace_back(kind, "mac_attn", key, path.c_str(), 0);
  };
  define(add(torch::Library::DEF, std::nullopt));
  implement(add(torch::Library::IMPL, c10::DispatchKey::CPU));
  implement(add(torch::Library::IMPL, c10::DispatchKey::CUDA));
  torch::Library& autograd = add(torch::Library::IMPL, c10::DispatchKey::Autograd);
  for (const char* op : {"match", "amend", "complete_exact", "complete", "decode_exact", "decode_exact.into",
                         "decode_reuse", "decode_reuse.into", "unrotate"}) {
    autograd.impl(op, torch::autograd::autogradNotImplementedFallback());  // a backward pass raises
  }
  return true;
}

int fill(PyObject* module) {
  const auto add_functions = [&]() -> PyObject* {
    if (!register_ops(module)) return nullptr;
    static PyMethodDef functions[] = {
        PlainFunction<decode_exact>::of("decode_exact", "mac_attn::decode_exact", ""),
        PlainFunction<decode_exact_into>::of("decode_exact_into", "mac_attn::decode_exact", "into"),
        PlainFunction<decode_reuse>::of("decode_reuse", "mac_attn::decode_reuse", ""),
        PlainFunction<decode_reuse_into>::of("decode_reuse_into", "mac_attn::decode_reuse", "into"),
        {"ring_layout", ring_layout_of, METH_VARARGS, "Parts of a slot of a ring, see mac_attn.cache; its bytes."},
        {"build_info", build_info, METH_NOARGS, "Version, CUDA architectures, SIMD level, threads, compiler."},
        {nullptr, nullptr, 0, nullptr},
    };
    return PyModule_AddFunctions(module, functions) == 0 ? module : nullptr;
  };
  return with_python_errors(add_functions) ? 0 : -1;
}

PyModuleDef_Slot slots[] = {
    {Py_mod_exec, reinterpret_cast<void*>(fill)},
#ifdef Py_GIL_DISABLED
    // What the module keeps is made while it is imported, or per thread; its ops run without the GIL anyway.
    {Py_mod_gil, Py_MOD_GIL_NOT_USED},
#endif
    {0, nullptr},
};

PyModuleDef definition = {
    PyModuleDef_HEAD_INIT,
    "_C",
    "Registers the mac_attn ops; build_info() tells how they were built.",
    0,
    nullptr,
    slots,
    nullptr,
    nullptr,
    nullptr,
};

}  // namespace

}  // namespace mac_attn

PyMODINIT_FUNC PyInit__C() {
  return PyModuleDef_Init(&mac_attn::definition);
}
