// The CPU kernels, one table per instruction set, and the work they share out among threads.
//
// A kernel is entered by every thread of a team with the same arguments; the threads draw work from
// the shared counters until none is left. So the kernels need no thread library of their own, and
// one request still keeps every core busy.
#pragma once

#include <atomic>
#include <cstdint>
#include <cstring>
#include <memory>
#include <vector>

#include "../params.h"

#define MAC_ALWAYS_INLINE __attribute__((always_inline))

namespace mac_attn::cpu {

// A candidate as one number, the smaller the better: the bits of its total (they are ordered like a
// number that is not negative), then its age, so that the newest wins a tie.
inline uint64_t match_key(float total, int32_t age) {
  uint32_t bits;
  std::memcpy(&bits, &total, sizeof bits);
  return static_cast<uint64_t>(bits) << 32 | static_cast<uint32_t>(age);
}
inline float match_total(uint64_t key) {
  const uint32_t bits = static_cast<uint32_t>(key >> 32);
  float total;
  std::memcpy(&total, &bits, sizeof total);
  return total;
}

struct MatchWork {
  MatchWork(const MatchParams& params, int num_threads);

  int32_t chunk;             // candidates per task
  int32_t chunks_per_group;  // tasks of one (request, KV head)
  int64_t num_tasks;
  int32_t decisions_per_group;
  std::atomic<int64_t> next{0};
  // [B, H, decisions_per_group] smallest key; it starts at (the total that is no hit any more, age 0),
  // which no candidate equals, as ages begin with 1.
  std::unique_ptr<std::atomic<uint64_t>[]> best;

  void write_source(const MatchParams& params) const;
};

// A piece of one request's tokens, attended by all of its KV heads that start before the end of it.
struct AmendTask {
  int32_t request;
  Span span;
  int32_t begin, end;  // token positions, or, of anchors, KV heads
  bool anchors;        // the tokens are the inherited anchors of the KV heads [begin, end)
  int64_t partial;     // where the partial states go
};

struct AmendGroup {
  const int32_t* inherited = nullptr;  // anchors of the matched entry
  int32_t num_inherited = 0;
  int64_t logits = -1;  // where its OldLogits are kept for choosing anchors, -1: they are not
  int64_t totals = -1;
};

constexpr int32_t kAmendBlock = 32;  // tokens whose logits are in flight together

// The logits of the old tokens of one KV head that misses and, of every block of them, what its softmax was:
// sum = sum of exp(logit - base) over the block. Ends are padded with logits of -inf and sums of 0. What a block
// writes lies together, so that it touches few pages of memory.
struct OldLogits {
  enum Total { kMax, kBase, kSum, kNumTotals };
  static constexpr int32_t kTile = 16;  // blocks whose totals lie side by side: the widest vector
  static constexpr int32_t kHeadTotals = kNumTotals * kTile;

  float* logits;  // [blocks, G, kAmendBlock]
  float* totals;  // [blocks / kTile, G, kNumTotals, kTile]
  int32_t group_size;
  int32_t num_blocks;
  int32_t num_padded;  // whole tiles

  // All inlined, as files compiled for several instruction sets share this header.
  MAC_ALWAYS_INLINE OldLogits(float* logits, float* totals, int32_t group_size, int32_t num_tokens)
      : logits(logits),
        totals(totals),
        group_size(group_size),
        num_blocks((num_tokens + kAmendBlock - 1) / kAmendBlock),
        num_padded((num_blocks + kTile - 1) / kTile * kTile) {}
  MAC_ALWAYS_INLINE int64_t num_logits() const { return int64_t{group_size} * num_blocks * kAmendBlock; }
  MAC_ALWAYS_INLINE int64_t num_totals() const { return int64_t{group_size} * num_padded * kNumTotals; }
  MAC_ALWAYS_INLINE float* block(int g, int32_t i) const {
    return logits + (int64_t{i} * group_size + g) * kAmendBlock;
  }
  MAC_ALWAYS_INLINE float* total(int g, Total which, int32_t i) const {
    return totals + (int64_t{i} / kTile * group_size + g) * kHeadTotals + which * kTile + i % kTile;
  }
};

struct AmendWork {
  AmendWork(const AmendParams& params, int num_threads);

  // Heads in the order of their first tokens, so that those that attend to a token come first.
  std::vector<int32_t> kv_heads;  // [B, H]
  std::vector<int32_t> qo_heads;  // [B, H, G] within each KV head, all its query heads
  std::vector<int32_t> starts;    // [B, H, G] their first tokens, in that order

  std::vector<AmendTask> tasks;
  int64_t num_drawn_early;         // while a thread does one of the first tasks, it has drawn its next one already
  std::vector<AmendGroup> groups;  // [B, H]
  std::vector<int64_t> first_partial;               // [B + 1]
  std::vector<Span> partial_span;                   // [P]
  std::unique_ptr<std::atomic<int32_t>[]> pending;  // [B] tasks not done yet
  // These are kept for the thread's next call: fresh memory costs more than what is written to it here.
  float* partial_out;  // [P, Hq, D] sum of exp(logit - max) * value
  float* partial_max;  // [P, Hq]
  float* partial_sum;  // [P, Hq] sum of exp(logit - max); 0: the head has no part, and no `out`
  float* logits;
  bool
      logits_cached;  // they are few enough to stay in the caches from one call to the next; else written past them
  float* block_totals;
  std::atomic<int64_t> next{0};
  std::atomic<int64_t> next_finish{0};  // of `groups`

 private:
  void cut_request(const AmendParams& params, int request, int64_t target);
};

struct CompleteWork {
  explicit CompleteWork(const CompleteParams& params);
  int64_t num_tasks;
  std::atomic<int64_t> next{0};
};

struct Kernels {
  const char* name;
  void (*match)(const MatchParams&, MatchWork&);
  void (*amend)(const AmendParams&, AmendWork&);
  void (*complete)(const CompleteParams&, CompleteWork&);
};

// The best table this machine can run; the environment variable MAC_ATTN_SIMD (generic, avx2, avx512,
// avx512_bf16) asks for a lesser one, so that all of them can be tested on one machine. Throws
// std::invalid_argument if it has another value.
const Kernels& kernels();

namespace generic {
extern const Kernels table;
}
namespace avx2 {
extern const Kernels table;
}
namespace avx512 {
extern const Kernels table;
}
namespace avx512_bf16 {
extern const Kernels table;
}

}  // namespace mac_attn::cpu
