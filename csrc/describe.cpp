#include "describe.h"

#include <ATen/Parallel.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/kernels.h"
#include "ring.h"

namespace mac_attn {

namespace {

using Sizes = std::vector<int64_t>;

PyObject* to_python(int64_t number) {
  return PyLong_FromLongLong(number);
}

PyObject* to_python(const std::string& text) {
  return PyUnicode_FromStringAndSize(text.data(), static_cast<Py_ssize_t>(text.size()));
}

template <typename T>
PyObject* to_python(const std::vector<T>& values) {
  PyObject* list = PyList_New(0);
  for (const T& value : values) {
    PyObject* object = list ? to_python(value) : nullptr;
    if (!object || PyList_Append(list, object)) Py_CLEAR(list);
    Py_XDECREF(object);
  }
  return list;
}

}  // namespace

PyObject* ring_layout_of(PyObject*, PyObject* arguments) {
  RingShape shape{};
  if (!PyArg_ParseTuple(arguments, "iiiiiii:ring_layout", &shape.num_kv_heads, &shape.group_size, &shape.head_dim,
                        &shape.entries, &shape.anchors, &shape.itemsize, &shape.head_dim_v)) {
    return nullptr;
  }
  const RingLayout l = ring_layout(shape);
  const int64_t H = shape.num_kv_heads, G = shape.group_size, D = shape.head_dim, M = shape.entries;
  const int64_t S = shape.anchors, R = l.record_bytes, itemsize = shape.itemsize, V = shape.head_dim_v;
  PyObject* parts = PyDict_New();
  const auto add = [&](const char* name, const char* type, int64_t at, const Sizes& sizes, const Sizes& strides) {
    PyObject* part = Py_BuildValue("LsNN", static_cast<long long>(at), type, to_python(sizes), to_python(strides));
    if (parts && (!part || PyDict_SetItemString(parts, name, part))) Py_CLEAR(parts);
    Py_XDECREF(part);
  };
  add("slot_end", "int32", l.end, {}, {});
  add("slot_reach", "int32", l.reach, {}, {});
  add("slot_request", "int64", l.request, {}, {});
  add("counters", "int64", l.counters, {kNumCounters}, {8});
  add("ring_stored", "int32", l.stored, {H}, {4});
  add("ring_tau", "float32", l.tau, {H}, {4});
  add("ring_spread", "float32", l.spread, {H}, {4});
  add("ring_missed", "int32", l.missed, {H}, {4});
  add("ring_last_lse", "float32", l.last_lse, {H, G}, {G * 4, 4});
  add("ring_position", "int32", l.position, {H, M}, {M * 4, 4});
  add("ring_depth", "int32", l.depth, {H, M, G}, {M * G * 4, G * 4, 4});
  const int64_t row = D * itemsize;
  add("ring_query", "T", l.query, {H, M, G, D}, {M * G * row, G * row, row, itemsize});
  add("ring_out", "float32", l.record + l.out, {H, M, G, V}, {M * R, R, V * 4, 4});
  add("ring_lse", "float32", l.record + l.lse, {H, M, G}, {M * R, R, 4});
  add("ring_rotated", "T", l.record + l.rotated, {H, M, S > 0 ? G : 0, D}, {M * R, R, row, itemsize});
  add("ring_anchors", "int32", l.record + l.anchors, {H, M, S}, {M * R, R, 4});
  add("ring_anchor_weights", "float32", l.record + l.anchor_weights, {H, M, S}, {M * R, R, 4});
  return Py_BuildValue("NL", parts, static_cast<long long>(l.slot_bytes));
}

PyObject* build_info(PyObject*, PyObject*) {
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
#ifdef __clang__
  const char* compiler = __VERSION__;
#else
  const char* compiler = "GCC " __VERSION__;
#endif
  const char* simd = nullptr;
  try {
    simd = cpu::best_kernels().name;
  } catch (const std::invalid_argument& error) {  // MAC_ATTN_SIMD names no level
    PyErr_SetString(PyExc_ValueError, error.what());
    return nullptr;
  }
  return Py_BuildValue("{s:s, s:N, s:s, s:i, s:s}", "version", MAC_ATTN_VERSION, "cuda_arches", to_python(arches),
                       "simd", simd, "threads", at::get_num_threads(), "compiler", compiler);
}

}  // namespace mac_attn

// mac_attn/_extension.py looks for this in the file before it is opened. Exported, as else it is in nobody's way.
extern "C" [[gnu::visibility("default")]] const char mac_attn_built_for[] =
    "mac_attn is built for torch " MAC_ATTN_TORCH "\n";
