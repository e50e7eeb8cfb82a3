// The tiles of K and V on their way to shared memory: which rows, and the copies of one stage.
//
// A warp looks after 16 rows of each tile by itself: nobody else reads its stages.
// Traffic: each row once, 128 bytes at a time; a block-table entry for every row (one line for all of a page).
#pragma once

#include <type_traits>

#include "head_dim.cuh"
#include "ptx/async_copy.h"
#include "ptx/memory.h"
#include "ptx/warp.h"
#include "schedule.cuh"

namespace mac_attn::cuda {

// Shared memory of one stage of one warp: 16 rows of K, 16 of V. The eight 16-byte pieces of 128 bytes of a row lie
// in an order of the row's own, so that an ldmatrix, which reads one piece of eight rows, meets different banks.
// Padding would do the same, but an asynchronous copy of 128 bytes that straddles a line of shared memory is two
// requests, some sectors in both: half as much again came out of the L2 cache.
// Two stages of 8 KB for each of the 8 warps of a processor keep enough in flight; more only queue up, at a loss.
// Those of fp8 are half as long, so there are so many that as much is in flight while one is computed. Of the
// largest heads one stage is as much, and takes longer to fill than to compute: while a warp computes, the others'
// are filled.
template <int kHeadDim, typename T = bf16>
struct Stage {
  static constexpr bool kHalf = sizeof(T) == 1;
  static constexpr int kCount =  // in the pipeline
      kHeadDim < 128    ? (kHalf ? 6 : 3)
      : kHeadDim <= 256 ? (kHalf ? 3 : 2)
                        : (kHalf ? 2 : 1);
  static constexpr int kRow = (kHeadDim + 63) / 64 * 64;  // elements: whole lines, or half
  static constexpr int kElements = 2 * kWarpTokens * kRow;
  static constexpr int kBytes = kElements * static_cast<int>(sizeof(T));
  static constexpr int kUnit = 16 / static_cast<int>(sizeof(T));  // elements of 16 bytes
  static constexpr bool kHalfLines = kRow * sizeof(T) < 128;

  // Where 16-byte piece `piece` of row `row` lies, in elements from the row's beginning.
  MAC_DEVICE static int place(int row, int piece) {
    if constexpr (kHalfLines) return (piece ^ (row / 2 & 3)) * kUnit;  // two rows share a line
    return ((piece & ~7) | ((piece ^ row) & 7)) * kUnit;
  }
  // Which rows of a tile are there, 16 bits for each of the rounds in flight.
  using Valid = std::conditional_t<kWarpTokens*(kCount + 1) <= 64, uint64_t, unsigned __int128>;
};

// The token row that a lane has looked up: lanes r and r + 16 row r of the warp's 16.
struct Row {
  uint32_t page, offset;
  bool valid;
};

template <bool kAnchors, bool kTwice>
MAC_DEVICE Row find_row(const AmendParams& p, const AmendWorkspace& w, const Piece& piece, int tile, int warp) {
  const TileTokens tokens = tile_tokens<kAnchors, kTwice>(p, piece.work, tile);
  const int place = tokens.begin + warp * kWarpTokens + ptx::lane_id() % kWarpTokens;
  Row row{0, 0, place < tokens.end};
  int token = place;
  if (kAnchors && tokens.anchors) {
    const int32_t* list = p.ring.anchors(p.requests.slots[piece.request], piece.kv_head, piece.work.place);
    if (row.valid) token = list[place];
    // Neither a place without an anchor nor a token that the entry does not stand for.
    row.valid = row.valid && token >= 0 && token < piece.work.start;
  }
  if (row.valid) {
    const int page_index = w.page_size.divide(token);
    row.page = p.kv.block_table[piece.request * p.kv.block_table_stride + page_index];
    row.offset = token - page_index * p.kv.page_size;
  }
  return row;
}

// Eight lanes side by side copy a row's 128 bytes at a time: whole lines of the L2 cache. Four do of 64 bytes.
template <typename T, int kHeadDim, bool kExact>
MAC_DEVICE void load_stage(const AmendParams& p, const AmendWorkspace& w, const Piece& piece, Row row, T* stage) {
  using Stage = Stage<kHeadDim, T>;
  constexpr int kChunks = kHeadDim / Stage::kUnit;
  constexpr int kLanes = Stage::kHalfLines ? 4 : 8, kRowsAtOnce = 32 / kLanes;
  const int lane = ptx::lane_id();
  const int k_chunks = row_elements<kHeadDim, kExact>(p.shape) / Stage::kUnit;
  const int v_chunks = value_elements<kHeadDim, kExact>(p.shape) / Stage::kUnit;
  // A page id outside the cache is not followed: the request is marked and answers NaN.
  if (row.valid && row.page >= static_cast<uint32_t>(p.kv.num_pages)) {
    row.valid = false, row.page = 0;
    ptx::atomic_or(w.status + piece.request, kBadPage);
    if (w.error_flag) ptx::atomic_or(w.error_flag, kBadPage);
  }
  // In units of 16 bytes, so that 32 bits are enough for 64 GiB of K and as much of V.
  const uint32_t k_place = row.page * w.k_page_units + row.offset * w.k_token_units;
  const uint32_t v_place = row.page * w.v_page_units + row.offset * w.v_token_units;
  const uint32_t valid = ptx::ballot(row.valid);
  // Bytes from the lane's first chunk on, so that of each row one multiplication is all there is to an address.
  const auto bytes = [&](const void* base, int64_t head_stride) {
    const int64_t first = piece.kv_head * head_stride * static_cast<int>(sizeof(T)) + lane % kLanes * 16;
    return static_cast<const unsigned char*>(base) + first;
  };
  const unsigned char *k_lane = bytes(p.kv.k, p.kv.k_head_stride), *v_lane = bytes(p.kv.v, p.kv.v_head_stride);
#pragma unroll
  for (int first = 0; first < kWarpTokens; first += kRowsAtOnce) {
    const int r = first + lane / kLanes;
    const bool fill = valid >> r & 1u;
    const unsigned char* k = k_lane + static_cast<uint64_t>(ptx::shfl(k_place, r)) * 16;
    const unsigned char* v = v_lane + static_cast<uint64_t>(ptx::shfl(v_place, r)) * 16;
#pragma unroll
    for (int i = 0; i * kLanes < kChunks; ++i) {
      const int chunk = lane % kLanes + i * kLanes;
      if (chunk >= kChunks) continue;
      // Rows eight apart have their pieces in the same order.
      T* to = stage + lane / kLanes * Stage::kRow + Stage::place(first % 8 + lane / kLanes, chunk) +
              first * Stage::kRow;
      ptx::cp_async_16(to, k + i * kLanes * 16, fill && (kExact || chunk < k_chunks));
      ptx::cp_async_16(to + kWarpTokens * Stage::kRow, v + i * kLanes * 16, fill && (kExact || chunk < v_chunks));
    }
  }
}

}  // namespace mac_attn::cuda
