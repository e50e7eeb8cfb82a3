// How the work of one amend launch is shared out: one persistent grid for every mix of hits and misses.
//
// The tokens of a KV head (once per 16 query heads that share it) are cut into tiles of 64: first those of
// the old span [s, E(p)), then the inherited anchors, then the band [E(p), n). All tiles of the call form
// one line, T long, and each of the C CTAs takes an equal piece of it: [T c / C, T (c + 1) / C). The
// lengths are read on the device, so a captured graph adapts to every step. A piece of a CTA within one KV
// head is a segment; it leaves at most one partial state per span. Segment numbers (CTA + head) differ,
// as from one segment to the next at least one of the two grows.
#pragma once

#include "../params.h"
#include "kernels.h"
#include "ptx/barrier.h"
#include "ptx/warp.h"
#include "simt.h"

namespace mac_attn::cuda {

constexpr int kWarps = 4;
constexpr int kThreads = 32 * kWarps;
constexpr int kTileTokens = kWarps * kWarpTokens;

// First token that a query head attends to afresh: E(c) on a hit, 0 on a miss or without reuse.
MAC_DEVICE int amend_start(const AmendParams& p, int request, int head) {
  if (!p.source) return 0;
  const int source = p.source[static_cast<int64_t>(request) * p.shape.num_kv_heads * p.shape.group_size + head];
  return source == kMiss ? 0 : band_start(source, p.band);
}

// What one KV head of one request has to attend to.
struct KvHeadWork {
  int seq_len, start, old_end;
  int old_tiles, anchor_tiles, fresh_tiles;
  bool hit;

  MAC_DEVICE int tiles() const { return old_tiles + anchor_tiles + fresh_tiles; }
};

MAC_DEVICE KvHeadWork kv_head_work(const AmendParams& p, const AmendWorkspace& w, int request, int kv_head) {
  KvHeadWork work;
  const int n = p.requests.seq_lens[request];
  // Padding, and a length that cannot be: one tile without tokens, so that its state is written.
  if (n <= 0 || n > w.max_tokens) return {0, 0, 0, 0, 0, 1, false};
  int start = n;
  for (int g = 0; g < p.shape.group_size; ++g) {
    const int s = amend_start(p, request, kv_head * p.shape.group_size + g);
    start = s < start ? s : start;
  }
  work.seq_len = n;
  work.start = start;
  work.old_end = p.source ? band_start(n - 1, p.band) : 0;
  work.hit = p.source && start > 0;
  work.old_tiles = (work.old_end - start + kTileTokens - 1) / kTileTokens;
  work.anchor_tiles = work.hit ? (p.num_anchors + kTileTokens - 1) / kTileTokens : 0;
  work.fresh_tiles = (n - work.old_end + kTileTokens - 1) / kTileTokens;
  return work;
}

// The line of tiles, cut evenly.
struct Line {
  int64_t tiles;
  int64_t ctas;

  MAC_DEVICE int64_t first_tile(int64_t cta) const { return tiles * cta / ctas; }
  MAC_DEVICE int cta_of(int64_t tile) const { return static_cast<int>(((tile + 1) * ctas - 1) / tiles); }
};

// Where a CTA stands on the line: a tile, and the pass (KV head, head tile) that it belongs to.
struct Cursor {
  int64_t tile;
  int64_t pass_first_tile;
  int pass;  // (request * H + kv_head) * head_tiles + head tile
  KvHeadWork work;

  MAC_DEVICE int kv_group(const AmendWorkspace& w) const { return pass / w.head_tiles; }
  MAC_DEVICE int request(const AmendParams& p, const AmendWorkspace& w) const {
    return kv_group(w) / p.shape.num_kv_heads;
  }
  MAC_DEVICE int kv_head(const AmendParams& p, const AmendWorkspace& w) const {
    return kv_group(w) % p.shape.num_kv_heads;
  }
  MAC_DEVICE void load_work(const AmendParams& p, const AmendWorkspace& w) {
    work = kv_head_work(p, w, request(p, w), kv_head(p, w));
  }
  // To the next tile; `last` is the end of the CTA's piece, beyond which there may be no pass.
  MAC_DEVICE void advance(const AmendParams& p, const AmendWorkspace& w, int64_t last) {
    ++tile;
    if (tile < last && tile == pass_first_tile + work.tiles()) {
      ++pass;
      pass_first_tile = tile;
      load_work(p, w);
    }
  }
  MAC_DEVICE int local() const { return static_cast<int>(tile - pass_first_tile); }
  MAC_DEVICE Span span() const { return local() < work.old_tiles ? kOld : kFresh; }
};

// The tokens of a cursor's tile: positions [begin, end), or places in the list of inherited anchors.
struct TileTokens {
  int begin, end;
  bool anchors;
};

MAC_DEVICE TileTokens tile_tokens(const AmendParams& p, const Cursor& cursor) {
  const KvHeadWork& work = cursor.work;
  int local = cursor.local();
  if (local < work.old_tiles) return {work.start + local * kTileTokens, work.old_end, false};
  local -= work.old_tiles;
  if (local < work.anchor_tiles) return {local * kTileTokens, p.num_anchors, true};
  local -= work.anchor_tiles;
  return {work.old_end + local * kTileTokens, work.seq_len, false};
}

// The anchors of the matched entry of a KV head that hits.
MAC_DEVICE const int32_t* inherited_anchors(const AmendParams& p, int request, int kv_head) {
  const int64_t head = (static_cast<int64_t>(request) * p.shape.num_kv_heads + kv_head) * p.shape.group_size;
  const int64_t slot = p.requests.slots[request];
  const int64_t entry = (slot * p.shape.num_kv_heads + kv_head) * p.window + p.source[head] % p.window;
  return p.ring_anchors + entry * p.num_anchors;
}

// Sums up the line (every CTA for itself: a prefix sum over the passes) and puts `cursor` at the first tile of
// this CTA's piece. CTAs from line.ctas on have no piece.
MAC_DEVICE Line find_first_tile(const AmendParams& p, const AmendWorkspace& w, Cursor& cursor) {
  __shared__ int64_t warp_sum[kWarps];
  __shared__ int64_t found_tile;
  __shared__ int found_pass;
  const int lane = ptx::lane_id(), warp = threadIdx.x / 32;
  const int passes = p.shape.batch * p.shape.num_kv_heads * w.head_tiles;
  const int each = (passes + kThreads - 1) / kThreads;
  const int begin = threadIdx.x * each, end = begin + each < passes ? begin + each : passes;

  auto tiles_of = [&](int pass) {
    const int group = pass / w.head_tiles;
    return kv_head_work(p, w, group / p.shape.num_kv_heads, group % p.shape.num_kv_heads).tiles();
  };
  int64_t mine = 0;
  for (int pass = begin; pass < end; ++pass) mine += tiles_of(pass);
  int64_t upto = mine;  // inclusive prefix within the warp
  for (int distance = 1; distance < 32; distance *= 2) {
    const int64_t before = ptx::shfl(upto, lane >= distance ? lane - distance : lane);
    if (lane >= distance) upto += before;
  }
  if (lane == 31) warp_sum[warp] = upto;
  ptx::sync_block();
  Line line{0, 0};
  for (int i = 0; i < kWarps; ++i) {
    if (i < warp) upto += warp_sum[i];
    line.tiles += warp_sum[i];
  }
  line.ctas = line.tiles < gridDim.x ? line.tiles : gridDim.x;
  if (static_cast<int64_t>(blockIdx.x) >= line.ctas) return line;

  const int64_t first = line.first_tile(blockIdx.x);
  if (first >= upto - mine && first < upto) {  // one thread's passes hold it
    int64_t tile = upto - mine;
    int pass = begin;
    for (int tiles; tile + (tiles = tiles_of(pass)) <= first; ++pass) tile += tiles;
    found_tile = tile;
    found_pass = pass;
  }
  ptx::sync_block();
  cursor.tile = first;
  cursor.pass = found_pass;
  cursor.pass_first_tile = found_tile;
  cursor.load_work(p, w);
  return line;
}

}  // namespace mac_attn::cuda
