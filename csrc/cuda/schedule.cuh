// How the work of one amend launch is shared out: one persistent grid for every mix of hits and misses.
//
// The tokens of a KV head (once per pass: for as many queries of it as most_tile_heads says) are cut into tiles of
// 64: first those of the old span [s, E(p)), then the band [E(p), n); with anchors a hit has those first, then [s,
// n). A pass is cut into equal pieces of at most so many tiles that every CTA gets some, and no more than
// kMaxSplits; a piece leaves one partial state per span. The CTAs begin with the piece of their own number and then
// draw one after another, as they do not get equal shares of the memory's bandwidth. The lengths are read on the
// device, so a captured graph adapts to every step.
#pragma once

#include "../params.h"
#include "kernels.h"
#include "ptx/barrier.h"
#include "ptx/math.h"
#include "ptx/warp.h"
#include "simt.h"

namespace mac_attn::cuda {

constexpr int kWarps = 4;
constexpr int kThreads = 32 * kWarps;
constexpr int kTileTokens = kWarps * kWarpTokens;
// Tiles of a piece that is worth a draw.
constexpr int kDrawnTiles = 64;
constexpr int kTilesAlone = kPieceTokensAlone / kTileTokens;
// What a pass costs besides its tiles (its first wait for memory, writing and merging its states), in tiles.
constexpr int kPassCost = 4;
// What merging a piece's state of one query takes, one after another at the end, by what a tile takes: tiles / n +
// queries n kMergeCost is least where a piece has sqrt(tiles queries kMergeCost) tiles. Measured (bench/README.md).
constexpr float kMergeCost = 0.025f;

// First token that a query head attends to afresh: E(c) on a hit, 0 on a miss or without reuse.
MAC_DEVICE int amend_start(const AmendParams& p, int source) {
  return source == kMiss ? 0 : band_start(source, p.band);
}

// Position of a request's first query token; -1 for padding, and where lengths cannot be.
MAC_DEVICE int position_of(const AmendParams& p, const AmendWorkspace& w, int request) {
  const bool fits = p.requests.seq_lens[request] <= w.max_tokens && fits_query(p.shape, p.requests, request);
  return fits ? first_position(p.shape, p.requests, request) : -1;
}

// What one KV head of one request has to attend to: on a miss with all of its query tokens at once, which are the
// first one's unit then; on a hit each token is a unit of its own, with its own entry. A hit with anchors has no
// old tiles: those and the rest are one span, and of the entry's state only the anchors are kOld. Where the anchors
// come twice (kTwice, see anchors_twice), the first time they are the old tiles.
struct KvHeadWork {
  int seq_len, start, old_end, place;  // place: of the matched entry, looked at where there are anchors
  int position;                        // of the unit's first query token
  int token;                           // that token
  int queries, passes;                 // of the unit, and over how many its tokens are attended to
  int old_tiles, anchor_tiles, tiles;

  MAC_DEVICE bool hit() const { return start > 0; }
  // The tiles that leave a partial state of kOld.
  template <bool kTwice>
  MAC_DEVICE int tiles_of_old() const {
    return kTwice ? old_tiles : old_tiles + anchor_tiles;
  }
};

MAC_DEVICE int tiles_for(int tokens) {
  return (tokens + kTileTokens - 1) / kTileTokens;
}

template <bool kTwice>
MAC_DEVICE KvHeadWork kv_head_work(const AmendParams& p, const AmendWorkspace& w, int unit) {
  const int group = w.unit_tokens.divide(unit), request = w.num_kv_heads.divide(group), G = p.shape.group_size;
  const int n = p.requests.seq_lens[request], first = position_of(p, w, request);
  const bool reuses = p.matched.source && has_ring(p.requests, request);
  const int token = p.matched.source ? unit - group * p.shape.tokens : 0;
  const bool there = first + token < n;
  int start = 0, place = kMiss;
  if (reuses) {
    // A token that is not there goes by the first one.
    const int64_t row = static_cast<int64_t>(there ? unit : unit - token) * G;
    const int32_t* source = p.matched.source + row;
    if (p.num_anchors > 0) place = p.matched.place[row];
    int oldest = 0x7fffffff;  // kMiss is less than any
#pragma unroll 4
    for (int g = 0; g < G; ++g) oldest = source[g] < oldest ? source[g] : oldest;
    start = amend_start(p, oldest);
  }
  const bool hit = first >= 0 && start > 0;
  const int queries = hit ? G : p.shape.group_queries(), passes = hit ? w.token_passes : w.head_tiles;
  // What another token's unit does, or another launch.
  if ((token > 0 && !hit) || (hit ? w.serves == Serves::kMisses : w.serves == Serves::kHits)) return {};
  // Padding, a token that is not there, a length that cannot be: one tile without tokens, so that its state is
  // written.
  if (first < 0 || !there) return {0, 0, 0, kMiss, 0, token, queries, passes, 0, 0, 1};
  const int end = hit ? first + token + 1 : n;
  const int anchor_tiles = hit ? tiles_for(sample_size(p.num_anchors, start)) : 0;
  const int old_end = !reuses ? 0 : anchor_tiles > 0 ? start : band_start(first, p.band);
  const int old_tiles = kTwice && anchor_tiles > 0 ? anchor_tiles : tiles_for(old_end - start);
  const int tiles = old_tiles + anchor_tiles + tiles_for(end - old_end);
  return {end, start, old_end, place, first + token, token, queries, passes, old_tiles, anchor_tiles, tiles};
}

// A piece of one pass: tiles [begin, end).
struct Piece {
  int number, begin, end;
  int request, kv_head, head_tile;
  KvHeadWork work;
  // All pieces of the unit: `splits` for each pass, of `most` tiles but for the last.
  int first, splits, most;

  MAC_DEVICE int kv_group(const AmendParams& p) const { return request * p.shape.num_kv_heads + kv_head; }
  // Number of the unit's first token, [B, H, T], where there is reuse.
  MAC_DEVICE int64_t token_row(const AmendParams& p) const {
    return int64_t{kv_group(p)} * p.shape.tokens + work.token;
  }
  // The pass's first query of the KV head's, [T, G], and how many it has.
  MAC_DEVICE int first_query(const AmendParams& p, const AmendWorkspace& w) const {
    return work.token * p.shape.group_size + head_tile * w.tile_heads;
  }
  MAC_DEVICE int num_queries(const AmendWorkspace& w) const {
    const int rest = work.queries - head_tile * w.tile_heads;
    return rest < w.tile_heads ? rest : w.tile_heads;
  }
  MAC_DEVICE Span span(int tile) const { return tile < work.old_tiles ? kOld : kFresh; }
};

// The tokens of a tile: positions [begin, end), or places in the list of the entry's anchors.
struct TileTokens {
  int begin, end;
  bool anchors;
};

// kAnchors: there may be some.
template <bool kAnchors, bool kTwice>
MAC_DEVICE TileTokens tile_tokens(const AmendParams& p, const KvHeadWork& work, int tile) {
  if (kTwice && work.anchor_tiles > 0 && tile < work.old_tiles) tile += work.old_tiles;  // the same both times
  if (tile < work.old_tiles) return {work.start + tile * kTileTokens, work.old_end, false};
  tile -= work.old_tiles;
  if constexpr (kAnchors) {
    if (tile < work.anchor_tiles) return {tile * kTileTokens, p.num_anchors, true};
    tile -= work.anchor_tiles;
  }
  return {work.old_end + tile * kTileTokens, work.seq_len, false};
}

// Sum over the threads of the block before this one, and over all. The caller keeps `warp_sum` free.
template <int kBlockWarps>
MAC_DEVICE int sum_before(int mine, int (&warp_sum)[kBlockWarps], int& all) {
  const int lane = ptx::lane_id(), warp = threadIdx.x / 32;
  int upto = mine;
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) {
    const int before = ptx::shfl(upto, lane >= distance ? lane - distance : lane);
    if (lane >= distance) upto += before;
  }
  if (lane == 31) warp_sum[warp] = upto;
  ptx::sync_block();
  all = 0;
  for (int i = 0; i < kBlockWarps; ++i) {
    if (i < warp) upto += warp_sum[i];
    all += warp_sum[i];
  }
  ptx::sync_block();
  return upto - mine;
}

// a / b, rounded up, for quotients below 2^20: a division takes some hundred cycles, this a quarter of them.
MAC_DEVICE int divide_up(int a, int b) {
  const int quotient = static_cast<int>(ptx::divide(static_cast<float>(a), static_cast<float>(b)));
  const int rest = a - quotient * b;  // the quotient is off by one at most
  return rest <= 0 ? quotient + (rest > -b ? 0 : -1) : quotient + (rest > b ? 2 : 1);
}

// How many tiles a piece has at most, from all tiles of the call, its passes and the longest of them. The CTAs go
// over the pieces in waves. Rounding up makes some pieces more than there is room for, one for each long pass;
// where those are few, the room is kept free for them: a wave for just one of them would last as long as the
// others.
MAC_DEVICE int tiles_of_piece(const AmendWorkspace& w, int tiles, int passes, int longest) {
  const int ctas = gridDim.x, cost = tiles + kPassCost * passes;
  int waves = w.ctas.divide(cost) / kDrawnTiles;
  waves = waves < 1 ? 1 : waves > kMaxWaves ? kMaxWaves : waves;
  const int long_passes = 1 + static_cast<int>(ptx::divide(static_cast<float>(tiles), static_cast<float>(longest)));
  const int room = waves * ctas - (2 * long_passes <= ctas ? long_passes : 0);
  // A float is off by less than is added here.
  const float share = ptx::divide(static_cast<float>(cost), static_cast<float>(room));
  const int most = static_cast<int>(share * 1.00001f) + 1;
  const int least = (longest + kMaxSplits - 1) / kMaxSplits;
  const float square = kMergeCost * static_cast<float>(w.tile_heads * longest);
  const int cheapest = static_cast<int>(ptx::ex2(0.5f * ptx::lg2(square)) + 0.5f);
  const int wanted = least > cheapest ? least : cheapest;
  return most > wanted ? most : wanted;
}

// The same for a pass of `tiles`, from what is best for the call, `most`, or from the pass alone.
MAC_DEVICE int most_tiles(const AmendWorkspace& w, int tiles, int most) {
  if (w.pieces_alone == 0) return most;
  const int share = divide_up(tiles, w.pieces_alone);
  return share > kTilesAlone ? share : kTilesAlone;
}

// A thread's share of the units, [begin, end), whose pieces are `pieces` from `first` on; and the call's.
struct Share {
  int begin, end;
  int first, pieces;
  int most, all_pieces;
};

// Counts the pieces, every CTA for itself: a sum and a prefix sum over the units. Everything waits for this at the
// start of a step, so it is written to be short.
template <bool kTwice>
MAC_DEVICE Share share_out(const AmendParams& p, const AmendWorkspace& w) {
  __shared__ int warp_tiles[kWarps], warp_longest[kWarps], warp_pieces[kWarps];
  const int lane = ptx::lane_id(), warp = threadIdx.x / 32;
  const int units = w.num_units, each = (units + kThreads - 1) / kThreads;
  Share share{};
  share.begin = threadIdx.x * each, share.end = share.begin + each < units ? share.begin + each : units;
  uint32_t tiles = 0, longest = 1;
  int last = 0, last_passes = 0;  // tiles of the last of them, which in most calls is the only one
#pragma unroll 1
  for (int unit = share.begin; unit < share.end; ++unit) {
    const KvHeadWork work = kv_head_work<kTwice>(p, w, unit);
    last = work.tiles, last_passes = work.passes;
    tiles += last * last_passes;
    longest = static_cast<uint32_t>(last) > longest ? last : longest;
  }
  tiles = ptx::reduce_add(tiles), longest = ptx::reduce_max(longest);
  if (lane == 0) warp_tiles[warp] = tiles, warp_longest[warp] = longest;
  ptx::sync_block();
  int all_tiles = 0, longest_pass = 1;
  for (int i = 0; i < kWarps; ++i) {
    all_tiles += warp_tiles[i];
    longest_pass = warp_longest[i] > longest_pass ? warp_longest[i] : longest_pass;
  }
  const int all_passes = p.shape.batch * p.shape.num_kv_heads * w.head_tiles;
  share.most = tiles_of_piece(w, all_tiles, all_passes, longest_pass);
#pragma unroll 1
  for (int unit = share.begin; unit < share.end; ++unit) {
    if (unit + 1 < share.end) {
      const KvHeadWork work = kv_head_work<kTwice>(p, w, unit);
      share.pieces += divide_up(work.tiles, most_tiles(w, work.tiles, share.most)) * work.passes;
    } else {
      share.pieces += divide_up(last, most_tiles(w, last, share.most)) * last_passes;
    }
  }
  share.first = sum_before(share.pieces, warp_pieces, share.all_pieces);
  return share;
}

// The piece of a number below `all_pieces`, in shared memory. The whole block takes part.
template <bool kTwice>
MAC_DEVICE void find_piece(const AmendParams& p, const AmendWorkspace& w, const Share& share, int number,
                           Piece& found) {
  ptx::sync_block();  // the last one is no longer needed
  if (number >= share.first && number < share.first + share.pieces) {
    int first = share.first;
#pragma unroll 1
    for (int unit = share.begin;; ++unit) {
      const KvHeadWork work = kv_head_work<kTwice>(p, w, unit);
      const int most_of_pass = most_tiles(w, work.tiles, share.most);
      const int splits = divide_up(work.tiles, most_of_pass);
      const int in_unit = number - first;
      if (in_unit >= splits * work.passes) {
        first += splits * work.passes;
        continue;
      }
      const int most = work.tiles <= most_of_pass ? work.tiles : (work.tiles + splits - 1) / splits;
      // Passes over the same tokens are neighbours, so that the second finds them in the L2 cache.
      const int split = work.passes == 1 ? in_unit : in_unit / work.passes;
      const int head_tile = in_unit - split * work.passes, begin = split * most;
      const int end = begin + most < work.tiles ? begin + most : work.tiles;
      const int group = w.unit_tokens.divide(unit), request = w.num_kv_heads.divide(group);
      found = {number,    begin, end,   request, group - request * p.shape.num_kv_heads,
               head_tile, work,  first, splits,  most};
      break;
    }
  }
  ptx::sync_block();
}

}  // namespace mac_attn::cuda
