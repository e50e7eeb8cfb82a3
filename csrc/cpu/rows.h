// Where the K and V rows of a block of tokens lie, and fetching them ahead of their use.

constexpr int kBlock = kAmendBlock;

template <typename T>
constexpr int kLineElements = 64 / static_cast<int>(sizeof(T));  // of a cache line

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

// What one KV head's query heads read of a block, and what they fetch meanwhile.
template <typename T>
struct Rows {
  const T* k;  // the KV head's first rows
  const T* v;
  const int64_t* k_at;  // [count] see Block
  const int64_t* v_at;
  const T* const* next_k;  // [count] rows to fetch into the cache, one for every row that is read
  const T* const* next_v;
  int count;
};

// The K or V rows of a block, of some KV heads, in the order in which they lie in memory: token by token where a
// token's heads are neighbours (NHD), else head by head. A block is computed head by head, in strides that the
// hardware prefetcher does not follow; so the next one's rows are asked for meanwhile, in this order.
template <typename T>
class RowOrder {
 public:
  RowOrder() = default;
  RowOrder(const void* rows, const int64_t* at, int count, int64_t head_stride, int64_t token_stride,
           const int32_t* heads, int num_heads)
      : rows_(static_cast<const T*>(rows)),
        at_(at),
        heads_(heads),
        head_stride_(head_stride),
        count_(count),
        num_heads_(num_heads),
        left_(count * num_heads),
        by_token_(head_stride < token_stride) {}

  // The next `count` rows; when there are none left, `spare`.
  void take(int count, const T* spare, const T** rows) {
    int i = 0;
    for (; i < count && left_ > 0; ++i, --left_) {
      rows[i] = rows_ + heads_[head_] * head_stride_ + at_[token_];
      if (by_token_) {
        if (++head_ == num_heads_) head_ = 0, ++token_;
      } else {
        if (++token_ == count_) token_ = 0, ++head_;
      }
    }
    for (; i < count; ++i) rows[i] = spare;
  }

  void fetch_rest(int head_dim) {
    const T* row;
    while (left_ > 0) {
      take(1, nullptr, &row);
      for (int d = 0; d < head_dim; d += kLineElements<T>) prefetch(row + d);
    }
  }

 private:
  const T* rows_ = nullptr;
  const int64_t* at_ = nullptr;
  const int32_t* heads_ = nullptr;
  int64_t head_stride_ = 0;
  int count_ = 0, num_heads_ = 0, left_ = 0;
  bool by_token_ = false;
  int head_ = 0, token_ = 0;
};

template <typename T>
RowOrder<T> k_order(const AmendParams& p, const Block& block, const int32_t* heads, int num_heads) {
  return {p.kv.k, block.k, block.count, p.kv.k_head_stride, p.kv.k_token_stride, heads, num_heads};
}
template <typename T>
RowOrder<T> v_order(const AmendParams& p, const Block& block, const int32_t* heads, int num_heads) {
  return {p.kv.v, block.v, block.count, p.kv.v_head_stride, p.kv.v_token_stride, heads, num_heads};
}

// The V row of one token.
template <typename T>
MAC_INLINE const T* token_value(const AmendParams& p, int request, int kv_head, int32_t token) {
  const int64_t page = p.kv.block_table[request * p.kv.block_table_stride + token / p.kv.page_size];
  return static_cast<const T*>(p.kv.v) + page * p.kv.v_page_stride + token % p.kv.page_size * p.kv.v_token_stride +
         kv_head * p.kv.v_head_stride;
}
