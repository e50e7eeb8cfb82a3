// How the work of one amend launch is shared out: one persistent grid for every mix of hits and misses.
//
// The tokens of a KV head (once per 16 query heads that share it) are cut into tiles of 64: first those of the old
// span [s, E(p)), then the inherited anchors, then the band [E(p), n). All tiles of the call form one line, with a
// gap of kPassCost before every pass, and the line is cut into pieces, one for each CTA. Of a long line that is
// only three quarters; the rest is cut into small pieces which the CTAs draw when they are done, as they do not get
// equal shares of the memory's bandwidth. The lengths are read on the device, so a captured graph adapts to every
// step. A piece's part within one KV head is a segment; it leaves at most one partial state per span. Segment
// numbers (piece + pass) differ, as from one segment to the next at least one of the two grows.
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
// Pieces of one pass: with more, merging their states costs more than they save.
constexpr int kMaxSplits = 48;
// What a pass costs besides its tiles (writing and merging its states), in tiles. Without it, the CTAs that get the
// many short passes of a batch of hits would be the last to finish.
constexpr int kPassCost = 6;
// Tiles for each CTA from which on pieces are drawn, and the small pieces that such a share would make.
constexpr int kDrawFrom = 64;
constexpr int kSmallPieces = 24;
static_assert(kSmallPieces / 4 + 2 < kMaxPieces, "room for the partial states");

// First token that a query head attends to afresh: E(c) on a hit, 0 on a miss or without reuse.
MAC_DEVICE int amend_start(const AmendParams& p, int source) {
  return source == kMiss ? 0 : band_start(source, p.band);
}

// What one KV head of one request has to attend to.
struct KvHeadWork {
  int seq_len, start, old_end;
  int old_tiles, anchor_tiles, tiles;

  MAC_DEVICE bool hit() const { return start > 0; }
};

MAC_DEVICE int tiles_for(int tokens) {
  return (tokens + kTileTokens - 1) / kTileTokens;
}

MAC_DEVICE KvHeadWork kv_head_work(const AmendParams& p, const AmendWorkspace& w, int request, int kv_head) {
  int n = p.requests.seq_lens[request];
  int start = 0;
  if (p.source) {
    const int32_t* source =
        p.source + (static_cast<int64_t>(request) * p.shape.num_kv_heads + kv_head) * p.shape.group_size;
    int oldest = 0x7fffffff;  // kMiss is less than any
#pragma unroll 4
    for (int g = 0; g < p.shape.group_size; ++g) oldest = source[g] < oldest ? source[g] : oldest;
    start = amend_start(p, oldest);
  }
  // Padding, and a length that cannot be: one tile without tokens, so that its state is written.
  if (n <= 0 || n > w.max_tokens) return {0, 0, 0, 0, 0, 1};
  const int old_end = p.source ? band_start(n - 1, p.band) : 0;
  const int old_tiles = tiles_for(old_end - start), anchor_tiles = start > 0 ? tiles_for(p.num_anchors) : 0;
  return {n, start, old_end, old_tiles, anchor_tiles, old_tiles + anchor_tiles + tiles_for(n - old_end)};
}

// The line and its pieces: the first `longer` of the `firsts` are one place longer than `each`, then come small
// ones.
struct Line {
  int places, pieces;
  int firsts, each, longer, small;

  MAC_DEVICE Line(int places, int ctas, int longest_pass) : places(places) {
    const int share = places / ctas, least = (longest_pass + kMaxSplits - 1) / kMaxSplits;
    if (share < kDrawFrom) {
      const int most = (places + least - 1) / least;
      pieces = firsts = most < ctas ? most : ctas;
      each = places / firsts, longer = places % firsts, small = 1;
    } else {
      firsts = ctas, each = share - share / 4, longer = 0, small = (share + kSmallPieces - 1) / kSmallPieces;
      if (small < least) small = least;
      pieces = firsts + (places - firsts * each + small - 1) / small;
    }
  }
  MAC_DEVICE int begin(int piece) const {
    const int place = piece < firsts ? piece * each + (piece < longer ? piece : longer)
                                     : firsts * each + longer + (piece - firsts) * small;
    return place < places ? place : places;
  }
  MAC_DEVICE int piece_of(int place) const {
    const int in_small = place - firsts * each - longer;
    if (in_small >= 0) return firsts + in_small / small;
    const int in_shorter = place - longer * (each + 1);
    return in_shorter < 0 ? place / (each + 1) : longer + in_shorter / each;
  }
};

// Where a CTA stands on the line: a tile, and the pass (KV head, head tile) that it belongs to.
struct Cursor {
  int place;  // on the line
  int local;  // tile within the pass
  int request, kv_head, head_tile;
  KvHeadWork work;

  MAC_DEVICE int kv_group(const AmendParams& p) const { return request * p.shape.num_kv_heads + kv_head; }
  MAC_DEVICE int pass(const AmendParams& p, const AmendWorkspace& w) const {
    return kv_group(p) * w.head_tiles + head_tile;
  }
  MAC_DEVICE Span span() const { return local < work.old_tiles ? kOld : kFresh; }
  // Whether the piece, which ends at `end`, has a tile after this one.
  MAC_DEVICE bool has_next(int end) const { return place + 1 + (local + 1 == work.tiles ? kPassCost : 0) < end; }
  // To the next tile; beyond the end of the piece there may be no pass.
  MAC_DEVICE void advance(const AmendParams& p, const AmendWorkspace& w, int end) {
    const bool has = has_next(end);
    ++place, ++local;
    if (!has) place = end;
    if (!has || local < work.tiles) return;
    place += kPassCost;
    local = 0;
    if (++head_tile < w.head_tiles) return;
    head_tile = 0;
    if (++kv_head == p.shape.num_kv_heads) kv_head = 0, ++request;
    work = kv_head_work(p, w, request, kv_head);
  }
};

// The tokens of a cursor's tile: positions [begin, end), or places in the list of inherited anchors.
struct TileTokens {
  int begin, end;
  bool anchors;
};

MAC_DEVICE TileTokens tile_tokens(const AmendParams& p, const Cursor& cursor) {
  const KvHeadWork& work = cursor.work;
  int local = cursor.local;
  if (local < work.old_tiles) return {work.start + local * kTileTokens, work.old_end, false};
  local -= work.old_tiles;
  if (local < work.anchor_tiles) return {local * kTileTokens, p.num_anchors, true};
  local -= work.anchor_tiles;
  return {work.old_end + local * kTileTokens, work.seq_len, false};
}

// The anchors of the matched entry of a KV head that hits.
MAC_DEVICE const int32_t* inherited_anchors(const AmendParams& p, int request, int kv_head) {
  const int64_t group = static_cast<int64_t>(request) * p.shape.num_kv_heads + kv_head;
  const int64_t slot = p.requests.slots[request];
  const int64_t entry =
      (slot * p.shape.num_kv_heads + kv_head) * p.window + p.source[group * p.shape.group_size] % p.window;
  return p.ring_anchors + entry * p.num_anchors;
}

// Sum over the threads of the block before this one, and over all. The caller keeps `warp_sum` free.
MAC_DEVICE int sum_before(int mine, int (&warp_sum)[kWarps], int& all) {
  const int lane = ptx::lane_id(), warp = threadIdx.x / 32;
  int upto = mine;
#pragma unroll 1
  for (int distance = 1; distance < 32; distance *= 2) {
    const int before = ptx::shfl(upto, lane >= distance ? lane - distance : lane);
    if (lane >= distance) upto += before;
  }
  if (lane == 31) warp_sum[warp] = upto;
  ptx::sync_block();
  all = 0;
  for (int i = 0; i < kWarps; ++i) {
    if (i < warp) upto += warp_sum[i];
    all += warp_sum[i];
  }
  ptx::sync_block();
  return upto - mine;
}

// A thread's share of the KV heads: [begin, end), which lie on the line from `place` on.
struct LineShare {
  int begin, end;
  int place, places;
};

// Sums up the line, every CTA for itself: a prefix sum over the KV heads.
MAC_DEVICE Line sum_line(const AmendParams& p, const AmendWorkspace& w, LineShare& share) {
  __shared__ int warp_sum[kWarps], warp_longest[kWarps];
  const int lane = ptx::lane_id(), warp = threadIdx.x / 32, H = p.shape.num_kv_heads;
  const int groups = p.shape.batch * H, each = (groups + kThreads - 1) / kThreads;
  share.begin = threadIdx.x * each, share.end = share.begin + each < groups ? share.begin + each : groups;
  share.places = 0;
  uint32_t longest = 1;
#pragma unroll 1
  for (int group = share.begin; group < share.end; ++group) {
    const uint32_t tiles = kv_head_work(p, w, group / H, group % H).tiles;
    share.places += (tiles + kPassCost) * w.head_tiles;
    longest = tiles > longest ? tiles : longest;
  }
  longest = ptx::reduce_max(longest);
  if (lane == 0) warp_longest[warp] = longest;
  int places = 0, longest_pass = 0;
  share.place = sum_before(share.places, warp_sum, places);
  for (int i = 0; i < kWarps; ++i) {
    if (warp_longest[i] > longest_pass) longest_pass = warp_longest[i];
  }
  return Line(places, gridDim.x, longest_pass);
}

// Puts `cursor` at the first tile of a piece; false if it has none.
MAC_DEVICE bool find_tile(const AmendParams& p, const AmendWorkspace& w, const Line& line, const LineShare& share,
                          int piece, Cursor& cursor) {
  __shared__ int found_group, found_place;
  __shared__ KvHeadWork found_work;
  const int H = p.shape.num_kv_heads, first = line.begin(piece);
  ptx::sync_block();  // the last piece's are no longer needed
  if (first >= share.place && first < share.place + share.places) {
    int group = share.begin, place = share.place;
#pragma unroll 1
    for (;; ++group) {
      const KvHeadWork work = kv_head_work(p, w, group / H, group % H);
      const int places = (work.tiles + kPassCost) * w.head_tiles;
      if (group + 1 == share.end || place + places > first) {
        found_group = group, found_place = first - place, found_work = work;
        break;
      }
      place += places;
    }
  }
  ptx::sync_block();
  const KvHeadWork work = found_work;
  const int pass_places = work.tiles + kPassCost, place = found_place % pass_places;
  const int gap = place < kPassCost ? kPassCost - place : 0;  // still before the pass's first tile
  if (first + gap >= line.begin(piece + 1)) return false;
  cursor = {first + gap,     place + gap - kPassCost,   found_group / H,
            found_group % H, found_place / pass_places, work};
  return true;
}

// The next piece of a CTA; beyond the line if there is none. The last draw of all leaves the counter at zero.
MAC_DEVICE int draw_piece(const AmendWorkspace& w, const Line& line) {
  __shared__ int drawn;
  if (line.pieces == line.firsts) return line.pieces;
  if (threadIdx.x == 0) {
    drawn = ptx::atomic_add(w.drawn, 1);
    if (drawn == line.pieces - 1) *w.drawn = 0;
  }
  ptx::sync_block();
  return line.firsts + drawn;
}

}  // namespace mac_attn::cuda
