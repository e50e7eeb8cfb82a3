// Checks of arguments, before anything is read or written. Each message names the argument, what it
// was and what it must be. Wrong values and shapes raise ValueError, wrong dtypes TypeError.
#pragma once

#include <ATen/MemoryOverlap.h>
#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <numeric>
#include <vector>

#include "params.h"

namespace mac_attn {

constexpr int64_t kAny = -1;                      // in an expected shape: this size is free
constexpr int64_t kHeadDimStep = 8;               // elements; 16 bytes of the smallest queries, a vector of AVX2
constexpr int64_t kMaxHeadDim = 256;              // of them all
constexpr int64_t kWideHeadDim = 512;             // and one more
constexpr int64_t kMaxTokens = INT32_MAX - 4096;  // of a request: loops count in int32 and look a block ahead

// A tensor argument of a given shape, dtype and device whose last dimension is contiguous.
inline void check_tensor(const at::Tensor& t, const char* name, at::IntArrayRef shape, at::ScalarType dtype,
                         at::Device device) {
  bool fits = t.dim() == static_cast<int64_t>(shape.size());
  for (size_t i = 0; fits && i < shape.size(); ++i) fits = shape[i] == kAny || t.size(i) == shape[i];
  TORCH_CHECK_VALUE(fits, name, " has shape ", t.sizes(), ", must be ", shape, " (-1: any size)");
  TORCH_CHECK_TYPE(t.scalar_type() == dtype, name, " is ", t.scalar_type(), ", must be ", dtype);
  TORCH_CHECK_VALUE(t.device() == device, name, " is on ", t.device(), ", must be on ", device);
  TORCH_CHECK_VALUE(t.dim() == 0 || t.size(-1) <= 1 || t.stride(-1) == 1, name, " has stride ",
                    t.dim() ? t.stride(-1) : 1, " in its last dimension, must be 1");
}

// One that the kernels index as a plain array.
inline void check_array(const at::Tensor& t, const char* name, at::IntArrayRef shape, at::ScalarType dtype,
                        at::Device device) {
  check_tensor(t, name, shape, dtype, device);
  TORCH_CHECK_VALUE(t.is_contiguous(), name, " has strides ", t.strides(), ", must be contiguous");
}

// A tensor [.., D] that is written: by several threads at once, so no two rows may share memory.
inline void check_rows_apart(const at::Tensor& t, const char* name) {
  if (t.numel() == 0) return;
  int64_t inner = t.size(-1);  // elements that one step of a larger stride has to pass
  std::vector<int64_t> dims(t.dim() - 1);
  std::iota(dims.begin(), dims.end(), 0);
  std::sort(dims.begin(), dims.end(), [&](int64_t a, int64_t b) { return t.stride(a) < t.stride(b); });
  for (const int64_t dim : dims) {
    if (t.size(dim) == 1) continue;
    TORCH_CHECK_VALUE(t.stride(dim) >= inner, name, " has strides ", t.strides(), " for shape ", t.sizes(),
                      ", must not overlap itself");
    inner += (t.size(dim) - 1) * t.stride(dim);
  }
}

// `read` is needed after `written` has been written.
inline void check_apart(const at::Tensor& written, const char* name, const at::Tensor& read,
                        const char* read_name) {
  const auto overlap = at::get_overlap_status(written, read);
  const auto end = [](const at::Tensor& t) {
    int64_t last = 0;
    for (int64_t dim = 0; dim < t.dim(); ++dim) last += (t.size(dim) - 1) * t.stride(dim);
    return static_cast<const char*>(t.const_data_ptr()) + (last + 1) * t.element_size();
  };
  const bool apart = overlap == at::MemOverlapStatus::No || written.numel() == 0 || read.numel() == 0 ||
                     end(written) <= read.const_data_ptr() || end(read) <= written.const_data_ptr();
  TORCH_CHECK_VALUE(apart, name, " shares memory with ", read_name, ", must not where entries are stored");
}

// Sizes with another last one.
inline at::DimVector with_last(at::IntArrayRef sizes, int64_t last) {
  at::DimVector changed(sizes);
  if (!changed.empty()) changed.back() = last;
  return changed;
}

// Elements of a row of queries and keys, or of values, that there are kernels for.
constexpr bool is_head_dim(int64_t size) {
  return size > 0 && size % kHeadDimStep == 0 && (size <= kMaxHeadDim || size == kWideHeadDim);
}

// Rows of values, and so those of outputs: `name` has them.
inline void check_head_dim_v(int64_t head_dim_v, int64_t head_dim, const char* name) {
  TORCH_CHECK_VALUE(is_head_dim(head_dim_v) && head_dim_v <= head_dim, name, " has head_dim_v ", head_dim_v,
                    ", must be a multiple of ", kHeadDimStep, " up to ", kMaxHeadDim, ", or ", kWideHeadDim,
                    ", and no more than head_dim, ", head_dim);
}

// A tensor that defines the call's dtype and head_dim: [B, Hq, D] or, of several tokens, [B, T, Hq, D].
inline void check_query(const at::Tensor& t, const char* name) {
  TORCH_CHECK_VALUE(t.dim() == 3 || t.dim() == 4, name, " has shape ", t.sizes(),
                    ", must be [batch, num_qo_heads, head_dim] or [batch, tokens, num_qo_heads, head_dim]");
  TORCH_CHECK_VALUE(t.dim() == 3 || (t.size(1) >= 1 && t.size(1) <= kMaxQueryTokens), name, " has ", t.size(1),
                    " tokens, must have from 1 to ", kMaxQueryTokens);
  TORCH_CHECK_TYPE(
      t.scalar_type() == at::kFloat || t.scalar_type() == at::kBFloat16 || t.scalar_type() == at::kHalf, name,
      " is ", t.scalar_type(), ", must be float32, bfloat16 or float16");
  const int64_t head_dim = t.size(-1);
  TORCH_CHECK_VALUE(is_head_dim(head_dim), name, " has head_dim ", head_dim, ", must be a multiple of ",
                    kHeadDimStep, " up to ", kMaxHeadDim, ", or ", kWideHeadDim);
  check_tensor(t, name, t.sizes(), t.scalar_type(), t.device());
}

// GQA and MQA: `num_qo_heads` is a multiple of `num_kv_heads`.
inline Shape make_shape(const at::Tensor& query, int64_t num_kv_heads) {
  const int64_t num_qo_heads = query.size(-2), tokens = query.dim() == 4 ? query.size(1) : 1;
  TORCH_CHECK_VALUE(num_kv_heads > 0 && num_qo_heads > 0 && num_qo_heads % num_kv_heads == 0, "num_qo_heads is ",
                    num_qo_heads, ", must be a positive multiple of num_kv_heads = ", num_kv_heads);
  TORCH_CHECK_VALUE(query.size(0) * tokens * num_qo_heads <= INT32_MAX, "batch * tokens * num_qo_heads is ",
                    query.size(0) * tokens * num_qo_heads, ", must be below 2^31");
  return {static_cast<int32_t>(query.size(0)), static_cast<int32_t>(num_kv_heads),
          static_cast<int32_t>(num_qo_heads / num_kv_heads), static_cast<int32_t>(query.size(-1)),
          static_cast<int32_t>(tokens)};
}

inline DType dtype_of(const at::Tensor& t) {
  switch (t.scalar_type()) {
    case at::kBFloat16: return DType::kBFloat16;
    case at::kHalf: return DType::kFloat16;
    default: return DType::kFloat32;
  }
}

inline int32_t check_int32(int64_t value, const char* name, int64_t low) {
  TORCH_CHECK_VALUE(value >= low && value <= INT32_MAX, name, " is ", value, ", must be from ", low, " to ",
                    INT32_MAX);
  return static_cast<int32_t>(value);
}

// The checks below read values, so they are for tensors that lie on the host.

inline void check_seq_lens(const Shape& shape, const Requests& requests, int64_t longest) {
  for (int32_t b = 0; b < shape.batch; ++b) {
    const int32_t n = requests.seq_lens[b];
    TORCH_CHECK_VALUE(n >= 0 && n <= longest, "seq_lens[", b, "] is ", n, ", must be from 0 to ", longest,
                      " (max_pages * page_size)");
    if (n == 0) continue;
    const int32_t tokens = query_len(shape, requests, b);
    TORCH_CHECK_VALUE(tokens >= 1 && tokens <= shape.tokens, "query_lens[", b, "] is ", tokens,
                      ", must be from 1 to ", shape.tokens);
    TORCH_CHECK_VALUE(tokens <= n, "seq_lens[", b, "] is ", n, ", must be 0 or at least the query tokens, ",
                      tokens);
  }
}

// Every slot in range or kNoSlot, none twice; padding rows have none.
inline void check_slots(const Shape& shape, const Requests& requests, int32_t num_slots) {
  std::vector<int32_t> row_of(num_slots, -1);
  for (int32_t b = 0; b < shape.batch; ++b) {
    if (requests.seq_lens[b] == 0) continue;
    const int32_t slot = requests.slots[b];
    if (slot == kNoSlot) continue;
    TORCH_CHECK_VALUE(slot >= 0 && slot < num_slots, "slots[", b, "] is ", slot, ", must be from 0 to ",
                      num_slots - 1, ", or -1 for none");
    TORCH_CHECK_VALUE(row_of[slot] < 0, "slots[", b, "] is ", slot, ", which slots[", row_of[slot],
                      "] has too; every request needs its own");
    row_of[slot] = b;
    const int64_t id = requests.request_ids ? requests.request_ids[b] : 0;
    TORCH_CHECK_VALUE(id >= 0, "request_ids[", b, "] is ", id, ", must not be negative");
  }
}

// Every source is kMiss or a position before this one whose entry has old tokens, and lies at its place in the
// ring; that of a request without a ring is kMiss.
inline void check_matched(const Shape& shape, const Requests& requests, const Matched& matched, const Ring& ring,
                          int32_t band) {
  const RingShape& sizes = ring.layout.shape;
  for (int64_t group = 0; group < int64_t{shape.batch} * shape.num_kv_heads; ++group) {
    const int64_t b = group / shape.num_kv_heads, kv_head = group % shape.num_kv_heads;
    if (requests.seq_lens[b] == 0) continue;
    const int32_t position = first_position(shape, requests, b), tokens = query_len(shape, requests, b);
    const int32_t stored = matched.stored[group];
    TORCH_CHECK_VALUE(stored >= kNoHistory && stored < 2 * int64_t{sizes.entries}, "stored[", b, ", ", kv_head,
                      "] is ", stored, ", must be from -1 to ", 2 * int64_t{sizes.entries} - 1);
    const int64_t rows = shape.group_queries();
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t row = group * rows + i, head = row - b * shape.num_queries();
      const int64_t token = i / shape.group_size, g = i % shape.group_size;
      const int32_t source = matched.source[row], place = matched.place[row];
      const int64_t first = row - g;
      TORCH_CHECK_VALUE(sizes.anchors == 0 || (source == matched.source[first] && place == matched.place[first]),
                        "source[", b, ", ", head, "] is ", source, " at place ", place,
                        ", must be the same for all query heads of a KV head with anchors");
      const bool hits = token < tokens && matched.source[group * rows + g] != kMiss;
      TORCH_CHECK_VALUE(hits == (source != kMiss), "source[", b, ", ", head, "] is ", source, ", must ",
                        hits ? "not be -1, as a head hits with all tokens or none"
                             : "be -1, as of another token or one that is not there");
      if (source == kMiss) continue;
      TORCH_CHECK_VALUE(has_ring(requests, b), "source[", b, ", ", head, "] is ", source, ", must be -1, as slots[",
                        b, "] is -1");
      TORCH_CHECK_VALUE(source >= band && source < position, "source[", b, ", ", head, "] is ", source,
                        ", must be -1 or from ", band, " to ", position - 1);
      TORCH_CHECK_VALUE(place >= 0 && place < sizes.entries, "place[", b, ", ", head, "] is ", place,
                        ", must be from 0 to ", sizes.entries - 1);
      const int32_t tag = *ring.position(requests.slots[b], static_cast<int>(kv_head), place);
      TORCH_CHECK_VALUE(tag == source, "source[", b, ", ", head, "] is ", source, ", but its place in the ring, ",
                        place, ", holds position ", tag);
    }
  }
}

// Positive numbers.
inline void check_scale(const Scale& scale, const char* name, int32_t num_kv_heads) {
  for (int32_t h = 0; scale.data && h < (scale.stride ? num_kv_heads : 1); ++h) {
    const float x = scale.data[h];
    TORCH_CHECK_VALUE(std::isfinite(x) && x > 0.f, name, "[", h, "] is ", x, ", must be finite and above 0");
  }
}

// From 0 to `end` - 1.
inline bool is_below(int32_t value, int64_t end) {
  return static_cast<uint32_t>(value) < static_cast<uint32_t>(end);
}

// As many as the block table has room for.
inline int64_t max_tokens(const KVPages& kv) {
  return int64_t{kv.max_pages} * kv.page_size;
}

// Whether the pages of the tokens from `first_token` to `last_token` lie inside the cache.
inline bool has_pages(const KVPages& kv, int32_t request, int32_t first_token, int32_t last_token) {
  const int32_t* pages = kv.block_table + request * kv.block_table_stride;
  const int32_t last = last_token / kv.page_size;
  bool fits = true;  // looked at in the end, so that it takes vectors
  for (int32_t i = first_token / kv.page_size; i <= last; ++i) fits &= is_below(pages[i], kv.num_pages);
  return fits;
}

// The pages that are read, and only those, lie inside the cache.
inline void check_pages(const KVPages& kv, int32_t request, int32_t first_token, int32_t last_token) {
  if (has_pages(kv, request, first_token, last_token)) return;
  const int32_t* pages = kv.block_table + request * kv.block_table_stride;
  for (int32_t i = first_token / kv.page_size; i <= last_token / kv.page_size; ++i) {
    TORCH_CHECK_VALUE(pages[i] >= 0 && pages[i] < kv.num_pages, "block_table[", request, ", ", i, "] is ", pages[i],
                      ", must be from 0 to ", kv.num_pages - 1);
  }
}

}  // namespace mac_attn
