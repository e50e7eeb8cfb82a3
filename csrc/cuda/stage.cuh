// The tiles of K and V on their way to shared memory: which rows, and the copies of one stage.
//
// A warp looks after 16 rows of each tile by itself: nobody else reads its stages.
// Traffic: each row once, 128 bytes at a time; a block-table entry for every row (one line for all of a page).
#pragma once

#include "ptx/async_copy.h"
#include "ptx/memory.h"
#include "ptx/warp.h"
#include "schedule.cuh"

namespace mac_attn::cuda {

// Shared memory of one stage of one warp: 16 rows of K, 16 of V. 16 bytes of padding put the eight rows of
// an ldmatrix into different banks.
template <int kHeadDim>
struct Stage {
  static constexpr int kCount = kHeadDim <= 128 ? 3 : 2;  // in the pipeline
  static constexpr int kRow = kHeadDim + 8;               // elements
  static constexpr int kElements = 2 * kWarpTokens * kRow;
  static constexpr int kBytes = kElements * 2;
};

// The token row that a lane has looked up: lanes r and r + 16 row r of the warp's 16.
struct Row {
  uint32_t page, offset;
  bool valid;
};

MAC_DEVICE Row find_row(const AmendParams& p, const AmendWorkspace& w, const Cursor& cursor, int warp) {
  const TileTokens tokens = tile_tokens(p, cursor);
  const int place = tokens.begin + warp * kWarpTokens + ptx::lane_id() % kWarpTokens;
  Row row{0, 0, place < tokens.end};
  int token = place;
  if (tokens.anchors) {
    // Who reads the inherited anchors hands them on.
    const int32_t* list = inherited_anchors(p, cursor.request, cursor.kv_head);
    int32_t* handed_on = p.anchors + static_cast<int64_t>(cursor.kv_group(p)) * p.num_anchors;
    token = kNoAnchor;
    if (row.valid) token = list[place];
    if (row.valid && ptx::lane_id() < kWarpTokens && cursor.head_tile == 0) handed_on[place] = token;
    row.valid = token != kNoAnchor;
  }
  if (row.valid) {
    const int page_index = w.page_size.divide(token);
    row.page = p.kv.block_table[cursor.request * p.kv.block_table_stride + page_index];
    row.offset = token - page_index * p.kv.page_size;
  }
  return row;
}

// Eight lanes side by side copy a row's 128 bytes at a time: whole lines of the L2 cache.
template <typename T, int kHeadDim>
MAC_DEVICE void load_stage(const AmendParams& p, const AmendWorkspace& w, const Cursor& cursor, Row row, T* stage) {
  constexpr int kChunks = kHeadDim / 8, kRowsAtOnce = 4, kUnit = 8;  // elements of 16 bytes
  const int lane = ptx::lane_id();
  // A page id outside the cache is not followed: the request is marked and answers NaN.
  if (row.valid && row.page >= static_cast<uint32_t>(w.num_pages)) {
    row.valid = false, row.page = 0;
    ptx::atomic_or(w.status + cursor.request, kBadPage);
    if (w.error_flag) ptx::atomic_or(w.error_flag, kBadPage);
  }
  // In units of 16 bytes, so that 32 bits are enough for 64 GiB of K and as much of V.
  const uint32_t k_place = row.page * w.k_page_units + row.offset * w.k_token_units;
  const uint32_t v_place = row.page * w.v_page_units + row.offset * w.v_token_units;
  const uint32_t valid = ptx::ballot(row.valid);
  const T* k_head = static_cast<const T*>(p.kv.k) + cursor.kv_head * p.kv.k_head_stride;
  const T* v_head = static_cast<const T*>(p.kv.v) + cursor.kv_head * p.kv.v_head_stride;
#pragma unroll
  for (int first = 0; first < kWarpTokens; first += kRowsAtOnce) {
    const int r = first + lane / 8;
    const bool fill = valid >> r & 1u;
    const T* k = k_head + static_cast<uint64_t>(ptx::shfl(k_place, r)) * kUnit;
    const T* v = v_head + static_cast<uint64_t>(ptx::shfl(v_place, r)) * kUnit;
    T* k_row = stage + r * Stage<kHeadDim>::kRow;
    T* v_row = k_row + kWarpTokens * Stage<kHeadDim>::kRow;
#pragma unroll
    for (int chunk = lane % 8; chunk < kChunks; chunk += 8) {
      ptx::cp_async_16(k_row + chunk * 8, k + chunk * 8, fill);
      ptx::cp_async_16(v_row + chunk * 8, v + chunk * 8, fill);
    }
  }
}

}  // namespace mac_attn::cuda
