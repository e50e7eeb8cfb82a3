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

// Merges the four warps' states through the stages they have just read and writes the piece's partial
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
  float* mine = static_cast<float*>(scratch.area(warp));
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
      const float4 part = ptx::load_float4(static_cast<float*>(scratch.area(j)) + place(head, d));
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

template <typename T, int kHeadDim, int kHeadBlocks>
MAC_DEVICE void amend_piece(const AmendParams& p, const AmendWorkspace& w, const Piece& piece,
                            WarpState<T, kHeadDim, kHeadBlocks>& state) {
  using Stage = Stage<kHeadDim>;
  T* shared = static_cast<T*>(dynamic_shared());
  T* query = shared + kWarps * Stage::kCount * Stage::kElements;
  const int warp = threadIdx.x / 32;
  T* stages = shared + warp * Stage::kCount * Stage::kElements;

  // Round r looks up the rows of tile r, asks for tile r - 1 and computes tile r - kCount. There is one loop for
  // filling the pipeline and for using it.
  Row row{};
  uint64_t valid = 0;  // 16 bits a round: which rows of the tile are there
  static_assert(kWarpTokens * (Stage::kCount + 1) <= 64, "the rounds in flight");
  int slot = 0;
#pragma unroll 1
  for (int ahead = piece.begin;; ++ahead) {
    if (ahead > piece.begin && ahead <= piece.end) {
      load_stage<T, kHeadDim>(p, w, piece, row,
                              stages + (ahead - 1 - piece.begin) % Stage::kCount * Stage::kElements);
    }
    ptx::cp_async_commit();
    if (ahead < piece.end) row = find_row(p, w, piece, ahead, warp);
    valid = valid << kWarpTokens | (ptx::ballot(row.valid && ahead < piece.end) & 0xffffu);
    if (ahead == piece.begin) state.load_query(p, piece, query);
    const int tile = ahead - Stage::kCount;
    if (tile < piece.begin) continue;
    ptx::cp_async_wait<Stage::kCount - 1>();
    ptx::sync_warp();  // the stage is filled for all lanes

    const TileTokens tokens = tile_tokens(p, piece.work, tile);
    const int first = tokens.begin + warp * kWarpTokens;
    const T* stage = stages + slot * Stage::kElements;
    if (first < tokens.end) {
      float x[kHeadBlocks][4];
      warp_logits<T, kHeadDim, kHeadBlocks>(p, state, stage, query, first,
                                            static_cast<uint32_t>(valid >> (kWarpTokens * Stage::kCount)),
                                            tokens.anchors, x);
      raise_max<T, kHeadDim, kHeadBlocks>(state, x);
      uint16_t* kept = nullptr;
      if (p.num_anchors > 0 && !piece.work.hit() && piece.span(tile) == kOld) {
        kept = keep_strip<T, kHeadDim, kHeadBlocks>(p, w, piece, state, x, first);
      }
      add_values<T, kHeadDim, kHeadBlocks>(state, x, stage, kept, p.shape.group_size);
    }
    ptx::sync_warp();  // all lanes have read the stage

    const bool at_end = tile + 1 == piece.end;
    if (at_end || tile + 1 == piece.work.old_tiles) {
      const Scratch scratch{reinterpret_cast<unsigned char*>(shared + slot * Stage::kElements),
                            Stage::kCount * Stage::kBytes};
      write_partial<T, kHeadDim, kHeadBlocks>(w, state, scratch,
                                              int64_t{piece.number} * kNumSpans + piece.span(tile));
      if (at_end) {
        leave_kv_head<T, kHeadDim>(p, w, piece, {reinterpret_cast<unsigned char*>(shared), Stage::kBytes});
      }
    }
    if (at_end) break;
    slot = slot + 1 == Stage::kCount ? 0 : slot + 1;
  }
  ptx::cp_async_wait<0>();
}

// Asks for the queries and the bands, which are read whatever match answers, while match is still looking. The
// lengths and pages that this goes by may still be written by the launches before: a wrong one is a prefetch in
// vain, within the caches all the same.
template <typename T, int kHeadDim>
MAC_DEVICE void prefetch_bands(const AmendParams& p, const AmendWorkspace& w) {
  constexpr int kLine = 64, kLines = (kHeadDim + kLine - 1) / kLine;  // elements; in a row
  constexpr int kMostBytes = 20 << 20;                                // of the L2 cache's 50 MB
  const int thread = blockIdx.x * kThreads + threadIdx.x, threads = gridDim.x * kThreads;
  const int B = p.shape.batch, H = p.shape.num_kv_heads, Hq = p.shape.num_qo_heads();
#pragma unroll 1
  for (int row = thread; row < B * Hq; row += threads) {
    const T* query =
        static_cast<const T*>(p.query.data) + row / Hq * p.query.batch_stride + row % Hq * p.query.head_stride;
    for (int i = 0; i < kLines; ++i) ptx::prefetch_l2(query + i * kLine);
  }
  const int64_t rows = int64_t{B} * p.band * H;
  if (rows * kHeadDim * 4 > kMostBytes) return;
#pragma unroll 1
  for (int row = thread; row < rows; row += threads) {
    const int kv_head = row % H, request = row / H / p.band, n = p.requests.seq_lens[request];
    const int token = n - 1 - row / H % p.band;
    if (token < 0 || n > w.max_tokens) continue;
    const int index = w.page_size.divide(token), offset = token - index * p.kv.page_size;
    const int64_t page = p.kv.block_table[request * p.kv.block_table_stride + index];
    if (page < 0 || page >= w.num_pages) continue;
    const T* k = static_cast<const T*>(p.kv.k) + page * p.kv.k_page_stride + offset * p.kv.k_token_stride;
    const T* v = static_cast<const T*>(p.kv.v) + page * p.kv.v_page_stride + offset * p.kv.v_token_stride;
    for (int i = 0; i < kLines; ++i) {
      ptx::prefetch_l2(k + kv_head * p.kv.k_head_stride + i * kLine);
      ptx::prefetch_l2(v + kv_head * p.kv.v_head_stride + i * kLine);
    }
  }
}

// CTAs of a processor. Where a third one fits, it makes a step at batch 1 slower (bench/README.md).
constexpr int ctas_per_processor(int head_dim) {
  return head_dim <= 128 ? 2 : 1;
}

template <typename T, int kHeadDim, int kHeadBlocks>
__global__ void __launch_bounds__(kThreads, ctas_per_processor(kHeadDim))
    amend_kernel(const __grid_constant__ AmendParams p, const __grid_constant__ AmendWorkspace w) {
  if (p.source) prefetch_bands<T, kHeadDim>(p, w);
  ptx::grid_dependency_wait();  // match's answer
  const Share share = share_out(p, w);
  ptx::grid_dependency_launch();
  WarpState<T, kHeadDim, kHeadBlocks> state;
  state.clear();
  __shared__ int next;
  const int ctas = gridDim.x;
  int number = blockIdx.x;
#pragma unroll 1
  while (number < share.all_pieces) {
    const Piece piece = find_piece(p, w, share, number);
    int drawn = 0;
    if (threadIdx.x == 0 && share.all_pieces > ctas) drawn = ptx::atomic_add(w.drawn, 1);
    amend_piece<T, kHeadDim, kHeadBlocks>(p, w, piece, state);
    if (share.all_pieces <= ctas) break;
    if (threadIdx.x == 0) {
      next = ctas + drawn;
      // There are as many draws as pieces, one after each; the last one of all leaves the counter as it was.
      if (drawn == share.all_pieces - 1) *w.drawn = 0;
    }
    ptx::sync_block();
    number = next;
  }
}

}  // namespace mac_attn::cuda
