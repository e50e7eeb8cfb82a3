// The rings of a ReuseCache: one tensor of bytes [num_slots, slot_bytes], whose layout is fixed here and nowhere
// else (mac_attn/cache.py asks for it).
//
// A slot holds one request: its history, the numbers that sampling is steered by, and for each KV head M entries.
// What match looks through lies together; what a hit reads of one entry lies together, on few pages of memory.
//
// Letters: H KV heads, G query heads per KV head, D head_dim, V head_dim_v, M entries, S anchors. T is the queries'
// type.
#pragma once

#include <cstdint>

#include "state.h"

namespace mac_attn {

// Order of a slot's counters; mac_attn/stats.py reads them.
enum Counter : int32_t {
  kSteps,
  kKvHeadSteps,
  kKvHeadHits,
  kQueryHeadHits,
  kKvTokensRead,
  kKvTokensFull,
  kAnchorsRead,
  kEntriesStored,
  kNumCounters
};

struct RingShape {
  int32_t num_kv_heads;
  int32_t group_size;
  int32_t head_dim;
  int32_t entries;
  int32_t anchors;
  int32_t itemsize;               // of T
  int32_t head_dim_v = head_dim;  // see Shape
};

// Where the parts of a slot lie: bytes from its beginning, each at a multiple of 64.
struct RingLayout {
  RingShape shape;
  int64_t end, reach;      // int32: the next call may begin from `end` to `reach`; its last one's seq_len
  int64_t request;         // int64: id of its last call, -1 if none was given
  int64_t counters;        // int64 [kNumCounters]
  int64_t stored;          // int32 [H] entries stored since the history began, see `next_stored`
  int64_t tau;             // float [H] what a token's key has to exceed, see sample.h
  int64_t spread;          // float [H] see `drift_bound`; 0: not known
  int64_t missed;          // int32 [H] steps in a row without a hit, see `draws_sample`
  int64_t last_lse;        // float [H, G] log-sum-exp of the last step
  int64_t position;        // int32 [H, M] whose entry this is, -1: nobody's any more
  int64_t depth;           // int32 [H, M, G] hits in a row that made the entry
  int64_t query;           // T [H, M, G, D] pre-RoPE
  int64_t record;          // [H, M] of `record_bytes`, in each:
  int64_t out, lse;        //   float [G, V], float [G]: the state over [0, E(c))
  int64_t rotated;         //   T [G, D] post-RoPE, nothing if S = 0
  int64_t anchors;         //   int32 [S] positions, ascending, then -1
  int64_t anchor_weights;  //   float [S] how many tokens besides itself each stands for
  int64_t record_bytes;
  int64_t slot_bytes;
};

constexpr RingLayout ring_layout(const RingShape& s) {
  const auto place = [](int64_t& at, int64_t bytes) {
    const int64_t here = at;
    at += (bytes + 63) / 64 * 64;
    return here;
  };
  const int64_t heads = s.num_kv_heads, entries = heads * s.entries, row = int64_t{s.group_size} * s.head_dim;
  RingLayout l{};
  l.shape = s;
  int64_t at = 0;
  l.out = place(at, int64_t{s.group_size} * s.head_dim_v * 4);
  l.lse = place(at, s.group_size * 4);
  l.rotated = place(at, s.anchors > 0 ? row * s.itemsize : 0);
  l.anchors = place(at, int64_t{s.anchors} * 4);
  l.anchor_weights = place(at, int64_t{s.anchors} * 4);
  l.record_bytes = at;
  at = 0;
  l.end = at, l.reach = at + 4;
  place(at, 8);
  l.request = place(at, 8);
  l.counters = place(at, kNumCounters * 8);
  l.stored = place(at, heads * 4);
  l.tau = place(at, heads * 4);
  l.spread = place(at, heads * 4);
  l.missed = place(at, heads * 4);
  l.last_lse = place(at, heads * s.group_size * 4);
  l.position = place(at, entries * 4);
  l.depth = place(at, entries * s.group_size * 4);
  l.query = place(at, entries * row * s.itemsize);
  l.record = place(at, entries * l.record_bytes);
  l.slot_bytes = at;
  return l;
}

// The rings as the kernels see them. A `slot` and a `place` are in range; the caller has looked.
struct Ring {
  char* data;
  RingLayout layout;
  int32_t num_slots;

  template <typename T>
  MAC_HOST_DEVICE T* at(int64_t slot, int64_t offset) const {
    return reinterpret_cast<T*>(data + slot * layout.slot_bytes + offset);
  }
  MAC_HOST_DEVICE int64_t entry(int kv_head, int place) const {
    return int64_t{kv_head} * layout.shape.entries + place;
  }
  MAC_HOST_DEVICE int32_t* end(int64_t slot) const { return at<int32_t>(slot, layout.end); }
  MAC_HOST_DEVICE int32_t* reach(int64_t slot) const { return at<int32_t>(slot, layout.reach); }
  MAC_HOST_DEVICE int64_t* request(int64_t slot) const { return at<int64_t>(slot, layout.request); }
  MAC_HOST_DEVICE int64_t* counters(int64_t slot) const { return at<int64_t>(slot, layout.counters); }
  MAC_HOST_DEVICE int32_t* stored(int64_t slot, int kv_head) const {
    return at<int32_t>(slot, layout.stored) + kv_head;
  }
  MAC_HOST_DEVICE float* tau(int64_t slot, int kv_head) const { return at<float>(slot, layout.tau) + kv_head; }
  MAC_HOST_DEVICE float* spread(int64_t slot, int kv_head) const {
    return at<float>(slot, layout.spread) + kv_head;
  }
  MAC_HOST_DEVICE int32_t* missed(int64_t slot, int kv_head) const {
    return at<int32_t>(slot, layout.missed) + kv_head;
  }
  MAC_HOST_DEVICE float* last_lse(int64_t slot, int kv_head) const {
    return at<float>(slot, layout.last_lse) + int64_t{kv_head} * layout.shape.group_size;
  }
  MAC_HOST_DEVICE int32_t* position(int64_t slot, int kv_head, int place) const {
    return at<int32_t>(slot, layout.position) + entry(kv_head, place);
  }
  MAC_HOST_DEVICE int32_t* depth(int64_t slot, int kv_head, int place) const {
    return at<int32_t>(slot, layout.depth) + entry(kv_head, place) * layout.shape.group_size;
  }
  template <typename T>
  MAC_HOST_DEVICE T* query(int64_t slot, int kv_head, int place) const {
    return at<T>(slot, layout.query) + entry(kv_head, place) * layout.shape.group_size * layout.shape.head_dim;
  }
  template <typename T>
  MAC_HOST_DEVICE T* of_record(int64_t slot, int kv_head, int place, int64_t offset) const {
    return at<T>(slot, layout.record + entry(kv_head, place) * layout.record_bytes + offset);
  }
  MAC_HOST_DEVICE float* out(int64_t slot, int kv_head, int place) const {
    return of_record<float>(slot, kv_head, place, layout.out);
  }
  MAC_HOST_DEVICE float* lse(int64_t slot, int kv_head, int place) const {
    return of_record<float>(slot, kv_head, place, layout.lse);
  }
  template <typename T>
  MAC_HOST_DEVICE T* rotated(int64_t slot, int kv_head, int place) const {
    return of_record<T>(slot, kv_head, place, layout.rotated);
  }
  MAC_HOST_DEVICE int32_t* anchors(int64_t slot, int kv_head, int place) const {
    return of_record<int32_t>(slot, kv_head, place, layout.anchors);
  }
  MAC_HOST_DEVICE float* anchor_weights(int64_t slot, int kv_head, int place) const {
    return of_record<float>(slot, kv_head, place, layout.anchor_weights);
  }
};

// Entries are written to the places 0, 1, .., M - 1, 0, ..: the next one goes to `stored % M`, and the youngest
// min(stored, M) count. Beyond M only the remainder matters, so the number stays below 2 M.
MAC_HOST_DEVICE constexpr int32_t next_stored(int32_t stored, int32_t entries) {
  return stored + 1 >= 2 * entries ? stored + 1 - entries : stored + 1;
}

// A KV head that has missed so many steps in a row draws a sample in every eighth step only, until it hits: a miss
// then costs little more than exact attention does, and entries that are further apart are no worse to it
// (docs/fidelity.md).
constexpr int32_t kDrawsAlways = 32, kDrawsNot = 7;
MAC_HOST_DEVICE constexpr bool draws_sample(int32_t missed) {
  return missed <= kDrawsAlways;
}
MAC_HOST_DEVICE constexpr int32_t next_missed(int32_t missed) {
  return missed < kDrawsAlways + kDrawsNot ? missed + 1 : kDrawsAlways;
}

}  // namespace mac_attn
