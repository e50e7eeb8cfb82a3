// A paged KV cache in the forms that callers have it in, brought to the strides that the kernels read by. Here and
// not as views in Python: with cold caches those cost a tenth of a step (bench/README.md).
#pragma once

#include <optional>

#include "checks.h"

namespace mac_attn {

// Elements of a row of values, and so of the output: of a pair of caches they may be fewer than of keys.
inline int64_t head_dim_v(const at::Tensor& q, const std::optional<at::Tensor>& v) {
  return v && v->dim() > 0 ? v->size(-1) : q.dim() > 0 ? q.size(-1) : 0;
}

struct KVCache {
  const at::Tensor& k;  // without `v` both: the pair in dimension 1
  const std::optional<at::Tensor>& v;
  bool hnd;  // [.., num_kv_heads, page_size, head_dim], else [.., page_size, num_kv_heads, head_dim]
  const std::optional<at::Tensor>&k_scale, &v_scale;  // of float8 pages, else null

  const char* name() const { return v ? "k_cache" : "kv_cache"; }
  int64_t dims() const { return v ? 4 : 5; }
  int64_t token_dim() const { return dims() - (hnd ? 2 : 3); }
  int64_t head_dim() const { return dims() - (hnd ? 3 : 2); }

  int64_t num_kv_heads() const {
    TORCH_CHECK_VALUE(k.dim() == dims(), name(), " has shape ", k.sizes(), ", must be [num_pages, ", v ? "" : "2, ",
                      hnd ? "num_kv_heads, page_size" : "page_size, num_kv_heads", ", head_dim]");
    return k.size(head_dim());
  }
  // Queries of the call, where the rows of values are as long as `v` has them; `check` looks at that.
  Shape shape(const at::Tensor& q) const {
    Shape shape = make_shape(q, num_kv_heads());
    shape.head_dim_v = static_cast<int32_t>(head_dim_v(q, v));
    return shape;
  }

  KVPages check(const Shape& shape, const at::Tensor& q, const at::Tensor& block_table) const {
    at::DimVector sizes(dims(), kAny);
    sizes[head_dim()] = shape.num_kv_heads;
    sizes[dims() - 1] = shape.head_dim;
    if (!v) sizes[1] = 2;
    const at::ScalarType type = k.scalar_type();
    const bool float8 = type == at::kFloat8_e4m3fn;
    TORCH_CHECK_TYPE(float8 || type == q.scalar_type(), name(), " is ", type, ", must be ", q.scalar_type(), " or ",
                     at::kFloat8_e4m3fn);
    check_tensor(k, name(), sizes, type, q.device());
    if (v) {
      check_tensor(*v, "v_cache", with_last(k.sizes(), head_dim_v(q, v)), type, q.device());
      check_head_dim_v(v->size(-1), shape.head_dim, "v_cache");
    }
    check_tensor(block_table, "block_table", {shape.batch, kAny}, at::kInt, q.device());
    const at::Tensor& values = v ? *v : k;
    KVPages kv{};
    kv.num_pages = check_int32(k.size(0), "num_pages", 0);
    kv.max_pages = check_int32(block_table.size(1), "max_pages", 0);
    kv.page_size = check_int32(k.size(token_dim()), "page_size", 1);
    kv.k = k.const_data_ptr();
    kv.v = values.const_data_ptr();
    if (!v && k.numel() > 0) kv.v = static_cast<const char*>(kv.k) + k.stride(1) * k.element_size();
    kv.k_page_stride = k.stride(0), kv.v_page_stride = values.stride(0);
    kv.k_token_stride = k.stride(token_dim()), kv.v_token_stride = values.stride(token_dim());
    kv.k_head_stride = k.stride(head_dim()), kv.v_head_stride = values.stride(head_dim());
    kv.block_table = block_table.const_data_ptr<int32_t>();
    kv.block_table_stride = block_table.stride(0);
    kv.float8 = float8;
    kv.k_scale = check_scale(k_scale, "k_scale", shape, q.device());
    kv.v_scale = check_scale(v_scale, "v_scale", shape, q.device());
    return kv;
  }

 private:
  Scale check_scale(const std::optional<at::Tensor>& scale, const char* scale_name, const Shape& shape,
                    at::Device device) const {
    const bool float8 = k.scalar_type() == at::kFloat8_e4m3fn;
    TORCH_CHECK_VALUE(scale.has_value() == float8, scale_name, " is ", scale ? "given" : "None", ", must be ",
                      float8 ? "given" : "None", ", as ", name(), " is ", k.scalar_type());
    if (!scale) return {nullptr, 0};
    const bool one = scale->dim() == 0 || (scale->dim() == 1 && scale->size(0) == 1);
    TORCH_CHECK_VALUE(one || (scale->dim() == 1 && scale->size(0) == shape.num_kv_heads), scale_name, " has shape ",
                      scale->sizes(), ", must be [], [1] or [num_kv_heads], [", shape.num_kv_heads, "]");
    check_array(*scale, scale_name, scale->sizes(), at::kFloat, device);
    return {scale->const_data_ptr<float>(), one ? 0 : 1};
  }
};

}  // namespace mac_attn
