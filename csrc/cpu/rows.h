// Where the K and V rows of a block of tokens lie, and fetching them ahead of their use.

constexpr int kBlock = kAmendBlock;

// Up to kBlock tokens, as distances in elements from the first row of a KV head. The places past `count`
// repeat the last one, so that dots are computed four at a time; their logits are not used.
struct Block {
  int64_t k[kBlock + 3];
  int64_t v[kBlock + 3];
  int count;
};

MAC_INLINE void pad_block(Block& block) {
  for (int i = block.count; i < kBlock + 3; ++i) {
    block.k[i] = block.k[block.count - 1];
    block.v[i] = block.v[block.count - 1];
  }
}

// The tokens [first, end), as many as fit.
inline void find_tokens(const AmendParams& p, int request, int first, int end, Block& block) {
  const int32_t* pages = p.kv.block_table + request * p.kv.block_table_stride;
  block.count = std::max(0, std::min(kBlock, end - first));
  if (block.count == 0) return;
  int page = first / p.kv.page_size, offset = first % p.kv.page_size;
  for (int i = 0; i < block.count; ++i) {
    block.k[i] = pages[page] * p.kv.k_page_stride + offset * p.kv.k_token_stride;
    block.v[i] = pages[page] * p.kv.v_page_stride + offset * p.kv.v_token_stride;
    if (++offset == p.kv.page_size) ++page, offset = 0;
  }
  pad_block(block);
}

// Tokens from a list, as many as fit.
inline void find_listed(const AmendParams& p, int request, const int32_t* tokens, int count, Block& block) {
  const int32_t* pages = p.kv.block_table + request * p.kv.block_table_stride;
  block.count = std::max(0, std::min(kBlock, count));
  if (block.count == 0) return;
  for (int i = 0; i < block.count; ++i) {
    const int64_t page = pages[tokens[i] / p.kv.page_size];
    const int64_t offset = tokens[i] % p.kv.page_size;
    block.k[i] = page * p.kv.k_page_stride + offset * p.kv.k_token_stride;
    block.v[i] = page * p.kv.v_page_stride + offset * p.kv.v_token_stride;
  }
  pad_block(block);
}

// The rows of one KV head of a block.
template <typename T>
struct Rows {
  const T* k;  // the KV head's first row
  const T* v;
  const int64_t* k_at;  // [count] see Block
  const int64_t* v_at;
  int count;

  Rows from(int place, int how_many) const { return {k, v, k_at + place, v_at + place, how_many}; }
};

template <typename T>
MAC_INLINE Rows<T> head_rows(const AmendParams& p, const Block& block, int kv_head) {
  return {static_cast<const T*>(p.kv.k) + kv_head * p.kv.k_head_stride,
          static_cast<const T*>(p.kv.v) + kv_head * p.kv.v_head_stride, block.k, block.v, block.count};
}

// The V row of one token.
template <typename T>
MAC_INLINE const T* token_value(const AmendParams& p, int request, int kv_head, int32_t token) {
  const int64_t page = p.kv.block_table[request * p.kv.block_table_stride + token / p.kv.page_size];
  return static_cast<const T*>(p.kv.v) + page * p.kv.v_page_stride + token % p.kv.page_size * p.kv.v_token_stride +
         kv_head * p.kv.v_head_stride;
}
