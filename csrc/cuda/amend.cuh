// Amend on the GPU: split-KV decode attention over the tokens that reuse does not cover.
//
//   old   = state([s, E(p)) without the anchors)        fresh = state(anchors) (+) state([E(p), n))
//
// Grid: persistent, see schedule.cuh. Four warps a CTA; of each tile of 64 tokens every warp takes 16, with
// a cp.async pipeline of its own straight from the pages and without a barrier of the block. Tokens are the M
// rows of the MMAs and query heads the N columns, so that a group of 8 wastes nothing:
//   S^T [16 tokens, heads] = K Q^T,   O^T [D, heads] += V^T P^T.
// The maximum a weight is relative to moves only when a logit passes it by 8 (log2): until then neither a
// shuffle nor a rescaling is needed, and no weight exceeds 256.
// Traffic: the K and V rows of [s, n) and of the inherited anchors, once per 16 query heads.
#pragma once

#include "finish.cuh"
#include "ptx/async_copy.h"
#include "ptx/barrier.h"
#include "ptx/math.h"
#include "ptx/matrix.h"
#include "ptx/memory.h"
#include "ptx/warp.h"
#include "schedule.cuh"

namespace mac_attn::cuda {

constexpr int kNoHead = 0x7ffffffe;
constexpr float kMaxLead = 8.f;          // log2, see above
constexpr float kCandidateLead = -12.f;  // log2: lighter tokens, against the maximum so far, are no anchors

// Shared memory of one stage of one warp: 16 rows of K, 16 of V. 16 bytes of padding put the eight rows of
// an ldmatrix into different banks.
template <int kHeadDim>
struct Stage {
  static constexpr int kCount = kHeadDim <= 128 ? 3 : 2;  // in the pipeline
  static constexpr int kRow = kHeadDim + 8;               // elements
  static constexpr int kElements = 2 * kWarpTokens * kRow;
  static constexpr int kBytes = kElements * 2;
};

// The query lies behind the stages, [8 kHeadBlocks, D].
template <int kHeadDim, int kHeadBlocks>
constexpr int amend_shared_bytes() {
  const int query = 8 * kHeadBlocks * Stage<kHeadDim>::kRow * 2;
  return kWarps * Stage<kHeadDim>::kCount * Stage<kHeadDim>::kBytes + query;
}

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

// One warp's running softmax over its tokens. A lane holds heads 2 (lane % 4) + {0, 1} of each block of
// eight, of O^T rows lane / 4 + {0, 8} of each 16.
template <typename T, int kHeadDim, int kHeadBlocks>
struct WarpState {
  static constexpr int kSteps = kHeadDim / 16;
  static constexpr bool kQueryInRegisters = kHeadBlocks == 1;  // there is no room for two blocks
  uint32_t q[kQueryInRegisters ? kSteps : 1][2];
  float out[kHeadBlocks][kSteps][4];
  float max[kHeadBlocks][2];
  float sum[kHeadBlocks][2];
  int source[kHeadBlocks][2];  // position of the entry that the head reuses; kNoHead for a column without one

  MAC_DEVICE void clear() {
#pragma unroll
    for (int b = 0; b < kHeadBlocks; ++b) {
      for (int i = 0; i < 2; ++i) max[b][i] = -INFINITY, sum[b][i] = 0.f;
      for (int s = 0; s < kSteps; ++s) {
        for (int i = 0; i < 4; ++i) out[b][s][i] = 0.f;
      }
    }
  }

  // The whole block takes part.
  MAC_DEVICE void load_query(const AmendParams& p, const Cursor& cursor, T* shared) {
    constexpr int kPieces = kHeadDim / 8, kRow = Stage<kHeadDim>::kRow;
    const int lane = ptx::lane_id(), request = cursor.request, kv_head = cursor.kv_head;
    const int G = p.shape.group_size, first = cursor.head_tile * kMaxTileHeads;  // within the group
    const T* rows = static_cast<const T*>(p.query.data) + request * p.query.batch_stride +
                    static_cast<int64_t>(kv_head) * G * p.query.head_stride;
    const int32_t* sources = p.source + static_cast<int64_t>(cursor.kv_group(p)) * G;
#pragma unroll 1
    for (int i = threadIdx.x; i < 8 * kHeadBlocks * kPieces; i += kThreads) {
      const int g = first + i / kPieces, d = i % kPieces * 8;
      const uint4 piece = g < G ? ptx::load_16(rows + g * p.query.head_stride + d) : uint4{0, 0, 0, 0};
      ptx::store_16(shared + i / kPieces * kRow + d, piece);
    }
    ptx::sync_block();
    if constexpr (kQueryInRegisters) {
#pragma unroll
      for (int s = 0; s < kSteps; ++s) {
        for (int i = 0; i < 2; ++i) q[s][i] = ptx::load_4(shared + lane / 4 * kRow + s * 16 + i * 8 + lane % 4 * 2);
      }
    }
#pragma unroll
    for (int b = 0; b < kHeadBlocks; ++b) {
      for (int i = 0; i < 2; ++i) {
        const int column = first + b * 8 + lane % 4 * 2 + i;
        source[b][i] = column < G ? kMiss : kNoHead;
        if (column < G && p.source) source[b][i] = sources[column];
      }
    }
  }
};

// Logits of the warp's 16 tokens, log2, masked by the bits of `valid`: x[b][0, 1] token lane / 4, x[b][2, 3] token
// lane / 4 + 8.
template <typename T, int kHeadDim, int kHeadBlocks>
MAC_DEVICE void warp_logits(const AmendParams& p, const WarpState<T, kHeadDim, kHeadBlocks>& state, const T* stage,
                            const T* query, int first_token, uint32_t valid, bool anchors,
                            float (&x)[kHeadBlocks][4]) {
  constexpr int kSteps = kHeadDim / 16;
  const int lane = ptx::lane_id();
  // Two chains of MMAs hide their latency; two blocks of heads are two chains already.
  float sum[2][4] = {};
  const T* row = stage + (lane % 8 + lane / 8 % 2 * 8) * Stage<kHeadDim>::kRow + lane / 16 * 8;
  const T* query_row = query + (lane % 8 + lane / 16 * 8) * Stage<kHeadDim>::kRow + lane / 8 % 2 * 8;
#pragma unroll
  for (int s = 0; s < kSteps; ++s) {
    uint32_t k[4], q[4];
    ptx::ldmatrix_x4(k, row + s * 16);
    if constexpr (kHeadBlocks == 1) {
      q[0] = state.q[s][0], q[1] = state.q[s][1];
    } else {
      ptx::ldmatrix_x4(q, query_row + s * 16);
    }
#pragma unroll
    for (int b = 0; b < kHeadBlocks; ++b) {
      ptx::mma_m16n8k16<T>(sum[kHeadBlocks == 1 ? s % 2 : b], k, q[2 * b], q[2 * b + 1]);
    }
  }
  for (int i = 0; i < 4; ++i) {
    const int token = first_token + lane / 4 + i / 2 * 8;
#pragma unroll
    for (int b = 0; b < kHeadBlocks; ++b) {
      float logit = (kHeadBlocks == 1 ? sum[0][i] + sum[1][i] : sum[b][i]) * p.sm_scale;
      if (p.logits_soft_cap > 0.f) logit = p.logits_soft_cap * ptx::tanh(logit / p.logits_soft_cap);
      const int source = state.source[b][i % 2];
      const bool counts = source != kNoHead && (anchors || token >= amend_start(p, source));
      x[b][i] = (valid >> (lane / 4 + i / 2 * 8) & 1u) && counts ? logit * kLog2E : -INFINITY;
    }
  }
}

// Remembers the heaviest of the warp's tokens as a candidate for an anchor, if one is heavy at all.
template <typename T, int kHeadDim, int kHeadBlocks>
MAC_DEVICE void keep_candidate(const AmendParams& p, const AmendWorkspace& w, const Cursor& cursor,
                               const WarpState<T, kHeadDim, kHeadBlocks>& state, const float (&x)[kHeadBlocks][4],
                               int first_token) {
  const int lane = ptx::lane_id(), G = p.shape.group_size;
  // A weight's lead over kCandidateLead as a number whose bits are ordered like it; the last four are the token's.
  uint32_t heaviest = 0;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float lead = 0.f;
#pragma unroll
    for (int b = 0; b < kHeadBlocks; ++b) {
      for (int i = 0; i < 2; ++i) lead = fmaxf(lead, x[b][2 * half + i] - state.max[b][i] - kCandidateLead);
    }
    const uint32_t key = (float_bits(lead) & ~15u) | (15 - lane / 4 - 8 * half);
    if (lead > 0.f) heaviest = key > heaviest ? key : heaviest;
  }
  heaviest = ptx::reduce_max(heaviest);
  const int64_t base = static_cast<int64_t>(cursor.kv_group(p)) * w.max_candidates;
  const int place = first_token / kWarpTokens, row = 15 - heaviest % 16;
  float* logits = w.candidate_logit + base * G + place;
  if (first_token + kWarpTokens >= cursor.work.old_end && lane < G) {
    // They are read four at a time: fill up the last four.
    for (int i = 1; (place + i) % 4 != 0; ++i)
      logits[static_cast<int64_t>(lane) * w.max_candidates + i] = -INFINITY;
  }
  if (heaviest == 0) {
    if (lane < G) logits[static_cast<int64_t>(lane) * w.max_candidates] = -INFINITY;
    return;
  }
  if (lane == 0) w.candidate[base + place] = first_token + row;
  if (lane / 4 != row % 8) return;
#pragma unroll
  for (int b = 0; b < kHeadBlocks; ++b) {
    for (int i = 0; i < 2; ++i) {
      const int g = b * 8 + lane % 4 * 2 + i;
      if (g >= G) continue;
      const int64_t offset = static_cast<int64_t>(g) * w.max_candidates;
      logits[offset] = row < 8 ? x[b][i] : x[b][2 + i];
      w.candidate_max[base * G + offset + place] = state.max[b][i];
    }
  }
}

template <typename T, int kHeadDim, int kHeadBlocks>
MAC_DEVICE void raise_max(WarpState<T, kHeadDim, kHeadBlocks>& state, const float (&x)[kHeadBlocks][4]) {
  float high[kHeadBlocks][2];
  bool passed = false;
#pragma unroll
  for (int b = 0; b < kHeadBlocks; ++b) {
    for (int i = 0; i < 2; ++i) {
      high[b][i] = fmaxf(x[b][i], x[b][2 + i]);
      passed = passed || high[b][i] > state.max[b][i] + kMaxLead;
    }
  }
  if (!ptx::ballot(passed)) return;
#pragma unroll
  for (int b = 0; b < kHeadBlocks; ++b) {
    for (int i = 0; i < 2; ++i) {
      for (int distance = 4; distance < 32; distance *= 2) {
        high[b][i] = fmaxf(high[b][i], ptx::shfl_xor(high[b][i], distance));
      }
      const float max = fmaxf(state.max[b][i], high[b][i]);
      const float rescale = max == state.max[b][i] ? 1.f : ptx::ex2(state.max[b][i] - max);
      state.max[b][i] = max;
      state.sum[b][i] *= rescale;
#pragma unroll
      for (int s = 0; s < kHeadDim / 16; ++s) state.out[b][s][i] *= rescale, state.out[b][s][2 + i] *= rescale;
    }
  }
}

template <typename T, int kHeadDim, int kHeadBlocks>
MAC_DEVICE void add_values(WarpState<T, kHeadDim, kHeadBlocks>& state, const float (&x)[kHeadBlocks][4],
                           const T* stage) {
  const int lane = ptx::lane_id();
  uint32_t weights[kHeadBlocks][2];
#pragma unroll
  for (int b = 0; b < kHeadBlocks; ++b) {
    for (int half = 0; half < 2; ++half) {
      float weight[2];
      for (int i = 0; i < 2; ++i) weight[i] = ptx::ex2(x[b][2 * half + i] - finite_or_zero(state.max[b][i]));
      const uint32_t pair = ptx::pack2<T>(weight[0], weight[1]);
      // Sum what the MMA multiplies by, so that numerator and denominator are rounded alike.
      const float2 rounded = ptx::unpack2<T>(pair);
      state.sum[b][0] += rounded.x;
      state.sum[b][1] += rounded.y;
      weights[b][half] = ptx::movmatrix_trans(pair);
    }
  }
  const T* row = stage + (kWarpTokens + lane / 16 * 8 + lane % 8) * Stage<kHeadDim>::kRow + lane / 8 % 2 * 8;
#pragma unroll
  for (int s = 0; s < kHeadDim / 16; ++s) {
    uint32_t v[4];
    ptx::ldmatrix_x4_trans(v, row + s * 16);
#pragma unroll
    for (int b = 0; b < kHeadBlocks; ++b) ptx::mma_m16n8k16<T>(state.out[b][s], v, weights[b][0], weights[b][1]);
  }
}

// Merges the four warps' states through the stages they have just read and writes the segment's partial
// state. Every thread of the block comes here at the same tile.
template <typename T, int kHeadDim, int kHeadBlocks>
MAC_DEVICE void write_partial(const AmendWorkspace& w, WarpState<T, kHeadDim, kHeadBlocks>& state,
                              const Scratch& scratch, int64_t partial) {
  constexpr int kRow = kHeadDim + 4;  // floats; the padding spreads the heads over the banks
  constexpr int kHeads = 8 * kHeadBlocks;
  const int lane = ptx::lane_id(), warp = threadIdx.x / 32, heads = w.tile_heads;
  static_assert((kHeads * (kRow + 2)) * 4 <= Stage<kHeadDim>::kBytes, "a state fits a stage");
  float* mine = scratch.area(warp);
#pragma unroll
  for (int b = 0; b < kHeadBlocks; ++b) {
    for (int i = 0; i < 2; ++i) {
      const int head = b * 8 + lane % 4 * 2 + i;
      for (int distance = 4; distance < 32; distance *= 2) {
        state.sum[b][i] += ptx::shfl_xor(state.sum[b][i], distance);
      }
      if (lane < 4) {
        mine[kHeads * kRow + head] = state.max[b][i];
        mine[kHeads * kRow + kHeads + head] = state.sum[b][i];
      }
#pragma unroll
      for (int s = 0; s < kHeadDim / 16; ++s) {
        mine[head * kRow + s * 16 + lane / 4] = state.out[b][s][i];
        mine[head * kRow + s * 16 + lane / 4 + 8] = state.out[b][s][2 + i];
      }
    }
  }
  ptx::sync_block();
#pragma unroll 1
  for (int i = threadIdx.x; i < heads * (kHeadDim / 4); i += kThreads) {
    const int head = i / (kHeadDim / 4), d = i % (kHeadDim / 4) * 4;
    float max = -INFINITY, sum = 0.f;
    float4 out{0.f, 0.f, 0.f, 0.f};
    for (int j = 0; j < kWarps; ++j) max = fmaxf(max, scratch.area(j)[kHeads * kRow + head]);
    for (int j = 0; j < kWarps; ++j) {
      const float* area = scratch.area(j);
      const float weight = ptx::ex2(area[kHeads * kRow + head] - finite_or_zero(max));
      const float4 part = ptx::load_float4(area + head * kRow + d);
      sum += area[kHeads * kRow + kHeads + head] * weight;
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
