// What Python asks about the extension itself.
#pragma once

#include <Python.h>

namespace mac_attn {

// Where the parts of a slot lie, for the views that Python has of them: name -> (bytes from the slot's beginning,
// type, sizes, strides in bytes), and the bytes of a slot. Type "T" is the queries'. Arguments: num_kv_heads,
// group_size, head_dim, entries, anchors, itemsize, head_dim_v.
PyObject* ring_layout_of(PyObject*, PyObject* arguments);

// Version, CUDA architectures, SIMD level, threads, compiler.
PyObject* build_info(PyObject*, PyObject*);

}  // namespace mac_attn
