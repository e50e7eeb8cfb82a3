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
  for (int i = block.count; i < (block.count + 3) / 4 * 4 + 3 && i < kBlock + 3; ++i) {
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

// Fetches a block's rows of some KV heads into the L2 cache, a few at a time, in the order in which they
// lie in memory: token by token where a token's heads are neighbours (NHD), else head by head. The hardware
// prefetcher would follow neither that well: what is computed goes through the heads one after another.
template <typename T>
class Ahead {
 public:
  Ahead(const AmendParams& p, const Block& block, const int32_t* heads, int num_heads)
      : p_(p),
        block_(block),
        heads_(heads),
        num_heads_(num_heads),
        by_token_(p.kv.k_head_stride < p.kv.k_token_stride),
        left_(block.count * num_heads) {}

  MAC_INLINE void fetch(int rows) {
    const int row_bytes = p_.shape.head_dim * static_cast<int>(sizeof(T));
    for (; rows > 0 && left_ > 0; --rows, --left_) {
      const int64_t head = heads_[head_];
      const char* k = reinterpret_cast<const char*>(static_cast<const T*>(p_.kv.k) + head * p_.kv.k_head_stride +
                                                    block_.k[token_]);
      const char* v = reinterpret_cast<const char*>(static_cast<const T*>(p_.kv.v) + head * p_.kv.v_head_stride +
                                                    block_.v[token_]);
      for (int byte = 0; byte < row_bytes; byte += 64) prefetch(k + byte);
      for (int byte = 0; byte < row_bytes; byte += 64) prefetch(v + byte);
      if (by_token_) {
        if (++head_ == num_heads_) head_ = 0, ++token_;
      } else {
        if (++token_ == block_.count) token_ = 0, ++head_;
      }
    }
  }
  void fetch_all() { fetch(left_); }

 private:
  const AmendParams& p_;
  const Block& block_;
  const int32_t* heads_;
  int num_heads_;
  bool by_token_;
  int left_;
  int head_ = 0, token_ = 0;
};

// The V row of one token.
template <typename T>
MAC_INLINE const T* token_value(const AmendParams& p, int request, int kv_head, int32_t token) {
  const int64_t page = p.kv.block_table[request * p.kv.block_table_stride + token / p.kv.page_size];
  return static_cast<const T*>(p.kv.v) + page * p.kv.v_page_stride + token % p.kv.page_size * p.kv.v_token_stride +
         kv_head * p.kv.v_head_stride;
}
