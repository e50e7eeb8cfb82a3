// Amend on the GPU: split-KV decode attention over the tokens that reuse does not cover.
//
//   old   = state([s, E(p)) without the anchors)        fresh = state(anchors) (+) state([E(p), n))
//
// Grid: persistent, see schedule.cuh. Four warps a CTA; of each tile of 64 tokens every warp takes 16, with
// a cp.async pipeline of its own straight from the pages (stage.cuh) and without a barrier of the block.
// Traffic: the K and V rows of [s, n) and of the inherited anchors, once per 16 query heads; the partial states.
#pragma once

#include "finish.cuh"
#include "ptx/barrier.h"
#include "warp_state.cuh"

namespace mac_attn::cuda {

// The query lies behind the stages, [8 kHeadBlocks, D].
template <int kHeadDim, int kHeadBlocks>
constexpr int amend_shared_bytes() {
  const int query = 8 * kHeadBlocks * WarpState<bf16, kHeadDim, kHeadBlocks>::kQueryRow * 2;
  return kWarps * Stage<kHeadDim>::kCount * Stage<kHeadDim>::kBytes + query;
}

// Merges the four warps' states through the stages they have just read and writes the segment's partial
// state. Every thread of the block comes here at the same tile.
template <typename T, int kHeadDim, int kHeadBlocks>
MAC_DEVICE void write_partial(const AmendWorkspace& w, WarpState<T, kHeadDim, kHeadBlocks>& state,
                              const Scratch& scratch, int64_t partial) {
  constexpr int kRow = (kHeadDim + 31) / 32 * 32;  // floats
  constexpr int kHeads = 8 * kHeadBlocks;
  __shared__ float warp_max[kWarps][kHeads], warp_sum[kWarps][kHeads];
  // Columns are shuffled within 32, so that the four heads that a warp writes at a time lie in different banks.
  const auto place = [](int head, int column) { return head * kRow + (column ^ head / 2 % 4 * 8); };
  const int lane = ptx::lane_id(), warp = threadIdx.x / 32, heads = w.tile_heads;
  static_assert(kHeads * kRow * 4 <= Stage<kHeadDim>::kBytes, "a state fits a stage");
  float* mine = scratch.area(warp);
#pragma unroll
  for (int b = 0; b < kHeadBlocks; ++b) {
    for (int i = 0; i < 2; ++i) {
      const int head = b * 8 + lane % 4 * 2 + i;
      for (int distance = 4; distance < 32; distance *= 2) {
        state.sum[b][i] += ptx::shfl_xor(state.sum[b][i], distance);
      }
      if (lane < 4) {
        warp_max[warp][head] = state.max[b][i];
        warp_sum[warp][head] = state.sum[b][i];
      }
#pragma unroll
      for (int s = 0; s < kHeadDim / 16; ++s) {
        mine[place(head, s * 16 + lane / 4)] = state.out[b][s][i];
        mine[place(head, s * 16 + lane / 4 + 8)] = state.out[b][s][2 + i];
      }
    }
  }
  ptx::sync_block();
#pragma unroll 1
  for (int i = threadIdx.x; i < heads * (kHeadDim / 4); i += kThreads) {
    const int head = i / (kHeadDim / 4), d = i % (kHeadDim / 4) * 4;
    float max = -INFINITY, sum = 0.f;
    float4 out{0.f, 0.f, 0.f, 0.f};
    for (int j = 0; j < kWarps; ++j) max = fmaxf(max, warp_max[j][head]);
    for (int j = 0; j < kWarps; ++j) {
      const float weight = ptx::ex2(warp_max[j][head] - finite_or_zero(max));
      const float4 part = ptx::load_float4(scratch.area(j) + place(head, d));
      sum += warp_sum[j][head] * weight;
      out.x += part.x * weight, out.y += part.y * weight, out.z += part.z * weight, out.w += part.w * weight;
    }
    ptx::store_float4(w.partial_out + (partial * heads + head) * kHeadDim + d, out);
    if (d == 0) {
      w.partial_max[partial * heads + head] = max;
      w.partial_sum[partial * heads + head] = sum;
    }
  }
  ptx::sync_block();  // the stages may be filled again
  state.clear();
}

// The tiles of one piece, from `cursor` on.
template <typename T, int kHeadDim, int kHeadBlocks>
MAC_DEVICE void amend_piece(const AmendParams& p, const AmendWorkspace& w, const Line& line, int piece,
                            Cursor cursor, WarpState<T, kHeadDim, kHeadBlocks>& state) {
  using Stage = Stage<kHeadDim>;
  T* shared = static_cast<T*>(dynamic_shared());
  T* query = shared + kWarps * Stage::kCount * Stage::kElements;
  const int warp = threadIdx.x / 32, end = line.begin(piece + 1);
  T* stages = shared + warp * Stage::kCount * Stage::kElements;

  // Round r looks up the rows of tile r, asks for tile r - 1 and computes tile r - kCount. There is one loop for
  // filling the pipeline and for using it, as the first run through any code waits for the code itself.
  Cursor ahead = cursor;
  Row row{};
  bool new_pass = true;
  uint64_t valid = 0;  // 16 bits a round: which rows of the tile are there
  static_assert(kWarpTokens * (Stage::kCount + 1) <= 64, "the rounds in flight");
  int slot = 0, filling = Stage::kCount;
#pragma unroll 1
  for (int round = 0;; ++round) {
    if (round > 0 && ahead.place < end) {
      load_stage<T, kHeadDim>(p, w, ahead, row, stages + (round - 1) % Stage::kCount * Stage::kElements);
      ahead.advance(p, w, end);
    }
    ptx::cp_async_commit();
    if (ahead.place < end) row = find_row(p, w, ahead, warp);
    valid = valid << kWarpTokens | (ptx::ballot(row.valid && ahead.place < end) & 0xffffu);
    if (new_pass) state.load_query(p, cursor, query);
    new_pass = false;
    if (filling-- > 0) continue;
    filling = 0;
    ptx::cp_async_wait<Stage::kCount - 1>();
    ptx::sync_warp();  // the stage is filled for all lanes

    const TileTokens tokens = tile_tokens(p, cursor);
    const int first = tokens.begin + warp * kWarpTokens;
    const T* stage = stages + slot * Stage::kElements;
    if (first < tokens.end) {
      float x[kHeadBlocks][4];
      warp_logits<T, kHeadDim, kHeadBlocks>(p, state, stage, query, first,
                                            static_cast<uint32_t>(valid >> (kWarpTokens * Stage::kCount)),
                                            tokens.anchors, x);
      raise_max<T, kHeadDim, kHeadBlocks>(state, x);
      if (p.num_anchors > 0 && !cursor.work.hit() && cursor.span() == kOld) {
        keep_candidate<T, kHeadDim, kHeadBlocks>(p, w, cursor, state, x, first);
      }
      add_values<T, kHeadDim, kHeadBlocks>(state, x, stage);
    }
    ptx::sync_warp();  // all lanes have read the stage

    const bool at_end = !cursor.has_next(end);
    new_pass = cursor.local + 1 == cursor.work.tiles;
    if (at_end || new_pass || cursor.local + 1 == cursor.work.old_tiles) {
      const Scratch scratch{reinterpret_cast<unsigned char*>(shared + slot * Stage::kElements),
                            Stage::kCount * Stage::kBytes};
      const int64_t segment = static_cast<int64_t>(piece) + cursor.pass(p, w);
      write_partial<T, kHeadDim, kHeadBlocks>(w, state, scratch, segment * kNumSpans + cursor.span());
      if (at_end || (new_pass && cursor.head_tile + 1 == w.head_tiles)) {
        leave_kv_head<T, kHeadDim>(p, w, line, piece, cursor, scratch);
      }
    }
    if (at_end) break;
    cursor.advance(p, w, end);
    slot = slot + 1 == Stage::kCount ? 0 : slot + 1;
  }
  ptx::cp_async_wait<0>();
}

template <typename T, int kHeadDim, int kHeadBlocks>
__global__ void __launch_bounds__(kThreads, kHeadDim <= 128 ? 2 : 1)
    amend_kernel(const __grid_constant__ AmendParams p, const __grid_constant__ AmendWorkspace w) {
  ptx::grid_dependency_wait();  // match's answer
  LineShare share;
  const Line line = sum_line(p, w, share);
  ptx::grid_dependency_launch();
  WarpState<T, kHeadDim, kHeadBlocks> state;
  state.clear();
#pragma unroll 1
  for (int piece = blockIdx.x; piece < line.pieces; piece = draw_piece(w, line)) {
    Cursor cursor;
    if (find_tile(p, w, line, share, piece, cursor))
      amend_piece<T, kHeadDim, kHeadBlocks>(p, w, line, piece, cursor, state);
  }
}

}  // namespace mac_attn::cuda
