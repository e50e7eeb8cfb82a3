// One warp's attention to its 16 tokens of a tile. Tokens are the M rows of the MMAs and query heads the N columns,
// so that a group of 8 wastes nothing:
//   S^T [16 tokens, heads] = K Q^T,   O^T [D, heads] += V^T P^T.
// The maximum a weight is relative to moves only when a logit passes it by 8 (log2): until then neither a
// shuffle nor a rescaling is needed, and no weight exceeds 256.
// Traffic: shared memory only, but for what a miss keeps of its old tokens for choosing anchors: 2 bytes for each
// token and head, and 8 for each head and strip of 16 tokens.
#pragma once

#include "log2.cuh"
#include "ptx/barrier.h"
#include "ptx/math.h"
#include "ptx/matrix.h"
#include "stage.cuh"

namespace mac_attn::cuda {

constexpr int kNoHead = 0x7ffffffe;
constexpr float kMaxLead = 8.f;      // log2, see above
constexpr float kHeavyLead = -12.f;  // log2: a strip of lighter tokens, against the maximum so far, has no anchors

// One warp's running softmax over its tokens. A lane holds heads 2 (lane % 4) + {0, 1} of each block of
// eight, of O^T rows lane / 4 + {0, 8} of each 16.
template <typename T, int kHeadDim, int kHeadBlocks>
struct WarpState {
  static constexpr int kSteps = kHeadDim / 16;
  static constexpr int kQueryRow = kHeadDim + 8;  // elements in shared memory; padded against bank conflicts
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
  MAC_DEVICE void load_query(const AmendParams& p, const Piece& piece, T* shared) {
    constexpr int kPieces = kHeadDim / 8;
    const int lane = ptx::lane_id(), request = piece.request, kv_head = piece.kv_head;
    const int G = p.shape.group_size, first = piece.head_tile * kMaxTileHeads;  // within the group
    const T* rows = static_cast<const T*>(p.query.data) + request * p.query.batch_stride +
                    static_cast<int64_t>(kv_head) * G * p.query.head_stride;
    const int32_t* sources = p.source + static_cast<int64_t>(piece.kv_group(p)) * G;
#pragma unroll 1
    for (int i = threadIdx.x; i < 8 * kHeadBlocks * kPieces; i += kThreads) {
      const int g = first + i / kPieces, d = i % kPieces * 8;
      const uint4 data = g < G ? ptx::load_16(rows + g * p.query.head_stride + d) : uint4{0, 0, 0, 0};
      ptx::store_16(shared + i / kPieces * kQueryRow + d, data);
    }
    ptx::sync_block();
    if constexpr (kQueryInRegisters) {
#pragma unroll
      for (int s = 0; s < kSteps; ++s) {
        for (int i = 0; i < 2; ++i)
          q[s][i] = ptx::load_4(shared + lane / 4 * kQueryRow + s * 16 + i * 8 + lane % 4 * 2);
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
  const T* row = stage + (lane % 8 + lane / 8 % 2 * 8) * Stage<kHeadDim>::kRow;
  const T* query_row =
      query + (lane % 8 + lane / 16 * 8) * WarpState<T, kHeadDim, kHeadBlocks>::kQueryRow + lane / 8 % 2 * 8;
#pragma unroll
  for (int s = 0; s < kSteps; ++s) {
    uint32_t k[4], q[4];
    ptx::ldmatrix_x4(k, row + Stage<kHeadDim>::place(lane, 2 * s + lane / 16));
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

// Keeps what the choice of anchors goes by: of every head the largest logit of the strip and the maximum that its
// weights are relative to. Returns where the weights are to be kept, null if all of them are light.
template <typename T, int kHeadDim, int kHeadBlocks>
MAC_DEVICE uint16_t* keep_strip(const AmendParams& p, const AmendWorkspace& w, const Piece& piece,
                                const WarpState<T, kHeadDim, kHeadBlocks>& state, const float (&x)[kHeadBlocks][4],
                                int first_token) {
  const int lane = ptx::lane_id(), G = p.shape.group_size;
  const int64_t strip = static_cast<int64_t>(piece.kv_group(p)) * w.max_strips + first_token / kWarpTokens;
  float high[kHeadBlocks][2];
  bool heavy = false;
#pragma unroll
  for (int b = 0; b < kHeadBlocks; ++b) {
    for (int i = 0; i < 2; ++i) {
      high[b][i] = fmaxf(x[b][i], x[b][2 + i]);
      heavy = heavy || high[b][i] > state.max[b][i] + kHeavyLead;
    }
  }
  const bool light = !ptx::ballot(heavy), second = lane & 4;  // which head of its pair a lane brings to an end
#pragma unroll
  for (int b = 0; b < kHeadBlocks; ++b) {
    float logit = -INFINITY;
    if (!light) {
      const float mine = second ? high[b][1] : high[b][0], other = second ? high[b][0] : high[b][1];
      logit = fmaxf(mine, ptx::shfl_xor(other, 4));
      logit = fmaxf(logit, ptx::shfl_xor(logit, 8));
      logit = fmaxf(logit, ptx::shfl_xor(logit, 16));
    }
    const int g = b * 8 + lane % 4 * 2 + second;
    if (lane >= 8 || g >= strip_row(G)) continue;  // a column without a head is -inf
    w.strip_logit[strip * strip_row(G) + g] = logit;
    if (!light) w.strip_max[strip * strip_row(G) + g] = second ? state.max[b][1] : state.max[b][0];
  }
  return light ? nullptr : w.token_weight + strip * kWarpTokens * weight_row(G);
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

// `kept`: where the strip's weights are kept, or null.
template <typename T, int kHeadDim, int kHeadBlocks>
MAC_DEVICE void add_values(WarpState<T, kHeadDim, kHeadBlocks>& state, const float (&x)[kHeadBlocks][4],
                           const T* stage, uint16_t* kept, int group_size) {
  const int lane = ptx::lane_id();
  uint32_t weights[kHeadBlocks][2];
#pragma unroll
  for (int b = 0; b < kHeadBlocks; ++b) {
    uint32_t pairs[2];
    for (int half = 0; half < 2; ++half) {
      float weight[2];
      for (int i = 0; i < 2; ++i) weight[i] = ptx::ex2(x[b][2 * half + i] - finite_or_zero(state.max[b][i]));
      pairs[half] = ptx::pack2<T>(weight[0], weight[1]);
      // Sum what the MMA multiplies by, so that numerator and denominator are rounded alike.
      const float2 rounded = ptx::unpack2<T>(pairs[half]);
      state.sum[b][0] += rounded.x;
      state.sum[b][1] += rounded.y;
      weights[b][half] = ptx::movmatrix_trans(pairs[half]);
    }
    const int column = b * 8 + lane % 4 * 2;
    if (kept && column < group_size) {
      ptx::store_8(kept + weight_place(group_size, lane / 4, column), {pairs[0], pairs[1]});
    }
  }
  const T* row = stage + (kWarpTokens + lane / 16 * 8 + lane % 8) * Stage<kHeadDim>::kRow;
#pragma unroll
  for (int s = 0; s < kHeadDim / 16; ++s) {
    uint32_t v[4];
    ptx::ldmatrix_x4_trans(v, row + Stage<kHeadDim>::place(lane, 2 * s + lane / 8 % 2));
#pragma unroll
    for (int b = 0; b < kHeadBlocks; ++b) ptx::mma_m16n8k16<T>(state.out[b][s], v, weights[b][0], weights[b][1]);
  }
}

}  // namespace mac_attn::cuda
