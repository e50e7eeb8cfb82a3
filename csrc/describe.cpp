#include "describe.h"

#include <ATen/Parallel.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "cpu/kernels.h"

namespace mac_attn {

pybind11::tuple describe_ring(int32_t num_kv_heads, int32_t group_size, int32_t head_dim, int32_t entries,
                              int32_t anchors, int32_t itemsize, int32_t head_dim_v) {
  using Sizes = std::vector<int64_t>;
  const RingLayout l = ring_layout({num_kv_heads, group_size, head_dim, entries, anchors, itemsize, head_dim_v});
  const int64_t H = num_kv_heads, G = group_size, D = head_dim, M = entries, S = anchors, R = l.record_bytes;
  pybind11::dict parts;
  const auto add = [&](const char* name, const char* type, int64_t at, const Sizes& sizes, const Sizes& strides) {
    parts[name] = pybind11::make_tuple(at, type, sizes, strides);
  };
  add("slot_end", "int32", l.end, {}, {});
  add("slot_reach", "int32", l.reach, {}, {});
  add("slot_request", "int64", l.request, {}, {});
  add("counters", "int64", l.counters, {kNumCounters}, {8});
  add("ring_stored", "int32", l.stored, {H}, {4});
  add("ring_tau", "float32", l.tau, {H}, {4});
  add("ring_spread", "float32", l.spread, {H}, {4});
  add("ring_last_lse", "float32", l.last_lse, {H, G}, {G * 4, 4});
  add("ring_position", "int32", l.position, {H, M}, {M * 4, 4});
  add("ring_depth", "int32", l.depth, {H, M, G}, {M * G * 4, G * 4, 4});
  const int64_t row = D * itemsize;
  add("ring_query", "T", l.query, {H, M, G, D}, {M * G * row, G * row, row, itemsize});
  add("ring_out", "float32", l.record + l.out, {H, M, G, head_dim_v}, {M * R, R, head_dim_v * 4, 4});
  add("ring_lse", "float32", l.record + l.lse, {H, M, G}, {M * R, R, 4});
  add("ring_rotated", "T", l.record + l.rotated, {H, M, S > 0 ? G : 0, D}, {M * R, R, row, itemsize});
  add("ring_anchors", "int32", l.record + l.anchors, {H, M, S}, {M * R, R, 4});
  add("ring_anchor_weights", "float32", l.record + l.anchor_weights, {H, M, S}, {M * R, R, 4});
  return pybind11::make_tuple(parts, l.slot_bytes);
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
  info["simd"] = cpu::best_kernels().name;
  info["threads"] = at::get_num_threads();
#ifdef __clang__
  info["compiler"] = __VERSION__;
#else
  info["compiler"] = "GCC " __VERSION__;
#endif
  return info;
}

}  // namespace mac_attn
