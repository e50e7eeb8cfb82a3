// Where the K and V rows of a block of tokens lie, read in place from the pages.

constexpr int kBlock = 16;  // tokens whose logits are in flight together

// The rows of up to kBlock tokens. Places past `count` repeat the last row, so that dots are computed
// four at a time; their logits are not used.
template <typename T>
struct Rows {
  const T* k[kBlock];
  const T* v[kBlock];
  int count;
};

template <typename T>
MAC_INLINE void find_rows(const AmendParams& p, const AmendTask& task, const int32_t* anchors, int first,
                          Rows<T>& rows) {
  const int kv_head = task.group % p.shape.num_kv_heads;
  const int request = task.group / p.shape.num_kv_heads;
  const int32_t* pages = p.kv.block_table + request * p.kv.block_table_stride;
  const T* k = static_cast<const T*>(p.kv.k) + kv_head * p.kv.k_head_stride;
  const T* v = static_cast<const T*>(p.kv.v) + kv_head * p.kv.v_head_stride;
  rows.count = std::max(0, std::min(kBlock, task.end - first));
  if (rows.count == 0) return;
  for (int i = 0; i < rows.count; ++i) {
    const int32_t token = anchors ? anchors[first + i] : first + i;
    const int64_t page = pages[token / p.kv.page_size];
    const int64_t offset = token % p.kv.page_size;
    rows.k[i] = k + page * p.kv.k_page_stride + offset * p.kv.k_token_stride;
    rows.v[i] = v + page * p.kv.v_page_stride + offset * p.kv.v_token_stride;
  }
  for (int i = rows.count; i < kBlock; ++i) {
    rows.k[i] = rows.k[rows.count - 1];
    rows.v[i] = rows.v[rows.count - 1];
  }
}

// The V row of one token.
template <typename T>
MAC_INLINE const T* token_value(const AmendParams& p, const AmendTask& task, int32_t token) {
  const int kv_head = task.group % p.shape.num_kv_heads;
  const int request = task.group / p.shape.num_kv_heads;
  const int64_t page = p.kv.block_table[request * p.kv.block_table_stride + token / p.kv.page_size];
  return static_cast<const T*>(p.kv.v) + page * p.kv.v_page_stride + token % p.kv.page_size * p.kv.v_token_stride +
         kv_head * p.kv.v_head_stride;
}
