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

// A block's K and V rows, fetched into the L2 cache in the order in which they lie in memory, before they are
// computed: page by page, of every token the rows of all KV heads that need them. The rows of one KV head alone lie
// apart; in that order memory gives half of its bandwidth, unless a hardware prefetcher foresees the next token,
// and where pages lie in any order none does.
class Stream {
 public:
  // The first `num_heads` KV heads of `order`; `first_token` is the block's.
  template <typename T>
  void add(const AmendParams& p, const Block& block, int first_token, const int32_t* order, int num_heads) {
    const KVPages& kv = p.kv;
    for (int i = 0; i < block.count;) {
      const int left = kv.page_size - (first_token + i) % kv.page_size, count = std::min(left, block.count - i);
      add_page(static_cast<const T*>(kv.k), block.k + i, count, kv.k_token_stride, kv.k_head_stride, order,
               num_heads, p.shape.head_dim);
      add_page(static_cast<const T*>(kv.v), block.v + i, count, kv.v_token_stride, kv.v_head_stride, order,
               num_heads, p.shape.head_dim_v);
      i += count;
    }
    begin();
  }
  // One KV head's rows of tokens from anywhere.
  template <typename T>
  void add_listed(const AmendParams& p, const Block& block, int kv_head) {
    const T* k = static_cast<const T*>(p.kv.k) + kv_head * p.kv.k_head_stride;
    const T* v = static_cast<const T*>(p.kv.v) + kv_head * p.kv.v_head_stride;
    for (int i = 0; i < block.count; ++i) {
      add_run(k + block.k[i], k + block.k[i] + p.shape.head_dim);
      add_run(v + block.v[i], v + block.v[i] + p.shape.head_dim_v);
    }
    begin();
  }

  template <int kLines>
  MAC_INLINE void fetch() {
    for (int i = 0; i < kLines; ++i) __builtin_prefetch(at_ + 64 * i, 0, 2);
    at_ += 64 * kLines;
    if (at_ < end_) return;
    // At the end the last lines stay, again and again: what lies in a cache costs nothing.
    if (next_ < num_runs_)
      at_ = runs_[next_].begin, end_ = runs_[next_++].end;
    else
      at_ -= 64 * kLines;
  }

 private:
  void begin() {
    if (num_runs_ > 0) at_ = runs_[0].begin, end_ = runs_[0].end, next_ = 1;
  }
  template <typename T>
  void add_page(const T* base, const int64_t* places, int count, int64_t token_stride, int64_t head_stride,
                const int32_t* order, int num_heads, int64_t head_dim) {
    for (int j = 0; j < num_heads;) {
      const T* row = base + order[j++] * head_stride;
      int64_t size = head_dim;
      for (; j < num_heads && head_stride == head_dim && order[j] == order[j - 1] + 1; ++j) size += head_dim;
      if (size == token_stride) {
        add_run(row + places[0], row + places[0] + count * size);
      } else {
        for (int t = 0; t < count; ++t) add_run(row + places[t], row + places[t] + size);
      }
    }
  }
  void add_run(const void* begin, const void* end) {
    if (num_runs_ > 0 && runs_[num_runs_ - 1].end == begin) {
      runs_[num_runs_ - 1].end = static_cast<const char*>(end);
    } else if (num_runs_ < kMaxRuns) {  // more are left to what fetches the rows of one KV head
      runs_[num_runs_++] = {static_cast<const char*>(begin), static_cast<const char*>(end)};
    }
  }

  struct Run {
    const char* begin;
    const char* end;
  };
  static constexpr int kMaxRuns = 8 * kBlock;
  const char* at_ = reinterpret_cast<const char*>(runs_);  // without rows, itself
  const char* end_ = at_;
  int next_ = 0;
  int num_runs_ = 0;
  Run runs_[kMaxRuns];
};
