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
// number that is not negative), then how many entries ago it was stored, so that the youngest wins a tie.
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
  int32_t chunks_per_token;  // tasks of one (request, KV head, query token)
  int64_t num_tasks;
  int32_t decisions_per_group;
  std::atomic<int64_t> next{0};
  // [B, H, T, decisions_per_group] smallest key; it starts at (the total that is no hit any more, age 0),
  // which no candidate equals, as the youngest entry has age 1.
  std::unique_ptr<std::atomic<uint64_t>[]> best;

  void write_matched(const MatchParams& params) const;
};

// Entries that a request's slot holds of a KV head, see Matched::stored.
int32_t stored_entries(const MatchParams& params, int32_t request, int32_t kv_head);

// Where the entry of an age lies.
constexpr int32_t place_of(int32_t stored, int32_t age, int32_t entries) {
  return (stored - age) % entries;
}

// What a task's partial states are over.
enum class Tokens : int32_t {
  kOld,      // [.., E(p)): of a KV head that hits with anchors fresh all the same
  kRecent,   // [E(p), ..)
  kAnchors,  // of the matched entries, by the current query
  kReplaced  // the same by the entry's
};

// A piece of one request's tokens, attended by all of its KV heads that start before the end of it.
struct AmendTask {
  int32_t request;
  Tokens tokens;
  int64_t begin, end;  // positions; of anchors places in the lists of `AmendWork::hits`, S for each
  int64_t partial;     // where the partial states go; those of kReplaced follow
};

// What one query token of a KV head reuses on a hit with anchors: those of the matched entry.
struct AmendHit {
  const int32_t* anchors = nullptr;  // null: it does not hit
  const float* anchor_weights = nullptr;
  int32_t num_anchors = 0;
  float density = 0.f;  // see `counted`
};

// The sample that one KV head of a request draws on a miss, see sample.h.
struct AmendGroup {
  int64_t candidates = -1;          // where they go, of how many there is room for; -1: it draws none
  const float* last_lse = nullptr;  // [G]
  float tau = 0.f;
  uint32_t seed = 0;
};

constexpr int32_t kAmendBlock = 32;  // tokens whose logits are in flight together

struct AmendWork {
  AmendWork(const AmendParams& params, int num_threads);

  // Heads in the order of their first tokens, so that those that attend to a token come first; and those tokens.
  std::vector<int32_t> kv_heads;   // [B, H]
  std::vector<int32_t> kv_starts;  // [B, H] of any of its queries
  std::vector<int32_t>
      queries;                  // [B, Q] of the request's Q, those of each KV head and query token among themselves
  std::vector<int32_t> starts;  // [B, Q]

  std::vector<AmendTask> tasks;
  int64_t num_drawn_early;         // while a thread does one of the first tasks, it has drawn its next one already
  std::vector<AmendGroup> groups;  // [B, H]
  std::vector<AmendHit> hits;      // [B, H, T]
  std::vector<int64_t> first_partial;               // [B + 1]
  std::vector<Tokens> partial_tokens;               // [P]
  std::unique_ptr<std::atomic<int32_t>[]> pending;  // [B] tasks not done yet
  // These are kept for the thread's next call: fresh memory costs more than what is written to it here.
  float* partial_out;         // [P, Q, V] sum of exp(logit - max) * value
  float* partial_max;         // [P, Q]
  float* partial_sum;         // [P, Q] sum of exp(logit - max); 0: the head has no part, and no `out`
  float* partial_light;       // [P, Q] sum of a exp(logit - max) over anchors
  int32_t* candidate_tokens;  // [drawing KV heads, room]
  float* candidate_weights;
  std::unique_ptr<std::atomic<int32_t>[]> num_candidates;  // [B, H], also of those there was no room for
  std::atomic<int64_t> next{0};
  std::atomic<int64_t> next_finish{0};  // of `groups`

 private:
  void sort_request(const AmendParams& params, int request);
  void cut_request(const AmendParams& params, int request, int64_t target);
};

struct CompleteWork {
  explicit CompleteWork(const CompleteParams& params);
  int64_t num_tasks;
  std::atomic<int64_t> next{0};
};

struct Kernels {
  const char* name;
  int32_t lanes;  // elements of a vector, of which a row is whole ones
  void (*match)(const MatchParams&, MatchWork&);
  void (*amend)(const AmendParams&, AmendWork&);
  void (*complete)(const CompleteParams&, CompleteWork&);
};

// The best table this machine can run; the environment variable MAC_ATTN_SIMD asks for a lesser one by its name, so
// that all of them can be tested on one machine. Throws std::invalid_argument if it has another value.
const Kernels& best_kernels();
// The same, or the best below it whose vectors the rows of keys and values are whole ones of.
const Kernels& kernels(const Shape& shape);

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
namespace neon {
extern const Kernels table;
}
namespace neon_bf16 {
extern const Kernels table;
}

}  // namespace mac_attn::cpu
