// One warp's attention to its 16 tokens of a tile. Tokens are the M rows of the MMAs and query heads the N columns,
// so that a group of 8 wastes nothing:
//   S^T [16 tokens, heads] = K Q^T,   O^T [D, heads] += V^T P^T.
// The maximum a weight is relative to moves only when a logit passes it by 8 (log2): until then neither a
// shuffle nor a rescaling is needed, and no weight exceeds 256.
//
// fp8 becomes fp16 on its way from shared memory to the MMAs, and so do the queries and the weights: fp16 holds
// every fp8 number, and its weights are finer than those of bf16. bf16 reaches further than fp16, so a query is
// brought to fp16's range by a power of two that its logits are multiplied by again.
// A register that ldmatrix fills has four neighbouring dimensions of a K row in place of two, or two of two V rows.
// So the dimensions of a step of 16 are multiplied in another order, which the query has in shared memory
// (load_query), and those of the output come in another (write_partial).
// Traffic: shared memory only.
#pragma once

#include "log2.cuh"
#include "ptx/barrier.h"
#include "ptx/math.h"
#include "ptx/matrix.h"
#include "stage.cuh"

namespace mac_attn::cuda {

constexpr int kNoHead = 0x7ffffffe;
constexpr float kMaxLead = 8.f;  // log2, see above

template <typename T>
constexpr bool kIsFp8 = std::is_same_v<T, fp8>;
// What the MMAs multiply where the cache holds T.
template <typename T>
using Factor = std::conditional_t<kIsFp8<T>, fp16, T>;

// Brings a query row's numbers of this lane to fp16's range; `scale` is multiplied by what undoes that. The whole
// warp takes part.
template <typename Q, int kPairs>
MAC_DEVICE void to_fp16(uint32_t (&pairs)[kPairs], float& scale) {
  if constexpr (std::is_same_v<Q, bf16>) {
    uint32_t high = 0;
    for (const uint32_t pair : pairs) {
      const uint32_t a = pair & 0x7fffu, b = pair >> 16 & 0x7fffu;
      high = a > high ? a : high, high = b > high ? b : high;
    }
    // The greatest becomes 2^8 at least, less than 2^9, so that what fp16 rounds off is 2^-32 of it. One that is
    // not finite stays what it is.
    constexpr int kWanted = 127 + 8;
    int exponent = static_cast<int>(ptx::reduce_max(high) >> 7);
    exponent = exponent == 255 ? kWanted : exponent < 9 ? 9 : exponent;
    const float factor = bits_float(static_cast<uint32_t>(127 + kWanted - exponent) << 23);
    scale *= bits_float(static_cast<uint32_t>(127 + exponent - kWanted) << 23);
    for (uint32_t& pair : pairs) {
      const float2 x = ptx::unpack2<bf16>(pair);
      pair = ptx::pack2<fp16>(x.x * factor, x.y * factor);
    }
  }
}

// One warp's running softmax over its tokens, where the cache holds T. A lane holds heads 2 (lane % 4) + {0, 1} of
// each block of eight, of O^T rows lane / 4 + {0, 8} of each 16.
template <typename T, int kHeadDim, int kHeadBlocks, bool kReplaced = false>
struct WarpState {
  static constexpr int kSteps = kHeadDim / 16;
  static constexpr int kQueryRow = kHeadDim + 8;  // elements in shared memory; padded against bank conflicts
  // There is no room for more blocks or the largest heads, nor for the query of a matched entry.
  static constexpr bool kQueryInRegisters = kHeadBlocks == 1 && kHeadDim <= 128 && !kReplaced;
  uint32_t q[kQueryInRegisters ? kSteps : 1][2];
  float out[kHeadBlocks][kSteps][4];
  float max[kHeadBlocks][2];
  float sum[kHeadBlocks][2];
  float light[kHeadBlocks][2];  // sum of a * weight over the anchors
  int anchors;                  // that the warp has read

  MAC_DEVICE void clear() {
    anchors = 0;
#pragma unroll
    for (int b = 0; b < kHeadBlocks; ++b) {
      for (int i = 0; i < 2; ++i) max[b][i] = -INFINITY, sum[b][i] = 0.f, light[b][i] = 0.f;
#pragma unroll
      for (int s = 0; s < kSteps; ++s) {
        for (int i = 0; i < 4; ++i) out[b][s][i] = 0.f;
      }
    }
  }

  // What the logits of a column are multiplied by, with fp8: it lies in the padding of the query's row.
  MAC_DEVICE static float* column_scale(Factor<T>* query, int column) {
    return reinterpret_cast<float*>(query + column * kQueryRow + kHeadDim);
  }
  MAC_DEVICE static float column_scale(const Factor<T>* query, int column) {
    return *reinterpret_cast<const float*>(query + column * kQueryRow + kHeadDim);
  }

  // Brings the queries of a pass to `shared`. `row_of`: where one lies, of `heads`, each of `elements`; `scale`: of
  // the logits, with fp8. The whole block takes part.
  template <typename RowOf>
  MAC_DEVICE void load_query(const RowOf& row_of, int heads, int elements, [[maybe_unused]] float scale,
                             Factor<T>* shared) {
    using Q = std::remove_const_t<std::remove_pointer_t<decltype(row_of(0))>>;
    constexpr int kPieces = kHeadDim / 8;
    const int lane = ptx::lane_id();
    if constexpr (kIsFp8<T>) {
      constexpr int kLanePieces = (kPieces + 31) / 32;  // a row is a warp's
#pragma unroll 1
      for (int g = threadIdx.x / 32; g < 8 * kHeadBlocks; g += kWarps) {
        uint32_t pairs[4 * kLanePieces];
#pragma unroll
        for (int i = 0; i < kLanePieces; ++i) {
          const int d = (lane + 32 * i) * 8;
          const uint4 data = g < heads && d < elements ? ptx::load_16(row_of(g) + d) : uint4{0, 0, 0, 0};
          pairs[4 * i] = data.x, pairs[4 * i + 1] = data.y, pairs[4 * i + 2] = data.z, pairs[4 * i + 3] = data.w;
        }
        float logit_scale = scale;
        to_fp16<Q>(pairs, logit_scale);
#pragma unroll
        for (int i = 0; i < kLanePieces; ++i) {
          const int piece = lane + 32 * i, d = piece * 8;
          // Dimensions 4 c + 2 b + {0, 1} of 16 go to 8 b + 2 c + {0, 1}.
          Factor<T>* to = shared + g * kQueryRow + d / 16 * 16 + d % 16 / 2;
          if (piece >= kPieces) continue;
          ptx::store_8(to, {pairs[4 * i], pairs[4 * i + 2]});
          ptx::store_8(to + 8, {pairs[4 * i + 1], pairs[4 * i + 3]});
        }
        if (lane == 0) *column_scale(shared, g) = logit_scale;
      }
    } else {
#pragma unroll 1
      for (int i = threadIdx.x; i < 8 * kHeadBlocks * kPieces; i += kThreads) {
        const int g = i / kPieces, d = i % kPieces * 8;
        const uint4 data = g < heads && d < elements ? ptx::load_16(row_of(g) + d) : uint4{0, 0, 0, 0};
        ptx::store_16(shared + g * kQueryRow + d, data);
      }
    }
    ptx::sync_block();
    if constexpr (kQueryInRegisters) {
#pragma unroll
      for (int s = 0; s < kSteps; ++s) {
        for (int i = 0; i < 2; ++i)
          q[s][i] = ptx::load_4(shared + lane / 4 * kQueryRow + s * 16 + i * 8 + lane % 4 * 2);
      }
    }
  }
};

// Brings to shared memory which tokens the queries of a pass attend to: those from `starts` on, kNoHead for a
// column without a query, up to their own, `lasts`. The block's barrier has to follow.
template <int kHeadBlocks>
MAC_DEVICE void load_bounds(const AmendParams& p, const AmendWorkspace& w, const Piece& piece, int* starts,
                            int* lasts) {
  const int column = threadIdx.x, i = piece.first_query(p, w) + column;
  if (column >= 8 * kHeadBlocks) return;
  const int last = piece.work.position + w.group_size.divide(i) - piece.work.token;
  const bool there = column < piece.num_queries(w) && last < piece.work.seq_len;
  const int32_t* source = p.matched.source + int64_t{piece.kv_group(p)} * p.shape.group_queries();
  starts[column] = !there ? kNoHead : p.matched.source ? amend_start(p, source[i]) : 0;
  lasts[column] = last;
}

// Takes out the logits of tokens behind a query's own.
template <int kHeadBlocks>
MAC_DEVICE void mask_later(const int* lasts, int first_token, float (&x)[kHeadBlocks][4]) {
#pragma unroll
  for (int b = 0; b < kHeadBlocks; ++b) {
    for (int i = 0; i < 4; ++i) {
      const int token = first_token + ptx::lane_id() / 4 + i / 2 * 8;
      if (token > lasts[b * 8 + ptx::lane_id() % 4 * 2 + i % 2]) x[b][i] = -INFINITY;
    }
  }
}

// Logits of the warp's 16 tokens, log2, masked by the bits of `valid`: x[b][0, 1] token lane / 4, x[b][2, 3] token
// lane / 4 + 8.
template <typename T, int kHeadDim, int kHeadBlocks, bool kReplaced>
MAC_DEVICE void warp_logits(const AmendParams& p, const WarpState<T, kHeadDim, kHeadBlocks, kReplaced>& state,
                            const int* starts, const T* stage, const Factor<T>* query, int first_token,
                            uint32_t valid, float (&x)[kHeadBlocks][4]) {
  using Stage = Stage<kHeadDim, T>;
  constexpr int kSteps = kHeadDim / 16;
  const int lane = ptx::lane_id();
  // Two chains of MMAs hide their latency; two blocks of heads are two chains already.
  constexpr int kPairs = kHeadBlocks > 2 ? kHeadBlocks / 2 : 1;  // of blocks, that one ldmatrix reads
  float sum[2 * kPairs][4] = {};
  const T* row = stage + (lane % 8 + lane / 8 % 2 * 8) * Stage::kRow;
  // The upper lanes read the second block of a pair, of one block the step after.
  const Factor<T>* query_row =
      query + (lane % 8 + (kHeadBlocks > 1 ? lane / 16 * 8 : 0)) * state.kQueryRow + lane / 8 % 2 * 8;
  uint32_t q[kPairs][4];
  [[maybe_unused]] uint32_t bytes[4];  // of this step and the next, of an odd last one twice the same
#pragma unroll
  for (int s = 0; s < kSteps; ++s) {
    uint32_t k[4];
    if constexpr (kIsFp8<T>) {
      if (s % 2 == 0) ptx::ldmatrix_x4(bytes, row + Stage::place(lane, s + (s + 1 < kSteps ? lane / 16 : 0)));
      const uint2 low = ptx::fp8_to_fp16(bytes[s % 2 * 2]), high = ptx::fp8_to_fp16(bytes[s % 2 * 2 + 1]);
      k[0] = low.x, k[1] = high.x, k[2] = low.y, k[3] = high.y;
    } else {
      ptx::ldmatrix_x4(k, row + Stage::place(lane, 2 * s + lane / 16));
    }
    if constexpr (state.kQueryInRegisters) {
      q[0][0] = state.q[s][0], q[0][1] = state.q[s][1];
    } else if (kHeadBlocks > 1) {
#pragma unroll
      for (int i = 0; i < kPairs; ++i) ptx::ldmatrix_x4(q[i], query_row + i * 16 * state.kQueryRow + s * 16);
    } else if (s % 2 == 0) {
      ptx::ldmatrix_x4(q[0], query_row + (s + (s + 1 < kSteps ? lane / 16 : 0)) * 16);
    } else {
      q[0][0] = q[0][2], q[0][1] = q[0][3];
    }
#pragma unroll
    for (int b = 0; b < kHeadBlocks; ++b) {
      ptx::mma_m16n8k16<Factor<T>>(sum[kHeadBlocks == 1 ? s % 2 : b], k, q[b / 2][b % 2 * 2],
                                   q[b / 2][b % 2 * 2 + 1]);
    }
  }
  const auto scaled = [&](int b, int i) {
    const float scale = kIsFp8<T> ? state.column_scale(query, b * 8 + lane % 4 * 2 + i % 2) : p.sm_scale;
    return (kHeadBlocks == 1 ? sum[0][i] + sum[1][i] : sum[b][i]) * scale;
  };
  const auto capped = [&](float logit) { return p.logits_soft_cap * ptx::tanh(logit / p.logits_soft_cap); };
  const auto masked = [&](int b, int i, float logit) {
    const int row = lane / 4 + i / 2 * 8;
    const bool counts = (valid >> row & 1u) && first_token + row >= starts[b * 8 + lane % 4 * 2 + i % 2];
    return counts ? logit * kLog2E : -INFINITY;
  };
  const bool caps = p.logits_soft_cap > 0.f;
  if constexpr (kHeadBlocks == 1 && kHeadDim <= 128) {
    for (int i = 0; i < 4; ++i) {
      const float logit = scaled(0, i);
      x[0][i] = masked(0, i, caps ? capped(logit) : logit);
    }
    return;
  }
  // A branch for all of them: with one for each, each waits for its own start. A single block's are so few that
  // this costs more than it saves (bench/README.md); with the largest heads it saves registers.
#pragma unroll
  for (int b = 0; b < kHeadBlocks; ++b) {
    for (int i = 0; i < 4; ++i) x[b][i] = scaled(b, i);
  }
  if (caps) {
#pragma unroll
    for (int b = 0; b < kHeadBlocks; ++b) {
      for (int i = 0; i < 4; ++i) x[b][i] = capped(x[b][i]);
    }
  }
#pragma unroll
  for (int b = 0; b < kHeadBlocks; ++b) {
    for (int i = 0; i < 4; ++i) x[b][i] = masked(b, i, x[b][i]);
  }
}

template <typename T, int kHeadDim, int kHeadBlocks, bool kReplaced>
MAC_DEVICE void raise_max(WarpState<T, kHeadDim, kHeadBlocks, kReplaced>& state, const float (&x)[kHeadBlocks][4]) {
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
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      for (int distance = 4; distance < 32; distance *= 2) {
        high[b][i] = fmaxf(high[b][i], ptx::shfl_xor(high[b][i], distance));
      }
      const float max = fmaxf(state.max[b][i], high[b][i]);
      const float rescale = max == state.max[b][i] ? 1.f : ptx::ex2(state.max[b][i] - max);
      state.max[b][i] = max;
      state.sum[b][i] *= rescale, state.light[b][i] *= rescale;
#pragma unroll
      for (int s = 0; s < kHeadDim / 16; ++s) state.out[b][s][i] *= rescale, state.out[b][s][2 + i] *= rescale;
    }
  }
}

// What a weight stands for besides its own token, of the lane's two of a strip of anchors: those are counted more
// than once, so that a is as much less.
struct Counted {
  float lift[2];   // log2 of how many tokens it is counted as
  float light[2];  // a over that
};

template <int kHeadBlocks>
MAC_DEVICE void lift(float (&x)[kHeadBlocks][4], const Counted& counted) {
#pragma unroll
  for (int b = 0; b < kHeadBlocks; ++b) {
    for (int i = 0; i < 4; ++i) x[b][i] += counted.lift[i / 2];
  }
}

// Adds the sums of a * weight.
template <typename T, int kHeadDim, int kHeadBlocks, bool kReplaced>
MAC_DEVICE void add_light(WarpState<T, kHeadDim, kHeadBlocks, kReplaced>& state, const float (&x)[kHeadBlocks][4],
                          const Counted& counted) {
#pragma unroll
  for (int b = 0; b < kHeadBlocks; ++b) {
    for (int i = 0; i < 4; ++i) {
      state.light[b][i % 2] += counted.light[i / 2] * ptx::ex2(x[b][i] - finite_or_zero(state.max[b][i % 2]));
    }
  }
}

template <typename T, int kHeadDim, int kHeadBlocks, bool kReplaced>
MAC_DEVICE void add_values(WarpState<T, kHeadDim, kHeadBlocks, kReplaced>& state, const float (&x)[kHeadBlocks][4],
                           const T* stage) {
  using Stage = Stage<kHeadDim, T>;
  constexpr int kSteps = kHeadDim / 16;
  const int lane = ptx::lane_id();
  uint32_t weights[kHeadBlocks][2];
#pragma unroll
  for (int b = 0; b < kHeadBlocks; ++b) {
    for (int half = 0; half < 2; ++half) {
      float weight[2];
      for (int i = 0; i < 2; ++i) weight[i] = ptx::ex2(x[b][2 * half + i] - finite_or_zero(state.max[b][i]));
      const uint32_t pair = ptx::pack2<Factor<T>>(weight[0], weight[1]);
      // Sum what the MMA multiplies by, so that numerator and denominator are rounded alike.
      const float2 rounded = ptx::unpack2<Factor<T>>(pair);
      state.sum[b][0] += rounded.x;
      state.sum[b][1] += rounded.y;
      weights[b][half] = ptx::movmatrix_trans(pair);
    }
  }
  const T* row = stage + (kWarpTokens + lane / 16 * 8 + lane % 8) * Stage::kRow;
  [[maybe_unused]] uint32_t bytes[4];
#pragma unroll
  for (int s = 0; s < kSteps; ++s) {
    uint32_t v[4];
    if constexpr (kIsFp8<T>) {
      // Of two dimensions the first is a row of the upper half of the product, the second of the lower.
      if (s % 2 == 0) {
        ptx::ldmatrix_x4_trans(bytes, row + Stage::place(lane, s + (s + 1 < kSteps ? lane / 8 % 2 : 0)));
      }
      const uint2 low = ptx::fp8_to_fp16(ptx::swap_middle_bytes(bytes[s % 2]));
      const uint2 high = ptx::fp8_to_fp16(ptx::swap_middle_bytes(bytes[s % 2 + 2]));
      v[0] = low.x, v[1] = low.y, v[2] = high.x, v[3] = high.y;
    } else {
      ptx::ldmatrix_x4_trans(v, row + Stage::place(lane, 2 * s + lane / 8 % 2));
    }
#pragma unroll
    for (int b = 0; b < kHeadBlocks; ++b) {
      ptx::mma_m16n8k16<Factor<T>>(state.out[b][s], v, weights[b][0], weights[b][1]);
    }
  }
}

}  // namespace mac_attn::cuda
