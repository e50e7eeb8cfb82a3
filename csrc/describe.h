// What Python asks about the extension itself.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>

namespace mac_attn {

// Where the parts of a slot lie, for the views that Python has of them: name -> (bytes from the slot's beginning,
// type, sizes, strides in bytes), and the bytes of a slot. Type "T" is the queries'.
pybind11::tuple describe_ring(int32_t num_kv_heads, int32_t group_size, int32_t head_dim, int32_t entries,
                              int32_t anchors, int32_t itemsize, int32_t head_dim_v);

// Version, CUDA architectures, SIMD level, threads, compiler.
pybind11::dict build_info();

}  // namespace mac_attn
