// The CUDA kernels for a caller without nvcc: what they need and how they are launched.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "../params.h"

namespace mac_attn::cuda {

// Elements of a row in shared memory, in registers and in partial states. The kernels are compiled for six sizes;
// any other multiple of 8 is filled up with zeros to 128 or 256, and so is one with shorter values, see
// head_dim.cuh.
constexpr int32_t padded_head_dim(const Shape& shape) {
  const int32_t D = shape.head_dim;
  const bool compiled = shape.head_dim_v == D && (D == 64 || D == 80 || D == 96);
  return compiled ? D : D <= 128 ? 128 : D <= 256 ? 256 : 512;
}
// Whether rows are as long in global memory.
constexpr bool is_exact(const Shape& shape) {
  return shape.head_dim_v == shape.head_dim && padded_head_dim(shape) == shape.head_dim;
}
// Keys for which there are kernels with shorter values.
constexpr int32_t kMostOfShorterValues = 256;

// Queries of a KV head that one pass over the tokens serves: as many as there are registers for their sums.
constexpr int32_t most_tile_heads(int32_t head_dim) {
  return head_dim <= 128 ? 32 : head_dim <= 256 ? 16 : 8;
}
// Query heads of a KV head that anchors are possible with.
constexpr int32_t most_replaced_heads(int32_t head_dim) {
  return head_dim <= 128 ? 16 : 8;
}
// The largest heads leave no registers for a second state, of the matched entry's query. The anchors' tiles then
// come twice: as old ones for that query, and again for the new one.
constexpr bool anchors_twice(int32_t head_dim) {
  return head_dim > 256;
}
constexpr int32_t kMaxWaves = 8;     // pieces for each CTA
constexpr int32_t kWarpTokens = 16;  // tokens that a warp attends to at a time: a strip
// What a block of amend takes of shared memory with heads of more than 128, at least; GPUs of compute
// capability 8.6, 8.9 and 12.x have 99 KiB, the others as much as the largest heads take.
constexpr int32_t kSharedOfLargeHeads = 112 * 1024;
constexpr int32_t kMaxAnchors = 2048;
constexpr int32_t kMaxGroup = 128;
// Query heads of a KV head, at most: match has all of their queries as floats in shared memory.
constexpr int32_t max_group(int32_t head_dim) {
  return head_dim <= 256 ? kMaxGroup : kMaxGroup / 2;
}
constexpr int32_t kMaxUnrotateHeads = 65535 / 4;  // up to four CTAs each, all of a token the grid's y
constexpr int32_t kMaxCluster = 8;  // CTAs; more are not portable (CUDA Programming Guide, thread block clusters)

// Bits of a request's status and of the sticky error flag; mac_attn/cache.py reads them.
enum Error : int32_t { kBadLength = 1, kBadPage = 2, kBadSlot = 4 };

// Division of numbers in [0, 2^31) by one that the device does not know at compile time: n / d is n m / 2^shift
// with m = ceil(2^shift / d), as long as 2^(shift - 31) >= d (Granlund and Montgomery, PLDI 1994).
struct Divisor {
  uint32_t multiplier = 0;
  int32_t shift = 0;
  Divisor() = default;
  explicit Divisor(int32_t d) : shift(31) {
    while ((int64_t{1} << (shift - 31)) < d) ++shift;
    multiplier = static_cast<uint32_t>(((uint64_t{1} << shift) + d - 1) / d);
  }
  constexpr int32_t divide(int32_t n) const {
    return static_cast<int32_t>(static_cast<uint64_t>(n) * multiplier >> shift);
  }
};

// Device memory of one match call. `best` and `done` are zero before the launch and after it, and not used where
// the CTAs of a KV head are a cluster.
struct MatchWorkspace {
  unsigned long long* best;  // [B, H, T, G]
  int32_t* done;             // [B, H] CTAs that have left the KV head
  int32_t* status;           // [B] Error bits, written for every request
  int32_t* error_flag;       // [1] sticky, or null
  int32_t splits;            // CTAs for each query token of a KV head, see match_splits
  int32_t cluster;           // CTAs of a cluster: `splits`, or 1
};

// A token whose key exceeds tau.
struct alignas(8) Candidate {
  int32_t token;
  float lead;  // log2 of its weight by tau
};
static_assert(sizeof(Candidate) == kCandidateBytes, "as there is room for");

// Which units of a call a launch of amend does, see KvHeadWork.
enum class Serves : int32_t { kAll, kMisses, kHits };

// Device memory of one amend call. `done`, `sampled` and `drawn` are zero before the launch and after it.
struct AmendWorkspace {
  int32_t* done;        // [B, H, unit_tokens] pieces whose partial states are there
  int32_t* sampled;     // [B, H] candidates, those without room too
  int32_t* drawn;       // [1] pieces that CTAs have drawn
  int32_t* status;      // [B] Error bits
  int32_t* error_flag;  // [1] sticky, or null
  float* partial_out;   // [max_pieces, kNumSpans, tile_heads, padded D] sum of weight * value
  float* partial_sums;  // [.., kNumSpans, tile_heads, 4] max (log2), sums of weight and of a * weight, anchors read
  Candidate* candidate;                  // [B, H, kCandidateRoom * S] in no order; null if S = 0
  uint32_t k_page_units, k_token_units;  // strides in 16 bytes
  uint32_t v_page_units, v_token_units;
  Divisor page_size;
  Divisor num_kv_heads, ctas, group_size, unit_tokens;
  int64_t max_tokens;  // max_pages * page_size
  Serves serves;
  int32_t num_units;     // B H unit_tokens: with reuse each query token may have work of its own, see KvHeadWork
  int32_t tile_heads;    // queries of a pass, at most: min(T G, most_tile_heads)
  int32_t head_tiles;    // passes over all queries of a KV head: ceil(T G / tile_heads)
  int32_t token_passes;  // over those of one token: ceil(G / tile_heads)
  int32_t pieces_alone;  // 0, or how many a pass is cut into at most, whatever else there is: see most_tiles
};

struct CompleteWorkspace {
  const int32_t* status;  // [B] Error bits of match and amend, null in exact mode
  Divisor group_size;
};

// Fills in the CTAs for each KV head of the current device's match launch: as many as it keeps busy.
cudaError_t match_splits(const MatchParams& params, MatchWorkspace& workspace);

// Pieces of one pass: with more, merging their states costs more than they save.
constexpr int32_t kMaxSplits = 96;

// Tokens of a piece that is worth its state, where pieces do not hang on the rest of the call.
constexpr int32_t kPieceTokensAlone = 1024;

// Fills in what follows from the parameters: how the pages and the heads are cut up. False: a cache is too large.
inline bool describe(const AmendParams& params, int32_t ctas, AmendWorkspace& w) {
  const KVPages& kv = params.kv;
  const int64_t unit = kv.float8 ? 16 : 8;  // elements of 16 bytes
  const auto fits = [&](int64_t page_stride, int64_t token_stride) {
    return kv.num_pages * (page_stride / unit) + kv.page_size * (token_stride / unit) <= int64_t{UINT32_MAX};
  };
  w.k_page_units = static_cast<uint32_t>(kv.k_page_stride / unit);
  w.v_page_units = static_cast<uint32_t>(kv.v_page_stride / unit);
  w.k_token_units = static_cast<uint32_t>(kv.k_token_stride / unit);
  w.v_token_units = static_cast<uint32_t>(kv.v_token_stride / unit);
  w.page_size = Divisor(kv.page_size);
  w.num_kv_heads = Divisor(params.shape.num_kv_heads);
  w.ctas = Divisor(ctas);
  w.max_tokens = int64_t{kv.max_pages} * kv.page_size;
  const int32_t queries = params.shape.group_queries(), most = most_tile_heads(params.shape.head_dim);
  w.tile_heads = queries < most ? queries : most;
  w.head_tiles = (queries + most - 1) / most;
  w.group_size = Divisor(params.shape.group_size);
  const int32_t unit_tokens = params.matched.source ? params.shape.tokens : 1;
  w.unit_tokens = Divisor(unit_tokens);
  w.num_units = params.shape.batch * params.shape.num_kv_heads * unit_tokens;
  w.token_passes = (params.shape.group_size + most - 1) / most;
  // As many as keep the device busy with the passes of one request, and no more than the longest can have, so that
  // little memory is asked for where lengths are short.
  const int64_t busy =
      (ctas + params.shape.num_kv_heads * w.head_tiles - 1) / (params.shape.num_kv_heads * w.head_tiles);
  const int64_t longest = w.max_tokens / kPieceTokensAlone + 2;  // its spans are rounded up
  const int64_t alone = busy < longest ? busy : longest;
  w.pieces_alone = !params.batch_invariant ? 0 : static_cast<int32_t>(alone < kMaxSplits ? alone : kMaxSplits);
  return fits(kv.k_page_stride, kv.k_token_stride) && fits(kv.v_page_stride, kv.v_token_stride);
}

// Passes that an amend call may have.
constexpr int64_t max_passes(const AmendParams& params, const AmendWorkspace& w) {
  const int64_t all = int64_t{params.shape.batch} * params.shape.num_kv_heads * w.head_tiles;
  const int64_t apart = int64_t{w.num_units} * w.token_passes;
  return all > apart ? all : apart;
}
// Pieces that it may be cut into, see most_tiles.
constexpr int64_t max_pieces(const AmendParams& params, const AmendWorkspace& w, int32_t ctas) {
  const int64_t passes = max_passes(params, w);
  return w.pieces_alone > 0 ? passes * w.pieces_alone : static_cast<int64_t>(kMaxWaves) * ctas + passes;
}

// CTAs of the persistent amend grid on the current device.
cudaError_t amend_ctas(const AmendParams& params, int32_t* ctas);

cudaError_t launch_unrotate(const UnrotateParams& params, cudaStream_t stream);
cudaError_t launch_match(const MatchParams& params, const MatchWorkspace& workspace, cudaStream_t stream);
cudaError_t launch_amend(const AmendParams& params, const AmendWorkspace& workspace, int32_t ctas,
                         cudaStream_t stream);
cudaError_t launch_complete(const CompleteParams& params, const CompleteWorkspace& workspace, cudaStream_t stream);

}  // namespace mac_attn::cuda
